"""FedKSeed and Pro as a user starts them: eight unlike clients, half of them a round."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import edgellm_sdk as edgellm


@pytest.mark.parametrize("plugin", ["fedkseed", "fedkseed-pro"])
def test_the_loss_falls_on_held_out_data_of_unlike_clients(tiny_llama: Path, tmp_path: Path, plugin: str) -> None:
    """Validation loss at rounds 0, 5 .. 25 of 8 clients split by labels: lower each time, and by 0.8 nats in all."""
    texts = [
        ("win a prize now", "spam"),
        ("mum is home", "ham"),
        ("call this number", "spam"),
        ("see you at six", "ham"),
    ]
    rows = [{"text": f"{text} {i}", "label": label} for i in range(60) for text, label in texts]
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "seeds": 64, "steps": 10, "layers": 1, "rank": 4, "batch_size": 4, "precision": "float32",
        "learning_rate": 0.2, "step": 0.01,
    }  # fmt: skip
    outcome = edgellm.finetune(
        plugin, str(tiny_llama), str(data), tmp_path / "run", clients=8, clients_per_round=4, rounds=25,
        partition="dirichlet:0.5", seed=3, watch=5, options=options,
    )  # fmt: skip
    rounds, losses = zip(*outcome.report.curves["validation loss over rounds"], strict=True)
    assert rounds == (0, 5, 10, 15, 20, 25)
    assert (np.diff(losses) < 0).all(), losses
    assert losses[-1] <= losses[0] - 0.8
    assert len(outcome.report.bytes) == 8
