"""GPTQ on every block format: super-blocks, mixes of formats, the ends, and the way into a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.compression.columnwise import Swept, inverse_factor, row_errors, sweep
from edgellm_plugins.compression.gptq import BLOCKS, Config, method
from edgellm_plugins.compression.gptq.method import Gptq
from edgellm_plugins.compression.gptq.refit import descend, refit
from edgellm_plugins.compression.layerwise import Group
from edgellm_plugins.export import llama_family
from edgellm_plugins.export.gguf import Config as GGUF
from edgellm_plugins.export.gguf.method import export
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk import checkpoint, gguf_file, store
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import blocks, overrides, super_blocks
from edgellm_sdk.models import resolve
from edgellm_sdk.types import ModelHandle

SUPER = tuple(super_blocks.FORMATS)
ALL = (*blocks.FORMATS, *SUPER)


def problem(columns: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random weights (c, r) and the Hessian of correlated inputs with a few loud channels, float32."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5
    x = torch.randn(4 * columns, columns, generator=g) @ (mix + 0.3 * torch.eye(columns))
    x *= torch.logspace(-0.5, 0.7, columns)[torch.randperm(columns, generator=g)]
    return torch.randn(columns, rows, generator=g) * 0.1, 2 * x.t() @ x / len(x)


def compressed(model: Path, folder: Path, text: Path, plan: dict[str, str] | None = None, **given: Any) -> ModelHandle:
    options = {"calibration_samples": 4, "calibration_length": 32, "calibration_text": str(text), **given}
    return method.compress(resolve(str(model)), None, build(Config, options, "gptq"), Context(folder, seed=1), plan)


def test_the_config_names_every_lattice() -> None:
    assert set(BLOCKS) == set(ALL) == set(checkpoint.BLOCKS)


@pytest.mark.parametrize("fmt", SUPER)
def test_super_blocks_beat_round_to_nearest(fmt: str) -> None:
    weights, hessian = problem(512, 48)
    record = Gptq(Config(format=fmt)).solve(Group(0, ("a",), (weights.t().contiguous(),), hessian, 99)).records[0]
    assert record["format"] == fmt and record["gptq"] < 0.5 * record["rtn"], record


@pytest.mark.parametrize("fmt", SUPER)
def test_with_uncorrelated_inputs_super_blocks_are_plain_rounding(fmt: str) -> None:
    weights, _ = problem(512, 20)
    factor, _ = inverse_factor(torch.eye(512), 0.0)
    lattice = blocks.lattice(fmt)
    swept = sweep(weights, factor, lattice, 128)
    packed = lattice.pack_all(swept.levels, swept.parameters)
    assert np.array_equal(packed, blocks.nearest(weights.t().contiguous().numpy(), fmt))


@pytest.mark.parametrize("fmt", ["q4_k", "q6_k"])
def test_the_lazy_block_changes_nothing_for_super_blocks(fmt: str) -> None:
    weights, hessian = problem(512, 24)
    factor, _ = inverse_factor(hessian.double(), 0.01)
    results = [sweep(weights.double(), factor, blocks.lattice(fmt), size).levels for size in (1, 256, 512)]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("fmt", ALL)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_no_row_gets_worse_by_refit_or_by_looking_back(fmt: str, seed: int) -> None:
    weights, hessian = problem(256, 12, seed)
    factor, damped = inverse_factor(hessian, 0.01)
    grid = blocks.lattice(fmt)
    swept = sweep(weights, factor, grid, 128)

    def errors(one: Swept) -> torch.Tensor:
        return row_errors((weights - one.values(grid)).double(), damped.double())

    fitted = refit(weights, damped, swept, grid)
    back = descend(weights, damped, fitted, grid)
    assert torch.equal(fitted.levels, swept.levels)
    assert (errors(fitted) <= errors(swept) * 1.001).all() and errors(fitted).sum() < errors(swept).sum()
    assert (errors(back) <= errors(fitted) * 1.001).all() and errors(back).sum() < errors(fitted).sum()
    stored = blocks.decode(grid.pack_all(back.levels, back.parameters), fmt)
    assert np.array_equal(stored, back.values(grid).t().numpy())


def test_whole_scales_are_the_best_ones_given_the_others() -> None:
    """q4_k, one super-block: no single change of a scale or minimum by one lowers the error after the refit."""
    weights, hessian = problem(256, 6)
    factor, damped = inverse_factor(hessian, 0.01)
    grid = blocks.lattice("q4_k")
    fitted = refit(weights, damped, sweep(weights, factor, grid, 256), grid)
    best = row_errors((weights - fitted.values(grid)).double(), damped.double())
    for part in range(8):
        p = fitted.parameters[part]
        assert p.frame is not None and p.frame.dmin is not None and p.shift is not None
        for step in (-1, 1):
            for scale, shift in ((p.scale + step * p.frame.d, p.shift), (p.scale, p.shift + step * p.frame.dmin)):
                inside = ((scale / p.frame.d).round() <= 63) & (scale >= 0) & (shift <= 0)
                inside &= (-shift / p.frame.dmin).round() <= 63
                moved = [*fitted.parameters]
                moved[part] = blocks.Parameters.of(scale, shift, frame=p.frame)
                other = Swept(fitted.levels, moved, fitted.loss).values(grid)
                after = row_errors((weights - other).double(), damped.double())
                assert (after[inside] >= best[inside] * 0.98).all()  # the units moved once more after the last pass


def test_rows_do_not_depend_on_how_many_are_in_work(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, hessian = problem(256, 40)
    group = Group(0, ("a", "b"), (weights.t()[:16].contiguous(), weights.t()[16:].contiguous()), hessian, 9)
    errors = []
    for rows in (4096, 8):
        monkeypatch.setattr(method, "ROWS", rows)
        solved = Gptq(Config(format="q4_k")).solve(group)
        errors.append([row["gptq"] for row in solved.records])
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_linears_of_one_input_can_have_formats_of_their_own() -> None:
    weights, hessian = problem(256, 96)
    parts = tuple(part.contiguous() for part in weights.t().split(32))
    solver = Gptq(Config(format="q4_0", formats="v_proj=q6_k,*.k_proj=iq4_xs"))
    solved = solver.solve(Group(0, ("m.q_proj", "m.k_proj", "m.v_proj"), parts, hessian, 9))
    assert list(solved.arrays) == ["m.q_proj.weight", "m.k_proj.weight", "m.v_proj.weight"]
    assert [array.shape[1] for array in solved.arrays.values()] == [8 * 18, 136, 210]
    assert solver.formats == {"m.q_proj.weight": "q4_0", "m.k_proj.weight": "iq4_xs", "m.v_proj.weight": "q6_k"}
    alone = Gptq(Config(format="q6_k")).solve(Group(0, ("m.v_proj",), parts[2:], hessian, 9))
    assert np.array_equal(alone.arrays["m.v_proj.weight"], solved.arrays["m.v_proj.weight"])


@pytest.mark.parametrize("fmt", ALL)
def test_codes_reach_the_file_as_they_were_chosen(fmt: str, wide_llama: Path, text: Path, tmp_path: Path) -> None:
    """Compressed folder, GGUF file and the gguf package's reader agree bit for bit, embedding included."""
    import gguf

    small = compressed(wide_llama, tmp_path / "run", text, format=fmt, embedding=fmt)
    artifact = export(small, tmp_path / "m.gguf", GGUF(), Context(tmp_path))
    slots, found = llama_family.slots(llama_family.read(small.path)), checkpoint.inspect(small.path)
    state = small.load().model.state_dict()
    reader, arrays = gguf.GGUFReader(artifact.path), store.load_arrays(small.path / "quantized.safetensors")[0]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(arrays) == 15
    for name, packed in arrays.items():
        tensor, slot = tensors[slots[name].name], slots[name]
        assert tensor.tensor_type.name == fmt.upper()
        wanted = llama_family.permute(packed, slot.heads) if slot.heads else packed
        assert np.array_equal(np.asarray(tensor.data), wanted)
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = llama_family.permute(found.array(name), slot.heads) if slot.heads else found.array(name)
        assert np.array_equal(decoded, values) and np.array_equal(state[name].numpy(), found.array(name))
    assert gguf_file.read(artifact.path).metadata["general.file_type"] in range(2, 31)


