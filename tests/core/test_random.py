"""The random streams: published known answers, statistics, addressing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk import random
from edgellm_sdk.random import Stream


def test_philox_known_answers() -> None:
    """Random123's kat_vectors for philox4x32-10: zero counter and key; and key (a4093822, 299f31d0) by hand below."""
    assert [hex(int(x)) for x in random.blocks(0, 0, 1)[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def reference_block(key: int, counter: int) -> list[int]:
    """Philox4x32-10 once more, in plain integers."""
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k1, p0 & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40))
@settings(max_examples=50, deadline=None)
def test_blocks_equal_plain_integer_philox(key: int, start: int) -> None:
    assert random.blocks(key, start, 3).tolist() == [reference_block(key, start + i) for i in range(3)]


@given(st.integers(0, 2**64 - 1), st.integers(0, 100), st.integers(1, 100))
@settings(max_examples=50, deadline=None)
def test_any_stretch_can_be_computed_alone(key: int, offset: int, count: int) -> None:
    assert np.array_equal(random.normal(key, count, offset), random.normal(key, offset + count)[offset:])


def test_normal_statistics() -> None:
    x = random.normal(7, 1_000_000).astype(np.float64)
    assert abs(x.mean()) < 4e-3 and x.std() == pytest.approx(1, abs=4e-3)
    assert (x**4).mean() == pytest.approx(3, abs=0.03)
    grid = np.linspace(-3, 3, 61)
    from statistics import NormalDist

    normal = NormalDist()
    empirical = np.searchsorted(np.sort(x), grid) / len(x)
    assert max(abs(e - normal.cdf(g)) for e, g in zip(empirical, grid, strict=True)) < 1.63 / 1000  # KS, p = 0.01


def test_table_has_unit_variance_and_is_symmetric() -> None:
    table = random.normal_table().astype(np.float64)
    assert np.array_equal(table, -table[::-1])
    assert (table**2).mean() == pytest.approx(1, abs=1e-6)


def test_streams_with_other_names_indices_and_seeds_differ() -> None:
    draws = {Stream(s, n, i).bits(2).tobytes() for s in (0, 1) for n in ("a", "b") for i in (0, 1)}
    assert len(draws) == 8


@given(st.integers(1, 200), st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_permutation_and_sample(count: int, seed: int) -> None:
    assert sorted(Stream(seed, "p").permutation(count).tolist()) == list(range(count))
    chosen = Stream(seed, "s").sample(list(range(count)), count // 2)
    assert chosen == sorted(set(chosen)) and len(chosen) == count // 2


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
def test_gamma_moments(alpha: float) -> None:
    g = Stream(3, "g").gamma(alpha, 200_000)
    assert g.mean() == pytest.approx(alpha, rel=0.03) and g.var() == pytest.approx(alpha, rel=0.06)


def test_uniform_is_in_the_half_open_interval() -> None:
    u = Stream(3, "u").uniform(100_000)
    assert u.min() >= 0 and u.max() < 1 and u.mean() == pytest.approx(0.5, abs=0.005)
