"""Generalized knowledge distillation (Agarwal et al., arXiv 2306.13649, Algorithm 1).

    L = (1 - lambda) E_(x,y)~(X,Y) [D(p_T | p_S)(y|x)] + lambda E_x~X E_y~p_S(.|x) [D(p_T | p_S)(y|x)]

A coin is thrown for every step: with probability lambda its minibatch is what the student writes to the prompts now,
else it is the data's completions. D is the mean over the completion's tokens, up to and with the first that ends it, of
a divergence between the teacher's next-token distribution p_T and the student's p_S (eq. 2; `divergence.py`). Nothing
flows back through the writing. Teacher and student share a tokenizer and nothing else.

With a reward r (eq. 5) on-policy steps minimise alpha D - (1 - alpha) r; the gradient of E[r] is REINFORCE's,
(r - b) times that of ln p_S(y|x), b the mean reward of the minibatch's other completions.

Where we differ from the paper, and why:
* u < lambda instead of <=, so that 0 never writes. KL and JSD are apart (see `divergence.py`).
* What trains is a LoRA, or all weights of some layers; AdamW in place of Adafactor. Its memory is `backprop`'s: one
  layer's activations, and logits of both models for a chunk of positions.
* The off-policy part may also be what the teacher writes, drawn at the same temperature. With the tokens' likelihood
  for D that is sequence-level distillation (arXiv 1606.07947) by sampling, where that paper takes a beam search.
* The rewards are those that need no other model: overlap with the reference. The paper's is an entailment classifier.
* A text without a prompt lends its opening as one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgellm_plugins.compression.gkd import PLUGIN, Config
from edgellm_plugins.compression.gkd.divergence import Criterion
from edgellm_plugins.compression.gkd.writing import continuations, write_merged
from edgellm_plugins.training import backprop, run
from edgellm_sdk import checkpoint, store
from edgellm_sdk.errors import ConfigError, DataError, ModelError
from edgellm_sdk.kit import adapters, answers, prompts, scoring
from edgellm_sdk.kit.frozen import Frozen, Kept
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.models import resolve

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.kit.loading import LoadedModel
    from edgellm_sdk.types import Array, Dataset, ModelHandle

TITLE, LONGEST_CHAIN = "gkd", 16
STAND_IN = "."
"""A completion to encode a prompt with, where the data's is not to be read."""


@dataclass
class Distillation:
    """What is minimised at every step; `batch` is a `backprop.Batch`."""

    frozen: Frozen
    teacher: LoadedModel | None
    config: Config
    ctx: Context

    def batch(self, step: int, name: str, make: Callable[[], Dataset]) -> tuple[Kept, Criterion]:
        """Algorithm 1, lines 3-8: the minibatch of a step, as the layers that train read it, and its loss."""
        data, config = make(), self.config
        own = on_policy(step, config, self.ctx)
        if own or config.source == "teacher":
            rows = self.written(step, data, own)
            kept = self.frozen.prepare(rows)
        else:
            rows = prompts.encode(self.frozen.tokenizer, data.examples, config.max_length)
            kept = self.frozen.batch(name, lambda: data)
        return kept, self.criterion(rows, kept, self.advantages(rows, data) if own else None)

    def written(self, step: int, data: Dataset, own: bool) -> list[Encoded]:
        """The prompts of `data` with what the student, as it is now, or the teacher writes after them."""
        config = self.config
        given = given_tokens(self.frozen.tokenizer, data, config)
        writer = self.frozen.model if own or self.teacher is None else self.teacher.model
        stream = self.ctx.stream("gkd/student" if own else "gkd/teacher", step)
        found = continuations(writer, given, self.frozen.stops, config.new_tokens, config.temperature, stream)
        return [Encoded((*x, *y), len(x), i) for i, (x, y) in enumerate(zip(given, found, strict=True))]

    def criterion(self, rows: Sequence[Encoded], kept: Kept, advantages: Tensor | None) -> Criterion:
        """The loss of `rows`, which `kept` was prepared from. `advantages` (B,) are r - b of every completion."""
        config, head = self.config, self.frozen.model.lm_head
        means = averaging_weights(kept.rows, config.average)
        plain = Criterion(config.divergence, config.beta, kept.targets, head, config.chunk)
        if config.divergence == "likelihood" or self.teacher is None:
            return replace(plain, likelihoods=means)
        hidden, teacher_head = teacher_states(self.teacher.model, rows, kept), self.teacher.model.lm_head
        if advantages is None:
            return replace(plain, weights=means, hidden=hidden, teacher_head=teacher_head)
        share = config.reward_weight  # 1 - alpha
        likelihoods = (share * advantages / len(rows)).to(means)[kept.rows]
        weights = (1 - share) * means
        return replace(plain, weights=weights, hidden=hidden, teacher_head=teacher_head, likelihoods=likelihoods)

    def advantages(self, rows: Sequence[Encoded], data: Dataset) -> Tensor | None:
        """r - b of what was written for every example of `data`; None without a reward."""
        if self.config.reward == "none":
            return None
        goal = scoring.Goal(self.config.reward, self.config.new_tokens)
        key = scoring.answer_key(goal, data, self.frozen.encode)
        texts = answers.decoded(self.frozen.tokenizer, [row.tokens[row.start :] for row in rows])
        return against_others(torch.from_numpy(scoring.text_scores(goal, texts, key.references)))


