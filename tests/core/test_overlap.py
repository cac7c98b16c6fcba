"""Rouge-L and token F1 against values worked by hand, and their bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm_sdk.kit.overlap import longest_common_subsequence, rouge_l, token_f1

TEXT = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=8).map(" ".join)


def test_worked_by_hand() -> None:
    assert rouge_l("the cat sat on the mat", "the cat is on the mat") == pytest.approx(5 / 6)
    assert rouge_l("The mat!", "on the cat, the MAT") == pytest.approx(2 * 1 * 0.4 / 1.4)
    assert token_f1("the mat the", "a mat of the sea") == pytest.approx(2 * 2 / (3 + 5))
    assert longest_common_subsequence("abcbdab", "bdcaba") == 4


@pytest.mark.parametrize("score", [rouge_l, token_f1])
def test_empty_scores_nothing(score: object) -> None:
    assert callable(score)
    assert score("", "word") == score("word", "") == score("...", "...") == 0.0


def _by_recursion(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return _by_recursion(a[:-1], b[:-1]) + 1
    return max(_by_recursion(a[:-1], b), _by_recursion(a, b[:-1]))


@given(st.lists(st.sampled_from("ab"), max_size=6), st.lists(st.sampled_from("ab"), max_size=6))
def test_longest_common_subsequence_by_its_definition(a: list[str], b: list[str]) -> None:
    assert longest_common_subsequence(a, b) == _by_recursion(a, b)


@given(TEXT, TEXT)
def test_order_lowers_rouge_only(one: str, other: str) -> None:
    assert 0 <= rouge_l(one, other) <= token_f1(one, other) <= 1
    assert rouge_l(one, one) == (1.0 if one else 0.0)
    assert rouge_l(one, other) == rouge_l(other, one)
