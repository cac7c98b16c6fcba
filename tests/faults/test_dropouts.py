"""10 to 90 per cent of the clients silent: a round counts if and only if the quorum answers, else the model stays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from edgellm_plugins.aggregation.fedavg import Config

from edgellm_sdk import registry, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.rounds import Plan, resumed, run_rounds
from edgellm_sdk.random import Stream
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import State, Update

CLIENTS, ROUNDS, QUORUM, ATTEMPTS = 20, 4, 0.5, 2
START = State("base", 0, {"w": np.zeros(3, np.float32)})


class Fleet:
    """Clients that add 1, but for those who are silent in a round and attempt; remembers how many answered."""

    def __init__(self, silent: float, seed: int) -> None:
        self.silent, self.seed, self.answers = silent, seed, list[int]()

    def __call__(self, messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        drawn = Stream(self.seed, "silent", len(self.answers)).uniform(len(messages))
        awake = [client for client, at in zip(sorted(messages), drawn, strict=True) if at >= self.silent]
        self.answers.append(len(awake))
        for client in awake:
            asked = wire.assignment_from_bytes(messages[client], client)
            arrays = {"w": asked.arrays["w"] + np.float32(1)}
            yield client, wire.update_to_bytes(Update(asked.base, asked.round, client, "weights", arrays, 1))


@pytest.mark.parametrize("share", [k / 10 for k in range(1, 10)])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.row("B3")
def test_a_round_counts_if_the_quorum_answers(share: float, seed: int, tmp_path: Path) -> None:
    fleet, ctx = Fleet(share, seed), Context(tmp_path, seed=seed, rounds=ROUNDS)
    plan = Plan({f"c{k:02d}": 1 for k in range(CLIENTS)}, CLIENTS, ROUNDS, QUORUM, ATTEMPTS)
    relay, ledger = Relay([registry.get("fedavg")], {"fedavg": Config()}), Ledger(tmp_path / "ledger.jsonl")
    try:
        final, failed = run_rounds(relay, START, plan, fleet, ctx, ledger), False
    except FederationError as error:
        assert error.exit_code == 8 and "stayed below quorum" in error.what
        final, failed = resumed(ctx, "base") or START, True
    whole = [count >= QUORUM * CLIENTS for count in fleet.answers]
    counted = sum(whole)
    assert final.round == counted and final.arrays["w"].tolist() == [float(counted)] * 3
    assert failed == (counted < ROUNDS)
    assert failed == any(not any(whole[k : k + ATTEMPTS]) for k in range(len(whole) - ATTEMPTS + 1))
    silent = sum(row["rejected"] == "did not answer" for row in ledger.rows())
    assert silent == sum(CLIENTS - count for count in fleet.answers)