@pytest.mark.llama
def test_llama_cpp_leaves_our_codes_alone_in_a_file_of_stock_size(wide_llama: Path, text: Path, tmp_path: Path) -> None:
    """Its quantiser copies blocks of the type asked for; codes that it would choose otherwise show that it does."""
    pytest.importorskip("llama_cpp")
    from edgellm_hardware.llama_cpp.quantiser import quantise

    small = compressed(wide_llama, tmp_path / "run", text, format="q4_0")
    ours = export(small, tmp_path / "ours.gguf", GGUF(embedding="q8_0", name="m"), Context(tmp_path)).path
    quantise(ours, tmp_path / "after.gguf", "q4_0", None, (("token_embd", 8),), 1)
    before, after = gguf_file.read(ours), gguf_file.read(tmp_path / "after.gguf")
    chosen_otherwise = 0
    for name, info in before.tensors.items():
        raw = before.tensor_bytes(name)
        assert after.tensors[name].type == info.type and np.array_equal(after.tensor_bytes(name), raw)
        if info.type == "Q4_0":
            chosen_otherwise += not np.array_equal(blocks.nearest(blocks.decode(raw, "q4_0"), "q4_0"), raw)
    assert chosen_otherwise == 14
    stock = GGUF(type="q4_0", embedding="q8_0", imatrix="none", name="m")
    assert export(resolve(str(wide_llama)), tmp_path / "stock.gguf", stock, Context(tmp_path)).path.stat().st_size == (
        ours.stat().st_size
    )


