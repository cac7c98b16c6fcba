"""FedIT: plain local training where there is one client, means of factors where there are more, and its bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edgellm_plugins.federated import local
from edgellm_plugins.federated.fedit import Config, method
from edgellm_plugins.federated.options import steps_of
from edgellm_plugins.training import backprop
from edgellm_plugins.training.lora import Config as LoraConfig
from edgellm_plugins.training.lora import method as lora
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import edgellm_sdk as edgellm
from edgellm_sdk import models, registry, wire
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.errors import DataError, FederationError
from edgellm_sdk.federate.engine import in_process
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.rounds import Plan, run_rounds
from edgellm_sdk.kit import adapters, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.random import Stream
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Assignment, Dataset, Example, ModelHandle, State, Update

SMALL: dict[str, Any] = {"rank": 4, "batch_size": 4, "precision": "float32", "learning_rate": 5e-3}
WORDS = ("win a prize now", "mum is home", "call this number", "see you at dinner")


def dataset(n: int = 12, kind: int = 0) -> Dataset:
    answers = (("spam", "ham"), ("yes", "no"), ("red", "blue"))[kind]
    rows = [Example(({"role": "user", "content": f"{WORDS[(i + kind) % 4]} {i}"},), answers[i % 2]) for i in range(n)]
    return Dataset(tuple(rows), f"{kind}-{n}", "toy")


@pytest.fixture(scope="module")
def handle(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    return models.resolve(str(make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", layers=2)))


def context(tmp_path: Path, config: Config, rounds: int = 1) -> Context:
    return Context(tmp_path, seed=7, rounds=rounds, configs={"fedit": config})


def rounds_of(
    handle: ModelHandle, shards: Mapping[str, Dataset], config: Config, ctx: Context, count: int
) -> list[State]:
    states = [method.initialise(handle, config, ctx)]
    for _ in range(count):
        state = states[-1]
        sent = {c: Assignment(state.base, state.round + 1, c, state.arrays, state.scalars) for c in sorted(shards)}
        updates = [method.finetune(handle, shards[c], sent[c], config, ctx) for c in sorted(shards)]
        assert local.screen(updates, state, config, ctx) == {}
        states.append(backprop.aggregate(state, updates, ctx))
    return states


def test_one_client_is_plain_local_training_bit_for_bit(handle: ModelHandle, tmp_path: Path) -> None:
    """One round of one pass: the same bits as a loop of gradient, clipping and AdamW over the same minibatches."""
    config, data = Config(**SMALL), dataset(11)
    start, after = rounds_of(handle, {"a": data}, config, context(tmp_path, config), 1)
    ctx = context(tmp_path, config)
    frozen = Frozen(handle, method.spec_of(config), ctx.stream("adapter"), "float32")
    assert all(np.array_equal(frozen.initial[name], start.arrays[name]) for name in start.arrays)
    leaves = backprop.leaves_of(frozen.initial)
    rule, slope = backprop.StepRule(leaves, "adamw"), backprop.exact_slope(frozen, config.chunk)
    for step in range(3):
        _, rows = backprop.minibatch(11, "a", step, 4, ctx)
        slope(step, f"batch {step}", lambda rows=rows: data.select(rows), leaves)  # type: ignore[misc]
        backprop.clip(leaves, 1.0)
        rule.step(5e-3 * (3 - step) / 3)
    for name, leaf in leaves.items():
        assert np.array_equal(after.arrays[name], leaf.detach()[0].numpy()), name
    assert (after.scalars["steps"], after.scalars["forwards"]) == (3, 9)

    same = LoraConfig(targets=config.targets, warmup=0, steps=3, **SMALL)
    plain = Context(tmp_path, seed=7, rounds=1, configs={"lora": same})
    state = lora.initialise(handle, same, plain)
    update = lora.finetune(handle, data, Assignment(state.base, 1, "a", state.arrays), same, plain)
    for name, change in update.arrays.items():
        np.testing.assert_allclose(after.arrays[name], state.arrays[name] + change, atol=1e-7)


def test_local_training_is_torchs(handle: ModelHandle, tmp_path: Path) -> None:
    """The same pass with peft's layers, autograd through the whole model, torch's AdamW and linear decay."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    config, data = Config(**SMALL), dataset(11)
    start, after = rounds_of(handle, {"a": data}, config, context(tmp_path, config), 1)
    loaded = handle.load(dtype="float32")
    peft = PeftConfig(r=4, lora_alpha=16.0, target_modules=config.targets.split(","))
    model = get_peft_model(loaded.model, peft).eval()
    live = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    for name, parameter in live.items():
        parameter.data.copy_(torch.from_numpy(start.arrays[name]))
    optimiser = torch.optim.AdamW(live.values(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (3 - step) / 3)
    ctx = context(tmp_path, config)
    for step in range(3):
        _, rows = backprop.minibatch(11, "a", step, 4, ctx)
        encoded = prompts.encode(loaded.tokenizer, [data.examples[i] for i in rows], 128)
        width = max(len(row.tokens) for row in encoded)
        tokens = torch.tensor([[*row.tokens, *[0] * (width - len(row.tokens))] for row in encoded])
        labels = torch.tensor(
            [[-100] * r.start + [*r.tokens[r.start :]] + [-100] * (width - len(r.tokens)) for r in encoded]
        )
        logits = model(input_ids=tokens).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(live.values(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    for name, parameter in live.items():
        moved = float(np.linalg.norm(after.arrays[name] - start.arrays[name]))
        apart = float(np.linalg.norm(after.arrays[name] - parameter.detach().numpy()))
        assert moved > 1e-3 and apart < 1e-3 * moved, name


def test_clones_agree_with_any_one_of_them(handle: ModelHandle, tmp_path: Path) -> None:
    """Clients of equal data and seeds: the mean is each of them, and there is no error of averaged factors."""
    config = Config(epochs=2, **SMALL)
    ctx = context(tmp_path, config)
    state = method.initialise(handle, config, ctx)
    update = method.finetune(handle, dataset(8), Assignment(state.base, 1, "a", state.arrays), config, ctx)
    clones = [replace(update, client=f"clone-{k}") for k in range(5)]
    new = backprop.aggregate(state, clones, ctx)
    for name, array in update.arrays.items():
        assert float(np.abs(new.arrays[name] - array).max()) <= 1e-7
        assert new.arrays[name].dtype == np.float32
    assert aggregation_error([clone.arrays for clone in clones], [0.2] * 5) <= 1e-6


def products(arrays: Mapping[str, Any]) -> Any:
    """All B A, one after the other, float64."""
    names = sorted(name.removesuffix(".lora_A") for name in arrays if name.endswith(".lora_A"))
    wide = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    return np.concatenate([(wide[f"{n}.lora_B"] @ wide[f"{n}.lora_A"]).ravel() for n in names])


def aggregation_error(several: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> float:
    """|| sum_k p_k B_k A_k - (sum_k p_k B_k)(sum_k p_k A_k) || / || sum_k p_k B_k A_k ||."""
    ideal = sum(w * products(one) for w, one in zip(weights, several, strict=True))
    mean = {
        name: sum(w * np.asarray(one[name], np.float64) for w, one in zip(weights, several, strict=True))
        for name in several[0]
    }
    return float(np.linalg.norm(ideal - products(mean)) / np.linalg.norm(ideal))


def test_weights_are_of_the_selected_clients(tmp_path: Path) -> None:
    """n = (1, 3): 0.25 and 0.75, to the bit; who was not selected has no say, and the order of arrival none."""
    config, stream = Config(), Stream(0, "made up")
    arrays = [{"m.lora_A": stream.normal(8).reshape(2, 4), "m.lora_B": stream.normal(6).reshape(3, 2)} for _ in "ab"]
    state = State("base", 0, {name: np.zeros_like(a) for name, a in arrays[0].items()}, {"steps": 0, "forwards": 0})
    told = {"forwards": 3, "loss": 1.0, "steps": 1}
    updates = [Update("base", 1, c, "weights", a, n, "", told) for c, a, n in zip("ab", arrays, (1, 3), strict=True)]
    ctx = context(tmp_path, config)
    assert local.screen(updates, state, config, ctx) == {}
    for order in (updates, updates[::-1]):
        new = backprop.aggregate(state, order, ctx)
        for name in state.arrays:
            expected = np.float32(0.25 * np.float64(arrays[0][name]) + 0.75 * np.float64(arrays[1][name]))
            assert np.array_equal(new.arrays[name], expected)


def test_averaged_factors_are_not_the_average(handle: ModelHandle, tmp_path: Path) -> None:
    """Large for unlike factors, of residual rank (K - 1) r; small after one round from one start, and growing with
    local steps."""
    stream = Stream(0, "factors")
    drawn = [
        {"m.lora_A": stream.normal(60).reshape(3, 20), "m.lora_B": stream.normal(60).reshape(20, 3)} for _ in range(4)
    ]
    assert aggregation_error(drawn, [0.25] * 4) > 0.5
    mean = {name: sum(np.float64(one[name]) for one in drawn) / 4 for name in drawn[0]}
    ideal = sum(np.float64(one["m.lora_B"]) @ np.float64(one["m.lora_A"]) for one in drawn) / 4
    residual = ideal - mean["m.lora_B"] @ mean["m.lora_A"]
    assert np.linalg.matrix_rank(residual) == (4 - 1) * 3
    found = []
    for steps in (1, 8, 32):
        config = Config(steps=steps, **SMALL)
        ctx = context(tmp_path, config)
        state = method.initialise(handle, config, ctx)
        shards = {c: dataset(8, k) for k, c in enumerate("abc")}
        updates = [
            method.finetune(handle, d, Assignment(state.base, 1, c, state.arrays), config, ctx)
            for c, d in shards.items()
        ]
        found.append(aggregation_error([u.arrays for u in updates], [1 / 3] * 3))
    assert 0 < found[0] < found[1] < found[2] < 1


@pytest.mark.model
@pytest.mark.parametrize(
    ("rank", "targets", "trainable", "size"),
    [
        (8, "q_proj,v_proj", 460_800, 1_843_200),
        (8, "q_proj,k_proj,v_proj,o_proj", 921_600, 3_686_400),
        (8, "all-linear", 2_442_240, 9_768_960),
        (16, "q_proj,k_proj,v_proj,o_proj", 1_843_200, 7_372_800),
    ],
)
def test_bytes_of_smollm2(smollm2: ModelHandle, rank: int, targets: str, trainable: int, size: int) -> None:
    """From the real model's shapes, without its values: payload to the byte, framing apart, and factors alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smollm2.path))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    spec = method.spec_of(Config(rank=rank, targets=targets))
    found = adapters.install(model, spec, Stream(0, "adapter"))
    assert found.size == trainable
    told = {"loss": 1.0, "steps": 4, "forwards": 12, local.ADAPTER: local.digest(spec, "chat")}
    update = Update("0" * 64, 1, "client-000", "weights", found.initial, 100, "", told)
    raw = wire.update_to_bytes(update)
    assert wire.payload_bytes(update.arrays) == size
    assert size < len(raw) < size + 64 * 1024
    (length,) = np.frombuffer(raw[:8], "<u8")
    assert len(raw) == size + 8 + int(length)
    assert all(name.endswith((".lora_A", ".lora_B")) for name in wire.update_from_bytes(raw, "x").arrays)


def test_the_schedule_of_clients_does_not_depend_on_training(handle: ModelHandle, tmp_path: Path) -> None:
    shards = {f"c{k}": dataset(4, k % 3) for k in range(6)}
    seen = []
    for name, rate in (("one", 1e-3), ("two", 1e-2)):
        config = replace(Config(**SMALL), learning_rate=rate)
        relay = Relay([registry.get("fedit")], {"fedit": config})
        ctx = Context(tmp_path / name, seed=3, rounds=4, configs=relay.configs)
        ctx.folder.mkdir()
        ledger = Ledger(ctx.folder / "ledger.jsonl")
        start = relay.initialise(handle, ctx)
        plan = Plan({client: len(data) for client, data in shards.items()}, 2, 4)
        final = run_rounds(relay, start, plan, in_process(relay, handle, shards, ctx), ctx, ledger)
        seen.append(([(row["round"], row["client"]) for row in ledger.rows()], final))
    assert seen[0][0] == seen[1][0] and len(seen[0][0]) == 8
    assert len({tuple(c for r, c in seen[0][0] if r == k) for k in range(1, 5)}) > 1
    assert not np.array_equal(products(seen[0][1].arrays), products(seen[1][1].arrays))


# A client's turn


def test_every_round_has_its_own_optimiser_and_decay(handle: ModelHandle, tmp_path: Path) -> None:
    """A second round from the first's theta is a first round from there, of the other minibatches: nothing is kept."""
    config, data = Config(**SMALL), dataset(4)  # one minibatch, so both rounds see the same
    states = rounds_of(handle, {"a": data}, config, context(tmp_path, config, rounds=2), 2)
    ctx = context(tmp_path, config, rounds=50)
    method.initialise(handle, config, ctx)
    again = Assignment(states[1].base, 1, "a", states[1].arrays, states[1].scalars)
    update = method.finetune(handle, data, again, config, ctx)
    for name, array in update.arrays.items():
        assert np.array_equal(array, states[2].arrays[name])


@pytest.mark.parametrize("inputs", [False, True])
def test_micro_batches_add_up_to_the_minibatch(inputs: bool, handle: ModelHandle) -> None:
    """Examples of unlike lengths: the mean is over tokens, not over the means of micro-batches."""
    rows = [
        Example(({"role": "user", "content": "tell me " + WORDS[i % 4] * (1 + i)},), " ".join(WORDS[: 1 + i % 4]))
        for i in range(7)
    ]
    data = Dataset(tuple(rows), "unlike", "toy")
    config = Config(**SMALL)
    frozen = Frozen(handle, method.spec_of(config), Stream(0, "a"), "float32")
    theta = {n: v + Stream(1, n).normal(v.size).reshape(v.shape) * np.float32(0.05) for n, v in frozen.initial.items()}
    found = {}
    for micro in (0, 1, 3, 7):
        leaves = backprop.leaves_of(theta)
        slope = local.slope_of(frozen, replace(config, micro_batch=micro), inputs=inputs)
        found[micro] = slope(0, f"b{micro}", lambda: data, leaves), {n: leaf.grad for n, leaf in leaves.items()}
    for micro in (1, 3, 7):
        assert found[micro][0] == pytest.approx(found[0][0], rel=1e-6)
        for name, gradient in found[0][1].items():
            torch.testing.assert_close(found[micro][1][name], gradient, rtol=1e-4, atol=1e-7)


def test_training_on_inputs_scores_every_token_but_the_first(handle: ModelHandle) -> None:
    config, data = Config(**SMALL), dataset(5)
    frozen = Frozen(handle, method.spec_of(config), Stream(0, "a"), "float32")
    leaves = backprop.leaves_of(frozen.initial)
    loss = local.slope_of(frozen, config, inputs=True)(0, "b", lambda: data, leaves)
    losses = []
    for row in prompts.encode(frozen.tokenizer, data.examples, 128):
        tokens = torch.tensor([row.tokens])
        logits = frozen.model(input_ids=tokens).logits[0, :-1].detach()
        losses += F.cross_entropy(logits, tokens[0, 1:], reduction="none").tolist()
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    answers_only = backprop.exact_slope(frozen, 64)(0, "other", lambda: data, leaves)
    assert abs(loss - answers_only) > 1e-3


@given(n=st.integers(1, 500), batch=st.integers(1, 40), epochs=st.integers(1, 5), steps=st.integers(0, 9))
@settings(deadline=None)
def test_steps_are_whole_passes_unless_asked(n: int, batch: int, epochs: int, steps: int) -> None:
    config = Config(epochs=epochs, batch_size=batch, steps=steps)
    assert steps_of(config, n) == (steps or epochs * math.ceil(n / batch))


def test_claims_other_than_its_examples_come_to_are_rejected(handle: ModelHandle, tmp_path: Path) -> None:
    config = Config(epochs=2, **SMALL)
    ctx = context(tmp_path, config)
    state = method.initialise(handle, config, ctx)
    sent = Assignment(state.base, 1, "a", state.arrays, state.scalars)
    good = method.finetune(handle, dataset(9), sent, config, ctx)
    assert good.kind == "weights" and good.scalars["steps"] == 2 * 3
    bad = {
        "kind": replace(good, kind="delta"),
        "fewer steps": replace(good, scalars={**good.scalars, "steps": 3, "forwards": 9}),
        "more examples": replace(good, examples=40),
        "another adapter": replace(good, scalars={**good.scalars, local.ADAPTER: "0"}),
        "names": replace(good, arrays={**good.arrays, "model.embed_tokens.weight": np.zeros(2, np.float32)}),
    }
    for name, update in bad.items():
        assert local.screen([update], state, config, ctx), name
    both = local.screen([bad["kind"], replace(good, client="b")], state, config, ctx)
    assert list(both) == ["a"]
    asked = Assignment(state.base, 1, "a", state.arrays, state.scalars, {"epochs": 1})
    ctx.assigned = {"a": asked}
    short = method.finetune(handle, dataset(9), asked, replace(config, epochs=1), ctx)
    assert local.screen([short], state, config, ctx) == {} and local.screen([good], state, config, ctx)


def test_a_client_refuses_another_adapter(handle: ModelHandle, tmp_path: Path) -> None:
    config = Config(**SMALL)
    ctx = context(tmp_path, config)
    state = method.initialise(handle, config, ctx)
    sent = Assignment(state.base, 1, "a", state.arrays, state.scalars)
    with pytest.raises(FederationError, match="trains another adapter"):
        method.finetune(handle, dataset(4), sent, replace(config, alpha=8.0), ctx)
    method.finetune(handle, dataset(4), sent, replace(config, learning_rate=1.0), ctx)


# Instructions


def test_alpacas_template() -> None:
    asked = Dataset(
        (
            Example(({"role": "user", "content": "Name a colour."},), "red"),
            Example(({"role": "user", "content": "Add {x}.\n\n1\n\n2"},), "3"),
        ),
        "f",
    )
    one, two = method.alpaca(asked).examples
    assert one.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\n"
    )
    assert isinstance(two.prompt, str) and two.completion == "3"
    assert two.prompt.endswith("### Instruction:\nAdd {x}.\n\n### Input:\n1\n\n2\n\n### Response:\n")
    assert "paired with an input that provides further context. Write" in two.prompt


def test_alpacas_template_is_for_instructions() -> None:
    turn = {"role": "user", "content": "x"}
    with pytest.raises(DataError, match="labelled texts"):
        method.alpaca(Dataset((Example((turn,), "a", "a"),), "f", "toy", ("a",)))
    for prompt in ("", "plain", ({"role": "system", "content": "s"}, turn), (turn, turn)):
        with pytest.raises(DataError, match="one instruction"):
            method.alpaca(Dataset((Example(prompt, "a"),), "f", "toy"))


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_from_a_file_of_instructions_to_a_model(template: str, handle: ModelHandle, tmp_path: Path) -> None:
    """The whole way: three clients' instructions in, an adapter out whose loss on them has fallen."""
    rows = [
        {"instruction": f"say {w} {k}", "input": "twice" * (k % 2), "output": w, "user": f"u{k % 3}"}
        for k, w in enumerate(("red", "blue", "green") * 8)
    ]
    for name, part in (("train", rows), ("valid", rows[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    options = SMALL | {"epochs": 4, "max_length": 256, "template": template}
    outcome = edgellm.finetune(
        "fedit", str(handle.path), str(tmp_path), tmp_path / "run", partition="user", rounds=4, watch=1, options=options
    )
    curve = [loss for _, loss in outcome.report.curves["validation loss over rounds"]]
    assert len(curve) == 5 and curve[-1] < 0.7 * curve[0]
    assert outcome.report.metrics["uploaded"].value == 4 * 3 * 4 * sum(
        array.size for array in method.initialise(handle, Config(**SMALL), context(tmp_path, Config())).arrays.values()
    )
    tuned = models.resolve(str(tmp_path / "run"))
    data = read(str(tmp_path), "valid")
    live = tuned.load()
    shown = method.alpaca(data) if template == "alpaca" else data
    losses = []
    for row in prompts.encode(live.tokenizer, shown.examples, 256):
        with torch.no_grad():
            logits = live.model(input_ids=torch.tensor([row.tokens])).logits[0]
        scores = F.log_softmax(logits[row.start - 1 : -1], -1)
        losses += [-float(s[t]) for s, t in zip(scores, row.tokens[row.start :], strict=True)]
    assert sum(losses) / len(losses) == pytest.approx(curve[-1], rel=1e-4)


def test_unlike_clients_get_whole_passes_in_fewer_or_smaller_steps(handle: ModelHandle, tmp_path: Path) -> None:
    """Under `fit` a client makes the steps of its passes, or as many as its time allows; both are accepted."""
    (tmp_path / "d.jsonl").write_text('{"instruction": "a", "output": "b", "user": "x"}\n' * 9)
    found = []
    for name, seconds in (("whole", 0.0), ("hurried", 1e-9)):
        report = edgellm.finetune(
            "fedit", str(handle.path), str(tmp_path / "d.jsonl"), tmp_path / name, rounds=1, watch=0, around="fit",
            options={**SMALL, "epochs": 2, "fit": {"seconds": seconds}},
        ).report  # fmt: skip
        assert report.rejected == []
        found.append(report.metrics["steps"].value)
    assert found == [2 * 3, 1]
