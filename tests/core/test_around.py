"""What works around a method: the order of hooks, options per client, a client's memory, a LoRA on a folded one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from edgellm_sdk import models, registry, store
from edgellm_sdk.cli.main import main
from edgellm_sdk.config import opt
from edgellm_sdk.context import Context, Drift
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.kit import adapters, averaging
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.kit.prompts import encode
from edgellm_sdk.registry import Loaded, Plugin, Source
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Assignment, Dataset, Example, State, Update

STATE = State("base", 0, {"w": np.zeros(2, np.float32), "server/m": np.ones(2, np.float32)})
DATA = Dataset((Example("", "text"),), "fingerprint")


@dataclass(frozen=True)
class Config:
    rank: int = opt(4, "a number", ge=1, le=8)


class Method:
    """Sends what it was given and its option, as a change of w."""

    @hookimpl
    def edgellm_finetune(self, assignment: Assignment, config: Config, ctx: Context) -> Update:
        value = np.full(2, config.rank, np.float32) + assignment.arrays["w"]
        assert ctx.drift is None or ctx.drift.proximal == 1.0
        return Update(assignment.base, assignment.round, assignment.client, "delta", {"w": value}, 1)

    @hookimpl
    def edgellm_aggregate(self, state: State, updates: Sequence[Update], ctx: Context) -> State:
        return averaging.advanced(state, updates, averaging.mean([u.arrays for u in updates], [1.0]), ctx)


class Around:
    """Adds `number` before and after the work, and before and after aggregation."""

    def __init__(self, number: float) -> None:
        self.number = np.float32(number)

    def _plus(self, arrays: Any) -> dict[str, Any]:
        return {name: array * 10 + self.number for name, array in arrays.items()}

    @hookimpl
    def edgellm_prepare(self, assignment: Assignment, ctx: Context) -> Assignment:
        ctx.drift = Drift(1.0)
        return replace(assignment, arrays=self._plus(assignment.arrays))

    @hookimpl(wrapper=True)
    def edgellm_finetune(self) -> Iterator[None]:
        update: Any = yield
        return replace(update, arrays=self._plus(update.arrays))  # type: ignore[return-value]

    @hookimpl
    def edgellm_incoming(self, updates: Sequence[Update]) -> list[Update]:
        return [replace(update, arrays=self._plus(update.arrays)) for update in updates]

    @hookimpl(wrapper=True)
    def edgellm_aggregate(self) -> Iterator[None]:
        state: Any = yield
        return replace(state, arrays=self._plus(state.arrays))  # type: ignore[return-value]


def loaded(name: str, implementation: object, hooks: tuple[str, ...] = ()) -> Loaded:
    module: Any = implementation
    return Loaded(Plugin(name, "", "1", Config), module, Source(name, "here", "built-in"), hooks)


def relay(*around: float) -> Relay:
    plugins = [loaded("method", Method()), *(loaded(f"around-{n:g}", Around(n)) for n in around)]
    return Relay(plugins, {"method": Config()})


def test_the_outermost_is_last_in_and_last_out(tmp_path: Path) -> None:
    """w = 0, prepared by 1 then 2: 12; the method adds 4; then 1, 2 around it: 161, 1612."""
    ctx = Context(tmp_path)
    asked = relay(1, 2).assign(STATE, ["a"], {"a": 1}, ctx)["a"]
    assert set(asked.arrays) == {"w"}  # what is the server's stays there
    update = relay(1, 2).finetune(Any, DATA, asked, ctx)  # type: ignore[arg-type]
    assert update.arrays["w"].tolist() == [1612.0, 1612.0]
    assert ctx.drift is None
    coming = relay(1, 2).incoming(STATE, [replace(update, arrays={"w": np.zeros(2)})], ctx)
    assert coming[0].arrays["w"].tolist() == [12.0, 12.0]
    assert relay(1, 2).aggregate(STATE, coming, ctx).arrays["w"].tolist() == [1212.0, 1212.0]


def test_an_assignment_changes_options_within_their_bounds(tmp_path: Path) -> None:
    asked = Assignment("base", 1, "a", {"w": np.zeros(2, np.float32)}, {}, {"rank": 8})
    done = relay().finetune(Any, DATA, asked, Context(tmp_path))  # type: ignore[arg-type]
    assert done.arrays["w"].tolist() == [8.0, 8.0]
    for options in ({"rank": 9}, {"rang": 4}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            relay().finetune(Any, DATA, replace(asked, options=options), Context(tmp_path))  # type: ignore[arg-type]


def test_a_client_recalls_what_it_knew_before_the_round(tmp_path: Path) -> None:
    ctx = Context(tmp_path)
    assert ctx.recall("../é", "c", 1) is None
    for number in (1, 4, 6):
        ctx.remember("../é", "c", number, {"w": np.full(1, number)}, {"n": number})
    for number, known in ((7, 6), (6, 4), (5, 4)):
        found = ctx.recall("../é", "c", number)
        assert found is not None and found[1] == {"n": known} and found[0]["w"][0] == known
    assert ctx.recall("../é", "c", 4) is None  # two are kept
    assert ctx.recall("b", "c", 9) is None
    assert [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.safetensors")] == ["clients"] * 2


def test_means_refuse_unlike_shapes_and_screening_the_odd_kind(tmp_path: Path) -> None:
    from edgellm_sdk.errors import FederationError

    def update(client: str, kind: str, size: int = 2) -> Update:
        return Update("base", 1, client, kind, {"w": np.zeros(size, np.float32)}, 1)

    rows = [update("a", "weights"), update("b", "delta"), update("c", "delta"), update("d", "delta", 3)]
    reasons = averaging.screen(rows, STATE, Context(tmp_path))
    assert sorted(reasons) == ["a", "d"] and "most send delta" in reasons["a"]
    with pytest.raises(FederationError, match=r"w has shapes \[2\] and \[3\]"):
        averaging.mean([rows[1].arrays, rows[3].arrays], [0.5, 0.5])


@pytest.mark.parametrize("kind", ["lora", "lora-fa"])
def test_a_lora_on_a_folded_one(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Installed, it computes what the weights with both merged in compute; saved, it is one LoRA that does the same."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    spec, handle = adapters.Spec(kind, 1, 3, 6.0, ("q_proj", "down_proj")), models.resolve(str(tiny_llama))
    ctx = Context(tmp_path, seed=3)
    frozen = Frozen(handle, spec, ctx.stream("adapter"), "float32", max_length=64)
    noise = np.random.default_rng(0)
    theta: dict[str, Any] = {
        name: noise.normal(size=value.shape).astype(np.float32) * 0.1 for name, value in frozen.initial.items()
    }
    for module, (rows, columns) in (("self_attn.q_proj", (64, 64)), ("mlp.down_proj", (64, 128))):
        name = f"model.layers.1.{module}"
        theta[f"{name}.folded_A"] = noise.normal(size=(5, columns)).astype(np.float32) * 0.1
        theta[f"{name}.folded_B"] = noise.normal(size=(rows, 5)).astype(np.float32) * 0.1
    batch = encode(frozen.tokenizer, [Example("win a", " prize now"), Example("see you", " at eight")], 64)
    frozen.trainables.set_one(theta)
    ours = frozen.logits(frozen.prepare(batch))[0]

    frozen.write(tmp_path / "adapter", theta, {"path": str(tiny_llama), "digest": handle.digest, "name": "tiny"})
    saved = store.read_json(tmp_path / "adapter" / "adapter_config.json")
    assert (saved["r"], saved["lora_alpha"]) == (8, 16.0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    whole = {**frozen.trainables.frozen, **theta}
    with torch.no_grad():
        for module in {name.rpartition(".")[0] for name in theta}:
            a, b, fa, fb = (whole[f"{module}.{end}"] for end in ("lora_A", "lora_B", "folded_A", "folded_B"))
            merged.get_submodule(module).weight += torch.from_numpy(2.0 * b @ a + fb @ fa)
        for model in (merged, PeftModel.from_pretrained(plain, tmp_path / "adapter")):
            theirs = [model(torch.tensor([row.tokens])).logits[0, at - 1] for row in batch for at in row.scored]
            torch.testing.assert_close(ours, torch.stack(theirs), atol=2e-5, rtol=1e-4)


def test_what_can_be_named_around(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["finetune", "-p", "lora", "-m", "m", "-d", "sms-spam", "-o", str(tmp_path / "run")]
    for named, said in (("gptq", "does not work around a method"), ("nobody", "no plugin 'nobody'")):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--around", named])
        assert ended.value.code == 4
        assert said in capsys.readouterr().err


def test_wrappers_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that only wraps is no method, and is listed as one for around."""
    import sys

    module: Any = ModuleType("a_wrapper")
    module.PLUGIN = Plugin("a-wrapper", "adds nothing", "1")

    @hookimpl(wrapper=True)
    def edgellm_finetune() -> Iterator[None]:
        update: Any = yield
        return update  # type: ignore[no-any-return]

    module.edgellm_finetune = edgellm_finetune
    monkeypatch.setitem(sys.modules, "a_wrapper", module)
    found = registry.load(Source("a-wrapper", "a_wrapper", "here"))
    assert (found.hooks, found.wraps, found.stages) == ((), ("edgellm_finetune",), ("around",))
