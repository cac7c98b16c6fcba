"""The kernel of products of LoRA factors against dense arithmetic."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from edgellm_plugins.aggregation import factors
from edgellm_plugins.aggregation.factors import Product
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError

M, N = 23, 17


def clients(ranks: list[int], seed: int = 0, m: int = M, n: int = N) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "x.lora_A": rng.normal(size=(r, n)).astype(np.float32),
            "x.lora_B": rng.normal(size=(m, r)).astype(np.float32),
            "y.lora_A": rng.normal(size=(r, 5)).astype(np.float32),
            "y.lora_B": rng.normal(size=(9, r)).astype(np.float32),
            "norm": rng.normal(size=4).astype(np.float32),
        }
        for r in ranks
    ]


def dense(arrays: dict[str, np.ndarray], module: str = "x") -> np.ndarray:
    return arrays[f"{module}.lora_B"].astype(np.float64) @ arrays[f"{module}.lora_A"].astype(np.float64)


def test_what_is_a_pair_and_what_is_not() -> None:
    arrays = clients([3])[0] | {"z.lora_B": np.zeros((2, 2)), "lora_A": np.zeros((1, 1))}
    assert factors.modules(arrays) == ["x", "y"]
    assert sorted(factors.others(arrays)) == ["lora_A", "norm", "z.lora_B"]
    with pytest.raises(FederationError, match="are no factors of one matrix"):
        factors.factors(arrays | {"x.lora_A": np.zeros((4, N))})
    with pytest.raises(FederationError, match="have no sum"):
        factors.stacked(
            [Product(np.zeros((2, 1)), np.zeros((1, 3))), Product(np.zeros((3, 1)), np.zeros((1, 3)))], [1, 1]
        )


def test_a_worked_example() -> None:
    """[1 2]^T [3 4] and 2 [0 1]^T [1 0]; the mean with weights 1/4 and 3/4 by hand."""
    one = Product(np.array([[1.0], [2.0]]), np.array([[3.0, 4.0]]))
    two = Product(np.array([[0.0], [2.0]]), np.array([[1.0, 0.0]]))
    np.testing.assert_array_equal(factors.stacked([one, two], [0.25, 0.75]).dense(), [[0.75, 1.0], [3.0, 2.0]])
    assert factors.inner(one, two) == 12 and factors.inner(one, one) == 125
    assert two.norm() == pytest.approx(2) and factors.difference(one, two).norm() == pytest.approx(np.sqrt(105))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(0, 1000))
def test_sums_norms_and_inner_products_are_those_of_the_matrices(ranks: list[int], seed: int) -> None:
    several = clients(ranks, seed)
    weights = np.random.default_rng(seed).uniform(size=len(ranks))
    products = [factors.factors(arrays) for arrays in several]
    full = {x: sum(w * dense(arrays, x) for w, arrays in zip(weights, several, strict=True)) for x in "xy"}
    exact = factors.mean(products, list(weights))
    for module, wanted in full.items():
        np.testing.assert_allclose(exact[module].dense(), wanted, atol=1e-12 * (1 + np.abs(wanted).max()))
        assert exact[module].norm() == pytest.approx(np.linalg.norm(wanted), rel=1e-12, abs=1e-12)
    gram = factors.gram(several)
    for i, one in enumerate(several):
        for j, other in enumerate(several):
            wanted = sum(float(np.sum(dense(one, x) * dense(other, x))) for x in "xy")
            wanted += float(one["norm"].astype(np.float64) @ other["norm"].astype(np.float64))
            assert gram[i, j] == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_the_gauge_changes_no_distance() -> None:
    """(B Q, Q^-1 A) is the same update: distances stay, while those between factors are of the order of the norms."""
    several = clients([4, 4, 4])
    q = np.random.default_rng(5).normal(size=(4, 4))
    turned = [dict(arrays) for arrays in several]
    for x in "xy":
        turned[0][f"{x}.lora_B"] = several[0][f"{x}.lora_B"].astype(np.float64) @ q
        turned[0][f"{x}.lora_A"] = np.linalg.solve(q, several[0][f"{x}.lora_A"].astype(np.float64))
    np.testing.assert_allclose(factors.distances(turned), factors.distances(several), rtol=1e-9)
    assert factors.distances([several[0], turned[0]])[0, 1] < 1e-9
    assert np.abs(turned[0]["x.lora_A"] - several[0]["x.lora_A"]).max() > 0.1
    assert np.diag(factors.distances(several)).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("m", "n", "rank"), [(23, 17, 5), (17, 23, 5), (6, 40, 12), (40, 6, 12), (9, 9, 1)])
def test_qr_svd_is_the_dense_svd(m: int, n: int, rank: int) -> None:
    rng = np.random.default_rng(1)
    product = Product(rng.normal(size=(m, rank)), rng.normal(size=(rank, n)))
    u, s, vt = product.svd()
    np.testing.assert_allclose(s, np.linalg.svd(product.dense(), compute_uv=False)[: len(s)], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(u * s @ vt, product.dense(), atol=1e-10)
    np.testing.assert_allclose(vt @ vt.T, np.eye(len(vt)), atol=1e-10)
    cut = factors.best(product, 3)
    lost = np.linalg.norm(cut.dense() - product.dense())
    assert cut.rank <= 3 and lost == pytest.approx(float(np.linalg.norm(s[3:])), rel=1e-9, abs=1e-9)
    twice = Product(product.b @ np.diag(np.full(rank, -2.0)), product.a / -2)
    np.testing.assert_allclose(factors.best(twice, 3).a, cut.a, atol=1e-9)


def test_small_singular_values_and_nothing_at_all() -> None:
    product = Product(np.diag([1.0, 1e-3, 1e-9]), np.eye(3))
    assert [factors.best(product, floor=floor).rank for floor in (0, 1e-8, 1e-2, 2.0)] == [3, 2, 1, 0]
    nothing = Product(np.zeros((4, 0)), np.zeros((0, 3)))
    assert nothing.norm() == 0 and factors.best(nothing).rank == 0 and factors.best(nothing, 2).dense().shape == (4, 3)


def test_factored_is_faster_than_dense() -> None:
    """2,048 x 2,048 of rank 64 in less time than a dense decomposition of a quarter of it; the singular values, to
    1e-5, are the square roots of the eigenvalues of (B^T B)(A A^T)."""
    rng = np.random.default_rng(2)
    product = Product(rng.normal(size=(2048, 64)), rng.normal(size=(64, 2048)))
    began = time.process_time()
    _, s, _ = product.svd()
    factored = time.process_time() - began
    quarter = product.dense()[:1024, :1024]
    began = time.process_time()
    np.linalg.svd(quarter)
    assert factored < time.process_time() - began
    squares = np.linalg.eigvals((product.b.T @ product.b) @ (product.a @ product.a.T)).real
    np.testing.assert_allclose(s, np.sqrt(np.sort(squares)[::-1]), rtol=1e-5)


def test_the_error_of_averaged_factors_has_rank_k_minus_one_r() -> None:
    ranks, weights = [3] * 4, [0.1, 0.2, 0.3, 0.4]
    products = [factors.factors(arrays) for arrays in clients(ranks)]
    ideal, plain = factors.mean(products, weights), factors.averaged(products, weights)
    gap = factors.difference(ideal["x"], plain["x"])
    assert gap.rank == 15 and np.linalg.matrix_rank(gap.dense(), tol=1e-9) == 9
    assert factors.best(gap, floor=1e-9).rank == 9
    full = np.linalg.norm([factors.difference(plain[x], ideal[x]).norm() for x in "xy"])
    whole = np.linalg.norm([np.linalg.norm(ideal[x].dense()) for x in "xy"])
    assert factors.aggregation_error(plain, ideal) == pytest.approx(full / whole) and full / whole > 0.3
    assert factors.aggregation_error(ideal, ideal) < 1e-14
    with pytest.raises(FederationError, match="unlike ranks"):
        factors.averaged([factors.factors(a) for a in clients([2, 3])], [0.5, 0.5])


def test_scaling_both_sides_is_wrong() -> None:
    """p_k on A and on B weighs by p_k squared."""
    products = [factors.factors(arrays)["x"] for arrays in clients([3] * 4)]
    weights = [0.1, 0.2, 0.3, 0.4]
    right = factors.stacked(products, weights)
    both = factors.stacked([Product(p.b, p.a * w) for p, w in zip(products, weights, strict=True)], weights)
    assert factors.aggregation_error({"x": both}, {"x": right}) > 0.5


def test_errors_are_drawn(tmp_path: Path) -> None:
    ctx = Context(tmp_path)
    products = [factors.factors(arrays) for arrays in clients([2, 4])]
    factors.draw_errors(ctx, 1, products, [0.5, 0.5], factors.mean(products, [0.5, 0.5]))
    factors.draw_errors(ctx, 2, products, [0.5, 0.5])
    factors.draw_errors(ctx, 3, [{}, {}], [0.5, 0.5])
    (at, error), (_, plain) = ctx.curves["aggregation error over rounds"]
    assert at == 1 and error < 1e-12 and ctx.curves["error of averaged factors over rounds"] == [(1, plain)]
    halves = [factors.padded(one["x"], 4) for one in products]
    assert halves[0].rank == 4 and np.array_equal(halves[0].dense(), products[0]["x"].dense())
