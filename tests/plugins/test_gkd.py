"""GKD's arithmetic: divergences against their definition, gradients against autograd, what is scored, sequences written
by toys whose sums can be enumerated."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.compression.gkd import Config
from edgellm_plugins.compression.gkd.divergence import Criterion, divergence
from edgellm_plugins.compression.gkd.method import against_others, averaging_weights, on_policy
from edgellm_plugins.compression.gkd.writing import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.random import Stream

KINDS = [("forward-kl", 0.5), ("reverse-kl", 0.5), ("jsd", 0.1), ("jsd", 0.5), ("jsd", 0.9)]


def logits(rows: int, width: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(kind: str, beta: float, p: Tensor, s: Tensor) -> Tensor:
    """Of probabilities (N, V), as the sums are written."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    m = beta * p + (1 - beta) * s
    return {"forward-kl": kl(p, s), "reverse-kl": kl(s, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(s, m)}[kind]


def value(kind: str, beta: float, t: Tensor, z: Tensor) -> Tensor:
    return divergence(kind, beta, t.log_softmax(-1), z.log_softmax(-1))[0]


# Divergences


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("width", [2, 17, 64])
def test_values_and_gradients_are_those_of_autograd_through_the_definition(kind: str, beta: float, width: int) -> None:
    t, z = logits(9, width, 1, 2.0), logits(9, width, 2, 2.0).requires_grad_()
    expected = by_definition(kind, beta, t.softmax(-1), z.softmax(-1))
    (slope,) = torch.autograd.grad(expected.sum(), z)
    found, gradient = divergence(kind, beta, t.log_softmax(-1), z.detach().log_softmax(-1))
    torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-14)


def test_a_divergence_worked_by_hand() -> None:
    """P = (3/4, 1/4), S = (1/2, 1/2), beta = 1/2: M = (5/8, 3/8)."""
    p, s = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.75, 0.25], [0.5, 0.5]))
    ln = math.log
    expected = {
        "forward-kl": 0.75 * ln(1.5) + 0.25 * ln(0.5),
        "reverse-kl": 0.5 * ln(2 / 3) + 0.5 * ln(2),
        "jsd": 0.5 * (0.75 * ln(6 / 5) + 0.25 * ln(2 / 3)) + 0.5 * (0.5 * ln(4 / 5) + 0.5 * ln(4 / 3)),
    }
    for kind, wanted in expected.items():
        assert float(divergence(kind, 0.5, p, s)[0]) == pytest.approx(wanted, rel=1e-14)


NUMBERS = st.lists(st.floats(-8, 8), min_size=5, max_size=5)


@settings(max_examples=60, deadline=None)
@given(NUMBERS, NUMBERS, st.floats(0.01, 0.99))
def test_jsd_is_zero_for_equals_alone_and_at_most_the_entropy_of_beta(
    t: list[float], z: list[float], beta: float
) -> None:
    one, other = (torch.tensor([row], dtype=torch.float64) for row in (t, z))
    found = float(value("jsd", beta, one, other))
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert -1e-14 <= found <= bound + 1e-12
    assert abs(float(value("jsd", beta, one, one + 3.0))) < 1e-14
    apart = float((one.softmax(1) - other.softmax(1)).abs().max())
    assert found >= beta * (1 - beta) * apart**2 / 2 - 1e-14  # Pinsker's, for both parts of the mixture


def test_jsd_is_symmetric_at_one_half_alone_and_bounded_where_nothing_is_shared() -> None:
    t, z = logits(4, 8, 3), logits(4, 8, 4)
    torch.testing.assert_close(value("jsd", 0.5, t, z), value("jsd", 0.5, z, t), rtol=1e-12, atol=0)
    assert (value("jsd", 0.1, t, z) - value("jsd", 0.1, z, t)).abs().max() > 1e-2 * value("jsd", 0.1, t, z).max()
    here, there = torch.tensor([[1e4, 0.0]], dtype=torch.float64), torch.tensor([[0.0, 1e4]], dtype=torch.float64)
    for beta in (0.1, 0.5, 0.9):
        bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert float(value("jsd", beta, here, there)) == pytest.approx(bound, rel=1e-9)
    assert float(value("forward-kl", 0.5, here, there)) == pytest.approx(1e4)


