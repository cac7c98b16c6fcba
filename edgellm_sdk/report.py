"""One JSON file for every step that ran, and a page to look at: the only source of the figures we quote.

`report.json` follows `edgellm_sdk/assets/report.schema.json`; `report.html` is drawn from it by `edgellm_sdk.page`.
Neither holds a host name, a user name or an absolute path of the user's.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_sdk import __version__, store
from edgellm_sdk.errors import ModelError
from edgellm_sdk.types import Metric

if TYPE_CHECKING:
    from edgellm_sdk.context import Context

JSON, HTML = "report.json", "report.html"
FORMAT = 1

Points = Sequence[tuple[float, float]]
Row = Mapping[str, Any]


@dataclass
class Report:
    """What one verb did. Filled in while it works; whoever reads it changes nothing.

    `config` are the verb's settings and `options` the plugin's, as used. `bytes` maps each client to its totals (see
    `federate.ledger.Ledger.totals`). `curves` are named `y over x`. `rejected` rows have client, round and reason,
    `artifacts` rows name (relative to the report's folder), sha256 and bytes, `tables` title, columns and rows,
    `examples` prompt and any of before, after, expected. `verified` is what the export gate found. `federation` is what
    `federate.ledger.Ledger.overview` tells. `resumed` counts how often the run was taken up again. `peak_rss_bytes` is
    that of the largest single process.
    """

    verb: str
    plugin: str = ""
    plugin_version: str = ""
    plugin_origin: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    started: str = ""
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    curves: dict[str, Points] = field(default_factory=dict)
    rejected: list[Row] = field(default_factory=list)
    federation: dict[str, Any] = field(default_factory=dict)
    privacy: dict[str, Any] | None = None
    artifacts: list[Row] = field(default_factory=list)
    verified: dict[str, Any] = field(default_factory=dict)
    tables: list[Row] = field(default_factory=list)
    examples: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    resumed: int = 0

    @classmethod
    def begin(
        cls,
        verb: str,
        plugin: str = "",
        version: str = "",
        origin: str = "",
        options: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> Report:
        """A report that says what was asked and when it started; `finish` adds what it took."""
        return cls(verb, plugin, version, origin, dict(config or {}), dict(options or {}), seed, now())

    def finish(self, meter: Meter, ctx: Context | None = None) -> None:
        """Take time and memory from `meter`, curves and notes from `ctx`, and look at the environment."""
        self.started = meter.started
        self.wall_seconds, self.cpu_seconds = meter.wall_seconds, meter.cpu_seconds
        self.peak_rss_bytes = max(meter.peak_rss_bytes, ctx.highest if ctx is not None else 0)
        self.environment = environment()
        if ctx is not None:
            self.curves = dict(ctx.curves)
            self.notes += [note for note in ctx.notes if note not in self.notes]

    @classmethod
    def read(cls, folder: Path) -> Report:
        """The report of a run folder. ModelError when there is none or it is malformed."""
        return cls.from_json(store.read_json(folder / JSON), str(folder / JSON))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: paths made portable, values that are not finite made null."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain["metrics"] = {name: dataclasses.asdict(metric) for name, metric in self.metrics.items()}
        plain["environment"] = dict(self.environment) or environment()
        cleaned: dict[str, Any] = _plain({"format": FORMAT, **plain})
        return cleaned

    @classmethod
    def from_json(cls, value: Any, where: str = "") -> Report:
        """The inverse of `to_json`. ModelError for anything that is not a report of this format."""
        names = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(value, dict) or value.get("format") != FORMAT or not set(value) <= names | {"format"}:
            raise ModelError("is not a report of this version", where)
        given = {name: item for name, item in value.items() if name != "format"}
        try:
            given["metrics"] = {name: _metric(item) for name, item in given.get("metrics", {}).items()}
            given["curves"] = {
                name: [(float(x), float(y)) for x, y in points] for name, points in given.get("curves", {}).items()
            }
            return cls(**given)
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ModelError(f"is not a report: {error}", where) from None

    def write_json(self, folder: Path) -> None:
        """`report.json` in `folder`, atomically."""
        store.write_json(folder / JSON, self.to_json())

    def write(self, folder: Path) -> None:
        """`report.json` and `report.html` in `folder`, each atomically."""
        from edgellm_sdk.page import render

        self.write_json(folder)
        store.write_bytes(folder / HTML, render([self]).encode())


def _metric(item: Mapping[str, Any]) -> Metric:
    ci95 = item.get("ci95")
    value = math.nan if item["value"] is None else float(item["value"])
    return Metric(value, str(item.get("unit", "")), int(item.get("n", 0)), (ci95[0], ci95[1]) if ci95 else None)


def portable(text: str) -> str:
    """`text` without the part of a path that says whose machine this is: the working folder goes, home becomes `~`."""
    here, home = os.getcwd(), os.path.expanduser("~")  # noqa: PTH109, PTH111 - pathlib raises where these do not
    for prefix, instead in ((here, "."), (home, "~")):
        if len(prefix) > 1:
            text = text.replace(prefix + "/", "" if instead == "." else "~/")
            if text == prefix:
                text = instead
    return text


def _plain(value: Any) -> Any:
    """`value` as what JSON can say; a number that is not finite becomes null, a curve loses such points."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return portable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return portable(str(value))
    if isinstance(value, Mapping):
        return {
            str(key): _points(item) if key == "curves" and isinstance(item, Mapping) else _plain(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if hasattr(value, "item"):  # a numpy or torch scalar
        return _plain(value.item())
    return portable(str(value))


def _points(curves: Mapping[str, Points]) -> dict[str, list[list[float]]]:
    """Curves as lists of finite pairs."""
    return {
        str(name): [[float(x), float(y)] for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in curves.items()
    }


def now() -> str:
    """The time as UTC in ISO format, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def environment() -> dict[str, Any]:
    """What a figure depends on: versions, processor, cores, memory, platform. Nothing names a machine or a user."""
    return {
        "edgellm": __version__,
        "python": platform.python_version(),
        "torch": _version("torch") if "torch" in sys.modules else None,
        "llama_cpp": _version("llama-cpp-python"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return names[0][:80] if names else platform.processor() or platform.machine()


class Meter:
    """Wall and CPU seconds of a block, children's included, and the peak memory of the largest process in it."""

    def __init__(self) -> None:
        self.started = now()
        self.wall_seconds = 0.0
        self.cpu_seconds = 0.0
        self.peak_rss_bytes = 0

    def __enter__(self) -> Meter:
        self.started = now()
        forget_peak()
        self._wall, self._cpu, self._children = time.monotonic(), _cpu(), _peak_of_children()
        return self

    def __exit__(self, *exception: object) -> None:
        self.read()

    def read(self) -> Meter:
        """Take the figures as they stand, also in the middle of the block."""
        self.wall_seconds = round(time.monotonic() - self._wall, 3)
        self.cpu_seconds = round(_cpu() - self._cpu, 3)
        children = _peak_of_children()
        self.peak_rss_bytes = max(peak_rss(), children if children > self._children else 0)
        return self


def _cpu() -> float:
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _unit() -> int:
    return 1 if sys.platform == "darwin" else 1024


def _peak_of_children() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _unit()


def forget_peak() -> None:
    """Start the kernel's high-water mark afresh where it allows that, so a step does not inherit an earlier one's."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss() -> int:
    """Peak resident bytes of this process. VmHWM where the kernel has it: ru_maxrss would still carry the parent's size
    from before exec."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _unit()
