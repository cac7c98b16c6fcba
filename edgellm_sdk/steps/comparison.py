"""Methods side by side at equal cost: every arm on every task with every seed, each run in a process of its own.

An arm is a plugin with options. A pilot of a few rounds measures what a round of it costs; then each run gets the
rounds that the budget pays for. Back-propagation counts 3 forwards for a step. What is compared is the state at the end
of a run, on held-out data, with 95 % intervals over seeds, and the difference of each arm to the first, paired by seed.

What frozen layers make of the data is computed by the first run and read by the others, so no method pays for it.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from edgellm_sdk import config, registry, settings, store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, PluginError
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.report import Meter, Report
from edgellm_sdk.steps.step import Outcome
from edgellm_sdk.types import Metric

PILOT_ROUNDS, PILOT_GROWTH, PILOT_SHARE = 3, 8, 20
POINTS = 20
HIDDEN = "hidden"
SCORES = {"validation loss": "loss", "balanced accuracy": "accuracy"}
# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Arm:
    """One method as it is compared."""

    name: str
    plugin: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Pilot:
    """A short run that shows what rounds cost."""

    report: Report
    folder: Path
    rounds: int

    @property
    def seconds(self) -> float:
        """Of a round after the first."""
        curves = self.report.curves.items()
        times = next([x for x, _ in c] for n, c in curves if n.startswith("training ") and n.endswith(" over seconds"))
        return max(1e-3, (times[-1] - times[0]) / (len(times) - 1))


@dataclass(frozen=True)
class Run:
    """What one run came to."""

    arm: str
    task: str
    seed: int
    report: Report

    def score(self, name: str) -> float:
        metric = self.report.metrics.get(name)
        return metric.value if metric is not None else math.nan


def read_arms(path: Path) -> list[Arm]:
    """The arms of a TOML file: `[arms.NAME]` with `plugin` and its options. ConfigError for anything else."""
    tree = config.read_toml(path)
    arms = tree.get("arms")
    if set(tree) != {"arms"} or not isinstance(arms, dict) or not all(isinstance(arm, dict) for arm in arms.values()):
        raise ConfigError("holds something other than [arms.NAME] tables", str(path))
    return [
        Arm(name, str(arm.get("plugin", name)), {k: v for k, v in arm.items() if k != "plugin"})
        for name, arm in arms.items()
    ]


def compare(
    plugins: str,
    model: str,
    data: str,
    output: str | Path,
    *,
    arms: Sequence[Arm] = (),
    equal: str = "forwards",
    budget: float = 2000.0,
    seconds: float = 60.0,
    seeds: int = 5,
    clients: int = 1,
    partition: str = "iid",
    balance: bool = False,
    task_prompt: str = "",
    quiet: bool = True,
) -> Outcome:
    """Compare `plugins` (comma-separated, at their defaults) and `arms` on `data` (comma-separated tasks).

    `budget` is in forwards, seconds, bytes both ways of all clients, or MB of memory; with `equal="memory"` every arm
    trains for `seconds`. An arm whose first round needs more than the budget is out, with a note. Finished runs are
    kept when the same comparison is started again.
    """
    asked = {
        "plugins": plugins, "model": model, "data": data, "equal": equal, "budget": budget, "seconds": seconds,
        "seeds": seeds, "clients": clients, "partition": partition, "balance": balance, "task_prompt": task_prompt,
    }  # fmt: skip
    config.build(settings.Compare, asked, "bench compare")
    every = [*arms, *(Arm(name, name, {}) for name in _listed(plugins))]
    if len({arm.name for arm in every}) != len(every) or not every:
        raise ConfigError("name each arm once, and at least one", "bench compare")
    for arm in every:
        loaded = registry.get(arm.plugin, "finetune")
        config.build(loaded.plugin.config, arm.options, arm.plugin)
    folder = Path(output)
    common = {k: asked[k] for k in ("model", "clients", "partition", "balance", "task_prompt")}
    common["hidden"] = str((folder / HIDDEN).absolute())
    report = Report.begin("bench compare", config=asked | {"arms": {arm.name: dict(arm.options) for arm in every}})
    ctx = Context(folder, quiet=quiet)
    tasks = _listed(data)
    with store.run_folder(folder), Meter() as meter:
        runs: list[Run] = []
        with ctx.progress("runs", len(every) * len(tasks) * (seeds + 1)) as progress:
            for number, task in enumerate(tasks, 1):
                for arm in every:
                    where = folder / "runs" / f"{number}-{_slug(arm.name)}"
                    pilot = _pilot(arm, common | {"data": task}, where, equal, seconds if equal == "memory" else budget)
                    progress.advance(1, f"{arm.name}: pilot")
                    rounds, needs = affordable(pilot, equal, budget, seconds)
                    if not rounds:
                        report.notes.append(f"{arm.name} on {Path(task).name} needs {needs} and is out")
                        progress.advance(seeds)
                        continue
                    watch = max(1, rounds // POINTS)
                    for seed in range(seeds):
                        given = common | {"data": task, "rounds": rounds, "watch": watch, "seed": seed}
                        runs.append(Run(arm.name, task, seed, _train(arm, given, where / str(seed))))
                        progress.advance(1, f"{arm.name}: seed {seed}")
        shutil.rmtree(folder / HIDDEN, ignore_errors=True)
    report.finish(meter, ctx)
    _describe(report, runs, tasks, [arm.name for arm in every])
    report.write(folder)
    return Outcome(report, folder)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def _train(arm: Arm, given: Mapping[str, Any], folder: Path) -> Report:
    """One `edgellm finetune` in a fresh process, so that its memory is its own; kept if it is already there."""
    if not (folder / "report.json").is_file():
        lines = [f"{name} = {json.dumps(value)}" for name, value in given.items()]
        lines += ["", "[options]", *(f"{name} = {json.dumps(value)}" for name, value in arm.options.items())]
        recipe = folder.parent / f"{folder.name}.toml"
        store.write_bytes(recipe, "\n".join([*lines, ""]).encode())
        command = [sys.executable, "-c", "from edgellm_sdk.cli.main import main; main()", "finetune", "--quiet"]
        command += ["--plugin", arm.plugin, "--config", str(recipe), "--output", str(folder)]
        command += ["--resume"] if folder.is_dir() else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
            raise PluginError(f"{arm.name} ended with exit code {done.returncode}: {said[0][:120]}", str(folder))
    return Report.read(folder)


def _pilot(arm: Arm, given: Mapping[str, Any], where: Path, equal: str, budget: float) -> Pilot:
    """A few rounds; where time counts each pilot runs twice, so that it finds all hidden states made, and longer until
    it takes a part of the budget."""
    rounds = PILOT_ROUNDS
    timed = equal in ("time", "memory")
    while True:
        for name in (f"warm-up-{rounds}", f"pilot-{rounds}") if timed else (f"pilot-{rounds}",):
            report = _train(arm, {**given, "rounds": rounds, "watch": 0}, where / name)
        pilot = Pilot(report, where / f"pilot-{rounds}", rounds)
        if not timed or pilot.seconds * rounds >= budget / PILOT_SHARE:
            return pilot
        rounds *= PILOT_GROWTH


def affordable(pilot: Pilot, equal: str, budget: float, seconds: float) -> tuple[int, str]:
    """Rounds that the budget pays for, and what the first costs in words; 0 when that is too much.

    Bytes may grow with the rounds, as those of a log do: the growth from the second round to the third goes on.
    """
    if equal == "memory":
        if pilot.report.peak_rss_bytes > budget * 2**20:
            return 0, f"{pilot.report.peak_rss_bytes >> 20} MB"
        equal, budget = "time", seconds
    if equal == "bytes":
        each = [0.0] * PILOT_ROUNDS
        for row in Ledger(pilot.folder / "ledger.jsonl").rows():
            each[row["round"] - 1] += row["down"] + row["up"]
        growth, rounds, spent = max(0.0, each[2] - each[1]), 0, each[0]
        while spent <= budget:
            rounds += 1
            spent += each[1] + (rounds - 1) * growth
        return rounds, f"{each[0]:.0f} bytes for a round"
    if equal == "forwards":
        cost = pilot.report.metrics["forwards"].value / pilot.rounds
        return int(budget / cost), f"{cost:.0f} forwards for a round"
    return int(budget / pilot.seconds), f"{pilot.seconds:.1f} s for a round"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t) of a few values; an infinite one for a single value."""
    if len(values) < 2:
        return values[0], -math.inf, math.inf
    t = _T95[len(values) - 1] if len(values) <= len(_T95) else 1.96
    half = t * stdev(values) / math.sqrt(len(values))
    return mean(values), mean(values) - half, mean(values) + half


