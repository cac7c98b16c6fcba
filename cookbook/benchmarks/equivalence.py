"""Whether two means are equal within a margin: two one-sided t tests (Schuirmann, 1987).

Not finding a difference is not finding equality: with few runs the test says `open`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

LEVEL = 0.05


def pooled(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Standard deviation within groups and its degrees of freedom. ValueError when no group has two values."""
    degrees = sum(len(group) - 1 for group in groups)
    if not degrees:
        raise ValueError("no group has two values")
    squares = sum((x - statistics.mean(group)) ** 2 for group in groups for x in group)
    return math.sqrt(squares / degrees), degrees


def t_quantile(probability: float, degrees: int) -> float:
    """Student's t: the value that a draw stays below with `probability` in [0.5, 1), by bisection on Simpson's rule."""
    scale = math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)

    def below(t: float) -> float:
        n = 400
        heights = [scale * (1 + (t * i / n) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(n + 1)]
        return 0.5 + t / (3 * n) * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))

    low, high = 0.0, 1.0
    while below(high) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Comparison:
    """`difference` of two means, and the half width of its 90 % interval: both one-sided tests at 5 % in one."""

    difference: float
    half: float

    def verdict(self, margin: float) -> str:
        """`equal` within the margin, `apart` by more than it, or `open`."""
        if abs(self.difference) + self.half < margin:
            return "equal"
        return "apart" if abs(self.difference) - self.half > margin else "open"


def compare(a: Sequence[float], b: Sequence[float], deviation: float, degrees: int) -> Comparison:
    """mean(a) - mean(b) of independent groups that share a standard deviation estimated with `degrees`."""
    error = deviation * math.sqrt(1 / len(a) + 1 / len(b))
    return Comparison(statistics.mean(a) - statistics.mean(b), t_quantile(1 - LEVEL, degrees) * error)


def exceeds(a: Sequence[float], constant: float, margin: float, deviation: float, degrees: int) -> bool:
    """Whether mean(a) lies above constant + margin, one-sided at 5 %."""
    half = t_quantile(1 - LEVEL, degrees) * deviation / math.sqrt(len(a))
    return statistics.mean(a) - half > constant + margin


def pairs(groups: Mapping[int, Sequence[float]], margin: float) -> dict[tuple[int, int], str]:
    """The verdict for every two groups, one deviation pooled over all of them."""
    deviation, degrees = pooled(list(groups.values()))
    return {
        (a, b): compare(groups[a], groups[b], deviation, degrees).verdict(margin) for a, b in combinations(groups, 2)
    }


def runs_needed(groups: int, margin: float, deviation: float) -> int:
    """Runs of each of `groups` from which two equal means would be found equal."""
    n = 2
    while t_quantile(1 - LEVEL, groups * (n - 1)) * deviation * math.sqrt(2 / n) >= margin:
        n += 1
    return n


def straightness(points: Sequence[tuple[float, float]]) -> float:
    """R^2 of the least-squares line through the points."""
    return statistics.correlation([x for x, _ in points], [y for _, y in points]) ** 2
