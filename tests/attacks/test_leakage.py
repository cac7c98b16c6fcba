"""What one gradient tells: rows of an embedding, and a text found again by gradient inversion."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "cookbook" / "benchmarks"))

import leakage

from edgellm_sdk.kit.conformance_runs import tiny_model


@pytest.fixture(scope="module")
def model() -> str:
    return str(tiny_model().path)


def test_bags_of_tokens() -> None:
    assert leakage.bag([1, 1, 2, 3], [1, 2, 2]) == (2 / 4, 2 / 3, pytest.approx(4 / 7))
    assert leakage.bag([1], [2]) == (0, 0, 0)


def test_the_rows_of_the_embedding_are_the_tokens_that_were_read(model: str) -> None:
    """Recall and precision 1 under full tuning; no way of tuning that is sent here trains the embedding."""
    rows = torch.tensor([ids for ids, _ in leakage.messages(model, 8)[:4]])
    assert leakage.embedding_rows(model, rows) == set(rows.flatten().tolist())
    for spec in leakage.WAYS.values():
        assert not [name for name in leakage.Victim(model, spec, 0).theta if "embed" in name]


def test_a_text_is_found_again_from_the_gradient_of_all_layers(model: str) -> None:
    """Most tokens of one message, where chance finds hardly any of 384. The gradient is that of training."""
    (ids, label), other = leakage.messages(model, 8)[0], leakage.messages(model, 8)[1][0]
    victim = leakage.Victim(model, leakage.WAYS["full"], 0)
    observed = victim.observed(torch.tensor([ids]), torch.tensor([label]))
    found = victim.invert(observed, 1, 8, 250, 0).flatten().tolist()
    assert leakage.bag(found, ids)[2] >= 0.5 > leakage.bag(found, other)[2]
