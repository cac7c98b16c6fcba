"""GKD on tiny models: what a step minimises, what it reads, and whole runs that are killed, chained and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edgellm_plugins.compression.gkd import Config, method, writing
from edgellm_plugins.compression.gkd.method import Distillation
from edgellm_plugins.training import backprop, run
from torch import Tensor

import edgellm_sdk as edgellm
from edgellm_sdk import checkpoint, store
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, ModelError
from edgellm_sdk.kit import prompts
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.models import resolve
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset, Example, ModelHandle

LINES = ("win a prize now", "mum is home tonight", "call this number", "see you at dinner, are you coming home")
SMALL = {"batch_size": 4, "max_length": 64, "new_tokens": 6, "steps": 6, "rank": 4, "chunk": 5, "precision": "float32"}


def chat(n: int = 12) -> Dataset:
    rows = [
        Example(({"role": "user", "content": f"{LINES[i % 4]} {i}"},), ("spam", "it is ham")[i % 2]) for i in range(n)
    ]
    return Dataset(tuple(rows), f"chat-{n}", "chat")


def texts(n: int = 8) -> Dataset:
    return Dataset(
        tuple(Example("", f"{LINES[i % 4]} and {LINES[(i + 1) % 4]} {i}") for i in range(n)), f"t{n}", "texts"
    )


@pytest.fixture(scope="module")
def student(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    return resolve(str(make_tiny_llama(tmp_path_factory.mktemp("student") / "model", layers=2, seed=3)))


@pytest.fixture(scope="module")
def teacher(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModelHandle:
    """Deeper and wider than the student: 3 layers, hidden 96."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = make_tiny_llama(tmp_path_factory.mktemp("teacher") / "model", layers=3, seed=4)
    settings = LlamaConfig.from_pretrained(folder, hidden_size=96, intermediate_size=160, head_dim=24)
    torch.manual_seed(5)
    LlamaForCausalLM(settings).save_pretrained(folder)
    return resolve(str(folder))


def made(
    student: ModelHandle, teacher: ModelHandle | None, folder: Path, **options: Any
) -> tuple[Distillation, backprop.Slope, backprop.Leaves]:
    """A distillation about to take its steps, at a theta away from its start."""
    config = build(Config, {**SMALL, **options}, "gkd")
    ctx = Context(folder, seed=2)
    frozen = backprop.frozen_base(student, method.spec_of(config), ctx, "float32", 0, config.max_length)
    distillation = Distillation(frozen, teacher.load() if teacher else None, config, ctx)
    theta = {
        name: value + 0.03 * Stream(1, name).normal(value.size).reshape(value.shape)
        for name, value in sorted(frozen.initial.items())
    }
    return distillation, backprop.exact_slope(frozen, config.chunk, batch=distillation.batch), backprop.leaves_of(theta)


def gradients(leaves: backprop.Leaves) -> dict[str, Tensor]:
    return {name: leaf.grad[0].clone() for name, leaf in leaves.items() if leaf.grad is not None}


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[Encoded]]:
    """What is written from now on."""
    seen: list[list[Encoded]] = []
    write = Distillation.written

    def written(self: Distillation, step: int, data: Dataset, own: bool) -> list[Encoded]:
        seen.append(write(self, step, data, own))
        return seen[-1]

    monkeypatch.setattr(Distillation, "written", written)
    return seen


def plain(
    student: ModelHandle, teacher: ModelHandle, rows: Sequence[Encoded], leaves: backprop.Leaves, kind: str, beta: float
) -> tuple[float, dict[str, Tensor]]:
    """Eq. 2 to 4 by autograd through the whole student, one unpadded sequence after the other, in float64."""
    own, theirs = (handle.load().model.double() for handle in (student, teacher))
    named = dict(own.named_parameters())
    for name, leaf in leaves.items():
        named[name].data.copy_(leaf.detach()[0])
        named[name].requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        tokens = torch.tensor([row.tokens])
        places = [at - 1 for at in row.scored]
        s = own(tokens).logits[0, places].softmax(-1)
        with torch.no_grad():
            p = theirs(tokens).logits[0, places].softmax(-1)
        m = beta * p + (1 - beta) * s
        each = {
            "forward-kl": (p * (p / s).log()).sum(-1),
            "reverse-kl": (s * (s / p).log()).sum(-1),
            "jsd": (beta * p * (p / m).log() + (1 - beta) * s * (s / m).log()).sum(-1),
            "likelihood": -s[range(len(places)), list(row.tokens[row.scored.start :])].log(),
        }[kind]
        total = total + each.mean() / len(rows)
    total.backward()
    return float(total.detach()), {name: named[name].grad for name in leaves}  # type: ignore[misc]