def _shown(values: Sequence[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "-"
    centre, low, high = interval(finite)
    return f"{centre:.3g} [{low:.3g}, {high:.3g}]" if math.isfinite(low) else f"{centre:.3g}"


def _describe(report: Report, runs: Sequence[Run], tasks: Sequence[str], arms: Sequence[str]) -> None:
    """One table for each task, and the mean curve of each arm."""
    for task in tasks:
        title = Path(task).name
        here = {arm: [run for run in runs if run.task == task and run.arm == arm] for arm in arms}
        here = {arm: found for arm, found in here.items() if found}
        first = next(iter(here), "")
        columns = ["method", "held-out loss", f"minus {first}", "balanced accuracy"]
        columns += ["forwards", "seconds", "bytes sent", "peak MB"]
        rows = []
        for arm, found in here.items():
            against = [
                run.score("validation loss") - other.score("validation loss")
                for run, other in zip(found, here[first], strict=True)
            ]
            costs = [
                mean(run.report.metrics["forwards"].value for run in found),
                mean(run.report.wall_seconds for run in found),
                mean(sum(t["up"] + t["down"] for t in run.report.bytes.values()) for run in found),
                max(run.report.peak_rss_bytes for run in found) / 2**20,
            ]
            scores = [[run.score(name) for run in found] for name in SCORES]
            rows.append(
                [
                    arm,
                    _shown(scores[0]),
                    _shown(against) if arm != first else "-",
                    _shown(scores[1]),
                    *map(round, costs),
                ]
            )
            for name, short in SCORES.items():
                for x in ("forwards", "seconds"):
                    curve = _mean_curve([run.report.curves.get(f"{name} over {x}", ()) for run in found])
                    if curve:
                        series = f"{arm} ({title})" if len(tasks) > 1 else arm
                        report.curves[f"{short} over {x}, {series}"] = curve
            values = [value for value in scores[0] if math.isfinite(value)]
            if values:
                centre, low, high = interval(values)
                bounds = (low, high) if math.isfinite(low) else None
                report.metrics[f"{title}: loss of {arm}"] = Metric(centre, "nats/token", len(values), bounds)
        report.tables.append({"title": f"{title}: equal {report.config['equal']}", "columns": columns, "rows": rows})


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Point by point over seeds; runs of one arm are measured at the same rounds."""
    length = min((len(curve) for curve in curves), default=0)
    return [(mean(c[k][0] for c in curves), mean(c[k][1] for c in curves)) for k in range(length)]
