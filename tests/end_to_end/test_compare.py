"""`bench compare`: equal budgets, fresh processes, a table and curves with intervals; nothing is lost when repeated."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import edgellm_sdk as edgellm
from edgellm_sdk.errors import ConfigError, PluginError
from edgellm_sdk.report import Report
from edgellm_sdk.steps.comparison import Arm, interval, read_arms

ROWS = [("win a prize now", "spam"), ("mum is home", "ham"), ("call this number", "spam"), ("see you at six", "ham")]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "toy.jsonl"
    path.write_text("".join(json.dumps({"text": f"{t} {i}", "label": k}) + "\n" for i in range(8) for t, k in ROWS))
    return path


ARMS = (
    Arm("one", "mezo", {"layers": 1, "rank": 2, "steps": 2, "probes": 1, "batch_size": 4, "precision": "float32"}),
    Arm("many", "fzoo", {"layers": 1, "rank": 2, "steps": 1, "probes": 3, "batch_size": 4, "precision": "float32"}),
)


def test_equal_forwards(tiny_llama: Path, task: Path, tmp_path: Path) -> None:
    def run() -> edgellm.Outcome:
        out = tmp_path / "out"
        return edgellm.compare("", str(tiny_llama), str(task), out, arms=ARMS, budget=24, seeds=2)

    done = run()
    table = done.report.tables[0]
    assert [row[0] for row in table["rows"]] == ["one", "many"]
    assert [row[table["columns"].index("forwards")] for row in table["rows"]] == [24, 24]
    assert done.report.metrics["toy.jsonl: loss of one"].n == 2
    assert "loss over forwards, many" in done.report.curves
    assert Report.read(tmp_path / "out").tables == done.report.tables
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
    before = (tmp_path / "out" / "runs" / "1-one" / "0" / "report.json").stat().st_mtime_ns
    assert run().report.tables[0]["rows"] == table["rows"]
    assert (tmp_path / "out" / "runs" / "1-one" / "0" / "report.json").stat().st_mtime_ns == before


def test_equal_bytes_with_a_log_that_grows(tiny_llama: Path, task: Path, tmp_path: Path) -> None:
    """MeZO's download grows by the same number of bytes in every round: the budget is met to within two rounds."""
    cut = [Arm(arm.name, arm.plugin, {**arm.options, "steps": 8}) for arm in ARMS]
    whole = Arm("adapters", "lora", {"layers": 0, "rank": 64, "steps": 1})
    budget = 40_000
    done = edgellm.compare(
        "", str(tiny_llama), str(task), tmp_path / "out", arms=[*cut, whole], equal="bytes", budget=budget, seeds=1
    )
    table = done.report.tables[0]
    place = table["columns"].index("bytes sent")
    assert [row[0] for row in table["rows"]] == ["one", "many"]
    for row in table["rows"]:
        assert budget - 2 * 5000 <= row[place] <= budget, "the last round costs up to 4 896 bytes"
    assert [note for note in done.report.notes if "adapters" in note and "is out" in note]


def test_arms_from_a_file_and_refusals(tiny_llama: Path, task: Path, tmp_path: Path) -> None:
    path = tmp_path / "arms.toml"
    path.write_text('[arms.slow]\nplugin = "mezo"\nlearning_rate = 0.001\n[arms.fzoo]\n')
    assert read_arms(path) == [Arm("slow", "mezo", {"learning_rate": 0.001}), Arm("fzoo", "fzoo", {})]
    path.write_text("[arm.slow]\n")
    with pytest.raises(ConfigError, match="something other"):
        read_arms(path)
    with pytest.raises(ConfigError, match="each arm once"):
        edgellm.compare("mezo,mezo", str(tiny_llama), str(task), tmp_path / "out")
    with pytest.raises(ConfigError, match="did you mean 'probes'"):
        edgellm.compare("", str(tiny_llama), str(task), tmp_path / "out", arms=[Arm("a", "mezo", {"probs": 2})])
    with pytest.raises(PluginError, match="a ended with exit code 6"):
        arms = [Arm("a", "mezo", {})]
        edgellm.compare("", str(tmp_path / "nothing"), str(task), tmp_path / "out", arms=arms, seeds=1)


def test_intervals() -> None:
    """Student's t by hand: 1, 2, 3 have mean 2 and half-width 4.303 / sqrt(3)."""
    centre, low, high = interval([1.0, 2.0, 3.0])
    assert (centre, low, high) == pytest.approx((2, 2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)), rel=1e-4)
    assert interval([5.0]) == (5.0, -math.inf, math.inf)