def test_the_limits_of_jsd_are_the_kls_after_scaling() -> None:
    t, z = logits(6, 12, 5), logits(6, 12, 6)
    torch.testing.assert_close(value("jsd", 1e-5, t, z) / 1e-5, value("forward-kl", 0.5, t, z), rtol=1e-3, atol=0)
    torch.testing.assert_close(value("jsd", 1 - 1e-5, t, z) / 1e-5, value("reverse-kl", 0.5, t, z), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("kind", "beta"), [*KINDS, ("forward-kl", 0.0), ("reverse-kl", 1.0)])
def test_trl_computes_the_same(kind: str, beta: float) -> None:
    """Its beta 0 and 1 are the KLs."""
    trainer = pytest.importorskip("trl.experimental.gkd").GKDTrainer
    if kind != "jsd":
        beta = {"forward-kl": 0.0, "reverse-kl": 1.0}[kind]
    t, z = logits(9, 33, 7), logits(9, 33, 8).requires_grad_()
    expected = trainer.generalized_jsd_loss(z[None], t[None], beta=beta, reduction="sum")
    (slope,) = torch.autograd.grad(expected, z)
    found, gradient = divergence(kind, beta, t.log_softmax(-1), z.detach().log_softmax(-1))
    assert float(found.sum()) == pytest.approx(float(expected.detach()), rel=1e-8)
    torch.testing.assert_close(gradient, slope, rtol=1e-6, atol=1e-12)


# The loss of a batch


def positions(n: int = 20, width: int = 50) -> dict[str, Any]:
    """A student of hidden 16 and a teacher of hidden 24 with heads of their own."""
    g = torch.Generator().manual_seed(9)
    heads = [nn.Linear(h, width, bias=False) for h in (16, 24)]
    for head in heads:
        head.weight.data = torch.randn(head.weight.shape, generator=g)
    states = [torch.randn(n, h, generator=g) for h in (16, 24)]
    weights, likelihoods = (torch.rand(n, generator=g) for _ in range(2))
    targets = torch.randint(width, (n,), generator=g)
    return {"heads": heads, "states": states, "weights": weights, "likelihoods": likelihoods, "targets": targets}


@pytest.mark.parametrize("chunk", [1, 7, 20, 64])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_chunks_change_nothing(kind: str, beta: float, chunk: int) -> None:
    """Divergence and likelihood together against float64 autograd through whole logits, within 1e-5."""
    made = positions()
    own, theirs = made["heads"]
    hidden = made["states"][0].double().requires_grad_()
    z = hidden @ own.weight.double().T
    t = made["states"][1].double() @ theirs.weight.double().T
    d = by_definition(kind, beta, t.softmax(-1), z.softmax(-1))
    nll = -z.log_softmax(-1).gather(1, made["targets"][:, None])[:, 0]
    expected = (made["weights"] * d).sum() + (made["likelihoods"] * nll).sum()
    expected.backward()
    criterion = Criterion(
        kind, beta, made["targets"], own, chunk, made["weights"], made["states"][1], theirs, made["likelihoods"]
    )
    loss, gradient = criterion(made["states"][0])
    assert hidden.grad is not None
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float((gradient - hidden.grad).norm() / hidden.grad.norm()) < 1e-5