@pytest.mark.parametrize("data", [chat(4), texts(4)], ids=["chat", "texts"])
@pytest.mark.parametrize(
    ("kind", "beta", "source"),
    [
        ("forward-kl", 0.5, "data"), ("reverse-kl", 0.5, "data"), ("jsd", 0.1, "data"), ("likelihood", 0.5, "data"),
        ("likelihood", 0.5, "teacher"), ("jsd", 0.9, "teacher"),
    ],
)  # fmt: skip
def test_a_supervised_step_is_plain_autograd(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path, kind: str, beta: float, source: str, data: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = recorded(monkeypatch)
    made_of = {"divergence": kind, "beta": beta, "source": source, "on_policy": 0, "tune": "full"}
    distillation, slope, leaves = made(student, teacher, tmp_path, **made_of)
    loss = slope(0, "batch", lambda: data, leaves)
    rows = seen[0] if source == "teacher" else prompts.encode(distillation.frozen.tokenizer, data.examples, 64)
    expected, wanted = plain(student, teacher, rows, leaves, kind, beta)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients(leaves).items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 1e-4, name


@pytest.mark.parametrize(("kind", "data"), [("reverse-kl", chat(4)), ("jsd", texts(4))], ids=["chat", "texts"])
def test_nothing_flows_back_through_the_writing(
    student: ModelHandle,
    teacher: ModelHandle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    data: Dataset,
) -> None:
    """An on-policy step is the step on the same tokens, had they been the data's: to the bit in our own code, and as
    plain autograd has it."""
    seen = recorded(monkeypatch)
    distillation, slope, leaves = made(student, teacher, tmp_path, divergence=kind, on_policy=1, tune="full")
    loss, found = slope(3, "batch", lambda: data, leaves), gradients(leaves)
    rows = seen[0]
    expected, wanted = plain(student, teacher, rows, leaves, kind, 0.5)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in found.items():
        assert float((gradient - wanted[name]).norm() / wanted[name].norm()) < 1e-4, name
    monkeypatch.setattr(prompts, "encode", lambda tokenizer, examples, length: rows)
    distillation.config = replace(distillation.config, on_policy=0.0)
    assert slope(3, "batch", lambda: data, leaves) == loss
    assert all(torch.equal(gradient, found[name]) for name, gradient in gradients(leaves).items())


def test_what_is_written_comes_from_theta_as_it_is_now(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path
) -> None:
    """Greedy writing is that of the merged model, one prompt at a time; with another theta something else is written.
    It ends with the first id that ends an answer and that id is kept."""
    distillation, _, leaves = made(student, teacher, tmp_path, temperature=0, tune="full", new_tokens=12)
    distillation.frozen.trainables.set(leaves)
    found = distillation.written(0, chat(4), True)
    reference = student.load().model
    for name, leaf in leaves.items():
        reference.get_parameter(name).data.copy_(leaf.detach()[0])
    for row in found:
        tokens = list(row.tokens[: row.start])
        while len(tokens) < row.start + 12:
            with torch.no_grad():
                tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] in distillation.frozen.stops:
                break
        assert list(row.tokens) == tokens
    other = distillation.frozen.initial
    distillation.frozen.trainables.set_one(other)
    assert [row.tokens for row in distillation.written(0, chat(4), True)] != [row.tokens for row in found]


def test_writing_stops_at_the_first_end_and_scores_it(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path
) -> None:
    distillation, _, leaves = made(student, teacher, tmp_path, new_tokens=40, batch_size=8, temperature=3.0)
    distillation.frozen.trainables.set(leaves)
    stops = distillation.frozen.stops
    rows = [row for step in range(12) for row in distillation.written(step, chat(8), True)]
    ended = 0
    for row in rows:
        answer = row.tokens[row.start :]
        assert 1 <= len(answer) <= 40 and not set(stops) & set(answer[:-1])
        assert answer[-1] in stops or len(answer) == 40
        assert list(row.scored) == list(range(row.start, len(row.tokens)))
        ended += answer[-1] in stops
    assert ended >= 3 and len({row.tokens for row in rows}) > 8


