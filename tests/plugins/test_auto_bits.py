"""auto-bits: the knapsack against enumeration, the measure against whole forwards, the size against the file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edgellm_plugins.compression.auto_bits import Config, method, size_in_bytes
from edgellm_plugins.compression.auto_bits.plan import Choice, frontier, solve
from edgellm_plugins.export import gguf_size
from edgellm_plugins.export.gguf import Config as GGUF
from edgellm_plugins.export.gguf.method import export
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk import checkpoint, gguf_file
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, ModelError
from edgellm_sdk.kit import blocks
from edgellm_sdk.models import resolve
from edgellm_sdk.types import ModelHandle

CHOICES = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 100)).map(lambda p: Choice(f"f{p[0]}", p[0], p[1] / 7)),
    min_size=1,
    max_size=4,
    unique_by=lambda c: c.nbytes,
)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(CHOICES, min_size=1, max_size=5), budget=st.integers(5, 160))
def test_the_plan_fits_and_is_near_the_best_there_is(rows: list[list[Choice]], budget: int) -> None:
    """Against all combinations: at most the largest single step worse than the best, the bound of such a greedy."""
    options = {f"m{number}": choices for number, choices in enumerate(rows)}
    if sum(min(c.nbytes for c in choices) for choices in rows) > budget:
        with pytest.raises(ConfigError, match="at least"):
            solve(options, budget)
        return
    plan = solve(options, budget)
    assert plan.keys() == options.keys() and all(plan[name] in options[name] for name in options)
    left = budget - sum(choice.nbytes for choice in plan.values())
    assert left >= 0
    for name, choices in options.items():  # nothing better fits what is left
        assert not [c for c in choices if c.cost < plan[name].cost and c.nbytes - plan[name].nbytes <= left]
    cost = sum(choice.cost for choice in plan.values())
    best = min(
        sum(c.cost for c in combination)
        for combination in itertools.product(*rows)
        if sum(c.nbytes for c in combination) <= budget
    )
    steps = [a.cost - b.cost for choices in rows for a, b in itertools.pairwise(frontier(choices))]
    assert best - 1e-9 <= cost <= best + max(steps, default=0.0) + 1e-9


def test_a_plan_worked_by_hand() -> None:
    """10 bytes more buy 6 nats for a, 3 for b: a first; the dominated choice of b is never taken."""
    a = [Choice("small", 10, 8.0), Choice("large", 20, 2.0)]
    b = [Choice("small", 10, 4.0), Choice("same", 15, 4.0), Choice("large", 20, 1.0)]
    assert {n: c.format for n, c in solve({"a": a, "b": b}, 30).items()} == {"a": "large", "b": "small"}
    assert {n: c.format for n, c in solve({"a": a, "b": b}, 45).items()} == {"a": "large", "b": "large"}
    assert [c.format for c in frontier([*b, Choice("mid", 16, 3.9)])] == ["small", "large"]


def test_sizes_as_people_write_them() -> None:
    assert size_in_bytes("75MB") == 75_000_000 and size_in_bytes("75 MiB") == 75 << 20
    assert size_in_bytes("1.5gb") == 1_500_000_000 and size_in_bytes("4096") == 4096
    for wrong in ("", "MB", "75 MX", "-3MB", "1e9", "٣MB"):
        with pytest.raises(ValueError, match="is not a size"):
            size_in_bytes(wrong)
    with pytest.raises(ConfigError, match="'lots' is not a size"):
        build(Config, {"max_size": "lots"}, "auto-bits")
    with pytest.raises(ConfigError, match="'q9' is none of"):
        build(Config, {"bits": 4.0, "formats": "q8_0,q9"}, "auto-bits")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: Any, make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    folder = tmp_path_factory.mktemp("wide") / "model"
    return resolve(str(make_tiny_llama(folder, tied=request.param, layers=4, width=256)))


def options(text: Path, **given: Any) -> Config:
    small = {"probe_samples": 2, "probe_length": 24, "calibration_samples": 4, "calibration_length": 32, "passes": 1}
    return build(Config, {**small, "calibration_text": str(text), **given}, "auto-bits")


@torch.no_grad()
def test_the_divergence_is_that_of_whole_forwards(model: ModelHandle) -> None:
    windows = torch.randint(384, (2, 24), generator=torch.Generator().manual_seed(0))
    loaded = model.load().model
    probe = method.Probe(loaded, windows)
    state = {name: value.clone() for name, value in loaded.state_dict().items()}
    plain = loaded(input_ids=windows).logits.log_softmax(-1)
    assert torch.equal(plain, probe.original)
    cases = [
        {"model.layers.2.mlp.down_proj.weight": "q2_k"},
        {"model.layers.0.self_attn.q_proj.weight": "q4_0"},
        {"model.embed_tokens.weight": "q4_0"},
        {"model.layers.3.self_attn.v_proj.weight": "iq4_nl", "model.layers.1.mlp.up_proj.weight": "q3_k"},
    ]
    cases += [] if loaded.config.tie_word_embeddings else [{"lm_head.weight": "q4_0"}]
    for formats in cases:
        found = probe.divergence(formats)
        for name, fmt in formats.items():
            loaded.get_submodule(name.removesuffix(".weight")).weight.copy_(probe.rounded(name, fmt))
        after = loaded(input_ids=windows).logits.log_softmax(-1)
        expected = float((plain.exp() * (plain - after)).sum(-1).mean())
        assert expected > 0 and found == pytest.approx(expected, rel=1e-3), formats
        loaded.load_state_dict(state)
    assert probe.divergence({"lm_head.weight" if "lm_head.weight" in probe.modules else "model.embed_tokens.weight":
                             "q8_0"}) < 1e-3  # fmt: skip
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(input_ids=windows).logits.log_softmax(-1), plain)


def test_rounding_weighs_each_input_by_its_mean_square(model: ModelHandle) -> None:
    probe = method.Probe(model.load().model.requires_grad_(False), torch.arange(48).view(2, 24))
    name = "model.layers.1.mlp.gate_proj.weight"
    x = probe.inputs[name]
    assert torch.equal(x, probe.inputs["model.layers.1.mlp.up_proj.weight"]) and x.shape == (256,)
    weight = probe.modules[name].weight
    flat = torch.from_numpy(blocks.decode(blocks.lattice("q4_k").rounded(weight.t(), torch.ones(256)), "q4_k"))
    weighted = probe.rounded(name, "q4_k")
    assert ((weighted - weight).square() * x).sum() < ((flat - weight).square() * x).sum()
    assert probe.error(name, "q2_k") > 5 * probe.error(name, "q4_k") > 20 * probe.error(name, "q8_0")


@pytest.mark.parametrize(("model", "bits"), [(True, 4.5), (False, 3.2), (False, 7.0)], indirect=["model"])
def test_the_file_is_as_large_as_ordered(model: ModelHandle, text: Path, tmp_path: Path, bits: float) -> None:
    ctx = Context(tmp_path / "run", seed=1)
    place = gguf_size.layout(model)
    weights = sum(rows * columns for rows, columns in place.matrices.values())
    limit = place.fixed + int(bits * weights / 8)
    small = method.compress(model, None, options(text, max_size=str(limit)), ctx)
    artifact = export(small, tmp_path / "m.gguf", GGUF(), Context(tmp_path))
    size = artifact.path.stat().st_size
    plan = json.loads((ctx.folder / "plan.json").read_text())
    assert 0.985 * limit <= size <= limit  # one step of this small model is more than 1 %
    assert plan["bytes"] - method.SPARE <= size <= plan["bytes"] + method.SPARE
    stored = {name: tensor.stored for name, tensor in checkpoint.inspect(small.path).tensors.items()}
    assert {name: stored[name] for name in place.matrices} == plan["formats"]
    types = {t.type for t in gguf_file.read(artifact.path).tensors.values()}
    assert types == {fmt.upper() for fmt in plan["formats"].values()} | {"F32"}
    told = plan["divergence, rounded plainly"]
    assert 0.5 < told["summed"] / told["measured"] < 2  # additive within a factor of two
    assert ctx.notes[0].startswith("plan: ") and any("down_proj:" in note for note in ctx.notes)
    assert not list((ctx.folder / "checkpoint").iterdir())


@pytest.mark.parametrize("model", [False], indirect=True)
def test_the_mix_beats_one_format_of_the_same_size(model: ModelHandle, text: Path, tmp_path: Path) -> None:
    """Measured divergence of the plan against everything in q4_k, which is just as large."""
    config, ctx = options(text, bits=4.5), Context(tmp_path)
    formats = method.choose(model, None, config, ctx)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["bits per weight"] <= 4.5 and len(set(formats.values())) > 1
    loaded = model.load()
    ctx = Context(tmp_path / "other")
    windows = method.layerwise.calibration(loaded.tokenizer, None, str(text), 2, 24, ctx)
    with torch.no_grad():
        probe = method.Probe(loaded.model, windows)
        assert probe.divergence(formats) < probe.divergence(dict.fromkeys(formats, "q4_k"))


@pytest.mark.parametrize("model", [True], indirect=True)
def test_a_stopped_measurement_goes_on(
    model: ModelHandle, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ctx = options(text, bits=4.5), Context(tmp_path)
    calls: list[str] = []
    real = method.Probe.divergence

    def counted(self: Any, formats: Any) -> float:
        calls.append(next(iter(formats)))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, formats)

    monkeypatch.setattr(method.Probe, "divergence", counted)
    with pytest.raises(KeyboardInterrupt):
        method.choose(model, None, config, ctx)
    again = method.choose(model, None, config, ctx)
    matrices = len(gguf_size.layout(model).matrices)
    assert len(calls) == matrices + 2  # the one that was stopped, and the whole plan
    assert again == method.choose(model, None, config, Context(tmp_path / "calm"))


def test_what_cannot_be_ordered_is_refused(model: ModelHandle, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="take at least .* of 50,000"):
        method.choose(model, None, options(text, max_size="50KB"), Context(tmp_path / "a"))
    with pytest.raises(ModelError, match="divide into none of the formats"):
        method.choose(resolve(str(tiny_llama)), None, options(text, bits=4.5, formats="q4_k"), Context(tmp_path / "b"))
    with pytest.raises(DataError, match="nothing to calibrate on"):
        method.choose(model, None, options(Path(), bits=4.5, calibration_text=""), Context(tmp_path / "c"))
