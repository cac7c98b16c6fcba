"""What the estimates of the seed methods are: their moments, their order, their expectation, their scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.samplers import Dense, LowRank
from edgellm_plugins.zeroth_order.trajectory import sgd
from seed_method_cases import Llama64, Vector, dataset, drawn_ahead, no_data, vector

from edgellm_sdk import models
from edgellm_sdk.kit import noise
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.types import Dataset


@pytest.fixture(scope="module")
def llama64(tiny_llama: Path) -> Llama64:
    return Llama64(models.resolve(str(tiny_llama)), dataset(6))


@pytest.mark.parametrize("n", [1, 10])
def test_moments_of_4000_estimates(n: int) -> None:
    """mezo.md check 1 at its size: E|g|^2 = (d + n + 1) / n |v|^2, |mean - v| / |v| = sqrt((d + 1) / (4000 n))."""
    d, count = 1000, 4000
    v = np.random.default_rng(0).normal(size=d)
    v /= np.linalg.norm(v)
    space, estimate = vector(lambda x: float(v @ x), d), differences.central(1e-2)
    total, squares = np.zeros(d), []
    for first in range(0, count * n, 4000):
        with drawn_ahead("gaussian", range(first, first + 4000), "x", d):
            for k in range(first, first + 4000, n):
                seeds = list(range(k, k + n))
                scalars = estimate(space, "b", no_data, seeds).scalars
                g = scalars.astype(float) @ [noise.take("gaussian", seed, "x", d) for seed in seeds]
                total += g
                squares.append(float(g @ g))
    assert len(squares) == count
    assert np.mean(squares) == pytest.approx((d + n + 1) / n, rel=0.05)
    assert np.linalg.norm(total / count - v) == pytest.approx(((d + 1) / (n * count)) ** 0.5, rel=0.1)


class Weights64:
    """Every weight of a float64 model as the space of an estimate."""

    def __init__(self, llama: Llama64) -> None:
        self.llama = llama
        self.sampler = Dense("gaussian", {name: value.shape for name, value in llama.theta.items()})

    def z(self, seed: int) -> dict[str, np.ndarray]:
        return {name: self.sampler.draw(name, value, seed) for name, value in self.llama.theta.items()}

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[tuple[int, float]]) -> np.ndarray:
        return self.llama.at(self.llama.theta, [self.z(seed) for seed, _ in points], [c for _, c in points])


@pytest.mark.parametrize("seed", range(4, 9))
def test_the_error_is_second_order_on_a_llama_in_float64(llama64: Llama64, seed: int) -> None:
    """mezo.md check 2: a tenth of eps leaves a hundredth of a central difference's error, a tenth of a one-sided one's,
    which is not good enough for the bound of the first."""
    space = Weights64(llama64)
    exact = llama64.slope(space.z(seed))

    def ratio(make: Callable[[float], Any]) -> float:
        big, small = (abs(float(make(eps)(space, "b", no_data, [seed]).scalars[0]) - exact) for eps in (1e-4, 1e-5))
        return big / small

    assert 80 < ratio(differences.central) < 120
    one_sided = ratio(differences.one_sided)
    assert 7 < one_sided < 14
    assert not 80 < one_sided < 120


@pytest.mark.parametrize("n", [3, 4])
def test_several_directions_are_the_mean_of_single_ones(n: int) -> None:
    """mezo.md check 7: the scalars to the last bit of float64 before they are rounded, and the step."""
    draw = np.random.default_rng(0)
    v, eps, eta, seeds = draw.normal(size=50), 0.01, 0.1, [5, 6, 7, 8][:n]
    start = draw.normal(size=50).astype(np.float32)

    def loss(x: np.ndarray) -> float:
        return float(np.sin(x + v).sum())

    def space() -> Vector:
        return Vector(loss, start, Dense("gaussian", {"x": (50,)}))

    together = differences.central(eps)(space(), "b", no_data, seeds).scalars
    z = [noise.take("gaussian", seed, "x", 50).astype(np.float64) for seed in seeds]
    slopes = np.array([(loss(start + eps * each) - loss(start - eps * each)) / (2 * eps) for each in z])
    assert np.array_equal(together, np.float32(slopes / n))

    moved, singles = space(), []
    moved.step(sgd(seeds, together.tolist(), eta))
    for seed in seeds:
        one = space()
        one.step(sgd([seed], differences.central(eps)(one, "b", no_data, [seed]).scalars.tolist(), eta))
        singles.append(one.theta.astype(np.float64))
    wanted = np.mean(singles, axis=0)
    assert np.abs(moved.theta - wanted).max() <= 1e-7 * np.linalg.norm(start)
    assert np.abs(wanted - start).max() > 0.01


SHAPE, DRAWS = (8, 6), 20_000
THETA = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)
G = np.random.default_rng(1).normal(size=SHAPE)


def expectation(sampler: Any, name: str, ahead: str, elements: int, kind: str = "gaussian", step: bool = False) -> Any:
    """The mean of z <z, G> over the sampler's own draws; `ahead` names the noise that they are made of."""
    total = np.zeros(SHAPE)
    with drawn_ahead(kind, range(DRAWS), ahead, elements):
        for seed in range(DRAWS):
            if step:
                sampler.at(seed)
            z = sampler.draw(name, THETA, seed)
            total += z * float((z * G).sum())
    return total / DRAWS


