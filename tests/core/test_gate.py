"""The gate's arithmetic and verdicts on hand-made sessions; what it does with files is in test_gate_faults."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgellm_sdk import gate, ledger
from edgellm_sdk.errors import ConfigError, GateError
from edgellm_sdk.types import Artifact, Generation, Prompt, Session, SessionStats

EOS = 3


class Toy:
    """A session over bytes: next-token logits are a table row of the last token."""

    device = "toy"

    def __init__(self, table: np.ndarray, eos: tuple[int, ...] = (EOS,), shift: int = 0) -> None:
        self.table, self.eos, self.shift = table.astype(np.float32), eos, shift
        self.vocabulary = len(table)

    def encode(self, text: str) -> list[int]:
        return [(byte + self.shift) % self.vocabulary for byte in text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join("<end>" if token == EOS else chr(97 + token % 26) for token in tokens)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return self.encode(prompt if isinstance(prompt, str) else prompt[0]["content"])

    def logits(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[np.ndarray]:
        assert first is not None
        return [self.table[list(ids)][place:] for ids, place in zip(sequences, first, strict=True)]

    def generate(
        self, tokens: Sequence[int], max_tokens: int, temperature: float = 0.0, seed: int = 0, stop: Sequence[str] = ()
    ) -> Generation:
        out, last = [], tokens[-1]
        while len(out) < max_tokens:
            last = int(self.table[last].argmax())
            if last in self.eos:
                return Generation(tuple(out), "", "eos", 0.0)
            out.append(last)
        return Generation(tuple(out), "", "length", 0.0)

    def stats(self) -> SessionStats:
        return SessionStats(0, 0, 0, 0, 0, 0)

    def close(self) -> None:
        pass


def table(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((64, 64)) * 3


def compare(reference: Toy, candidate: Toy, tolerance: gate.Tolerance = gate.FLOAT32) -> gate.GateResult:
    return gate.check(reference, candidate, ["a prompt", "another"], tolerance, {"block_count": 2}, {"block_count": 2})


def failed(result: gate.GateResult) -> set[str]:
    return {check.name for check in result.checks if not check.passed}


def test_a_toy_is_a_session() -> None:
    assert isinstance(Toy(table()), Session)


def test_divergence_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - (ln 3) / 2; the reference is indifferent, so the gap is 0."""
    p = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32)) + 7
    q = np.log(np.array([[0.25, 0.75], [0.1, 0.9]], np.float32)) - 5
    kl, agree, gap = gate.divergence(p, q)
    assert kl == pytest.approx([math.log(2) - math.log(3) / 2, 0.8 * math.log(9)], rel=1e-6)
    assert agree.tolist() == [False, False]
    assert gap == pytest.approx([0.0, math.log(9)], abs=1e-6)


def test_equal_sessions_pass() -> None:
    result = compare(Toy(table()), Toy(table()))
    assert result.passed and result.reason == "" and result.positions > 10
    assert result.value("kl mean") == 0 and result.value("top-1") == 1
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["passed"]


def test_what_follows_the_same_tokens_counts_once() -> None:
    """One position that all prompts share is one of many, however many prompts there are."""
    reference = Toy(table())

    def positions(*prompts: str) -> int:
        return gate.check(reference, reference, prompts, gate.FLOAT32, {}, {}).positions

    alone, other = positions("system: one"), positions("system: another one")
    assert positions("system: one", "system: another one") == alone + other - len("system: ")
    assert positions("system: one", "system: one") == alone
    assert positions("system: one", "xsystem: one") == alone + positions("xsystem: one")


def test_logits_that_drift() -> None:
    noisy = table() + np.random.default_rng(1).standard_normal((64, 64)) * 0.1
    result = compare(Toy(table()), Toy(noisy))
    assert {"kl mean", "kl p99"} <= failed(result)
    assert compare(Toy(table()), Toy(noisy), gate.Tolerance(1, 1, 0.5, 1.0)).passed


def test_not_a_number_fails_and_stays_json() -> None:
    broken = table()
    broken[:, 0] = np.nan
    result = compare(Toy(table()), Toy(broken))
    assert {"kl mean", "kl p99"} <= failed(result)
    json.dumps(result.as_dict(), allow_nan=False)


