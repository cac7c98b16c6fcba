"""GPTQ against what can be worked out without it: explicit OBQ, traces, plain rounding, stored bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from edgellm_plugins.compression.gptq import Config, method
from edgellm_plugins.compression.gptq.method import Gptq, inverse_factor, refit, row_errors, sweep
from edgellm_plugins.compression.gptq.uniform import Uniform
from edgellm_plugins.compression.layerwise import Group
from edgellm_sdk.config import build
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import blocks, gptq_format
from edgellm_sdk.kit.blocks import Lattice, Parameters

BLOCK_FORMATS = tuple(blocks.FORMATS)


def problem(columns: int, rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random weights (c, r) and the Hessian of correlated inputs with a few loud channels."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=g, dtype=torch.float64) @ (mix + 0.3 * torch.eye(columns))
    x *= torch.logspace(-0.5, 0.7, columns, dtype=torch.float64)[torch.randperm(columns, generator=g)]
    weights = torch.randn(columns, rows, generator=g, dtype=torch.float64) * 0.1
    return weights.to(dtype), (2 * x.t() @ x / len(x)).to(dtype)


class Fixed:
    """One scale for everything, so that no group reads current values."""

    def __init__(self, columns: int, step: float = 0.05) -> None:
        self.group, self.step = columns, step

    def fit(self, columns: Tensor, omega: Tensor) -> Parameters:
        return Parameters.of(torch.full_like(columns[0], self.step))

    def level(self, weights: Tensor, p: Parameters) -> Tensor:
        return (weights * p.inverse).round_().clamp_(-8, 7)

    def basis(self, levels: Tensor) -> Tensor:
        return levels

    def value(self, levels: Tensor, p: Parameters) -> Tensor:
        return levels * p.scale


class Stale:
    """A grid whose scales come from the weights before the sweep, as the paper's code has them inside a lazy block."""

    def __init__(self, grid: Lattice | Uniform, original: Tensor, block: int) -> None:
        self.inner, self.group, self.original, self.at, self.block = grid, grid.group, original, 0, block

    def fit(self, columns: Tensor, omega: Tensor) -> Parameters:
        """The first group of a lazy block is current in that code as well."""
        first = self.at % self.block == 0
        read = columns if first else self.original[self.at : self.at + len(columns)]
        self.at += len(columns)
        return self.inner.fit(read, omega)

    def level(self, weights: Tensor, p: Parameters) -> Tensor:
        return self.inner.level(weights, p)

    def basis(self, levels: Tensor) -> Tensor:
        return self.inner.basis(levels)

    def value(self, levels: Tensor, p: Parameters) -> Tensor:
        return self.inner.value(levels, p)


def brute_force_obq(weights: Tensor, hessian: Tensor, step: float) -> Tensor:
    """OBQ in index order by its definition: invert H over the remaining columns afresh before every column."""
    w = weights.clone()
    for j in range(len(w)):
        inverse = torch.linalg.inv(hessian[j:, j:])
        rounded = (w[j] / step).round().clamp(-8, 7) * step
        w[j:] -= torch.outer(inverse[:, 0], (w[j] - rounded) / inverse[0, 0])
        w[j] = rounded
    return w