def on_policy(step: int, config: Config, ctx: Context) -> bool:
    """Whether step number `step` is on what the student writes: a coin of the run's seed."""
    return float(ctx.stream("gkd/coin", step).uniform(1)[0]) < config.on_policy


def given_tokens(tokenizer: Any, data: Dataset, config: Config) -> list[tuple[int, ...]]:
    """The prompts' ids, cut as for training so that `new_tokens` fit behind; of a text without one, its opening. The
    completions of examples with a prompt are not read."""
    room = config.max_length - config.new_tokens
    alone = [replace(e, completion=STAND_IN) if e.prompt else e for e in data.examples]
    rows = prompts.encode(tokenizer, alone, room)
    return [
        row.tokens[: row.start] if example.prompt else row.tokens[: min(config.opening, len(row.tokens) - 1)]
        for row, example in zip(rows, data.examples, strict=True)
    ]


def averaging_weights(rows: Tensor, average: str) -> Tensor:
    """Of every scored position, its weight in the mean (N,) float32; `rows` (N,) tells whose it is. `sequence`: the
    mean over completions of each one's mean over its tokens (eq. 2-4); `token`: the mean over all tokens, as in TRL."""
    if average == "token":
        return torch.full((len(rows),), 1 / len(rows), device=rows.device)
    counts = torch.bincount(rows)
    return (1 / (counts.double() * len(counts)))[rows].float()


def against_others(rewards: Tensor) -> Tensor:
    """r_i - mean of the others' (B,): a baseline that does not depend on y_i leaves REINFORCE unbiased. 0 if alone."""
    others = (rewards.sum() - rewards) / max(1, len(rewards) - 1)
    return rewards - others


@torch.no_grad()
def teacher_states(model: Any, rows: Sequence[Encoded], kept: Kept) -> Tensor:
    """The teacher's normed hidden states where `kept` is scored: (N, H_T). Rows are padded on the right, which causal
    attention never reads."""
    tokens = answers.padded([row.tokens for row in rows]).to(kept.rows.device)
    hidden: Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden[kept.rows, kept.columns]


# Teacher and student


def teacher_of(model: ModelHandle, config: Config) -> ModelHandle | None:
    """The model named by the options, or the one that a chain of `edgellm compress` runs began with. None when the
    options need no teacher, ConfigError when none is known."""
    if not config.needs_teacher:
        return None
    if config.teacher:
        return resolve(config.teacher)
    source, found = "", model
    for _ in range(LONGEST_CHAIN):
        recipe = found.path.parent / "recipe.json"
        asked = store.read_json(recipe) if recipe.is_file() else {}
        if asked.get("verb") != "compress":
            break
        source = str(asked.get("model", ""))
        found = resolve(source)
    if not source:
        raise ConfigError("no teacher is named and no run tells what the student was made from", "teacher",
                          "pass --teacher MODEL")  # fmt: skip
    return found


