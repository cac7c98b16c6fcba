"""How far a generated text agrees with a reference: Rouge-L and token F1, both in [0, 1].

Texts are lower-cased and split into runs of letters and digits; nothing is stemmed or removed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Its length, in O(len(a) len(b)) time and O(len(b)) memory."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if x == y else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(generated: str, reference: str) -> float:
    """Rouge-L F1: with L the longest common subsequence of words, 2PR / (P + R) for P = L / |generated| and
    R = L / |reference|; 0 when either has no words."""
    hypothesis, truth = words(generated), words(reference)
    return _f1(longest_common_subsequence(hypothesis, truth), len(hypothesis), len(truth))


def token_f1(generated: str, reference: str) -> float:
    """F1 of the two bags of words; 0 when either has no words."""
    hypothesis, truth = words(generated), words(reference)
    return _f1((Counter(hypothesis) & Counter(truth)).total(), len(hypothesis), len(truth))


def _f1(common: int, generated: int, reference: int) -> float:
    return 2 * common / (generated + reference) if generated and reference else 0.0