class Rows(TorchDispatchMode):
    """The most rows of any tensor of `width` columns that an operation makes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and out.shape[1] == self.width and "t.default" not in str(func):
            self.most = max(self.most, len(out))
        return out


def test_logits_never_exist_for_more_than_a_chunk() -> None:
    made = positions(n=90, width=101)
    own, theirs = made["heads"]
    with Rows(101) as seen:
        Criterion("jsd", 0.5, made["targets"], own, 8, made["weights"], made["states"][1], theirs)(made["states"][0])
    assert seen.most == 8


def test_means_over_completions_and_over_tokens() -> None:
    rows = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    expected = [1 / 12] * 4 + [1 / 3] + [1 / 6] * 2
    assert averaging_weights(rows, "sequence").tolist() == pytest.approx(expected)
    assert averaging_weights(rows, "token").tolist() == pytest.approx([1 / 7] * 7)


def test_likelihood_alone_is_cross_entropy() -> None:
    made = positions()
    rows = torch.zeros(20, dtype=torch.long)
    criterion = Criterion(
        "likelihood", 0.5, made["targets"], made["heads"][0], 6, likelihoods=averaging_weights(rows, "sequence")
    )
    loss, gradient = criterion(made["states"][0])
    hidden = made["states"][0].clone().requires_grad_()
    expected = nn.functional.cross_entropy(made["heads"][0](hidden), made["targets"])
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-5, atol=1e-7)


# What is written


def test_tokens_are_drawn_from_the_softmax() -> None:
    z = torch.tensor([[0.0, math.log(2), -math.inf, math.log(5)]]).repeat(80_000, 1)
    for temperature, powers in ((1.0, [1, 2, 0, 5]), (0.5, [1, 4, 0, 25])):
        counts = torch.bincount(drawn(z, temperature, Stream(3, "draw")), minlength=4).double() / len(z)
        p = torch.tensor(powers, dtype=torch.float64) / sum(powers)
        error = (p * (1 - p) / len(z)).sqrt()
        assert ((counts - p).abs() <= 3 * error).all(), (counts, p)
    assert drawn(z[:2], 0.0, Stream(3, "draw")).tolist() == [3, 3]


def test_the_coin_falls_as_often_as_lambda_says() -> None:
    ctx = Context(None, seed=11)  # type: ignore[arg-type]
    share = sum(on_policy(step, Config(on_policy=0.3), ctx) for step in range(10_000)) / 10_000
    assert abs(share - 0.3) <= 0.015
    assert not any(on_policy(step, Config(on_policy=0.0), ctx) for step in range(1000))
    assert all(on_policy(step, Config(on_policy=1.0), ctx) for step in range(1000))


# Toys


def bigram(seed: int, symbols: int = 3) -> Tensor:
    """Logits of the next symbol: row 0 for the first one, row 1 + y after y."""
    return logits(symbols + 1, symbols, seed)


def sequence_log_probability(table: Tensor, sequence: tuple[int, ...]) -> float:
    log_p = table.log_softmax(1)
    return sum(float(log_p[0 if n == 0 else 1 + sequence[n - 1], y]) for n, y in enumerate(sequence))


def test_summed_over_tokens_reverse_kl_is_that_of_sequences() -> None:
    """Chain rule: all 81 sequences of 4 of 3 symbols, and 50 000 that the student writes."""
    student, teacher = bigram(1), bigram(2)
    each = value("reverse-kl", 0.5, teacher, student)  # in every context
    exact = expected = 0.0
    for sequence in itertools.product(range(3), repeat=4):
        own, theirs = (sequence_log_probability(table, sequence) for table in (student, teacher))
        exact += math.exp(own) * (own - theirs)
        expected += math.exp(own) * sum(float(each[0 if n == 0 else 1 + sequence[n - 1]]) for n in range(4))
    assert expected == pytest.approx(exact, abs=1e-10)
    context, sums, stream = torch.zeros(50_000, dtype=torch.long), torch.zeros(50_000), Stream(5, "written")
    for _ in range(4):
        sums += each[context].float()
        context = 1 + drawn(student[context], 1.0, stream)
    assert abs(float(sums.mean()) - exact) <= 3 * float(sums.std()) / math.sqrt(len(sums))


def test_the_rewards_gradient_is_that_of_the_expected_reward() -> None:
    """A bandit (L = 1) with alpha = 0: minus the analytic gradient of E[r], S_i (r_i - E[r]), within 3 errors."""
    z, rewards = logits(1, 3, 6).float(), torch.tensor([0.1, 0.9, 0.4])
    s = z.softmax(1)[0]
    analytic = -s * (rewards - (s * rewards).sum())
    identity = nn.Linear(3, 3, bias=False)
    identity.weight.data = torch.eye(3)
    stream, found = Stream(8, "bandit"), []
    for _ in range(4000):
        chosen = drawn(z.repeat(4, 1), 1.0, stream)
        advantages = against_others(rewards[chosen].double())
        criterion = Criterion("jsd", 0.5, chosen, identity, 64, likelihoods=(advantages / 4).float())
        found.append(criterion(z.repeat(4, 1))[1].sum(0))
    gradients = torch.stack(found)
    error = gradients.std(0) / math.sqrt(len(gradients))
    assert ((gradients.mean(0) - analytic).abs() <= 3 * error).all()
    assert (analytic.abs() > 5 * error).all()  # it could tell
    assert against_others(torch.tensor([0.7])).tolist() == pytest.approx([0.7])  # alone: no baseline


SYMBOLS, LENGTH = 16, 12


class Chains:
    """Teacher: a chain of order 2 (its next symbol depends on two before). Student: order 1, a table of logits.
    Sequences begin after symbol 0, 0."""

    def __init__(self, seed: int) -> None:
        self.teacher = logits(SYMBOLS * SYMBOLS, SYMBOLS, seed, 2.0).view(SYMBOLS, SYMBOLS, SYMBOLS)

    def write(self, table: Tensor | None, count: int, stream: Stream) -> Tensor:
        """(count, 2 + LENGTH) symbols by the teacher, or by a student's table."""
        y = torch.zeros(count, 2, dtype=torch.long)
        for _ in range(LENGTH):
            z = self.teacher[y[:, -2], y[:, -1]] if table is None else table[y[:, -1]]
            y = torch.cat([y, drawn(z, 1.0, stream)[:, None]], 1)
        return y

    def slope(self, kind: str, table: Tensor, y: Tensor) -> Tensor:
        """Gradient by the table of the mean over sequences of the mean over symbols."""
        before, last = y[:, :-2].flatten(), y[:, 1:-1].flatten()
        _, gradient = divergence(kind, 0.5, self.teacher[before, last].log_softmax(1), table[last].log_softmax(1))
        return torch.zeros_like(table).index_add_(0, last, gradient / len(last))

    def reverse_kl(self, table: Tensor) -> float:
        """KL of whole sequences, student's first: the expectation of each symbol's by the student's own contexts."""
        each = value("reverse-kl", 0.5, self.teacher.view(-1, SYMBOLS), table.repeat(SYMBOLS, 1)).view(SYMBOLS, SYMBOLS)
        joint, s, total = torch.zeros(SYMBOLS, SYMBOLS, dtype=torch.float64), table.softmax(1), 0.0
        joint[0, 0] = 1.0
        for _ in range(LENGTH):
            total += float((joint * each).sum())
            joint = joint.sum(0)[:, None] * s
        return total

    def gold_loss(self, table: Tensor) -> float:
        """Cross-entropy of a symbol under the student on the teacher's sequences, exactly."""
        p, log_s = self.teacher.softmax(2), table.log_softmax(1)
        joint, total = torch.zeros(SYMBOLS, SYMBOLS, dtype=torch.float64), 0.0
        joint[0, 0] = 1.0
        for _ in range(LENGTH):
            flow = joint[:, :, None] * p
            total -= float((flow.sum(0) * log_s).sum())
            joint = flow.sum(0)
        return total / LENGTH


