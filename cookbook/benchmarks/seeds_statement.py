"""What the rows of `seeds.py` allow to say about the number of seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import equivalence
from benchmarks.equivalence import compare, exceeds, pooled, straightness

POINTS = 1.0  # the margin in Rouge-L points, fixed before the runs
NAMES = {
    "fedkseed": "FedKSeed", "fedkseed-pro": "Pro", "fedzo": "FedZO", "fedavg": "FedAvg", "none": "no training",
}  # fmt: skip
Groups = dict[int, list[float]]


@dataclass(frozen=True)
class Study:
    """The rows of a result file, by method, K and seed."""

    content: Mapping[str, Any]

    def values(self, method: str, name: str) -> Groups:
        """K -> one value for each seed; K is 0 for a method without it."""
        found: Groups = {}
        for row in self.content["rows"]:
            if row["method"] == method:
                found.setdefault(row["seeds"], []).append(row[name])
        return dict(sorted(found.items()))

    def flat(self, method: str, name: str) -> list[float]:
        """The values of a method without K."""
        return self.values(method, name).get(0, [])

    def rebuild(self, method: str) -> dict[int, float]:
        return {r["seeds"]: r["seconds"] for r in self.content["rebuild"] if r["method"] == method}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def about_rouge(study: Study, which: str) -> list[str]:
    """The claim: Rouge-L hardly depends on K, and every K has learnt something."""
    groups = study.values("fedkseed", f"rouge_l_{which}")
    untrained = study.flat("none", f"rouge_l_{which}")[0]
    ks, runs = list(groups), min(len(values) for values in groups.values())
    if runs < 2:
        return [f"Rouge-L, {which}: one run for each K says nothing about flatness."]
    deviation, degrees = pooled(list(groups.values()))
    margin = max(POINTS, deviation)
    verdicts = equivalence.pairs(groups, margin)
    learnt = [k for k, values in groups.items() if exceeds(values, untrained, margin, deviation, degrees)]
    tails = [k for k in ks[:-1] if _shape(verdicts, k)[0] == "flat"]
    small = next((k for k in tails if all(other in learnt for other in ks if other >= k)), None)
    needed = equivalence.runs_needed(len(ks), margin, deviation)
    power = (
        f"{runs} runs for each K cannot show two means equal at this std, even if they are; {needed} or more could."
        if runs < needed
        else f"{needed} runs for each K are the fewest that can show two means equal at this std."
    )
    lines = [
        f"Rouge-L, {which}: run-to-run std {deviation:.2f} points ({degrees} degrees of freedom), margin {margin:.2f}. "
        f"{power}",
        f"  Over all K the curve is {_told(verdicts, ks[0])}.",
        f"  No training scores {untrained:.2f}; shown to beat it by more than the margin: "
        f"{', '.join(f'K = {k}' for k in learnt) or 'no K'}.",
    ]
    start = plateau_start(study, which)
    if start is not None and start < ks[-1]:
        means = ", ".join(f"{statistics.mean(groups[k]):.2f}" for k in ks if k >= start)
        told = _told(verdicts, start)
        lines.append(f"  From K* = {start} on, where the loss is on its plateau, means are {means}: {told}.")
    if small is None:
        return [*lines, "  K_small: none. From no K on are all shown equal and better than untrained."]
    cost = study.rebuild("fedkseed")
    saved = f", {cost[ks[-1]] / cost[small]:.0f} times less to catch up" if small in cost else ""
    return [*lines, f"  K_small = {small}: {ks[-1] // small} times fewer bytes down than K = {ks[-1]}{saved}."]


def _shape(verdicts: Mapping[tuple[int, int], str], start: int) -> tuple[str, dict[str, int]]:
    """`flat`, `not flat` or `inconclusive` for all K from `start` on, and how many pairs have each verdict."""
    found = [v for (a, b), v in verdicts.items() if min(a, b) >= start]
    counts = {word: found.count(word) for word in ("equal", "apart", "open")}
    return "not flat" if counts["apart"] else "inconclusive" if counts["open"] else "flat", counts


def _told(verdicts: Mapping[tuple[int, int], str], start: int) -> str:
    word, counts = _shape(verdicts, start)
    apart = ", ".join(f"{a} and {b}" for (a, b), v in verdicts.items() if v == "apart" and min(a, b) >= start)
    return (
        f"{word}: of {sum(counts.values())} pairs {counts['equal']} are equal within the margin, "
        f"{counts['apart']} apart by more{f' ({apart})' if apart else ''}, {counts['open']} open"
    )


def plateau_start(study: Study, which: str) -> int | None:
    """K*: from this K on, every mean loss is within one std (FedKSeed's, run to run) of FedZO's; None without one."""
    groups, free = study.values("fedkseed", f"loss_{which}"), study.flat("fedzo", f"loss_{which}")
    if not free or min(len(values) for values in (*groups.values(), free)) < 2:
        return None
    deviation, _ = pooled(list(groups.values()))
    away = [k for k, values in groups.items() if abs(statistics.mean(values) - statistics.mean(free)) > deviation]
    return min((k for k in groups if k > max(away, default=0)), default=None)


def about_loss(study: Study, which: str) -> list[str]:
    groups, free = study.values("fedkseed", f"loss_{which}"), study.flat("fedzo", f"loss_{which}")
    if min(len(values) for values in (*groups.values(), free)) < 2:
        return [f"Loss, {which}: one run for each K, no statement."]
    deviation, _ = pooled(list(groups.values()))
    first, last, start = min(groups), max(groups), plateau_start(study, which)
    lines = [f"Loss, {which}: FedZO {spread(free, 3)}, run-to-run std of FedKSeed {deviation:.3f}."]
    if start is None:
        gap = statistics.mean(groups[last]) - statistics.mean(free)
        return [*lines, f"  No plateau: even K = {last} is more than one std from FedZO ({gap:+.3f})."]
    plateau = [x for k, values in groups.items() if k >= start for x in values]
    lines.append(f"  From K* = {start} on every K is within one std of FedZO; the plateau is at {spread(plateau, 3)}.")
    if start > first:
        low = statistics.mean(groups[first]) - statistics.stdev(groups[first])
        parted = low > statistics.mean(plateau) + statistics.stdev(plateau)
        told = f"  K = {first} ends at {spread(groups[first], 3)}: mean ± std {'apart from' if parted else 'overlaps'}"
        lines.append(f"{told} the plateau's.")
    return lines


def about_cost(study: Study) -> list[str]:
    down = {k: statistics.mean(values) for k, values in study.values("fedkseed", "bytes_down").items()}
    straight = straightness(list(down.items()))
    lines = [f"Bytes down against K: R^2 {straight:.5f}, {max(down.values()):.0f} at K = {max(down)}."]
    cost = study.rebuild("fedkseed")
    if len(cost) > 2:
        lines.append(
            f"Catch-up from theta_0, all seeds in use: R^2 {straightness(list(cost.items())):.5f}, "
            f"{1e3 * cost[min(cost)]:.2f} ms at K = {min(cost)}, {1e3 * cost[max(cost)]:.1f} ms at K = {max(cost)}."
        )
    first, last = (study.values("fedkseed", f"catch_up_{part}_third") for part in ("first", "last"))
    told = ", ".join(f"{k}: {1e3 * statistics.mean(first[k]):.1f}/{1e3 * statistics.mean(last[k]):.1f}" for k in first)
    lines.append(f"Catch-up in the first and last third of the rounds, ms by K: {told}.")
    early, late = (study.flat("fedzo", f"bytes_down_{part}") for part in ("first", "last"))
    lines.append(f"FedZO sends its log: {early[0]:.0f} bytes down in the first round, {late[0]:.0f} in the last.")
    return lines


def about_pro(study: Study) -> list[str]:
    lines = []
    for name, unit in (("rouge_l_unseen", "points"), ("loss_unseen", "nats/token")):
        plain, pro = study.values("fedkseed", name), study.values("fedkseed-pro", name)
        groups = [*plain.values(), *pro.values()]
        if min(len(values) for values in groups) < 2:
            return ["FedKSeed-Pro: one run for each K, no statement."]
        deviation, degrees = pooled(groups)
        for k, values in pro.items():
            c = compare(values, plain[k], deviation, degrees)
            lines.append(f"Pro minus uniform at K = {k}, {name}: {c.difference:+.3f} ± {c.half:.3f} {unit} (90 %).")
    return lines


def about_rates(study: Study) -> list[str]:
    """A best rate at the edge of its grid may not be the best there is."""
    rates: dict[tuple[str, int], dict[float, float]] = {}
    for row in study.content["tuning"]:
        rates.setdefault((row["method"], row["seeds"]), {})[row["learning_rate"]] = row["validation_loss"]
    best = {place: min(losses.items(), key=lambda item: item[1])[0] for place, losses in rates.items()}
    told = []
    for edge, pick in (("lowest", min), ("highest", max)):
        named = [f"{NAMES[m]} {k or ''}".strip() for (m, k), rate in best.items() if rate == pick(rates[m, k])]
        told.append(f"{', '.join(named) or 'none'} at the {edge} of the rates tried")
    return [f"Learning rates: {'; '.join(told)}."]


def statement(study: Study) -> list[str]:
    asked = study.content["protocol"]
    runs = len(next(iter(study.values("fedkseed", "seed").values())))
    head = (
        f"{asked['clients']} clients, {asked['clients_per_round']} a round, {asked['rounds']} rounds of "
        f"{asked['steps']} steps: T = {asked['draws']} draws; {runs} seeds for each cell; "
        f"{asked['test_seen']} seen and {asked['test_unseen']} unseen prompts."
    )
    references = [
        f"{NAMES[m]}: Rouge-L unseen {spread(study.flat(m, 'rouge_l_unseen'))}, seen "
        f"{spread(study.flat(m, 'rouge_l_seen'))}; loss unseen {spread(study.flat(m, 'loss_unseen'), 3)}."
        for m in ("none", "fedzo", "fedavg")
    ]
    rouge = [line for which in ("unseen", "seen") for line in about_rouge(study, which)]
    loss = [line for which in ("unseen", "seen") for line in about_loss(study, which)]
    return [head, *rouge, *loss, *references, *about_pro(study), *about_rates(study), *about_cost(study)]
