"""GPTQ against what can be worked out without it: explicit OBQ, traces, plain rounding, stored bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.compression import layerwise
from edgellm_plugins.compression.columnwise import TILE, inverse_factor, row_errors, sweep
from edgellm_plugins.compression.gptq import Config, method
from edgellm_plugins.compression.gptq.method import Gptq
from edgellm_plugins.compression.gptq.refit import descend, refit
from edgellm_plugins.compression.gptq.uniform import Uniform
from edgellm_plugins.compression.layerwise import Group
from torch import Tensor

from edgellm_sdk import store
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, ModelError
from edgellm_sdk.kit import blocks, gptq_format
from edgellm_sdk.kit.blocks import Lattice, Parameters
from edgellm_sdk.models import resolve
from edgellm_sdk.types import Dataset, Example, ModelHandle

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
        self.group, self.span, self.step = columns, columns, step

    def frame(self, columns: Tensor, omega: Tensor) -> None:
        return None

    def fit(self, columns: Tensor, omega: Tensor, frame: Any = None) -> Parameters:
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
        self.span = grid.span

    def frame(self, columns: Tensor, omega: Tensor) -> None:
        return None

    def fit(self, columns: Tensor, omega: Tensor, frame: Any = None) -> Parameters:
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
    swept = refit(weights, damped, sweep(weights, factor, grid, 128), grid)
    for _ in range(config.passes):
        swept = refit(weights, damped, descend(weights, damped, swept, grid), grid)
    values = swept.values(grid)
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
    if name not in ("iq4_nl", "q4_1", "q5_1"):  # their lattices have no exact 0
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
    with pytest.raises(ModelError, match="40 is no multiple of 32"):
        Gptq(Config()).solve(narrow)
    with pytest.raises(ModelError, match="40 is no multiple of 32"):
        Gptq(Config(format="int3")).solve(narrow)
    assert TILE == 32


TEXT = "a small model learns on a small device from private messages, and classifies every one of them. "


def compressed(model: Path, folder: Path, text: Path, **options: Any) -> ModelHandle:
    ctx = Context(folder, seed=1)
    config = build(
        Config, {"calibration_samples": 4, "calibration_length": 32, "calibration_text": str(text), **options}, "gptq"
    )
    return method.compress(resolve(str(model)), None, config, ctx)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "int4", "int3"])
def test_a_compressed_model_loads_as_what_was_written(name: str, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    handle = compressed(tiny_llama, tmp_path / "run", text, format=name, group_size=32)
    before, after = resolve(str(tiny_llama)).load().model, handle.load().model
    layers = json.loads((tmp_path / "run" / "layers.json").read_text())["layers"]
    assert [row["name"].split(".", 3)[3] for row in layers[:7]] == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert len(layers) == 14 and sum(row["gptq"] < row["rtn"] for row in layers) >= 13
    quantised = {row["name"] + ".weight" for row in layers}
    old, new = before.state_dict(), after.state_dict()
    for key, value in old.items():
        assert torch.equal(new[key], value) == (key not in quantised), key
    error = (new[key := layers[0]["name"] + ".weight"] - old[key]).norm() / old[key].norm()
    assert 0.01 < error < (0.25 if name != "int3" else 0.5)
    assert not (tmp_path / "run" / "checkpoint").exists() or not list((tmp_path / "run" / "checkpoint").iterdir())
    if name.startswith("int"):
        stored = {"quant_method": "gptq", "checkpoint_format": "gptq_v2", "bits": int(name[3]), "group_size": 32}
        settings = json.loads((handle.path / "config.json").read_text())["quantization_config"]
        assert stored.items() <= settings.items()
        assert resolve(str(handle.path)).dtype == "gptq"
    with pytest.raises(ModelError, match="already quantised"):
        compressed(handle.path, tmp_path / "again", text, format=name)


def test_adapters_are_merged_before_anything_is_rounded(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    rng, adapter, base = np.random.default_rng(0), tmp_path / "adapter", resolve(str(tiny_llama))
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {
        f"{prefix}.lora_A.weight": rng.standard_normal((4, 64)).astype(np.float32) / 8,
        f"{prefix}.lora_B.weight": rng.standard_normal((64, 4)).astype(np.float32) / 8,
    }
    store.save_arrays(adapter / "adapter_model.safetensors", factors, {})
    store.write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    config = Config(format="q8_0", calibration_samples=4, calibration_length=32, calibration_text=str(text))
    handle = method.compress(replace(base, adapters=(adapter,)), None, config, Context(tmp_path / "run"))
    assert handle.adapters == ()
    name = "model.layers.1.self_attn.q_proj.weight"
    got, old = handle.load().model.state_dict()[name], base.load().model.state_dict()[name]
    change = 2 * torch.from_numpy(factors[f"{prefix}.lora_B.weight"] @ factors[f"{prefix}.lora_A.weight"])
    assert (got - old - change).norm() < 0.02 * change.norm()


def test_groups_are_found_and_the_model_is_left_alone(tiny_llama: Path) -> None:
    model = resolve(str(tiny_llama)).load().model
    body, layers = layerwise.decoder(model)
    groups = layerwise.groups_of(body, layers, torch.arange(16)[None])
    assert groups[1] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
    ]  # fmt: skip
    assert not any(m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())


class Recorder:
    """A method that changes weights in a simple way and keeps the Hessians it was given."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor = factor
        self.hessians: dict[str, Tensor] = {}

    def solve(self, group: Group) -> layerwise.Solved:
        self.hessians[group.names[0]] = group.hessian.clone()
        arrays = {n: (w * self.factor).numpy() for n, w in zip(group.names, group.weights, strict=True)}
        return layerwise.Solved(arrays, ({"tokens": group.tokens},))

    def restore(self, name: str, arrays: Any) -> Any:
        return arrays[name]


