"""What left a client, decoded: every message, every array in it, every scalar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgellm_sdk import store, wire
from edgellm_sdk.errors import DataError, ModelError
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.sent import FOLDER, rows


def wire_of(folder: str | Path) -> dict[str, Any]:
    """The messages of a run folder, in order. DataError when it recorded none, or a file was changed since.

    {"messages": [{..., "arrays": [...], "scalars": {...}}], "bytes", "clients": {name: bytes}, "source"}. A server
    or a run in process that did not keep its updates has the sizes alone, from its ledger.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError("is no run folder", str(path))
    messages = [_decoded(path, row) for row in rows(path)]
    source = "the messages themselves"
    if not messages:
        messages = [
            {"round": row["round"], "kind": "update", "client": row["client"], "bytes": row["up"], "kept": False}
            for row in Ledger(path / "ledger.jsonl").rows()
            if row["up"]
        ]
        source = "the server's ledger, which has sizes alone (--keep-wire keeps the messages)"
    if not messages:
        raise DataError("recorded nothing that was sent", str(path), "give the folder of a join or a finetune")
    clients: dict[str, int] = {}
    for message in messages:
        clients[message["client"]] = clients.get(message["client"], 0) + message["bytes"]
    return {"messages": messages, "bytes": sum(clients.values()), "clients": clients, "source": source}


def _decoded(folder: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """One message with what its bytes hold; without, when they are no longer kept."""
    path = folder / FOLDER / str(row["file"])
    if Path(row["file"]).name != row["file"]:
        raise DataError("names a file outside of its folder", str(folder / FOLDER))
    if not path.is_file():
        return {**row, "kept": False}
    if store.digest_file(path) != row["sha256"]:
        raise DataError("is not what was sent: it was changed since", str(path))
    raw = path.read_bytes()
    if row["kind"] != "update":
        return {**row, "kept": True, "says": _text(raw)}
    try:
        arrays, scalars = wire.unpack(raw, str(path))
    except ModelError as error:
        return {**row, "kept": True, "says": error.what}
    return {**row, "kept": True, "arrays": [_array(name, arrays[name]) for name in sorted(arrays)], "scalars": scalars}


def _text(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw[:1000].decode(errors="replace")


def _array(name: str, array: Any) -> dict[str, Any]:
    """Shape, dtype, bytes, and for numbers min, max and the Euclidean norm."""
    import numpy as np

    about: dict[str, Any] = {
        "name": name, "shape": list(array.shape), "dtype": str(array.dtype), "bytes": array.nbytes,
    }  # fmt: skip
    if array.size and array.dtype.kind in "iuf":
        values = array.astype(np.float64)
        finite = bool(np.isfinite(values).all())
        about |= {"min": float(values.min()), "max": float(values.max()), "norm": float(np.linalg.norm(values))}
        about = about if finite else {**about, "min": None, "max": None, "norm": None}
    return about
