"""The engine's own quantiser, `llama_model_quantize`, in a child process: an assertion in it becomes one line.

    python -m edgellm_hardware.llama_cpp.quantiser < request.json

The importance matrix and overrides of single tensors' types are handed over in memory, as llama.cpp's quantize tool
does it, and what that tool writes about the matrix (`quantize.imatrix.*`) is written here too.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk.errors import DeviceError, ModelError, printable

if TYPE_CHECKING:
    from edgellm_plugins.export.imatrix import Imatrix

# What `--type` calls a mix of the engine's, and its number (llama_ftype).
MIXES: Mapping[str, int] = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13,
    "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "iq2_xxs": 19, "iq2_xs": 20, "q2_k_s": 21,
    "iq3_xs": 22, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq3_m": 27, "iq2_s": 28, "iq2_m": 29,
    "iq4_xs": 30, "iq1_m": 31, "tq1_0": 36, "tq2_0": 37,
}  # fmt: skip
NEED_IMATRIX = ("iq2_xxs", "iq2_xs", "iq2_s", "iq1_s", "iq1_m", "q2_k_s")


def quantise(
    source: Path, target: Path, mix: str, imatrix: Imatrix | None, overrides: Sequence[tuple[str, int]], threads: int
) -> None:
    """Write `source` (a float GGUF) as `mix` to `target`. `overrides` are (regex for tensor names, ggml type id).

    DeviceError when llama-cpp-python is missing or too old for what is asked, ModelError when the engine refuses.
    """
    if find_spec("llama_cpp") is None:
        raise DeviceError(f"{mix} is made by llama.cpp, which is not installed", fix="pip install 'edgellm-sdk[llama]'")
    from edgellm_hardware.llama_cpp.child import environment

    request = {
        "source": str(source), "target": str(target), "ftype": MIXES[mix], "threads": threads,
        "imatrix": None if imatrix is None else str(imatrix.path), "overrides": [list(row) for row in overrides],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "edgellm_hardware.llama_cpp.quantiser"],
        input=json.dumps(request), capture_output=True, text=True, errors="replace", env=environment(), check=False,
    )  # fmt: skip
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if "error" in line.lower() or "fail" in line.lower() or "assert" in line.lower()]
        cause = printable((told or lines or ["no reason given"])[0])[:160]
        raise ModelError(f"llama.cpp cannot quantise it to {mix}: {cause}", str(target))


def _work(request: Mapping[str, Any]) -> int:
    from edgellm_plugins.export.imatrix import read
    from llama_cpp import llama_cpp as lib

    params = lib.llama_model_quantize_default_params()
    if not hasattr(lib, "llama_model_imatrix_data") and (request["imatrix"] or request["overrides"]):
        sys.stderr.write("error: this llama-cpp-python cannot be handed an importance matrix; 0.3.20 can\n")
        return 1
    params.nthread, params.ftype = request["threads"], request["ftype"]
    kept: list[Any] = []  # what the structures point to
    if request["imatrix"]:
        found = read(Path(request["imatrix"]))
        rows = (lib.llama_model_imatrix_data * (len(found.entries) + 1))()
        for row, (name, entry) in zip(rows, found.entries.items(), strict=False):
            values = entry.mean_squares()
            kept.append(values)
            row.name, row.size = name.encode(), values.size
            row.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = rows
        notes: dict[str, str | int] = {
            "quantize.imatrix.file": found.path.name, "quantize.imatrix.dataset": found.datasets[0],
            "quantize.imatrix.entries_count": len(found.entries), "quantize.imatrix.chunks_count": found.chunks,
        }  # fmt: skip
        pairs = (lib.llama_model_kv_override * (len(notes) + 1))()
        for pair, (key, value) in zip(pairs, notes.items(), strict=False):
            pair.key = key.encode()
            if isinstance(value, str):
                pair.tag, pair.value.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()[:127]
            else:
                pair.tag, pair.value.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
        params.kv_overrides = pairs
        kept += [rows, pairs]
    if request["overrides"]:
        types = (lib.llama_model_tensor_override * (len(request["overrides"]) + 1))()
        for place, (pattern, kind) in enumerate(request["overrides"]):
            types[place].pattern, types[place].type = pattern.encode(), kind
        params.tt_overrides = types
        kept.append(types)
    return int(
        lib.llama_model_quantize(request["source"].encode(), request["target"].encode(), ctypes.byref(params)) != 0
    )


if __name__ == "__main__":
    sys.exit(_work(json.load(sys.stdin)))