@pytest.mark.parametrize("memory", [None, 1])
def test_tokens_of_huge_norm_count_like_all_others(memory: int | None, tiny_llama: Path, tmp_path: Path) -> None:
    """With `equal_tokens` H is that of inputs scaled to a mean square of 1: its trace counts tokens, and an embedding
    made a thousand times as large for one of them leaves that so."""
    windows = torch.randint(1, 384, (4, 24), generator=torch.Generator().manual_seed(0))
    windows[1, 5] = 0
    model, recorder = resolve(str(tiny_llama)).load().model, Recorder(1.0)
    model.model.embed_tokens.weight.data[0] *= 1000
    ctx = Context(tmp_path, memory=memory)
    layerwise.walk(model, windows, recorder, ctx, title="t", key="k", equal_tokens=True)
    for name, hessian in recorder.hessians.items():
        assert float(hessian.trace()) == pytest.approx(2 * 24 * len(hessian), rel=1e-4), name
    seen: list[Tensor] = []
    down = model.get_submodule("model.layers.1.mlp.down_proj")
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(windows)
    handle.remove()
    x = seen.pop().reshape(-1, down.in_features).double()
    x = x / x.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(recorder.hessians["model.layers.1.mlp.down_proj"].double(), 2 / 4 * x.t() @ x,
                               rtol=1e-3, atol=1e-4)  # fmt: skip


def test_an_input_of_zeros_stays_one() -> None:
    zeros, ones = torch.zeros(1, 3, 4), torch.ones(1, 1, 4)
    block = layerwise._Block(0, "", torch.nn.Identity(), {}, [("x",)], Recorder(), None, 1, equal_tokens=True)
    block._accumulate(torch.cat([zeros, 1e-3 * ones], 1))
    assert block.hessian is not None
    torch.testing.assert_close(block.hessian, torch.full((4, 4), 2.0))


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("memory", [None, 1])
def test_each_group_sees_what_its_compressed_predecessors_put_out(
    sequential: bool, memory: int | None, tiny_llama: Path, tmp_path: Path
) -> None:
    """Against the plain way: a whole forward of the model for every group. One batch or many make no difference."""
    windows = torch.randint(384, (4, 24), generator=torch.Generator().manual_seed(0))
    model, recorder = resolve(str(tiny_llama)).load().model, Recorder()
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    ctx = Context(tmp_path, memory=memory)
    _, records = layerwise.walk(model, windows, recorder, ctx, title="t", key="k", sequential=sequential)
    assert all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items())
    assert records == [{"tokens": 96}] * 8
    seen: list[Tensor] = []
    _, layers = layerwise.decoder(model)
    for number in range(2):
        for names in layerwise.groups_of(model.model, layers, windows)[number]:
            first = model.get_submodule(f"model.layers.{number}.{names[0]}")
            handle = first.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            with torch.no_grad():
                model(windows)
            handle.remove()
            x = seen.pop().reshape(-1, first.in_features)
            expected = 2 / 4 * x.t() @ x
            assert torch.allclose(
                recorder.hessians[f"model.layers.{number}.{names[0]}"], expected, rtol=1e-3, atol=1e-3
            )
            for name in names if sequential else ():
                model.get_submodule(f"model.layers.{number}.{name}").weight.data.mul_(0.5)