def test_rows_that_are_no_super_blocks_fall_back_and_say_so(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """The tiny model is 64 and 128 wide."""
    ctx = Context(tmp_path / "run", seed=1)
    options = {"calibration_samples": 4, "calibration_length": 32, "calibration_text": str(text), "format": "q4_k"}
    small = method.compress(resolve(str(tiny_llama)), None, build(Config, options, "gptq"), ctx)
    found = checkpoint.inspect(small.path)
    assert found.tensors["model.layers.0.mlp.down_proj.weight"].stored == "q5_0"
    assert any("14 layers whose rows are no whole blocks: q4_k -> q5_0" in note for note in ctx.notes)


def test_the_ends(tiny_llama: Path, wide_llama: Path, text: Path, tmp_path: Path) -> None:
    tied = compressed(wide_llama, tmp_path / "tied", text, format="q8_0", embedding="q4_k")
    rows = json.loads((tmp_path / "tied" / "layers.json").read_text())["layers"]
    assert rows[-1]["name"] == "model.embed_tokens" and rows[-1]["gptq"] < rows[-1]["rtn"]
    assert checkpoint.inspect(tied.path).tensors["model.embed_tokens.weight"].stored == "q4_k"
    untied = compressed(tiny_llama, tmp_path / "untied", text, formats="lm_head=q8_0", embedding="q5_0")
    stored = {name: t.stored for name, t in checkpoint.inspect(untied.path).tensors.items() if t.stored != "F32"}
    assert stored.pop("model.embed_tokens.weight") == "q5_0" and stored.pop("lm_head.weight") == "q8_0"
    assert set(stored.values()) == {"q4_0"}
    plan = {"model.embed_tokens.weight": "q6_k", "model.layers.1.mlp.down_proj.weight": "q3_k"}
    planned = checkpoint.inspect(compressed(wide_llama, tmp_path / "plan", text, plan=plan).path).tensors
    assert {name: planned[name].stored for name in plan} == plan
    assert planned["model.layers.0.mlp.down_proj.weight"].stored == "q4_0"


def test_a_finished_walk_is_taken_up_with_its_formats(
    wide_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"format": "iq4_nl", "formats": "down_proj=q4_k", "embedding": "q5_k"}
    calm = compressed(wide_llama, tmp_path / "calm", text, **given)

    def stopped(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(method.ends, "quantise", stopped)
        with pytest.raises(KeyboardInterrupt):
            compressed(wide_llama, tmp_path / "again", text, **given)
    again = compressed(wide_llama, tmp_path / "again", text, **given)
    assert again.digest == calm.digest


def test_formats_that_cannot_be_meant_are_refused(wide_llama: Path, text: Path, tmp_path: Path) -> None:
    for formats, words in (("down_proj", "is not PATTERN=FORMAT"), ("down_proj=q9_k", "no format 'q9_k'")):
        with pytest.raises(ConfigError, match=words):
            build(Config, {"formats": formats}, "gptq")
    with pytest.raises(ConfigError, match="no blocks beside them"):
        build(Config, {"format": "int4", "embedding": "q8_0"}, "gptq")
    with pytest.raises(ConfigError, match="'donw_proj' matches no layer"):
        compressed(wide_llama, tmp_path / "run", text, formats="donw_proj=q4_k")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["q_proj", "layers.0.", "*.down_proj", "mlp"]), st.sampled_from(BLOCKS))))
def test_the_first_pattern_that_matches_wins(pairs: list[tuple[str, str]]) -> None:
    parsed = overrides.parse(",".join(f"{a}={b}" for a, b in pairs), BLOCKS, "formats")
    assert parsed == tuple(pairs)
    name = "model.layers.0.mlp.down_proj"
    matching: Callable[[str], bool] = lambda pattern: pattern != "q_proj"  # noqa: E731
    expected = next((fmt for pattern, fmt in pairs if matching(pattern)), None)
    assert overrides.chosen(parsed, name) == expected
    assert set(overrides.idle(parsed, [name])) == {a for a, _ in pairs if a == "q_proj"}
