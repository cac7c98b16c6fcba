"""Metrics with their uncertainty: loss, perplexity, label accuracy decided by a label's first token, overlap of texts.

A labelled prompt is decided by comparing the model's next-token logits at the first token of each label. Labels whose
first tokens coincide cannot be told apart that way and are refused.

A `Goal` is what a method that only evaluates minimises: the loss, or minus one of the scores, which have no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgellm_sdk.errors import ConfigError, DataError
from edgellm_sdk.kit.overlap import rouge_l, token_f1
from edgellm_sdk.types import Array, Dataset, Metric, Session

if TYPE_CHECKING:
    from edgellm_sdk.kit.frozen import Frozen

CHUNK = 16
Z95 = 1.959964
TITLES = {"loss": "loss", "accuracy": "accuracy", "f1": "token F1", "rouge": "Rouge-L"}


@dataclass(frozen=True)
class Goal:
    """What is minimised on a batch; anything that can be evaluated will do (arXiv 2305.17333).

    `loss`: cross-entropy per scored token, nats. Others: minus the mean over examples of a score in [0, 1]: `accuracy`
    of the label, decided as above; `f1` (bag of words) or `rouge` (Rouge-L) of a greedy answer of at most `new_tokens`
    tokens against the completion.
    """

    name: str = "loss"
    new_tokens: int = 32

    @property
    def title(self) -> str:
        """The score's name in reports."""
        return TITLES[self.name]

    @property
    def writes(self) -> bool:
        """Whether answers have to be generated."""
        return self.name in ("f1", "rouge")


LOSS = Goal()


@dataclass(frozen=True)
class AnswerKey:
    """What the scores of some examples need: each label's first token and every example's place among them; the
    reference texts."""

    firsts: tuple[int, ...] = ()
    truth: tuple[int, ...] = ()
    references: tuple[str, ...] = ()


def answer_key(goal: Goal, data: Dataset, encode: Callable[[str], list[int]]) -> AnswerKey:
    """The key of `data`. ConfigError for accuracy without labels; DataError when two labels share a first token, or
    when an answer is to be generated to an empty prompt."""
    if goal.writes:
        if not all(example.prompt for example in data.examples):
            raise DataError(f"{goal.title} needs a prompt in every example", data.name, "train on the loss instead")
        return AnswerKey(references=tuple(example.completion for example in data.examples))
    if goal.name != "accuracy":
        return AnswerKey()
    if not data.labels:
        raise ConfigError("accuracy needs labelled data", "objective", "use loss, f1 or rouge")
    truth = tuple(data.labels.index(str(example.label)) for example in data.examples)
    return AnswerKey(tuple(first_tokens(data, encode)), truth)


def text_scores(goal: Goal, generated: Sequence[str], references: Sequence[str]) -> Array:
    """The score of each generated text: (n,) float64."""
    score = rouge_l if goal.name == "rouge" else token_f1
    return np.array([score(text, reference) for text, reference in zip(generated, references, strict=True)])


def first_tokens(data: Dataset, encode: Callable[[str], list[int]]) -> list[int]:
    """The first token of each label's answer, in the order of `labels`. DataError when two labels share it."""
    answers = data.answers or data.labels
    firsts = [encode(answer)[0] for answer in answers]
    if len(set(firsts)) != len(firsts):
        raise DataError(f"answers {', '.join(answers)} share a first token", fix="rename a label")
    return firsts


