"""The cookbook's federation, on a tiny model: unlike clients, a liar, TLS; an adapter GGUF for a user, and a page."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

import edgellm_sdk as edgellm
from edgellm_sdk import store
from edgellm_sdk.steps.audit import wire_of

if importlib.util.find_spec("flwr") is None:
    pytest.skip("Flower is not installed", allow_module_level=True)

OPTIONS = {
    "layers": 2, "rank": 2, "learning_rate": 0.01, "steps": 2, "batch_size": 4, "max_length": 64,
    "precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def entry() -> ModuleType:
    path = Path(__file__).parents[2] / "cookbook" / "04_a_fleet.py"
    spec = importlib.util.spec_from_file_location("a_fleet", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.llama
def test_it_ends_in_an_adapter_for_a_user_and_a_page(entry: ModuleType, tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    texts = [("win a prize now", "spam"), ("mum is home", "ham"), ("call this number", "spam"), ("at six", "ham")]
    rows = [{"text": f"{text} {i}", "label": label} for i in range(60) for text, label in texts]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    done = entry.serve(folder, str(tiny_llama), str(tmp_path / "data.jsonl"), "krum", 2, 12, OPTIONS)
    report = done.report
    assert not any("insecure" in note for note in report.notes)
    assert len(report.bytes) == 5 and report.metrics["rounds"].value == 2
    costs = {row["client"]: row for row in report.federation["costs"]}
    assert all(row["peak"] and row["foretold_peak"] and row["took"] for row in costs.values())

    sizes = []
    for number in (0, 4):
        updates = [m for m in wire_of(folder / f"client-{number}")["messages"] if m["kind"] == "update"]
        sizes.append(math.hypot(*(array["norm"] for array in updates[0]["arrays"])))
    assert sizes[1] > 4 * sizes[0]  # the liar's first change against an honest one
    assert report.metrics["users worse off than with base"].n >= 4

    records = entry.told(folder)
    assert [record["user"] for record in records] and all(r["user"] != "client-004" for r in records)
    assert records[0]["gains"]["base"] > 0
    bundle = entry.export(folder, records[0]["user"])
    about = json.loads((bundle / "MANIFEST.json").read_text())["about"]
    assert list(about["users"]) == [records[0]["user"]]
    adapter = about["users"][records[0]["user"]]
    assert adapter and (bundle / adapter).stat().st_size < (bundle / "base.gguf").stat().st_size
    with edgellm.deploy(str(bundle), user=records[0]["user"]) as session:
        assert session.logits([session.encode("mum is home")])
    page = (folder / "server" / "report.html").read_text()
    assert "What turns cost" in page and records[0]["user"] in page
    assert {m["kind"] for m in wire_of(folder / "client-0")["messages"]} == {"enrolled", "cost", "update", "gains"}
    assert store.published(folder / "client-0") is not None
    entry.show(done, records)