def test_a_killed_run_continues_to_the_same_bytes(make_tiny_llama: Any, text: Path, tmp_path: Path) -> None:
    """Two kill -9 at different blocks and a rerun, against a run left in peace."""
    model = make_tiny_llama(tmp_path / "tiny", layers=5)
    compressed(model, tmp_path / "calm", text)
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from edgellm_sdk.context import Context\n"
        "from edgellm_sdk.models import resolve\n"
        "from edgellm_plugins.compression.gptq import Config, method\n"
        "config = Config(calibration_samples=4, calibration_length=32, calibration_text=sys.argv[3])\n"
        "method.compress(resolve(sys.argv[1]), None, config, Context(Path(sys.argv[2]), seed=1))\n"
    )
    run = tmp_path / "killed"
    command = [sys.executable, "-c", program, str(model), str(run), str(text)]
    marker = run / "checkpoint"
    for blocks_done in (1, 3):
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None and len(list(marker.glob("gptq-*.safetensors"))) < blocks_done:
            time.sleep(0.001)
        process.kill()
        process.wait()
    kept = len(list(marker.glob("gptq-*.safetensors")))
    assert subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode == 0
    assert kept >= 1 or (run / "model").is_dir()
    assert contents(run / "model") == contents(tmp_path / "calm" / "model")
    assert (run / "layers.json").read_bytes() == (tmp_path / "calm" / "layers.json").read_bytes()


def test_a_checkpoint_of_another_job_is_not_used(tiny_llama: Path, tmp_path: Path) -> None:
    model, windows = resolve(str(tiny_llama)).load().model, torch.arange(48).view(2, 24)
    ctx = Context(tmp_path)
    first, _ = layerwise.walk(model, windows, Recorder(0.5), ctx, title="t", key="a")
    again, _ = layerwise.walk(model, windows, Recorder(0.25), ctx, title="t", key="a")
    other, _ = layerwise.walk(model, windows, Recorder(0.25), ctx, title="t", key="b")
    name = "model.layers.0.self_attn.q_proj"
    assert np.array_equal(first[name], again[name]) and np.array_equal(first[name], 2 * other[name])
    torn = tmp_path / "checkpoint" / "t-0001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    resumed, _ = layerwise.walk(model, windows, Recorder(0.25), ctx, title="t", key="b")
    assert all(np.array_equal(resumed[k], other[k]) for k in other)


def test_calibration_text_and_data(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    tokenizer, ctx = resolve(str(tiny_llama)).load().tokenizer, Context(tmp_path, seed=3)
    windows = layerwise.calibration(tokenizer, None, str(text), 5, 16, ctx)
    assert windows.shape == (5, 16) and torch.equal(
        windows, layerwise.calibration(tokenizer, None, str(text), 5, 16, ctx)
    )
    data = Dataset(tuple(Example("say it", f"{TEXT}{n}") for n in range(40)), "f", "my.jsonl")
    from_data = layerwise.calibration(tokenizer, data, "", 5, 16, ctx)
    assert from_data.shape == (5, 16) and not torch.equal(from_data, windows) and not ctx.notes
    few = layerwise.calibration(tokenizer, data.__class__(data.examples[:1], "g"), "", 500, 16, ctx)
    assert 1 <= len(few) < 500 and "not 500" in ctx.notes[0]
    with pytest.raises(DataError, match="nothing to calibrate on"):
        layerwise.calibration(tokenizer, None, "", 5, 16, ctx)
    with pytest.raises(DataError, match="one window needs 4096"):
        layerwise.calibration(tokenizer, Dataset(data.examples[:2], "g"), "", 5, 4096, ctx)
    with pytest.raises(DataError, match="cannot be read"):
        layerwise.calibration(tokenizer, None, str(tmp_path / "nothing"), 5, 16, ctx)
    (tmp_path / "broken.txt").write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="byte 3"):
        layerwise.calibration(tokenizer, None, str(tmp_path / "broken.txt"), 5, 16, ctx)


def test_bfloat16_forwards_give_nearly_the_same_layers(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    errors = []
    for dtype in ("float32", "bfloat16"):
        compressed(tiny_llama, tmp_path / dtype, text, dtype=dtype)
        rows = json.loads((tmp_path / dtype / "layers.json").read_text())["layers"]
        errors.append(sum(row["gptq"] for row in rows))
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_a_model_without_decoder_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no decoder blocks"):
        layerwise.decoder(torch.nn.Linear(2, 2))


@pytest.mark.model
@pytest.mark.parametrize("name", ["q4_0", "int3"])
def test_it_beats_round_to_nearest_on_the_real_model(name: str, smollm2: ModelHandle, tmp_path: Path) -> None:
    """>= 95 % of linears. Not on q4_1: the shipped weights lie on that very grid, where rounding has no error at all.
    Three of the 30 blocks and 4 windows keep it short; the benchmark does all of them."""
    loaded = smollm2.load()
    del loaded.model.model.layers[3:]
    loaded.model.config.num_hidden_layers = 3
    words = "The weather in the north was cold, and the ships that came in brought news of a long war. "
    ids = loaded.tokenizer(" ".join(f"{words}{n}" for n in range(100)))["input_ids"][:1024]
    _, records = layerwise.walk(
        loaded.model, torch.tensor(ids).view(4, 256), Gptq(Config(format=name)), Context(tmp_path), title="g", key="k"
    )
    better = sum(row["gptq"] < row["rtn"] for row in records)
    assert len(records) == 21 and better >= (21 if name == "int3" else 0.95 * 21)
