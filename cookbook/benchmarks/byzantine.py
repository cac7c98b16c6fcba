"""Rules against hostile clients: the error of one round of ten, f of which are hostile, for six attacks.

    python cookbook/benchmarks/byzantine.py

Every client's change is the true one plus noise of 0.55 times its size. Twice: with A frozen, where clients send B, and
with both factors trained, where the error is that of the product B A. A figure is ||found - true|| / ||true||, mean and
largest over five seeds; `floor` is each rule's with no hostile client; null is a refusal. No model is trained here.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from edgellm_plugins.aggregation import factors

from edgellm_sdk import config, registry, store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, FederationError
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import environment
from edgellm_sdk.types import State, Update

CLIENTS, NOISE, SEEDS, MOST = 10, 0.55, 5, 4
SETTINGS = ("frozen A", "both factors")
RULES: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "fedavg": ("fedavg", lambda f: {}),
    "median": ("median", lambda f: {}),
    "trimmed-mean": ("trimmed-mean", lambda f: {"byzantine": f}),
    "krum": ("krum", lambda f: {"byzantine": f}),
    "multi-krum": ("krum", lambda f: {"byzantine": f, "select": 0}),
    "bulyan": ("bulyan", lambda f: {"byzantine": f}),
    "geometric-median": ("geometric-median", lambda f: {}),
    "norm-clip": ("norm-clip", lambda f: {}),
}
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """A state, what its clients send when all are honest, and the change that is right, as one matrix a module."""

    state: State
    updates: tuple[Update, ...]
    truth: Mapping[str, Any]


def honest_round(setting: str, seed: int) -> Round:
    """Two modules of rank 4 and a bias; the change has a tenth of the size of what it changes."""
    draw = np.random.default_rng([seed, SETTINGS.index(setting)])
    shapes = {"q.lora_B": (24, 4), "v.lora_B": (12, 4), "bias": (24,)}
    if setting == "both factors":
        shapes |= {"q.lora_A": (4, 32), "v.lora_A": (4, 32)}
    start = {name: draw.normal(size=shape) for name, shape in sorted(shapes.items())}
    right = {name: 0.1 * draw.normal(size=shape) for name, shape in sorted(shapes.items())}
    updates = []
    for client in range(CLIENTS):
        change = {name: g + NOISE * 0.1 * draw.normal(size=g.shape) for name, g in right.items()}
        updates.append(Update("base", 1, f"c{client}", "delta", _float32(change), 10))
    state = State("base", 0, _float32(start))
    moved = {name: state.arrays[name] + right[name] for name in right}
    return Round(state, tuple(updates), change_of(state.arrays, moved))


def _float32(arrays: Mapping[str, Any]) -> Arrays:
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def change_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> Arrays:
    """new - old: of products B A where both factors are there, of the arrays where not."""
    before, after = factors.factors(old), factors.factors(new)
    found: Arrays = {module: after[module].dense() - before[module].dense() for module in after}
    return found | {name: np.asarray(array, np.float64) - old[name] for name, array in factors.others(new).items()}


def error(found: Mapping[str, Any], truth: Mapping[str, Any]) -> float:
    gap = sum(float(((found[name] - right) ** 2).sum()) for name, right in truth.items())
    return float(np.sqrt(gap / sum(float((right**2).sum()) for right in truth.values())))


def _each(update: Update, change: Callable[[str, Any], Any]) -> Update:
    return replace(update, arrays=_float32({name: change(name, array) for name, array in update.arrays.items()}))


def attacked(attack: str, updates: Sequence[Update], f: int, seed: int) -> list[Update]:
    """`updates` with the first `f` clients hostile."""
    draw = np.random.default_rng([seed, 77])
    bad, good = updates[:f], updates[f:]
    values = {name: np.stack([update.arrays[name] for update in good]) for name in updates[0].arrays}
    alike = {name: draw.normal(size=array.shape[1:]) for name, array in values.items()}
    if attack == "sign flip":  # ten times as far, the other way
        bad = [_each(update, lambda name, array: -10 * array) for update in bad]
    elif attack == "huge":  # noise, a million times as long
        bad = [_each(update, lambda name, array: 1e6 * draw.normal(size=array.shape)) for update in bad]
    elif attack == "alie":  # a little is enough: one standard deviation from the honest mean, everywhere
        bad = [_each(update, lambda name, array: values[name].mean(0) - values[name].std(0)) for update in bad]
    elif attack == "stale":  # what was right before the direction turned
        bad = [_each(update, lambda name, array: -array) for update in bad]
    elif attack == "collusion":  # one made-up change, of the usual length, from all of them
        bad = [_each(update, lambda name, array: values[name].std() * alike[name]) for update in bad]
    elif attack == "weight lie":  # the other way, in the name of a hundred times the examples
        bad = [replace(_each(update, lambda name, array: -array), examples=1000) for update in bad]
    else:
        raise ValueError(attack)
    return [*bad, *good]


ATTACKS = ("sign flip", "huge", "alie", "stale", "collusion", "weight lie")


@functools.lru_cache
def _loaded(name: str) -> registry.Loaded:
    return registry.get(name, "aggregate")


def measured(rule: str, f: int, case: Round, updates: Sequence[Update]) -> float | None:
    """The rule's error in this round, None where it refuses."""
    name, options = RULES[rule]
    loaded = _loaded(name)
    relay = Relay([loaded], {name: config.build(loaded.plugin.config, options(f), name)})
    try:
        new = relay.aggregate(case.state, updates, Context(Path(), configs=relay.configs))
    except (ConfigError, FederationError):
        return None
    return error(change_of(case.state.arrays, new.arrays), case.truth)


def table(setting: str, rule: str, attack: str | None, f: int) -> dict[str, float] | None:
    """Mean and largest error over the seeds; None where the rule refuses."""
    found = []
    for seed in range(SEEDS):
        case = honest_round(setting, seed)
        updates = attacked(attack, case.updates, f, seed) if attack else case.updates
        found.append(measured(rule, f, case, updates))
    numbers = [value for value in found if value is not None]
    return {"mean": float(np.mean(numbers)), "largest": max(numbers)} if len(numbers) == len(found) else None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "byzantine.json")
    asked = parser.parse_args()
    results: dict[str, Any] = {}
    for setting in SETTINGS:
        results[setting] = {}
        for rule in RULES:
            results[setting][rule] = {
                "floor": table(setting, rule, None, 0),
                **{a: {str(f): table(setting, rule, a, f) for f in range(1, MOST + 1)} for a in ATTACKS},
            }
        print(setting, "- mean error, f = 3 (floor: no hostile client)")
        print(f"{'':18}" + "".join(f"{column:>12}" for column in ("floor", *ATTACKS)))
        for rule, row in results[setting].items():
            cells = [row["floor"], *(row[attack]["3"] for attack in ATTACKS)]
            print(f"{rule:18}" + "".join(f"{'refused' if c is None else format(c['mean'], '.3g'):>12}" for c in cells))
    command = "python cookbook/benchmarks/byzantine.py"
    about = {"clients": CLIENTS, "noise": NOISE, "seeds": SEEDS}
    store.write_json(asked.output, {"command": command, "environment": environment(), **about, "error": results})


if __name__ == "__main__":
    main()
