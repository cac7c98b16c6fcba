"""Privacy over the network: the bytes and the account of the process, and nothing more on the wire."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm_sdk as edgellm
from edgellm_sdk.random import Stream
from edgellm_sdk.steps import Outcome
from edgellm_sdk.steps.audit import wire_of
from edgellm_sdk.steps.federation import join, keys, serve
from edgellm_sdk.types import Array

if importlib.util.find_spec("flwr") is None:
    pytest.skip("Flower is not installed", allow_module_level=True)

from loopback import Aside, free_port  # noqa: E402

ROUNDS, CLIENTS = 2, 3
OPTIONS = {"rank": 2, "batch_size": 4, "steps": 1, "layers": 1, "max_length": 64}
DP = {"noise_multiplier": 4.0, "clip": 0.5}
RECIPE = """seed = 5
[[step]]
verb = "finetune"
plugin = "lora"
around = "{around}"
model = {model}
clients = {clients}
rounds = {rounds}
watch = 0
[step.options]
{options}
{tables}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "messages.jsonl"
    texts = [("win a prize now", "spam"), ("mum is home", "ham"), ("call this number", "spam"), ("at six", "ham")]
    rows = [{"text": f"{text} {i}", "label": label} for i in range(12) for text, label in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def both(
    around: str, tables: Mapping[str, Any], model: Path, data: Path, folder: Path
) -> tuple[Outcome, Outcome, list[Outcome]]:
    """(in process, served, joined)."""
    here = edgellm.finetune(
        "lora", str(model), str(data), folder / "process", clients=CLIENTS, rounds=ROUNDS, seed=5, watch=0,
        around=around, options={**OPTIONS, **tables},
    )  # fmt: skip
    lines = "\n".join(f"{name} = {value}" for name, value in OPTIONS.items())
    told = "".join(
        f"[step.options.{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
        for name, table in tables.items()
    )
    (folder / "recipe.toml").write_text(
        RECIPE.format(
            around=around, model=json.dumps(str(model)), clients=CLIENTS, rounds=ROUNDS, options=lines, tables=told
        )
    )
    keys(folder / "keys", clients=CLIENTS)
    port = free_port()
    server = Aside(serve, folder / "recipe.toml", folder / "server", address=f"127.0.0.1:{port}",
                   keys=folder / "keys" / "server", wait=60.0)  # fmt: skip
    guests = [
        Aside(
            join,
            f"127.0.0.1:{port}",
            str(data),
            folder / f"client-{i}",
            shard=f"{i}/{CLIENTS}",
            model=str(model),
            keys=folder / "keys" / "clients" / f"client-00{i}",
        )  # fmt: skip
        for i in range(CLIENTS)
    ]
    return here, server.result(), [guest.result() for guest in guests]


def weights(outcome: Outcome) -> bytes:
    return (outcome.folder / "model" / "adapter_model.safetensors").read_bytes()


def test_dp_accounts_the_same_epsilon_and_gives_the_same_bytes(
    tiny_llama: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the operating system's entropy exchanged for a stream that is known, which begins anew in each run."""
    pytest.importorskip("dp_accounting")
    from edgellm_plugins.privacy.dp import method

    drawn: dict[str, int] = {}
    honest = method.released

    def released(state: Any, updates: Any, config: Any, ctx: Any) -> Any:
        def normal(count: int) -> Array:
            place = drawn[ctx.folder.name] = drawn.get(ctx.folder.name, 0) + 1
            return Stream(99, "entropy", place).normal(count).astype(np.float64)

        monkeypatch.setattr(method, "normal", normal)
        return honest(state, updates, config, ctx)

    monkeypatch.setattr(method, "released", released)
    here, served, joined = both("dp", {"dp": DP}, tiny_llama, data, tmp_path)
    assert drawn["process"] == drawn["server"] > ROUNDS and set(drawn) == {"process", "server"}
    assert weights(here) == weights(served)
    assert all(weights(outcome) == weights(served) for outcome in joined)
    for name in ("epsilon", "rounds", "steps"):
        assert here.report.metrics[name] == served.report.metrics[name]
    assert here.report.privacy == served.report.privacy and served.report.privacy is not None
    assert here.report.curves["epsilon over rounds"] == served.report.curves["epsilon over rounds"]
    account = [(outcome.folder / "privacy.jsonl").read_bytes() for outcome in (here, served)]
    assert account[0] == account[1] and account[0].count(b"\n") == ROUNDS
    for outcome in joined:
        assert [m["kind"] for m in wire_of(outcome.folder)["messages"]] == ["enrolled", *["update"] * ROUNDS]


def test_secagg_gives_the_same_bytes_and_the_server_no_single_update(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    here, served, joined = both("secagg", {}, tiny_llama, data, tmp_path)
    assert weights(here) == weights(served)
    assert all(weights(outcome) == weights(served) for outcome in joined)
    assert served.report.privacy == here.report.privacy
    for outcome in joined:
        messages = wire_of(outcome.folder)["messages"]
        assert {message["kind"] for message in messages} == {"enrolled", "update"}
        sent = [array["dtype"] for message in messages[1:] for array in message["arrays"]]
        assert sent and set(sent) <= {"uint8", "uint32"}  # keys, sealed shares, masked vectors
