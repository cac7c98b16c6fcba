"""Objectives without a gradient: accuracy, token F1 and Rouge-L as what the seed methods minimise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_hardware.torch_session import TorchSession
from edgellm_plugins.zeroth_order import differences, fzoo, mezo
from edgellm_plugins.zeroth_order.fzoo import method as fzoo_method
from edgellm_plugins.zeroth_order.mezo import method as mezo_method
from edgellm_plugins.zeroth_order.samplers import Dense
from edgellm_plugins.zeroth_order.space import Full, Small
from edgellm_plugins.zeroth_order.trajectory import SeedMethod

from edgellm_sdk import models
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError
from edgellm_sdk.kit import adapters, answers, prompts, scoring
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.kit.overlap import rouge_l, token_f1
from edgellm_sdk.kit.scoring import Goal
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset, Example, ModelHandle

WORDS = ("win a prize now", "mum is home", "call this number", "see you at dinner tonight")
SPOKEN = (" fox", " call", " dog", " mum")  # what the model of `speaker` can say
METHODS: dict[str, tuple[Any, SeedMethod]] = {
    "mezo": (mezo.Config, mezo_method.METHOD),
    "fzoo": (fzoo.Config, fzoo_method.METHOD),
}


def dataset(n: int = 16, completions: tuple[str, ...] = ("spam", "ham"), labelled: bool = True) -> Dataset:
    rows = []
    for i in range(n):
        answer = completions[i % len(completions)]
        prompt = ({"role": "user", "content": f"{WORDS[i % 4]} {i}"},)
        rows.append(Example(prompt, answer, answer if labelled else None))
    labels = tuple(sorted(set(completions))) if labelled else ()
    return Dataset(tuple(rows), f"fingerprint-{n}-{labelled}-{'/'.join(completions)}", "toy", labels)


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


@pytest.fixture(scope="module")
def speaker(make_tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    """A tiny model that can say four words and stop, so that texts overlap."""
    from transformers import LlamaForCausalLM

    folder = make_tiny_llama(tmp_path_factory.mktemp("speaker") / "m", seed=5)
    tokenizer = models.resolve(str(folder)).load().tokenizer
    model = LlamaForCausalLM.from_pretrained(folder)
    said = [tokenizer.encode(word, add_special_tokens=False) for word in SPOKEN]
    assert all(len(ids) == 1 for ids in said)
    kept = torch.tensor([tokenizer.eos_token_id, *(ids[0] for ids in said)])
    with torch.no_grad():
        head = torch.zeros_like(model.lm_head.weight)
        head[kept] = model.lm_head.weight[kept]
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    return models.resolve(str(folder))


def frozen(handle: ModelHandle, goal: Goal, spec: adapters.Spec | None = None, share: int = 0) -> Frozen:
    spec = spec or adapters.Spec("lora-fa", 1, 4, 8.0, ("down_proj",))
    return Frozen(handle, spec, Stream(0, "a"), "float32", share=share, goal=goal)


def directions(live: Frozen, n: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{k: rng.normal(size=a.shape).astype(np.float32) for k, a in live.initial.items()} for _ in range(n)]


SPECS = [
    adapters.Spec("lora-fa", 1, 4, 8.0, ("down_proj",)),  # only scored positions run
    adapters.Spec("lora", 2, 4, 8.0, ("q_proj", "v_proj", "down_proj")),
    adapters.Spec("norm", 0),
    adapters.Spec("layers", 1),
]


# --- accuracy


def by_hand(model: Any, tokenizer: Any, data: Dataset) -> list[bool]:
    """Whether the true label's first token beats the others', by plain transformers, one example at a time."""
    firsts = [tokenizer.encode(label, add_special_tokens=False)[0] for label in data.labels]
    right = []
    for row, example in zip(prompts.encode(tokenizer, data.examples, 128), data.examples, strict=True):
        logits = model(torch.tensor([row.tokens[: row.start]])).logits[0, -1]
        right.append(data.labels[int(logits[firsts].argmax())] == example.label)
    return right


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.layers}")
def test_accuracy_is_a_count_by_hand(handle: ModelHandle, tmp_path: Path, spec: adapters.Spec) -> None:
    data = dataset(12, ("spam", "ham", "dinner"))
    live = frozen(handle, Goal("accuracy"), spec)
    vs, steps = directions(live, 4), [0.0, 0.5, -0.5, 1.0]
    found = live.evaluate("b", lambda: data, live.initial, vs, steps)
    for v, step, minus in zip(vs, steps, found, strict=True):
        theta = {name: value + np.float32(step) * v[name] for name, value in live.initial.items()}
        folder = tmp_path / f"{step}"
        live.write(folder, theta, {"path": str(handle.path), "digest": handle.digest, "name": "m"})
        tuned = models.resolve(str(folder)).load(merge=True)
        right = by_hand(tuned.model, tuned.tokenizer, data)
        assert minus == -np.mean(right)
        live.trainables.set_one(theta)
        assert live.scores(live.batch("b", lambda: data))[0].tolist() == right
    assert len(set(found)) > 1
    classes = {label: [] for label in data.labels}  # type: ignore[var-annotated]
    for example, hit in zip(data.examples, right, strict=True):
        classes[str(example.label)].append(hit)
    balanced = live.measure(theta, data)["balanced accuracy"].value
    assert balanced == pytest.approx(np.mean([np.mean(hits) for hits in classes.values()]))


def test_accuracy_of_a_whole_model_is_a_count_by_hand(handle: ModelHandle) -> None:
    data = dataset(12, ("spam", "ham", "dinner"))
    whole = Whole(handle, "float32", goal=Goal("accuracy"))
    space = Full(whole, Dense("gaussian", whole.shapes))
    points = [(3, 0.0), (3, 0.05), (4, 0.05), (5, -0.05)]
    found = space.losses("b", lambda: data, points)
    for (seed, c), minus in zip(points, found, strict=True):
        loaded = handle.load().model
        for name, parameter in loaded.named_parameters():
            parameter.data += c * torch.from_numpy(space.sampler.draw(name, parameter.numpy(), seed))
        assert minus == -np.mean(by_hand(loaded, whole.tokenizer, data))
    assert len(set(found)) > 1


# --- answers


def test_greedy_stops_each_row_on_its_own_and_masks_the_padding() -> None:
    seen = []
    script = {1: [7, 9], 2: [9, 5], 3: [4, 4]}

    def step(ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append((ids[:, 0].tolist(), positions[:, 0].tolist(), mask.tolist()))
        return torch.tensor(script[len(seen)])

    found = answers.greedy(torch.tensor([6, 8]), torch.tensor([1, 3]), (9,), 4, step)
    assert found == [[6, 7], [8]]
    assert seen == [
        ([6, 8], [1, 3], [[1, 0, 0, 1], [1, 1, 1, 1]]),
        ([7, 9], [2, 4], [[1, 0, 0, 1, 1], [1, 1, 1, 1, 1]]),
    ]
    assert answers.greedy(torch.tensor([6, 8]), torch.tensor([1, 3]), (), 1, step) == [[6], [8]]
    assert len(seen) == 2


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind}-{spec.layers}")
def test_batched_answers_are_those_of_one_model_at_a_time(
    handle: ModelHandle, tmp_path: Path, spec: adapters.Spec
) -> None:
    """Token for token: candidates together, apart, and each written out and run by a session, prompt by prompt."""
    data = dataset(5, ("spam", "ham", "dinner"))
    live = frozen(handle, Goal("rouge", 12), spec)
    begun = live.begun("b", lambda: data)
    assert len(set(begun.lengths.tolist())) > 1
    thetas = [{n: a + np.float32(0.3) * v[n] for n, a in live.initial.items()} for v in directions(live, 3)]
    live.trainables.set({n: torch.from_numpy(np.stack([theta[n] for theta in thetas])) for n in live.initial})
    together = live.generate(begun, 3)
    for k, theta in enumerate(thetas):
        live.trainables.set_one(theta)
        assert live.generate(begun) == together[5 * k : 5 * k + 5]
        folder = tmp_path / str(k)
        live.write(folder, theta, {"path": str(handle.path), "digest": handle.digest, "name": "m"})
        session = TorchSession(models.resolve(str(folder)), "cpu", "float32")
        for i, example in enumerate(data.examples):
            alone = session.generate(session.prompt_ids(example.prompt), 12)
            assert list(alone.tokens) == together[5 * k + i]
    assert len({tuple(ids) for ids in together}) > 5


def test_answers_of_a_shifted_whole_model(handle: ModelHandle, speaker: ModelHandle) -> None:
    """Against transformers with every weight replaced and no cache; answers that stop early included."""
    stopped = 0
    for chosen in (handle, speaker):
        whole = Whole(chosen, "float32", goal=Goal("f1", 8))
        space = Full(whole, Dense("gaussian", whole.shapes))
        data = dataset(6, ("fox call", "mum"))
        batch = prompts.encode(whole.tokenizer, data.examples, 128)
        for seed, c in ((3, 0.0), (3, 0.02), (4, 0.05)):
            loaded = chosen.load().model
            for name, parameter in loaded.named_parameters():
                parameter.data += c * torch.from_numpy(space.sampler.draw(name, parameter.numpy(), seed))
            texts = []
            for row in batch:
                tokens = list(row.tokens[: row.start])
                for _ in range(8):
                    token = int(loaded(torch.tensor([tokens])).logits[0, -1].argmax())
                    if token == whole.tokenizer.eos_token_id:
                        stopped += 1
                        break
                    tokens.append(token)
                texts.append(whole.tokenizer.decode(tokens[row.start :], skip_special_tokens=True))
            scores = [token_f1(text, e.completion) for text, e in zip(texts, data.examples, strict=True)]
            found = space.losses(f"b{chosen.digest}", lambda data=data: data, [(seed, c)])[0]  # type: ignore[misc]
            assert found == pytest.approx(-np.mean(scores))
            if c == 0:
                assert whole.written(batch) == texts
                metric = whole.measure(data)["token F1"]
                assert metric.value == pytest.approx(np.mean(scores)) and metric.n == 6 and metric.ci95 is not None
    assert stopped


@pytest.mark.parametrize("name", ["accuracy", "f1", "rouge"])
def test_candidates_in_one_call_score_as_one_after_the_other(
    handle: ModelHandle, speaker: ModelHandle, name: str
) -> None:
    data = dataset(6, ("spam", "ham") if name == "accuracy" else ("fox call", "mum"))
    found = []
    for share in (0, 1, 5):
        live = frozen(handle if name == "accuracy" else speaker, Goal(name, 6), SPECS[1], share)
        vs = directions(live, 6)
        found.append(live.evaluate("b", lambda: data, live.initial, vs, [0.4, -0.4] * 3))
    assert found[0].tolist() == found[1].tolist() == found[2].tolist()
    assert len(set(found[0])) > 1 and (found[0] <= 0).all() and (found[0] >= -1).all()


def test_the_held_out_score_is_the_mean_over_all_examples(speaker: ModelHandle, tmp_path: Path) -> None:
    """More examples than a chunk; the same by a session and the published definition."""
    data = dataset(20, ("fox call", "mum dog", "fox"), labelled=False)
    live = frozen(speaker, Goal("rouge", 6), SPECS[1])
    v = directions(live, 1)[0]
    theta = {name: value + np.float32(0.2) * v[name] for name, value in live.initial.items()}
    metric = live.measure(theta, data)["Rouge-L"]
    live.write(tmp_path / "a", theta, {"path": str(speaker.path), "digest": speaker.digest, "name": "m"})
    session = TorchSession(models.resolve(str(tmp_path / "a")), "cpu", "float32")
    said = [session.generate(session.prompt_ids(example.prompt), 6).tokens for example in data.examples]
    texts = [live.tokenizer.decode(list(ids), skip_special_tokens=True) for ids in said]
    scores = [rouge_l(text, example.completion) for text, example in zip(texts, data.examples, strict=True)]
    assert metric.value == pytest.approx(np.mean(scores)) and metric.n == 20
    half = scoring.Z95 * np.std(scores, ddof=1) / 20**0.5
    assert metric.ci95 == pytest.approx((max(0, np.mean(scores) - half), min(1, np.mean(scores) + half)))
    assert set(live.measure(theta, data)) == {"validation loss", "Rouge-L"}


# --- training


def run(
    name: str, handle: ModelHandle, data: Dataset, folder: Path, rounds: int, **changes: Any
) -> tuple[Any, Context, list[float]]:
    config = METHODS[name][0](**{"layers": 0, "rank": 4, "precision": "float32", "batch_size": 16} | changes)
    ctx, method = Context(folder, seed=7, rounds=rounds, configs={name: config}), METHODS[name][1]
    state = method.initialise(handle, config, ctx)
    space = method.follower(handle, config, ctx).space
    assert isinstance(space, Full if config.train == "full" else Small)
    values = [-float(space.losses("all", lambda: data, [(0, 0.0)])[0])]
    for _ in range(rounds):
        given = method.assign(state, ["a"], config)
        update = method.finetune(handle, data, given["a"], config, ctx)
        assert method.screen([update], state, config) == {}
        state = method.aggregate(state, [update], config, ctx)
        values.append(-float(space.losses("all", lambda: data, [(0, 0.0)])[0]))
    return space, ctx, values


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mezo", {"step": 0.3, "learning_rate": 0.3}),
        ("fzoo", {"step": 0.3, "learning_rate": 0.1}),
        ("mezo", {"train": "full", "step": 0.02, "learning_rate": 2e-3}),
    ],
)
def test_accuracy_rises_where_there_is_no_gradient(
    handle: ModelHandle, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    """mezo.md check 8. The curve is of the score, and nothing is called a loss that is none."""
    data = dataset(16, ("ham", "spam"))
    space, ctx, values = run(name, handle, data, tmp_path, 6, objective="accuracy", probes=8, steps=5, **changes)
    assert values[0] <= 0.5 and values[-1] >= 0.9
    assert space.measure(data)["balanced accuracy"].value == pytest.approx(values[-1])
    assert set(ctx.curves) == {f"training accuracy over {x}" for x in ("rounds", "forwards", "seconds")}
    points = ctx.curves["training accuracy over rounds"]
    assert [x for x, _ in points] == [1, 2, 3, 4, 5, 6] and all(0 <= y <= 1 for _, y in points)


@pytest.mark.parametrize("objective", ["f1", "rouge"])
def test_the_overlap_of_answers_rises(speaker: ModelHandle, tmp_path: Path, objective: str) -> None:
    """mezo.md check 8, through generation."""
    data = dataset(8, ("fox call fox", "mum dog"), labelled=False)
    _, ctx, values = run(
        "mezo", speaker, data, tmp_path, 4, objective=objective, new_tokens=6, probes=8, steps=5, batch_size=8,
        step=0.2, learning_rate=0.1,
    )  # fmt: skip
    assert values[-1] >= values[0] + 0.1
    assert f"training {Goal(objective).title} over forwards" in ctx.curves


def test_equal_scores_move_nothing(handle: ModelHandle) -> None:
    """Steps too small to change a decision."""
    whole = Whole(handle, "float32", goal=Goal("accuracy"))
    space = Full(whole, Dense("gaussian", whole.shapes))
    for estimate in (differences.central(1e-6), differences.normalised(1e-6)):
        probe = estimate(space, "b", lambda: dataset(8), [1, 2, 3])
        assert not probe.scalars.any() and probe.dropped == 0


# --- errors


def test_refusals(handle: ModelHandle, tmp_path: Path) -> None:
    plain = dataset(4, labelled=False)
    for train in ("lora-fa", "full"):
        with pytest.raises(ConfigError, match="accuracy needs labelled data - objective; use loss, f1 or rouge"):
            run("mezo", handle, plain, tmp_path / train, 1, objective="accuracy", train=train)
        text = Dataset((Example("", "just a text"),), "f", "texts")
        with pytest.raises(DataError, match="token F1 needs a prompt in every example - texts"):
            run("mezo", handle, text, tmp_path / f"{train}-text", 1, objective="f1", train=train)
        with pytest.raises(DataError, match="share a first token"):
            same = dataset(4, ("spam a", "spam b"))
            run("mezo", handle, same, tmp_path / f"{train}-same", 1, objective="accuracy", train=train)
    config = mezo.Config(objective="rouge")
    elsewhere = Context(tmp_path, device="llama_cpp", configs={"mezo": config})
    with pytest.raises(ConfigError, match="llama_cpp computes losses only, no Rouge-L - objective; use --device cpu"):
        mezo_method.METHOD.initialise(handle, config, elsewhere)