def test_a_near_tie_is_no_fault_and_a_clear_preference_is() -> None:
    """The candidate's second choice becomes its first, everywhere; only the reference's lead decides."""
    for lead, verdict in ((0.01, set()), (0.5, {"top-1", "continuation"})):
        ours, theirs = table(), table()
        for row in range(64):
            second, first = np.argsort(ours[row])[-2:]
            ours[row, first] = ours[row, second] + lead
            theirs[row] = ours[row]
            theirs[row, second] = ours[row, first] + 0.001
        loose = dataclasses.replace(gate.FLOAT32, kl_mean=1.0, kl_p99=1.0)
        assert failed(compare(Toy(ours), Toy(theirs), loose)) == verdict


def test_token_ids() -> None:
    result = compare(Toy(table()), Toy(table(), shift=1))
    assert failed(result) == {"token ids"}
    assert "differs at token 0" in result.reason


def test_stop_ids() -> None:
    assert "stop ids" in failed(compare(Toy(table()), Toy(table(), eos=(5,))))  # misses 3, and 5 is a word
    assert "stop ids" in failed(compare(Toy(table()), Toy(table(), eos=(EOS, 5))))
    reference = Toy(table(), eos=(60,))
    reference.eos = ()
    assert "stop ids" not in failed(compare(reference, Toy(table())))  # <end> is a marker


def test_a_candidate_that_runs_on() -> None:
    ours = np.full((64, 64), -5.0)
    ours[:, EOS] = 5
    theirs = np.full((64, 64), -5.0)
    theirs[:, 9] = 5
    result = compare(Toy(ours), Toy(theirs), gate.Tolerance(99, 99, 0, 1.0))
    assert {"stop", "continuation"} <= failed(result)


def test_a_smaller_vocabulary_is_reported_and_logits_are_left_alone() -> None:
    result = compare(Toy(table()), Toy(table()[:60, :60]))
    assert "vocabulary" in failed(result) and result.positions == 0


def test_facts() -> None:
    expected = {"block_count": 2, "attention.layer_norm_rms_epsilon": 1e-5, "eos": (2, 7), "chat_template": "x" * 99}
    clean = {**expected, "eos": 7, "attention.layer_norm_rms_epsilon": float(np.float32(1e-5)), "extra": 1}
    assert ledger.differences(expected, clean) == []
    wrong = {"block_count": 3, "attention.layer_norm_rms_epsilon": 1e-6, "eos": 5, "pre": "default"}
    told = ledger.differences(expected, wrong)
    assert len(told) == 5 and told[0] == "block_count is 3, not 2" and "absent" in told[3]
    assert all(len(line) < 160 for line in told)


def test_interleave_is_what_rotates_neighbours() -> None:
    """Two heads of four rows: halves (0 1 | 2 3) become pairs 0 2 1 3."""
    rows = np.arange(8).reshape(8, 1)
    assert ledger.interleave(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("types", "rounded", "wanted"),
    [
        ({"F32": 9}, (), gate.FLOAT32),
        ({"F16": 9, "F32": 1}, ("F16",), gate.HALF),
        ({"Q4_0": 9, "F32": 1}, (), gate.BLOCKS),
        ({"Q4_0": 9, "Q8_0": 1}, ("Q8_0",), gate.ROUNDED["Q8_0"]),
        ({"Q4_0": 9, "Q8_0": 1}, ("Q4_0", "Q8_0"), gate.ROUNDED_FAR),
        ({"IQ2_XS": 9}, ("IQ2_XS",), gate.ROUNDED_FAR),
    ],
)
def test_tolerances(types: dict[str, int], rounded: tuple[str, ...], wanted: gate.Tolerance) -> None:
    assert gate.tolerance_for(types, rounded) == wanted


def test_no_text_to_compare_on() -> None:
    with pytest.raises(ConfigError):
        gate.check(Toy(table()), Toy(table()), [""], gate.FLOAT32, {}, {})


def test_enforce(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"x")
    artifact = Artifact((path,), ("",), "gguf", "llama_cpp", "")
    gate.enforce(compare(Toy(table()), Toy(table())), artifact)
    assert path.exists()
    with pytest.raises(GateError, match="token ids") as caught:
        gate.enforce(compare(Toy(table()), Toy(table(), shift=1)), artifact)
    assert "model.rejected.gguf" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model.rejected.gguf"]


def test_the_gate_is_light_to_import() -> None:
    code = "import sys, edgellm_sdk.gate; print({'torch', 'numpy', 'gguf', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