def test_the_factor_holds_the_inverses_of_every_remaining_set() -> None:
    _, hessian = problem(12, 1)
    factor, damped = inverse_factor(hessian, 0.0)
    assert torch.equal(factor, factor.triu()) and torch.equal(damped, hessian)
    for j in range(12):
        left = torch.linalg.inv(hessian[j:, j:])
        assert torch.allclose(factor[j, j:], left[0] / left[0, 0].sqrt(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("columns", [4, 8, 16])
@pytest.mark.parametrize("block", [1, 8, 32])
def test_sweep_equals_brute_force_obq(columns: int, block: int) -> None:
    weights, hessian = problem(columns, 9, seed=columns)
    factor, _ = inverse_factor(hessian, 0.0)
    grid = Fixed(columns)
    got = sweep(weights, factor, grid, block).values(grid)
    assert torch.allclose(got, brute_force_obq(weights, hessian, grid.step), atol=1e-6, rtol=0)


def test_the_lazy_block_changes_nothing() -> None:
    weights, hessian = problem(96, 40)
    factor, _ = inverse_factor(hessian, 0.01)
    grid = Lattice("q4_0")
    results = [sweep(weights, factor, grid, b).levels for b in (1, 32, 64, 96)]
    assert all(torch.equal(results[0], other) for other in results[1:])
    whole = Uniform(4, True, 96, True)
    results = [sweep(weights, factor, whole, b).levels for b in (1, 8, 32, 96)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("fmt", BLOCK_FORMATS)
def test_with_uncorrelated_inputs_it_is_plain_rounding(fmt: str) -> None:
    weights, _ = problem(64, 20, dtype=torch.float32)
    grid = Lattice(fmt)
    factor, _ = inverse_factor(torch.eye(64), 0.0)
    swept = sweep(weights, factor, grid, 128)
    plain = [grid.level(part, grid.fit(part, torch.ones(32))) for part in weights.split(32)]
    assert torch.equal(swept.levels, torch.cat(plain))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_with_uncorrelated_inputs_integers_are_plain_rounding(bits: int, symmetric: bool) -> None:
    """Also for any orthogonal X: H = 2 X X^T is a multiple of the identity."""
    weights, _ = problem(64, 20, dtype=torch.float32)
    grid = Uniform(bits, symmetric, 32, search=False)
    orthogonal = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).double())[0]
    for hessian in (torch.eye(64), (2 * orthogonal @ orthogonal.t()).round(decimals=6).float()):
        factor, _ = inverse_factor(hessian, 0.0)
        swept = sweep(weights, factor, grid, 128)
        plain = [grid.level(part, grid.fit(part, torch.ones(32))) for part in weights.split(32)]
        assert torch.equal(swept.levels, torch.cat(plain))


@pytest.mark.parametrize("grid", [Lattice("q4_0"), Lattice("q4_1"), Uniform(3, False, 32, True)], ids=str)
def test_the_compensated_errors_add_up_to_the_layer_objective(grid: Lattice | Uniform) -> None:
    weights, hessian = problem(96, 30)
    factor, _ = inverse_factor(hessian, 0.0)
    swept = sweep(weights, factor, grid, 64)
    objective = row_errors(weights - swept.values(grid), hessian)
    assert torch.allclose(swept.loss, objective, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "int2", "int3", "int4", "int8"])
def test_it_beats_round_to_nearest_on_correlated_inputs(name: str) -> None:
    weights, hessian = problem(192, 64, dtype=torch.float32)
    for symmetric in (True, False) if name.startswith("int") else (True,):
        gptq = Gptq(Config(format=name, symmetric=symmetric))
        record = gptq.solve(Group(0, ("layer",), (weights.t().contiguous(),), hessian, 768)).records[0]
        assert record["gptq"] < 0.8 * record["rtn"], record


STALE = [*map(Lattice, BLOCK_FORMATS), Uniform(4, True, 32, True), Uniform(3, False, 32, True)]


@pytest.mark.parametrize("grid", STALE, ids=[*BLOCK_FORMATS, "int4", "int3"])
def test_current_scales_beat_stale_ones(grid: Lattice | Uniform) -> None:
    """At g = 32 and B = 128, summed over layers: 1 to 7 % for the searched grids. (With the paper's min-max in place of
    a search the wider range of compensated values eats the gain: measured between 7 % worse and 1 % better.)"""
    current = stale = 0.0
    for seed in range(6):
        weights, hessian = problem(256, 64, seed)
        factor, _ = inverse_factor(hessian, 0.01)
        current += float(row_errors(weights - sweep(weights, factor, grid, 128).values(grid), hessian).sum())
        # the paper's code: a lazy block knows the blocks before it, its own groups do not know each other
        first = sweep(weights[:128], factor[:128, :128], Stale(grid, weights[:128], 128), 128).values(grid)
        rest = weights[128:] - factor[:128, 128:].t() @ compensated(weights[:128] - first, factor[:128, :128])
        second = sweep(rest, factor[128:, 128:], Stale(grid, rest, 128), 128).values(grid)
        stale += float(row_errors(weights - torch.cat([first, second]), hessian).sum())
    assert current < stale


def compensated(delta: Tensor, factor: Tensor) -> Tensor:
    """The errors E behind a finished sweep's W - Q = U^T E."""
    return torch.linalg.solve_triangular(factor.t(), delta, upper=False)


@pytest.mark.parametrize("grid", [Lattice("q4_0"), Lattice("iq4_nl"), Lattice("q4_1"), Uniform(3, False, 40, True)])
def test_refitted_scales_are_the_least_squares_ones_and_never_worse(grid: Lattice | Uniform) -> None:
    weights, hessian = problem(96, 30)
    factor, damped = inverse_factor(hessian, 0.01)
    swept = sweep(weights, factor, grid, 96)
    fitted = refit(weights, damped, swept, grid)
    before = row_errors(weights - swept.values(grid), damped)
    after = row_errors(weights - fitted.values(grid), damped)
    assert (after <= before).all() and after.sum() < 0.99 * before.sum()
    assert torch.equal(fitted.levels, swept.levels)
    # one row by the normal equations, written out
    row, z = 3, grid.basis(swept.levels)[:, 3]
    parts = torch.zeros(96, len(swept.parameters), dtype=torch.float64)
    for g in range(parts.shape[1]):
        parts[g * grid.group : (g + 1) * grid.group, g] = z[g * grid.group : (g + 1) * grid.group]
    if swept.parameters[0].shift is not None:
        parts = torch.cat([parts, torch.eye(3, dtype=torch.float64).repeat_interleave(32, 0)], 1)
    exact = torch.linalg.solve(parts.t() @ damped @ parts, parts.t() @ damped @ weights[:, row])
    got = torch.stack([p.scale[row] for p in fitted.parameters])
    if after[row] < before[row]:
        assert torch.allclose(got, exact[: len(got)], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "int2", "int3", "int4", "int8"])