def test_only_completions_up_to_their_end_are_scored(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher that says something else over the prompt or the padding changes nothing; at the position that predicts
    the end it changes the loss."""
    data = chat(4)
    distillation, slope, leaves = made(student, teacher, tmp_path, divergence="forward-kl", on_policy=0)
    rows = prompts.encode(distillation.frozen.tokenizer, data.examples, 64)
    width = max(len(row.tokens) for row in rows)
    short = min(range(4), key=lambda i: len(rows[i].tokens))
    assert len(rows[short].tokens) < width
    loaded = distillation.teacher
    assert loaded is not None
    forward = type(loaded.model.model).forward

    def loss_with(changed: tuple[int, int] | None) -> float:
        def other(**inputs: Any) -> Any:
            out = forward(loaded.model.model, **inputs)
            if changed is not None:
                out.last_hidden_state[changed] += 1.0
            return out

        monkeypatch.setattr(loaded.model.model, "forward", other)
        return slope(0, "batch", lambda: data, leaves)

    calm, row = loss_with(None), rows[short]
    silent = [at for at in range(width) if at + 1 not in row.scored]
    assert {0, row.start - 2, len(row.tokens) - 1, width - 1} <= set(silent)
    for at in silent:
        assert loss_with((short, at)) == calm, at
    for at in row.scored:
        assert loss_with((short, at - 1)) != calm, at
    assert row.tokens[row.scored[-1]] in distillation.frozen.stops


def test_lambda_says_what_is_read_and_written(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 never writes; 1 never reads a completion of the data: poisoned ones change nothing."""

    def never(*arguments: Any) -> list[list[int]]:
        raise AssertionError("something was written")

    with monkeypatch.context() as patch:
        patch.setattr(method, "continuations", never)
        _, slope, leaves = made(student, teacher, tmp_path / "0", on_policy=0)
        for step in range(10):
            slope(step, f"b{step}", lambda: chat(4), leaves)
    poisoned = Dataset(tuple(replace(e, completion="call this number " * 9) for e in chat(4).examples), "p", "p")
    found = []
    for data in (chat(4), poisoned):
        _, slope, leaves = made(student, teacher, tmp_path / data.name, on_policy=1)
        found.append((slope(0, "b", lambda data=data: data, leaves), gradients(leaves)))  # type: ignore[misc]
    assert found[0][0] == found[1][0] and all(torch.equal(g, found[1][1][n]) for n, g in found[0][1].items())


def test_a_text_without_a_prompt_lends_its_opening(student: ModelHandle, tmp_path: Path) -> None:
    tokenizer, config = student.load().tokenizer, build(Config, {**SMALL, "opening": 5}, "gkd")
    for row, example in zip(method.given_tokens(tokenizer, texts(4), config), texts(4).examples, strict=True):
        whole = prompts.encode(tokenizer, [example], 64)[0].tokens
        assert row == whole[:5]
    short = Dataset((Example("", "a"),), "s", "s")
    assert len(method.given_tokens(tokenizer, short, config)[0]) == 1
    long = Dataset((Example(({"role": "user", "content": "win a prize now " * 60},), "no"),), "l", "l")
    assert len(method.given_tokens(tokenizer, long, config)[0]) <= 64 - 6


# Rewards


def test_without_weight_a_reward_changes_nothing(student: ModelHandle, teacher: ModelHandle, tmp_path: Path) -> None:
    """alpha = 1 is on-policy distillation, gradient for gradient."""
    found = []
    for number, options in enumerate(({}, {"reward": "f1", "reward_weight": 0})):
        _, slope, leaves = made(student, teacher, tmp_path / str(number), on_policy=1, **options)
        slope(0, "b", lambda: chat(4), leaves)
        found.append(gradients(leaves))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=0, atol=0)