def gap(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_the_expectation_is_the_gradient_or_the_stated_part_of_it() -> None:
    """zo_extensions.md check 2 on a linear loss with gradient G: G; G under the mask; G times the share of layers."""
    fair = expectation(Dense("rademacher", {"w": SHAPE}), "w", "w", 48, "rademacher")
    assert gap(fair, G) < 0.12

    mask = np.abs(THETA) <= 0.5
    sparse = expectation(Dense("gaussian", {"w": SHAPE}, limits={"w": 0.5}), "w", "w", 48)
    assert gap(sparse, G * mask) < 0.12 and not sparse[~mask].any()
    assert gap(sparse, G) > 0.5

    halved = expectation(Dense("gaussian", {"w.0.x": SHAPE}, share=0.5), "w.0.x", "w.0.x", 48)
    assert gap(halved, 0.5 * G) < 0.12 and gap(halved, G) > 0.3


def test_the_expectation_of_a_low_rank_direction() -> None:
    """zo_extensions.md check 2: G V V^T while V is kept, r G when every step has a V of its own."""
    kept = LowRank(2, {"w": SHAPE}, 11, 10**9)
    v = kept.basis("w").numpy().astype(np.float64).T
    found = expectation(kept, "w", "w/U", 16)
    assert gap(found, G @ v @ v.T) < 0.12 and gap(found, 2 * G) > 0.3
    assert gap(expectation(LowRank(2, {"w": SHAPE}, 11, 1), "w", "w/U", 16, step=True), 2 * G) < 0.12


def test_fzoo_moves_alike_whatever_the_scale_of_the_loss() -> None:
    """zo_extensions.md check 3: 100 times the loss, and the same scalars and theta to 1e-6; as MeZO's are not."""
    d, n, eta = 4000, 8, 0.01
    v = np.random.default_rng(0).normal(size=d)

    def step(estimate: Any, scale: float, seeds: list[int]) -> tuple[np.ndarray, np.ndarray]:
        space = vector(lambda x: scale * float(v @ x), d, "rademacher")
        scalars = estimate(space, "b", no_data, seeds).scalars
        space.step(Move(tuple(seeds), tuple(-eta * scalars)))
        return scalars, space.theta

    for k in range(25):
        seeds = list(range(k * n, k * n + n))
        (one, here), (many, there) = (step(differences.normalised(1e-3), scale, seeds) for scale in (1, 100))
        np.testing.assert_allclose(many, one, rtol=1e-6)
        np.testing.assert_allclose(there, here, rtol=1e-6, atol=1e-6 * float(np.abs(here).max()))
    plain, hundredfold = (step(differences.one_sided(1e-3), scale, seeds)[0] for scale in (1, 100))
    np.testing.assert_allclose(hundredfold, 100 * plain, rtol=1e-3)
