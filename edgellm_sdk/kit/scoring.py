"""Metrics with their uncertainty: loss, perplexity, and label accuracy decided by a label's first token.

A labelled prompt is decided by comparing the model's next-token logits at the first token of each label. Labels whose
first tokens coincide cannot be told apart that way and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgellm_sdk.errors import DataError
from edgellm_sdk.types import Array, Dataset, Metric, Session

if TYPE_CHECKING:
    from edgellm_sdk.kit.frozen import Frozen

CHUNK = 16
Z95 = 1.959964


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


def mean(values: Array, unit: str) -> Metric:
    """The mean with a normal 95 % interval."""
    half = Z95 * float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    centre = float(values.mean())
    return Metric(centre, unit, len(values), (centre - half, centre + half) if math.isfinite(half) else None)


def log_softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(-1, keepdims=True)))


def of_frozen(frozen: Frozen, data: Dataset) -> dict[str, Metric]:
    """Loss per scored token and, for labelled data, balanced accuracy, with the trainables now installed."""
    losses, predicted = [], []
    firsts = first_tokens(data, frozen.encode) if data.labels else []
    for start in range(0, len(data), CHUNK):
        part = data.select(range(start, min(start + CHUNK, len(data))))
        kept = frozen.batch(f"{data.fingerprint}/{start}", lambda part=part: part)  # type: ignore[misc]
        logits = frozen.logits(kept)[0].cpu().numpy()
        rows = kept.rows.cpu().numpy()
        scores = log_softmax(logits)
        losses.append(-scores[np.arange(len(rows)), kept.targets.cpu().numpy()])
        if firsts:
            starts = np.searchsorted(rows, np.arange(len(part)))
            predicted += [data.labels[i] for i in logits[starts][:, firsts].argmax(1)]
    return metrics(np.concatenate(losses), predicted, data)


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