def test_what_is_stored_decodes_to_what_was_chosen(name: str) -> None:
    weights, hessian = problem(96, 64, dtype=torch.float32)
    config = Config(format=name, symmetric=False, group_size=32)
    gptq = Gptq(config)
    parts = (weights.t()[:32].contiguous(), weights.t()[32:].contiguous())
    arrays = gptq.solve(Group(0, ("a", "b"), parts, hessian, 384)).arrays
    factor, damped = inverse_factor(hessian, config.damping)
    grid = gptq.grid(96, True)
    values = refit(weights, damped, sweep(weights, factor, grid, 128), grid).values(grid)
    stored = np.concatenate([gptq.restore("a", arrays), gptq.restore("b", arrays)])
    assert np.array_equal(stored, values.t().numpy())
    if name in BLOCK_FORMATS:
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[blocks.FORMATS[name].ggml]
        assert np.array_equal(quants.dequantize(arrays["a.weight"], kind), gptq.restore("a", arrays))


def test_act_order_stores_the_group_of_every_input() -> None:
    weights, hessian = problem(96, 64, dtype=torch.float32)
    group = Group(0, ("a",), (weights.t().contiguous(),), hessian, 384)
    plain, ordered = (Gptq(Config(format="int3", group_size=32, act_order=on)).solve(group) for on in (False, True))
    order = hessian.diagonal().argsort(descending=True, stable=True)
    assert np.array_equal(ordered.arrays["a.g_idx"][order.numpy()], np.arange(96) // 32)
    assert ordered.records[0]["gptq"] < ordered.records[0]["rtn"] and plain.records[0]["gptq"] < plain.records[0]["rtn"]
    gptq_format.check_symmetric(ordered.arrays["a.qzeros"], 3, 2)


@pytest.mark.parametrize("name", [*BLOCK_FORMATS, "int4"])
def test_silent_inputs_and_rows_of_zeros(name: str) -> None:
    """A column that no token excites is stored as zero, so is a row of zeros; nothing becomes NaN."""
    weights, hessian = problem(64, 32, dtype=torch.float32)
    hessian[5] = hessian[:, 5] = 0
    weights[:, 7] = 0
    gptq = Gptq(Config(format=name, group_size=32))
    before = hessian.clone()
    arrays = gptq.solve(Group(0, ("a",), (weights.t().contiguous(),), hessian, 256)).arrays
    decoded = gptq.restore("a", arrays)
    assert torch.equal(hessian, before)
    assert np.isfinite(decoded).all() and not decoded[7].any()
    if not blocks.FORMATS.get(name, blocks.FORMATS["q4_0"]).table and name != "q4_1":  # their lattices have no exact 0
        assert not decoded[:, 5].any()


def test_a_singular_hessian_is_damped_until_it_works() -> None:
    weights, _ = problem(64, 8)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor, damped = inverse_factor(x.t() @ x, 0.0)
    assert torch.isfinite(factor).all() and (damped - x.t() @ x).diagonal().min() > 0
    assert torch.isfinite(sweep(weights, factor, Lattice("q4_0"), 32).loss).all()
    with pytest.raises(ModelError, match="Hessian"):
        inverse_factor(torch.full((4, 4), torch.nan), 0.01)


def test_options_that_cannot_be_stored_are_refused() -> None:
    with pytest.raises(ConfigError, match="act-order"):
        build(Config, {"act_order": True}, "gptq")
    with pytest.raises(ConfigError, match="group-size"):
        build(Config, {"format": "int4", "group_size": 12}, "gptq")
    with pytest.raises(ConfigError, match="did you mean"):
        build(Config, {"format": "q4_O"}, "gptq")
    assert build(Config, {"format": "int4", "act_order": True}, "gptq").act_order
    narrow = Group(0, ("a",), (torch.ones(4, 40),), torch.eye(40), 8)
    with pytest.raises(ModelError, match="40 columns"):
        Gptq(Config()).solve(narrow)
    with pytest.raises(ModelError, match="32-bit words"):
        Gptq(Config(format="int3")).solve(narrow)
    assert method.TILE == 32