@pytest.mark.parametrize("seed", [21, 22, 23])
def test_on_its_own_text_a_student_comes_nearer_to_its_teacher_and_on_the_teachers_it_predicts_it_better(
    seed: int,
) -> None:
    """The toy of exposure bias: 500 steps of 16 sequences each, Adam, one rate for both. Whole sequences are nearer on
    the student's own text, the teacher's text is predicted better on that text."""
    chains = Chains(seed)
    ended: dict[str, Tensor] = {}
    for kind, own in (("reverse-kl", True), ("forward-kl", False)):
        table = torch.zeros(SYMBOLS, SYMBOLS, dtype=torch.float64)
        m, v = torch.zeros_like(table), torch.zeros_like(table)
        for step in range(500):
            g = chains.slope(kind, table, chains.write(table if own else None, 16, Stream(4, kind, step)))
            m.lerp_(g, 0.1)
            v.lerp_(g * g, 0.001)
            table -= 0.05 * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        ended[kind] = table
    reverse = {kind: chains.reverse_kl(table) for kind, table in ended.items()}
    gold = {kind: chains.gold_loss(table) for kind, table in ended.items()}
    print(f"sequence KL(S|T): {reverse}; gold loss: {gold}")
    assert reverse["reverse-kl"] < reverse["forward-kl"]
    assert gold["forward-kl"] < gold["reverse-kl"]


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0}, "beta: jsd is 0"),
        ({"beta": 1}, "beta: jsd is 0"),
        ({"divergence": "likelihood"}, "on-policy: a student learns nothing"),
        ({"reward": "f1", "on_policy": 0}, "reward: only steps on what the student writes"),
        ({"new_tokens": 121, "max_length": 128}, "new-tokens: 121 of 128 leave no room"),
        ({"divergence": "kl"}, "forward-kl, reverse-kl, jsd, likelihood"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(Config, options, "gkd")


def test_what_is_never_written_may_be_long() -> None:
    build(Config, {"on_policy": 0, "new_tokens": 500, "divergence": "forward-kl"}, "gkd")
    assert np.isclose(build(Config, {"divergence": "reverse-kl", "beta": 1}, "gkd").beta, 1)
