"""The report: round trip, schema, what it leaves out, and its page."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from edgellm_sdk import charts, page
from edgellm_sdk.errors import ModelError
from edgellm_sdk.report import Meter, Report, environment, portable
from edgellm_sdk.types import Metric

SCHEMA = json.loads((resources.files("edgellm_sdk") / "assets" / "report.schema.json").read_text())
KINDS: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "null": type(None), "integer": int, "number": (int, float),
}  # fmt: skip


def problems(value: Any, schema: dict[str, Any], at: str = "report") -> list[str]:
    """What of the JSON Schema words that our schema uses `value` breaks."""
    if "anyOf" in schema:
        each = [problems(value, option, at) for option in schema["anyOf"]]
        return [] if [] in each else each[0]
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and (isinstance(value, bool) or not any(isinstance(value, KINDS[kind]) for kind in kinds)):
        return [f"{at}: {value!r} is not {kinds}"]
    found = []
    if "const" in schema and value != schema["const"]:
        found.append(f"{at}: is not {schema['const']}")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        found.append(f"{at}: {value!r} does not match")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{at}: too small")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            found.append(f"{at}: {len(value)} items")
        found += [p for i, v in enumerate(value) for p in problems(v, schema.get("items", {}), f"{at}[{i}]")]
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{at}: lacks {name}" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            if name in known:
                found += problems(item, known[name], f"{at}.{name}")
            elif others is False:
                found.append(f"{at}: unknown {name}")
            elif isinstance(others, dict):
                found += problems(item, others, f"{at}.{name}")
    return found


@pytest.fixture
def full() -> Report:
    report = Report.begin("finetune", "fwdllm", "1.0", "built-in", {"rank": 8, "sampling": False}, {"clients": 2}, 3)
    with Meter() as meter:
        sum(range(1000))
    report.finish(meter)
    report.bytes = {"a<b>": {"up": 8, "down": 900}}
    report.metrics = {"balanced accuracy": Metric(0.9, "", 10, (0.8, 0.95)), "uploaded": Metric(3e6, "bytes", 2)}
    report.curves = {
        "loss over rounds": [(1, 2.0), (2, math.nan), (3, 1.0)],
        "variance over rounds": [(1, 1e-9), (2, 5.0)],
    }
    report.rejected = [{"client": "c", "round": 4, "reason": "<i>NaN</i>"}]
    report.artifacts = [{"name": "filter.gguf", "sha256": "0" * 64, "bytes": 12}]
    report.verified = {"passed": False, "reason": "drift", "checks": [{"name": "KL", "passed": False, "value": 3.0}]}
    columns = ["model", "balanced accuracy", "size"]
    report.tables = [
        {"title": "t", "columns": columns, "rows": [["x", "0.5 [0.4, 0.6]", "1 MB"], ["y", "0.9", "2 MB"]]}
    ]
    report.examples = [{"prompt": "<script>alert(1)</script>", "expected": "ham", "before": "spam", "after": "ham"}]
    report.notes = ["a & b"]
    return report


def test_round_trip_and_schema(full: Report, tmp_path: Path) -> None:
    full.write(tmp_path)
    raw = json.loads((tmp_path / "report.json").read_text())
    assert problems(raw, SCHEMA) == []
    assert Report.read(tmp_path).to_json() == raw == full.to_json()
    assert raw["curves"]["loss over rounds"] == [[1.0, 2.0], [3.0, 1.0]]


def test_an_empty_report_follows_the_schema() -> None:
    assert problems(Report("doctor").to_json(), SCHEMA) == []


def test_the_validator_sees_faults(full: Report) -> None:
    raw = full.to_json()
    for key, value in (("verb", 1), ("peak_rss_bytes", -1), ("curves", {"x": [[1]]}), ("surprise", 1), ("format", 2)):
        assert problems({**raw, key: value}, SCHEMA), key
    assert problems({k: v for k, v in raw.items() if k != "seed"}, SCHEMA)


@pytest.mark.parametrize(
    "raw", [[], {}, {"format": 2}, {"format": 1, "verb": "x", "wat": 1}, {"format": 1, "verb": "x", "metrics": [1]}]
)
def test_what_is_no_report_is_refused(raw: Any) -> None:
    with pytest.raises(ModelError):
        Report.from_json(raw, "here")


def test_paths_and_machine_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import getpass
    import platform

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert portable(f"{tmp_path}/runs/a") == "runs/a"
    monkeypatch.chdir("/")
    assert portable(f"{tmp_path}/runs/a") == "~/runs/a"
    report = Report("finetune", config={"output": tmp_path / "secret", "data": f"{tmp_path}/my.jsonl"})
    text = json.dumps(report.to_json())
    assert str(tmp_path) not in text
    words = set(re.findall(r"[\w.-]+", json.dumps(environment())))
    assert platform.node() not in words
    assert getpass.getuser() not in words


def test_meter_measures_this_process_and_its_children() -> None:
    import subprocess
    import sys

    with Meter() as meter:
        blob = bytearray(40 << 20)
        blob[::4096] = b"x" * len(blob[::4096])
        subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert meter.peak_rss_bytes > 40 << 20
    assert meter.cpu_seconds > 0
    assert meter.wall_seconds > 0


class _Page(HTMLParser):
    """Counts tags, checks that they close, and collects addresses."""

    VOID = {"meta", "br"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_escaped_and_alone(full: Report) -> None:
    text = page.render([full, Report("export", "gguf")])
    parsed = _Page()
    parsed.feed(text)
    assert parsed.open == []
    assert parsed.addresses == []
    assert "script" not in parsed.tags
    assert "http" not in text
    assert "url(" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "a&lt;b&gt;" in text
    assert "&lt;i&gt;NaN&lt;/i&gt;" in text
    assert "does not behave like its model: drift" in text
    assert "Balanced accuracy against size" in text
    assert parsed.tags.count("svg") == 3
    assert text == page.render([full, Report("export", "gguf")])


def test_series_of_one_quantity_share_a_figure() -> None:
    report = Report(
        "compress", curves={"error over layers, gptq": [(0, 1.0)], "error over layers, nearest": [(0, 2.0)]}
    )
    text = page.render([report])
    assert text.count("<svg") == 1
    assert "Error over layers" in text
    assert ">nearest</span>" in text


def test_command_can_be_typed_again(full: Report) -> None:
    assert page.command(full) == "edgellm finetune --plugin fwdllm --clients 2 --rank 8 --no-sampling"
    odd = Report("finetune", "x", config={"data": "my file.jsonl"})
    assert page.command(odd) == "edgellm finetune --plugin x --data 'my file.jsonl'"


def test_axes_are_round_and_hold_their_values() -> None:
    axis = charts.axis([0.13, 9.7], 0, 100, zero=True)
    assert axis.ticks() == [0, 2.5, 5, 7.5, 10]
    assert axis.at(axis.low) == 0
    assert axis.at(axis.high) == 100
    log = charts.axis([0.002, 40], 100, 0, log=True)
    assert log.ticks() == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10, 100])
    assert [charts.short(v) for v in (0.25, 12, 15000, 1.2e6)] == ["0.25", "12", "15k", "1.2M"]


def test_running_mean_by_hand() -> None:
    assert charts.running_mean([(0, 0.0), (1, 3.0), (2, 6.0)]) == [(0, 1.5), (1, 3.0), (2, 4.5)]