def coding(tokenizer: Any) -> tuple[Any, ...]:
    """What decides which ids a text becomes."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return (tokenizer.get_vocab(),)
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {(token["id"], token["content"]) for token in told["added_tokens"]}
    return tokenizer.get_vocab(), added, *(told[name] for name in ("model", "normalizer", "pre_tokenizer"))


def check_tokens(frozen: Frozen, teacher: LoadedModel) -> None:
    """ModelError unless teacher and student have the same tokens."""
    where, fix = str(teacher.handle.path), "use a teacher of the student's family"
    own, theirs = (len(model.lm_head.weight) for model in (frozen.model, teacher.model))
    if own != theirs:
        raise ModelError(f"the teacher predicts {theirs} tokens, the student {own}", where, fix)
    if teacher.tokenizer is None or coding(teacher.tokenizer) != coding(frozen.tokenizer):
        raise ModelError("the teacher has another tokenizer than the student", where, fix)


def spec_of(config: Config) -> adapters.Spec:
    """What trains."""
    return adapters.Spec(config.tune, config.layers, config.rank, config.alpha, adapters.module_names(config.targets))


def compress(model: ModelHandle, data: Dataset | None, config: Config, ctx: Context) -> ModelHandle:
    """The student, trained, in `ctx.folder / "model"`, of the shape and the dtypes it had; adapters are merged first.

    ConfigError without a teacher, DataError without data, ModelError for a student in blocks or a teacher of another
    tokenizer.
    """
    if data is None or not len(data):
        raise DataError("nothing to distil on", fix="pass --data")
    if {tensor.stored for tensor in checkpoint.inspect(model.path).tensors.values()} - checkpoint.DTYPES.keys():
        raise ModelError("is quantised already", str(model.path), "distil first, then quantise")
    taught_by = teacher_of(model, config)
    work = ctx.folder / "checkpoint"
    student = write_merged(model, work / "student") if model.adapters else model
    frozen = backprop.frozen_base(
        student, spec_of(config), ctx, config.precision, config.hidden_memory, config.max_length
    )
    if frozen.tokenizer is None:
        raise ModelError("has no tokenizer", str(model.path))
    teacher = None if taught_by is None else taught_by.load(config.precision, ctx.device)
    if teacher is not None:
        check_tokens(frozen, teacher)
    slope = backprop.exact_slope(frozen, config.chunk, batch=Distillation(frozen, teacher, config, ctx).batch)
    told = [
        student.digest,
        taught_by.digest if taught_by else "",
        PLUGIN.version,
        asdict(config),
        data.fingerprint,
        ctx.seed,
    ]
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    theta, losses = run.train(slope, frozen.initial, data, config, ctx, title=TITLE, key=key)
    summarise(losses, taught_by, config, ctx)
    made = store_result(student, frozen, theta, ctx)
    ctx.drop(f"objective {student.digest}")
    run.forget(ctx, TITLE)
    for folder in ("student", "adapter"):
        shutil.rmtree(work / folder, ignore_errors=True)
    return made


def store_result(student: ModelHandle, frozen: Frozen, theta: dict[str, Array], ctx: Context) -> ModelHandle:
    """theta folded into the student's weights, as they are stored."""
    base = {"path": str(student.path), "digest": student.digest, "name": student.name}
    folder = ctx.folder / "checkpoint" / "adapter"
    adapters.write(folder, frozen.trainables, theta, base)
    return write_merged(replace(student, adapters=(folder,)), ctx.folder / "model")


def summarise(losses: Sequence[float], teacher: ModelHandle | None, config: Config, ctx: Context) -> None:
    """A note on who taught, how many steps were on-policy, and where the loss began and ended."""
    own = sum(on_policy(step, config, ctx) for step in range(config.steps))
    part = max(1, len(losses) // 10)
    first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
    taught = "no teacher" if teacher is None else f"teacher {teacher.name} {teacher.digest[:12]}"
    ctx.note(
        f"gkd: {taught}; {own} of {config.steps} steps on what the student wrote; loss {first:.4f} at first, "
        f"{last:.4f} at last (means of {part} steps)"
    )
