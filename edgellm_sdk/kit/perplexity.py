"""Perplexity and divergence as llama.cpp measures them, on any session.

A text is cut into whole chunks of n tokens, the first of each replaced by BOS where the engine puts one in front. The
predictions from token n/2 on count, each with at least n/2 tokens before it: n - 1 - n/2 of every chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgellm_sdk.errors import DataError, ModelError
from edgellm_sdk.gate import divergence
from edgellm_sdk.kit.scoring import log_softmax
from edgellm_sdk.types import Array, Metric, Session

PROBE = 2000
"""Characters on which two tokenizers are compared before their logits are."""


@dataclass(frozen=True)
class Quality:
    """One value for every prediction: `losses` in nats; against a reference its divergence `kl` (reference ||
    candidate, nats) and whether both choose the same token, empty without one."""

    losses: Array
    kl: Array = field(default_factory=lambda: np.empty(0))
    agree: Array = field(default_factory=lambda: np.empty(0))

    def metrics(self) -> dict[str, Metric]:
        """Perplexity with the interval of its mean loss; mean and 99th percentile of the divergence; agreement."""
        loss, half = _mean(self.losses)
        bounds = (math.exp(loss - half), math.exp(loss + half))
        found = {"perplexity": Metric(math.exp(loss), "", len(self.losses), bounds)}
        if len(self.kl):
            kl, half = _mean(self.kl)
            found["KL"] = Metric(kl, "nats", len(self.kl), (kl - half, kl + half))
            found["KL, 99th percentile"] = Metric(float(np.quantile(self.kl, 0.99)), "nats", len(self.kl))
            found["same top token"] = Metric(float(self.agree.mean()), "", len(self.agree))
        return found


def _mean(values: Array) -> tuple[float, float]:
    """The mean and half its 95 % interval, as of independent values."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else math.inf
    return float(values.mean()), 1.96 * spread / math.sqrt(len(values))


def chunks(session: Session, text: str, length: int, most: int) -> list[list[int]]:
    """At most `most` chunks of `length` tokens. DataError for a text of less than one."""
    ids = session.encode(text[: 64 * length * most])
    found = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)][:most]
    if not found:
        raise DataError(f"the text has {len(ids)} tokens, a chunk needs {length}", fix="give a longer text")
    opened = session.prompt_ids(text[:PROBE])
    if opened != session.encode(text[:PROBE]):
        found = [[opened[0], *chunk[1:]] for chunk in found]
    return found


def quality(
    session: Session,
    given: Sequence[Sequence[int]],
    reference: Session | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Quality:
    """Of `session` on chunks of token ids, held against `reference` where there is one.

    ModelError when the two differ in their vocabularies' sizes.
    """
    if reference is not None and reference.vocabulary != session.vocabulary:
        raise ModelError(f"has {session.vocabulary} logits, its reference {reference.vocabulary}")
    losses, kl, agree = [], [], []
    for chunk in given:
        first = len(chunk) // 2
        (logits,) = session.logits([chunk[:-1]], [first])
        wanted = np.array(chunk[first + 1 :])
        losses.append(-log_softmax(logits)[np.arange(len(wanted)), wanted])
        if reference is not None:
            (ours,) = reference.logits([chunk[:-1]], [first])
            apart, same, _ = divergence(ours, logits)
            kl.append(apart)
            agree.append(same)
        advance(1)
    found = [np.concatenate(values) if values else np.empty(0) for values in (losses, kl, agree)]
    return Quality(*found)
