"""Work cut to what clients have: batch by memory, steps by time, the same theta for all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from edgellm_plugins.federated.fit import Config, method
from hypothesis import given, settings
from hypothesis import strategies as st

import edgellm_sdk as edgellm
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import footprint
from edgellm_sdk.kit.footprint import Shape, Turn
from edgellm_sdk.types import Profile

SMALL = Shape(134_515_008, 30, 576, 1536, 9, 49_152, 2)
TURN = Turn(30, 2_442_240, 8, 16, 128)


@given(
    memory=st.integers(0, 4_000_000_000), up=st.floats(0, 1e8), cores=st.integers(0, 8), seconds=st.floats(0.0, 500),
    batch=st.integers(1, 64), steps=st.integers(1, 50),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_it_fits_or_is_the_least(memory: int, up: float, cores: int, seconds: float, batch: int, steps: int) -> None:
    profile, asked = Profile("", memory, cores, up, up), replace(TURN, batch=batch, steps=steps)
    turn, cost = method.fit(asked, SMALL, profile, Config(seconds=seconds), 2e10, 1_000_000)
    assert 1 <= turn.batch <= batch and 1 <= turn.steps <= steps
    assert not memory or cost.peak <= memory or turn.batch == 1
    assert not seconds or cost.seconds <= seconds or turn.steps == 1
    if not memory:
        assert turn.batch == batch
    elif turn.batch < batch:  # twice as many would not have been borne
        twice = replace(asked, batch=2 * turn.batch)
        assert footprint.memory(SMALL, twice, 330_000_000) > memory
    if seconds and turn.steps < steps:
        speed = 2e10 * (cores or footprint.cores_here())
        more = replace(turn, steps=turn.steps + 1)
        assert footprint.seconds(SMALL, more, speed, profile, 1_000_000, 1_000_000) > seconds


def test_a_poor_client_does_less(tiny_llama: Path, tmp_path: Path) -> None:
    """In a run: the poor client's forwards are fewer, its batch smaller, and nobody is rejected for it."""
    rows = [{"text": f"see you at {k}", "label": ("a", "b")[k % 2]} for k in range(48)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fleet.toml").write_text("[client.client-001]\nmemory = 1\nup = 0.1\n")
    done = edgellm.finetune(
        "lora", str(tiny_llama), str(tmp_path / "data.jsonl"), tmp_path / "run", clients=3, rounds=2,
        around="fit", profiles=tmp_path / "fleet.toml",
        options={"steps": 6, "batch_size": 8, "max_length": 32, "fit": {"seconds": 3.0}},
    )  # fmt: skip
    assert done.report.rejected == []
    sent = done.report.bytes["client-001"]["up_payload"] / 2
    assert 8 * sent / 1e5 > 3.0  # its uplink alone takes longer than a turn may
    assert done.report.metrics["forwards"].value == 2 * 3 * (6 + 6 + 1)
    assert any("client-001 has 1 MB, one example takes" in note for note in done.report.notes)
    rows = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert all(row["foretold_peak"] > 330_000_000 for row in rows)


def test_other_methods_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"see you {k}"}) + "\n" for k in range(8)))
    with pytest.raises(ConfigError, match="methods that back-propagate"):
        edgellm.finetune(
            "mezo", str(tiny_llama), str(tmp_path / "data.jsonl"), tmp_path / "run", rounds=1, around="fit", watch=0
        )
