"""AWQ: folding changes no answer, scales are those of the paper, and gptq gains from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edgellm_plugins.compression.awq import Config, method
from edgellm_plugins.compression.awq.method import Search, sources_of
from edgellm_plugins.compression.gptq import Config as Gptq
from edgellm_plugins.compression.gptq.method import Gptq as Solver
from edgellm_plugins.compression.layerwise import Group

from edgellm_sdk import checkpoint
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import blocks
from edgellm_sdk.models import resolve
from edgellm_sdk.types import ModelHandle


def folded(model: Path, folder: Path, text: Path, **given: Any) -> ModelHandle:
    options = {"calibration_samples": 4, "calibration_length": 32, "calibration_text": str(text), "steps": 5, **given}
    return method.compress(resolve(str(model)), None, build(Config, options, "awq"), Context(folder, seed=1))


def test_who_reads_whom(tiny_llama: Path) -> None:
    model = resolve(str(tiny_llama)).load().model
    found, shared = sources_of(model, torch.arange(8)[None])
    layer = "model.layers.1."
    assert {a.removeprefix(layer): b.removeprefix(layer) for a, b in found.items() if a.startswith(layer)} == {
        "self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm",
        "mlp.down_proj": "mlp.up_proj", "self_attn.o_proj": "self_attn.v_proj",
    }  # fmt: skip
    assert shared == {f"model.layers.{i}.self_attn.o_proj": (2, 2, 16) for i in range(2)}


@pytest.mark.parametrize(("seed", "heads"), [(0, (4, 2)), (1, (4, 2)), (0, (9, 3))])
@torch.no_grad()
def test_any_scales_change_no_answer(seed: int, heads: tuple[int, int]) -> None:
    """Grouped-query attention, that of SmolLM2 too; float64, so that nothing but the algebra is tested."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384, hidden_size=16 * heads[0], intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=heads[0], num_key_value_heads=heads[1], initializer_range=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    tokens = torch.randint(384, (2, 24), generator=torch.Generator().manual_seed(seed))
    before = model(input_ids=tokens).logits
    sources, shared = sources_of(model, tokens[:1])
    groups = {}
    for first in sources:
        stem = first.rpartition(".")[0]
        last = first.rpartition(".")[2]
        more = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}.get(last, (last,))
        groups[first] = tuple(f"{stem}.{name}" for name in more)
    scales = {}
    for number, first in enumerate(sources):
        g = torch.Generator().manual_seed(10 * seed + number)
        scale = torch.rand(model.get_submodule(first).in_features, generator=g, dtype=torch.float64) * 3 + 0.2
        if first in shared:
            heads, each, wide = shared[first]
            scale = scale.view(heads, each, wide)[:, :1].expand(-1, each, -1).reshape(-1)
        scales[first] = scale
    changed = method.fold(model, scales, sources, groups, shared)
    assert len(changed) == 2 * 9  # seven linears and two norms a layer
    after = model(input_ids=tokens).logits
    assert (after - before).abs().max() < 1e-10 * before.abs().max()


def problem(loud: float = 30.0) -> Group:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=g)
    x[:, [3, 40]] *= loud
    weights = torch.randn(48, 64, generator=g) * 0.1
    return Group(0, ("m.q_proj", "m.k_proj"), (weights[:32], weights[32:]), 2 * x.t() @ x / 4, 400)


def test_scales_are_powers_of_the_inputs_size() -> None:
    group = problem()
    solved = Search(Config(), {"m.q_proj": "norm"}, {}).solve(group)
    (record,), scale = solved.records, torch.from_numpy(solved.arrays["m.q_proj.scale"])
    size = group.hessian.diagonal().sqrt()
    wanted = size ** record["alpha"]
    assert 0 < record["alpha"] < 1 and record["gain"] < 0.8
    assert torch.allclose(scale, wanted / (wanted.max() * wanted.min()).sqrt(), rtol=1e-5)
    assert set(scale.topk(2).indices.tolist()) == {3, 40}


def test_without_exponents_nothing_is_scaled() -> None:
    solved = Search(Config(steps=1), {"m.q_proj": "norm"}, {}).solve(problem())
    assert torch.from_numpy(solved.arrays["m.q_proj.scale"]).eq(1).all() and solved.records[0]["gain"] == 1
    assert Search(Config(), {}, {}).solve(problem()) == method.layerwise.Solved({}, ())


def test_query_heads_that_share_a_value_head_share_scales() -> None:
    group = problem()
    solved = Search(Config(), {"m.q_proj": "v"}, {"m.q_proj": (2, 2, 16)}).solve(group)
    scale = torch.from_numpy(solved.arrays["m.q_proj.scale"]).view(2, 2, 16)
    assert torch.equal(scale[:, 0], scale[:, 1]) and not torch.equal(scale[0], scale[1])


@pytest.mark.parametrize("fmt", ["q4_0", "iq4_nl"])
def test_gptq_after_folding_errs_less_than_gptq_alone(fmt: str) -> None:
    """H' = diag(1/s) H diag(1/s), the same output error."""
    group = problem()
    scale = torch.from_numpy(Search(Config(format=fmt), {"m.q_proj": "n"}, {}).solve(group).arrays["m.q_proj.scale"])
    weights = torch.cat(group.weights)

    def error(w: torch.Tensor, hessian: torch.Tensor) -> float:
        packed = Solver(Gptq(format=fmt)).solve(Group(0, ("a",), (w,), hessian, 400)).arrays["a.weight"]
        delta = torch.from_numpy(blocks.decode(packed, fmt)) - w
        return float(((delta @ hessian) * delta).sum())

    alone = error(weights, group.hessian)
    assert error((weights * scale).contiguous(), group.hessian / scale[:, None] / scale) < 0.9 * alone


def test_the_folder_answers_as_before(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    after = folded(tiny_llama, tmp_path / "run", text)
    before = resolve(str(tiny_llama))
    tokens = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (handle.load().model(input_ids=tokens).logits for handle in (before, after))
    assert (a - b).abs().max() < 1e-5 * a.abs().max()
    rows = json.loads((tmp_path / "run" / "layers.json").read_text())["layers"]
    assert len(rows) == 8 and all(row["gain"] <= 1 for row in rows) and any(row["alpha"] > 0 for row in rows)
    old, new = (checkpoint.inspect(handle.path).tensors for handle in (before, after))
    assert {n: (t.shape, t.stored) for n, t in old.items()} == {n: (t.shape, t.stored) for n, t in new.items()}
    ends = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    was, now = before.load().model.state_dict(), after.load().model.state_dict()
    assert all(torch.equal(was[name], now[name]) for name in ends)
    assert folded(tiny_llama, tmp_path / "again", text).digest == after.digest


def test_a_model_that_answers_otherwise_is_refused(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = method.sources_of

    def wrong(model: Any, tokens: Any) -> Any:
        found, shared = real(model, tokens)
        return {**found, "model.layers.0.self_attn.q_proj": "model.layers.1.input_layernorm"}, shared

    monkeypatch.setattr(method, "sources_of", wrong)
    with pytest.raises(ModelError, match="folding changes its answers"):
        folded(tiny_llama, tmp_path / "run", text)
    assert not (tmp_path / "run" / "model").exists()