def test_a_reward_alone_raises_the_likelihood_of_what_earned_more(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """alpha = 0: the gradient is the mean over completions of (r - b) times that of -ln p(y|x), by plain autograd."""
    seen = recorded(monkeypatch)
    rewards = torch.tensor([0.0, 1.0, 0.25, 0.5], dtype=torch.float64).numpy()
    monkeypatch.setattr("edgellm_sdk.kit.scoring.text_scores", lambda goal, generated, references: rewards)
    _, slope, leaves = made(
        student, teacher, tmp_path, on_policy=1, reward="rouge", reward_weight=1, tune="full", layers=1
    )
    slope(0, "b", lambda: chat(4), leaves)
    model = student.load().model
    for name, leaf in leaves.items():
        model.get_parameter(name).data.copy_(leaf.detach()[0])
        model.get_parameter(name).requires_grad_(True)
    total: Any = 0.0
    for i, row in enumerate(seen[0]):
        tokens = torch.tensor([row.tokens])
        log_p = model(tokens).logits[0, row.start - 1 : -1].log_softmax(-1)
        nll = F.nll_loss(log_p, tokens[0, row.start :], reduction="sum")
        total = total + (rewards[i] - (rewards.sum() - rewards[i]) / 3) * nll / 4
    total.backward()
    for name, gradient in gradients(leaves).items():
        wanted = model.get_parameter(name).grad
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-4, name


def test_a_reward_for_texts_without_prompts_is_refused(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path
) -> None:
    _, slope, leaves = made(student, teacher, tmp_path, on_policy=1, reward="f1")
    with pytest.raises(DataError, match="needs a prompt in every example"):
        slope(0, "b", lambda: texts(4), leaves)


# Whole runs


def distilled(student: ModelHandle, teacher: ModelHandle, folder: Path, data: Dataset, **options: Any) -> ModelHandle:
    config = build(Config, {**SMALL, "teacher": str(teacher.path), **options}, "gkd")
    return method.compress(student, data, config, Context(folder, seed=1))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def mean_kl(student: ModelHandle, teacher: ModelHandle, data: Dataset) -> float:
    """KL(T | S) per scored token."""
    own, theirs = (handle.load() for handle in (student, teacher))
    total, count = 0.0, 0
    for row in prompts.encode(own.tokenizer, data.examples, 64):
        tokens, places = torch.tensor([row.tokens]), [at - 1 for at in row.scored]
        with torch.no_grad():
            log_s, log_p = (m.model(tokens).logits[0, places].log_softmax(-1) for m in (own, theirs))
        total, count = total + float((log_p.exp() * (log_p - log_s)).sum()), count + len(places)
    return total / count


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_student_learns_from_a_deeper_and_wider_teacher(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path, tune: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[Any] = []
    check = method.check_tokens
    monkeypatch.setattr(method, "check_tokens", lambda frozen, loaded: (held.append(loaded), check(frozen, loaded))[1])
    before = {name: array.copy() for name, array in teacher.tensors()}
    options = {"steps": 40, "learning_rate": 5e-3, "tune": tune, "max_length": 48}
    tuned = distilled(student, teacher, tmp_path / "run", texts(), **options)
    assert mean_kl(tuned, teacher, texts()) < 0.8 * mean_kl(student, teacher, texts())
    loaded = held[0].model  # the teacher stayed as it was
    assert loaded.training is False and not any(p.requires_grad for p in loaded.parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, torch.from_numpy(before[name])), name
    one, other = checkpoint.inspect(student.path), checkpoint.inspect(tuned.path)
    assert {n: (t.shape, t.stored) for n, t in one.tensors.items()} == {
        n: (t.shape, t.stored) for n, t in other.tensors.items()
    }
    assert tuned.adapters == () and not list((tmp_path / "run" / "checkpoint").rglob("*.safetensors"))


def test_the_result_is_theta_folded_into_the_student(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path
) -> None:
    """A LoRA on one module of the last layer changes that matrix alone, by a matrix of its rank."""
    tuned = distilled(student, teacher, tmp_path, chat(), layers=1, targets="down_proj", rank=2, learning_rate=1e-2)
    before, after = dict(student.tensors()), dict(tuned.tensors())
    changed = [name for name in before if (before[name] != after[name]).any()]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]
    spectrum = torch.linalg.svdvals(torch.from_numpy(after[changed[0]] - before[changed[0]]).double())
    assert spectrum[1] > 1e-3 * spectrum[0] and spectrum[2] < 1e-4 * spectrum[0]


def test_a_students_adapters_are_merged_first(student: ModelHandle, teacher: ModelHandle, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": e.completion}) + "\n" for e in texts(24).examples))
    asked = {"rounds": 2, "watch": 0, "options": {"steps": 2, "learning_rate": 1e-2, "max_length": 48}}
    edgellm.finetune("lora", str(student.path), str(path), tmp_path / "tuned", **asked)  # type: ignore[arg-type]
    tuned = resolve(str(tmp_path / "tuned"))
    assert tuned.adapters
    still = distilled(tuned, teacher, tmp_path / "run", texts(), learning_rate=0.0)
    assert still.adapters == ()
    for (name, merged), (_, stored) in zip(tuned.tensors(), still.tensors(), strict=True):
        assert (merged == stored).all(), name


def test_two_runs_and_a_resumed_one_end_in_the_same_bytes(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run stopped after every single step, each time in a new Context."""
    distilled(student, teacher, tmp_path / "calm", chat())
    step, left = backprop.one_step, [0]

    def stopping(*arguments: Any) -> float:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(*arguments)

    monkeypatch.setattr(backprop, "one_step", stopping)
    monkeypatch.setattr(run, "SHARE", 0)
    for taken in range(6):
        left[0] = 1
        if taken < 5:
            with pytest.raises(KeyboardInterrupt):
                distilled(student, teacher, tmp_path / "stopped", chat())
        else:
            distilled(student, teacher, tmp_path / "stopped", chat())
    assert contents(tmp_path / "stopped" / "model") == contents(tmp_path / "calm" / "model")
    assert [p.name for p in (tmp_path / "stopped" / "checkpoint").iterdir()] == []


def test_a_checkpoint_of_other_options_is_not_taken_up(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "forget", lambda ctx, title: None)
    distilled(student, teacher, tmp_path / "run", chat())
    assert list((tmp_path / "run" / "checkpoint").glob("gkd.safetensors"))
    distilled(student, teacher, tmp_path / "run", chat(), beta=0.2)
    distilled(student, teacher, tmp_path / "fresh", chat(), beta=0.2)
    assert contents(tmp_path / "run" / "model") == contents(tmp_path / "fresh" / "model")


def forked(student: ModelHandle, teacher: ModelHandle, folder: Path) -> int:
    """A process of its own that starts or goes on with a run; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        distilled(student, teacher, folder, texts(), steps=60)
    except BaseException as error:  # noqa: B036 - whatever happens, this process must end here
        os.write(2, f"{error!r}\n".encode())
        os._exit(9)
    os._exit(0)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_anywhere_it_continues_to_the_same_bytes(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path
) -> None:
    """kill -9 at eight moments, each of a run that goes on where the last one was killed, then it is left to end."""
    torch.set_num_threads(1)
    began = time.monotonic()
    assert ended(forked(student, teacher, tmp_path / "calm")) == 0
    whole, killed, kept = time.monotonic() - began, 0, tmp_path / "killed" / "checkpoint" / "gkd.safetensors"
    taken: list[int] = []
    for part in Stream(1, "kill").uniform(8):
        pid = forked(student, teacher, tmp_path / "killed")
        time.sleep(whole * (0.05 + 0.35 * float(part)))
        os.kill(pid, signal.SIGKILL)
        killed += ended(pid) == -signal.SIGKILL
        if kept.is_file():
            taken.append(len(store.load_arrays(kept)[0]["losses"]))
    assert killed >= 4 and len(set(taken)) >= 2, (killed, taken)
    assert ended(forked(student, teacher, tmp_path / "killed")) == 0
    assert contents(tmp_path / "killed" / "model") == contents(tmp_path / "calm" / "model")


@pytest.mark.llama
def test_in_a_recipe_the_teacher_is_what_the_student_was_made_from(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path
) -> None:
    """Two compressions made the student, so the first one's model teaches; gptq quantises the result and the gate
    finds that llama.cpp runs it."""
    pytest.importorskip("llama_cpp")
    for name, source in (("first", teacher.path), ("second", tmp_path / "first")):
        shutil.copytree(student.path, tmp_path / name / "model")
        (tmp_path / name / "recipe.json").write_text(json.dumps({"verb": "compress", "model": str(source)}))
        files = [f"model/{p.name}" for p in (tmp_path / name / "model").iterdir()]
        store.publish(tmp_path / name, files, {"model": "model", "verb": "compress"})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": e.completion}) + "\n" for e in texts(40).examples))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        [[step]]
        verb = "compress"
        plugin = "gkd"
        model = "{tmp_path}/second"
        data = "{data}"
        options = {{ steps = 2, new_tokens = 6, max_length = 64, batch_size = 4 }}

        [[step]]
        verb = "compress"
        plugin = "gptq"
        options = {{ format = "q8_0", calibration_samples = 2, calibration_length = 32 }}

        [[step]]
        verb = "export"
        plugin = "gguf"
        """
    )
    gkd, gptq, gguf = edgellm.run(recipe, tmp_path / "out")
    assert teacher.digest[:12] in gkd.report.notes[-1]
    assert len(gkd.report.curves["training loss over steps"]) == 2
    assert gptq.model is not None and gptq.model.dtype == "q8_0"
    assert gguf.report.verified["passed"] is True


def test_what_cannot_be_distilled_is_told_in_a_line(
    student: ModelHandle, teacher: ModelHandle, tmp_path: Path, make_tiny_llama: Callable[..., Path]
) -> None:
    ctx, config = Context(tmp_path, seed=1), build(Config, SMALL, "gkd")
    with pytest.raises(DataError, match="nothing to distil on"):
        method.compress(student, None, config, ctx)
    with pytest.raises(ConfigError, match="no teacher is named"):
        method.compress(student, chat(), config, ctx)
    with pytest.raises(ModelError, match="no such model"):
        method.compress(student, chat(), replace(config, teacher="nowhere"), ctx)
    other = tmp_path / "other"
    shutil.copytree(teacher.path, other)
    told = json.loads((other / "tokenizer.json").read_text())
    merges = told["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (other / "tokenizer.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="another tokenizer than the student"):
        method.compress(student, chat(), replace(config, teacher=str(other)), Context(tmp_path / "a"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    with pytest.raises(ModelError, match="another tokenizer than the student"):
        method.compress(student, chat(), replace(config, teacher=str(other)), Context(tmp_path / "b"))
    with pytest.raises(ModelError, match="loss is not finite"):
        distilled(student, teacher, tmp_path / "c", chat(), learning_rate=1e30, clip=0.0, optimizer="sgd")
    from edgellm_sdk.kit.conformance_runs import tiny_blocks

    with pytest.raises(ModelError, match="quantised already"):
        distilled(tiny_blocks(), teacher, tmp_path / "d", chat())


def test_a_teacher_of_more_tokens_is_refused(student: ModelHandle, teacher: ModelHandle, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(teacher.path, tmp_path / "wide")
    settings = LlamaConfig.from_pretrained(tmp_path / "wide", vocab_size=400)
    LlamaForCausalLM(settings).save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match="the teacher predicts 400 tokens, the student 384"):
        distilled(student, resolve(str(tmp_path / "wide")), tmp_path / "run", chat())


def test_supervised_fine_tuning_asks_for_no_teacher(student: ModelHandle, tmp_path: Path) -> None:
    config = build(Config, {**SMALL, "divergence": "likelihood", "on_policy": 0, "average": "token"}, "gkd")
    ctx = Context(tmp_path, seed=1)
    method.compress(student, chat(), replace(config, steps=60, learning_rate=3e-3), ctx)
    losses = [y for _, y in ctx.curves["training loss over steps"]]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6]) and "no teacher" in ctx.notes[-1]


def test_merged_tensors_keep_the_dtype_they_are_stored_in(student: ModelHandle, tmp_path: Path) -> None:
    half = student.load(dtype="bfloat16").model
    shutil.copytree(student.path, tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    handle = resolve(str(tmp_path / "half"))
    copied = writing.write_merged(handle, tmp_path / "copy")
    stored = {name: t.stored for name, t in checkpoint.inspect(copied.path).tensors.items()}
    assert set(stored.values()) == {"BF16"}
    assert all((a == b).all() for (_, a), (_, b) in zip(handle.tensors(), copied.tensors(), strict=True))
