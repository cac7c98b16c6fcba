"""The noise bank: the same bits in numpy and torch, statistics of independent draws, exact and replayable moves."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from edgellm_sdk.kit import noise
from edgellm_sdk.kit.noise import BLOCK, Move, Noise

SIZE = 2 * BLOCK + 12_345
SHAPE = (SIZE // 5, 5)


PINNED = {
    "gaussian": ("bank20-gaussian/2/df49c715", "f174c88d35bb0215", "829cdd9a5c0d0b7b"),
    "rademacher": ("bank20-rademacher/2/3ec07e4f", "ef521198dbc75285", "bfe4471e7aa43ebd"),
}
PINNED_ROUNDING = "f1b6da5feeb38a7c"


def weights(size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, size).astype(np.float32)


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


def test_the_bits_are_pinned() -> None:
    """A change of one of these breaks the replay of every log there is: give the noise a new id instead."""
    found = {
        kind: (noise.noise_id(kind), sha(noise.bank(kind)), sha(noise.take(kind, 7, "w", SIZE))) for kind in noise.KINDS
    }
    assert found == PINNED
    assert sha(noise.rounding_bank().astype(np.int32)) == PINNED_ROUNDING


MOVES = (
    Move((3,), (0.5,)),
    Move((3, 1 << 63, 5), (0.5, -1e-3, 2.0), decay=0.01),
    Move((3, 4), (0.5, -1e-3), second=(0.1, 0.3)),
)


@pytest.mark.parametrize("kind", noise.KINDS)
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("limit", [np.inf, 0.02])
def test_numpy_and_torch_move_alike_on_one_and_two_threads(kind: str, move: Move, limit: float) -> None:
    wanted = weights()
    noise.move(kind, wanted, "w", move, limit)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            tensor = torch.from_numpy(weights())
            Noise(kind, {"a": 10, "w": SIZE}).move(tensor, "w", move, limit)
            assert torch.equal(tensor, torch.from_numpy(wanted))
    finally:
        torch.set_num_threads(threads)


def test_a_move_is_what_it_says() -> None:
    start, z = weights(), {seed: noise.take("gaussian", seed, "w", SIZE).astype(np.float64) for seed in (3, 4)}
    plain, adam = weights(), weights()
    noise.move("gaussian", plain, "w", Move((3, 4), (0.5, -1e-3), decay=0.01))
    np.testing.assert_allclose(plain, 0.99 * start + 0.5 * z[3] - 1e-3 * z[4], atol=1e-6)
    noise.move("gaussian", adam, "w", Move((3, 4), (0.5, -1e-3), second=(0.1, 0.3)))
    ratio = (0.5 * z[3] - 1e-3 * z[4]) / (np.sqrt(0.1 * z[3] ** 2 + 0.3 * z[4] ** 2) + 1e-8)
    np.testing.assert_allclose(adam, start + ratio, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shifted_parts_and_rows_are_pieces_of_one_direction(dtype: torch.dtype) -> None:
    made = Noise("gaussian", {"w": SHAPE[0] * SHAPE[1]})
    weight = torch.from_numpy(weights(SHAPE[0] * SHAPE[1])).view(SHAPE).to(dtype)
    before = weight.clone()
    z = torch.from_numpy(noise.take("gaussian", 9, "w", weight.numel())).view(SHAPE)
    wanted = (weight.float() + 0.25 * z).to(dtype)
    whole, part = torch.empty_like(weight), torch.empty_like(weight[:40_000])
    made.shifted(weight, 9, "w", 0.25, whole)
    made.shifted(weight[30_000:70_000], 9, "w", 0.25, part, start=30_000 * SHAPE[1])
    assert torch.equal(whole[30_000:70_000], part)
    torch.testing.assert_close(whole, wanted, atol=2 * torch.finfo(dtype).eps, rtol=2 * torch.finfo(dtype).eps)
    rows = torch.tensor([0, BLOCK // 5, 55_555, SHAPE[0] - 1])
    assert torch.equal(made.rows(9, "w", SHAPE[1], rows), z[rows])
    masked = torch.empty_like(weight)
    made.shifted(weight, 9, "w", 0.25, masked, limit=0.01)
    still = weight.abs() > 0.01
    assert torch.equal(masked[still], weight[still]) and torch.equal(masked[~still], whole[~still])
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", noise.KINDS)
def test_moments_over_seeds(kind: str) -> None:
    """Mean 0 and covariance 1 on watched elements of two blocks, neighbours and a far pair; 4 standard errors."""
    n, watched = 4000, [0, 1, 17, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5]
    where, signs = noise.places(list(range(n)), "w", SIZE)
    bank = noise.bank(kind)
    drawn = np.stack([bank[where[:, i // BLOCK] + i % BLOCK] * signs[:, i // BLOCK] for i in watched], 1).astype(float)
    assert np.array_equal(drawn[5], noise.take(kind, 5, "w", SIZE)[watched])
    assert np.abs(drawn.mean(0)).max() < 4 / n**0.5
    fourth = 3 if kind == "gaussian" else 1
    spread = np.where(np.eye(len(watched)), (fourth - 1 + 1e-3) ** 0.5, 1) / n**0.5
    assert (np.abs(drawn.T @ drawn / n - np.eye(len(watched))) < 4 * spread + 1e-6).all()


def test_the_spread_of_an_estimate_is_that_of_independent_normals() -> None:
    """E|g|^2 = (d + 2) |v|^2 for one direction and a linear loss of slope v, also across blocks."""
    for d in (1000, 3 * BLOCK // 2):
        v = np.random.default_rng(1).normal(size=d)
        v /= np.linalg.norm(v)
        squares = []
        for seed in range(4000 if d == 1000 else 60):
            z = noise.take("gaussian", seed, "w", d).astype(np.float64)
            squares.append((v @ z) ** 2 * (z @ z) / (d + 2))
        error = 4 * np.std(squares) / len(squares) ** 0.5
        assert abs(np.mean(squares) - 1) < error < 0.8
    assert error  # both sizes ran


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_the_mean_of_tiny_steps(dtype: torch.dtype) -> None:
    """1 000 steps of a hundredth of the spacing move by ten spacings on average, where nearest rounding stays put."""
    start, steps, count = 0.02, 1000, 4096
    spacing = float(torch.finfo(dtype).eps) * 2**-6
    made, weight = Noise("gaussian", {"w": count}), torch.full((count,), start, dtype=dtype)
    first = float(weight[0])
    for step in range(steps):
        place = noise.rounding_places(Move((step,), (1.0,)), "w", 1)[0]
        made.add(weight, torch.full((count,), spacing / 100), 1.0, place)
    moved = (weight.double() - first).mean() / spacing
    assert float(moved) == pytest.approx(10, abs=4 * 10**0.5 / 64)
    nearest = torch.full((count,), start, dtype=dtype)
    assert torch.equal((nearest.float() + spacing / 100).to(dtype), nearest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decay_below_the_spacing_of_a_16_bit_weight_is_kept_in_the_mean(dtype: torch.dtype) -> None:
    """200 moves that shrink by 1e-3 each, where bfloat16 alone would lose every one of them."""
    made, weight = Noise("gaussian", {"w": SIZE}), torch.full((SIZE,), 0.02, dtype=dtype)
    for seed in range(200):
        made.move(weight, "w", Move((seed,), (0.0,), decay=1e-3))
    assert float(weight.float().mean()) == pytest.approx(float(torch.tensor(0.02, dtype=dtype)) * 0.999**200, rel=2e-3)