def balanced_accuracy(truth: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> Metric:
    """Mean recall over the labels that occur, with a 95 % interval from the recalls' binomial variances.

    Each recall's variance uses (hits + 2) / (n + 4) (Agresti and Coull), so a perfect class keeps an interval.
    """
    recalls, variance = [], 0.0
    for label in labels:
        hits = [p == label for t, p in zip(truth, predicted, strict=True) if t == label]
        if hits:
            recalls.append(sum(hits) / len(hits))
            smooth = (sum(hits) + 2) / (len(hits) + 4)
            variance += smooth * (1 - smooth) / (len(hits) + 4)
    value = sum(recalls) / len(recalls)
    half = Z95 * math.sqrt(variance) / len(recalls)
    return Metric(value, "", len(truth), (max(0.0, value - half), min(1.0, value + half)))


def mean(values: Array, unit: str, low: float = -math.inf, high: float = math.inf) -> Metric:
    """The mean with a normal 95 % interval, cut to what values can be."""
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    centre = float(values.mean())
    interval = (max(low, centre - half), min(high, centre + half)) if math.isfinite(half) else None
    return Metric(centre, unit, len(values), interval)


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def of_frozen(frozen: Frozen, data: Dataset) -> dict[str, Metric]:
    """Loss per scored token, for labelled data balanced accuracy, and the text score that is trained, with the
    trainables now installed."""
    losses: list[Array] = []
    predicted: list[str] = []
    scores: list[Array] = []
    firsts = first_tokens(data, frozen.encode) if data.labels else []
    for start in range(0, len(data), CHUNK):
        part = data.select(range(start, min(start + CHUNK, len(data))))
        name = f"{data.fingerprint}/{start}"
        kept = frozen.batch(name, lambda part=part: part)  # type: ignore[misc]
        logits = frozen.logits(kept)[0].cpu().numpy()
        rows = kept.rows.cpu().numpy()
        logp = log_softmax(logits)
        losses.append(-logp[np.arange(len(rows)), kept.targets.cpu().numpy()])
        if firsts:
            starts = np.searchsorted(rows, np.arange(len(part)))
            predicted += [data.labels[i] for i in logits[starts][:, firsts].argmax(1)]
        if frozen.goal.writes:
            scores.append(frozen.scores(frozen.begun(name, lambda part=part: part))[0])  # type: ignore[misc]
    return metrics(np.concatenate(losses), predicted, data) | text_metric(frozen.goal, scores)


def text_metric(goal: Goal, scores: Sequence[Array]) -> dict[str, Metric]:
    """The mean score of generated answers, from that of every example; nothing for goals that generate none."""
    return {goal.title: mean(np.concatenate(scores), "", 0.0, 1.0)} if goal.writes else {}


def metrics(losses: Array, predicted: Sequence[str], data: Dataset) -> dict[str, Metric]:
    """Validation loss from the losses of all scored tokens and, for labelled data, balanced accuracy."""
    found = {"validation loss": mean(losses, "nats/token")}
    if data.labels:
        truth = [str(example.label) for example in data.examples]
        found["balanced accuracy"] = balanced_accuracy(truth, predicted, data.labels)
    return found


def predict(session: Session, data: Dataset, advance: Callable[[int], None] = lambda done: None) -> list[str]:
    """The label a live model gives each labelled example."""
    firsts = first_tokens(data, session.encode)
    predicted = []
    for start in range(0, len(data), CHUNK):
        part = data.examples[start : start + CHUNK]
        logits = session.logits([session.prompt_ids(example.prompt) for example in part])
        predicted += [data.labels[int(row[-1][firsts].argmax())] for row in logits]
        advance(len(part))
    return predicted


def completion_losses(session: Session, data: Dataset, advance: Callable[[int], None] = lambda done: None) -> Array:
    """Negative log-likelihood of every completion token, nats: (tokens,) float64. The loss of unlabelled data."""
    losses = []
    for start in range(0, len(data), CHUNK):
        part = data.examples[start : start + CHUNK]
        sequences, firsts, targets = [], [], []
        for example in part:
            prompt = session.prompt_ids(example.prompt) if example.prompt else []
            answer = session.encode(example.completion)
            tokens = [*prompt, *answer]
            first = max(len(prompt) - 1, 0)
            sequences.append(tokens[:-1])
            firsts.append(first)
            targets.append(tokens[first + 1 :])
        usable = [i for i, target in enumerate(targets) if target]
        found = session.logits([sequences[i] for i in usable], [firsts[i] for i in usable])
        for index, logits in zip(usable, found, strict=True):
            wanted = np.array(targets[index])
            losses.append(-log_softmax(logits)[np.arange(len(wanted)), wanted])
        advance(len(part))
    return np.concatenate(losses) if losses else np.empty(0)


def of_session(
    session: Session, data: Dataset, advance: Callable[[int], None] = lambda done: None
) -> dict[str, Metric]:
    """Balanced accuracy of labelled data, else loss and perplexity of the completions."""
    if data.labels:
        truth = [str(example.label) for example in data.examples]
        return {"balanced accuracy": balanced_accuracy(truth, predict(session, data, advance), data.labels)}
    losses = completion_losses(session, data, advance)
    if not len(losses):
        raise DataError("has nothing to score", data.name)
    loss = mean(losses, "nats/token")
    bounds = tuple(math.exp(edge) for edge in loss.ci95) if loss.ci95 else None
    perplexity = Metric(math.exp(loss.value), "", loss.n, (bounds[0], bounds[1]) if bounds else None)
    return {"loss": loss, "perplexity": perplexity}
