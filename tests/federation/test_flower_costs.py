"""What turns cost clients, told over the network: in the ledger and the report, beside what was foretold."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from edgellm_sdk.context import Cost
from edgellm_sdk.federate import told
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.steps.audit import wire_of
from edgellm_sdk.steps.federation import join, keys, serve

if importlib.util.find_spec("flwr") is None:
    pytest.skip("Flower is not installed", allow_module_level=True)

from loopback import Aside, free_port  # noqa: E402

ROUNDS = 2
RECIPE = """[[step]]
verb = "finetune"
plugin = "lora"
around = "fit"
model = {model}
clients = 2
rounds = {rounds}
watch = 0
options = {{ rank = 2, batch_size = 4, steps = 2, max_length = 32 }}
"""


def test_costs_stand_beside_what_was_foretold_and_are_those_the_clients_told(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"text": f"see you at {k}", "label": ("a", "b")[k % 2]} for k in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(model=json.dumps(str(tiny_llama)), rounds=ROUNDS))
    keys(tmp_path / "keys", clients=2)
    port = free_port()
    server = Aside(serve, tmp_path / "recipe.toml", tmp_path / "server", address=f"127.0.0.1:{port}",
                   keys=tmp_path / "keys" / "server", wait=60.0)  # fmt: skip
    guests = [
        Aside(
            join,
            f"127.0.0.1:{port}",
            str(tmp_path / "data.jsonl"),
            tmp_path / f"client-{i}",
            shard=f"{i}/2",
            model=str(tiny_llama),
            keys=tmp_path / "keys" / "clients" / f"client-00{i}",
            memory=900 - 600 * i,
        )  # fmt: skip
        for i in range(2)
    ]
    report = server.result().report
    for guest in guests:
        guest.result()
    lines = Ledger(tmp_path / "server" / "ledger.jsonl").rows()
    for i in range(2):
        client = f"client-00{i}"
        said = [m["says"] for m in wire_of(tmp_path / f"client-{i}")["messages"] if m["kind"] == "cost"]
        mine = [line for line in lines if line["client"] == client and "kind" not in line]
        assert [{"peak": line["peak"], "seconds": line["took"]} for line in mine] == said and len(said) == ROUNDS
        assert all(line["peak"] > 50_000_000 and line["took"] > 0 for line in mine)
        assert all(line["foretold_peak"] > 330_000_000 and line["foretold_took"] > 0 for line in mine)
    costs = {row["client"]: row for row in report.federation["costs"]}
    assert set(costs) == {"client-000", "client-001"}
    assert all(row["peak"] and row["took"] and row["foretold_peak"] for row in costs.values())
    page = (tmp_path / "server" / "report.html").read_text()
    assert "What turns cost" in page and "foretold" in page
    assert any("client-001 has 315 MB, one example takes" in note for note in report.notes)  # its --memory


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[]", b'{"peak":1}', b'{"peak":1,"seconds":1,"name":"x"}', b'{"peak":-1,"seconds":1}',
        b'{"peak":1.5,"seconds":1}', b'{"peak":true,"seconds":1}', b'{"peak":1,"seconds":-0.5}',
        b'{"peak":1,"seconds":1e300}', b'{"peak":1,"seconds":NaN}', b'{"peak":"1","seconds":1}', b"\xff\xfe",
        b'{"peak":99999999999999999999,"seconds":1}',
    ],
)  # fmt: skip
def test_what_is_no_cost_is_left_out(raw: bytes) -> None:
    assert told.cost_from_bytes(raw) is None


def test_costs_survive_the_way() -> None:
    assert told.cost_from_bytes(told.cost_to_bytes(Cost(123, 0.1234))) == Cost(123, 0.1234)
    assert told.cost_to_bytes(None) == b""
