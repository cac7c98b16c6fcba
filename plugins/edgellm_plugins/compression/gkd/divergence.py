"""Divergences between next-token distributions, and their gradients by the student's logits in closed form.

P is the teacher's distribution over V tokens, S the student's = softmax(z), at one position (arXiv 2306.13649, 2-3):

    forward KL    KL(P | S) = sum P (ln P - ln S)            d/dz = S - P
    reverse KL    KL(S | P) = sum S (ln S - ln P)            d/dz = S [ln S - ln P - KL(S | P)]
    JSD(beta)     beta KL(P | M) + (1 - beta) KL(S | M)      d/dz = (1 - beta) S [ln S - ln M - KL(S | M)]
                  with M = beta P + (1 - beta) S (eq. 1)

JSD(beta) / beta tends to the forward KL for beta -> 0, JSD(beta) / (1 - beta) to the reverse KL for beta -> 1; JSD
itself to 0 at both. So the KLs are choices of their own here, where TRL takes beta 0 and 1 to mean them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def divergence(kind: str, beta: float, log_p: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
    """Value (N,) in nats and gradient by the student's logits (N, V), from log-probabilities (N, V) in their dtype."""
    s = log_s.exp()
    if kind == "forward-kl":
        p = log_p.exp()
        return (p * (log_p - log_s)).sum(1), s - p
    if kind == "reverse-kl":
        ratio = log_s - log_p
        value = (s * ratio).sum(1)
        return value, s * (ratio - value[:, None])
    log_m = torch.logaddexp(log_p + math.log(beta), log_s + math.log1p(-beta))
    ratio = log_s - log_m
    own = (s * ratio).sum(1)
    value = beta * (log_p.exp() * (log_p - log_m)).sum(1) + (1 - beta) * own
    return value, (1 - beta) * s * (ratio - own[:, None])


@dataclass(frozen=True)
class Criterion:
    """sum_n [w_n D_n + a_n (-ln S_n(y_n))] over N scored positions, as a loss of the student's normed hidden states.

    `weights` w (N,) are those of the divergence, `likelihoods` a (N,) those of the tokens `targets` (N,) themselves;
    float32. `hidden` (N, H_T) are the teacher's normed hidden states there and `teacher_head` its output layer; both
    None when there is no divergence. Logits of either model exist for `chunk` positions at a time, in float32.
    """

    kind: str
    beta: float
    targets: Tensor
    head: nn.Module
    chunk: int
    weights: Tensor | None = None
    hidden: Tensor | None = None
    teacher_head: nn.Module | None = None
    likelihoods: Tensor | None = None

    @torch.no_grad()
    def __call__(self, normed: Tensor) -> tuple[float, Tensor]:
        """The loss at `normed` (N, H), and its gradient (N, H) in normed's dtype. The heads are frozen."""
        weight: Any = self.head.weight
        gradient, total = torch.empty_like(normed), 0.0
        for start in range(0, len(normed), self.chunk):
            part = slice(start, start + self.chunk)
            log_s = self.head(normed[part]).float().log_softmax(1)
            value, slope = self._part(part, log_s)
            total += value
            gradient[part] = slope.to(weight.dtype) @ weight
        return total, gradient

    def _part(self, part: slice, log_s: Tensor) -> tuple[float, Tensor]:
        """What the positions of `part` add to the loss, and its gradient by their logits."""
        total, slope = 0.0, None
        if self.weights is not None and self.hidden is not None and self.teacher_head is not None:
            w = self.weights[part]
            log_p = self.teacher_head(self.hidden[part]).float().log_softmax(1)
            values, slope = divergence(self.kind, self.beta, log_p, log_s)
            total += float((w * values).double().sum())
            slope = slope.mul_(w[:, None])
        if self.likelihoods is not None:
            a, wanted = self.likelihoods[part], self.targets[part, None]
            total -= float((a * log_s.gather(1, wanted)[:, 0]).double().sum())
            own = log_s.exp_().scatter_add_(1, wanted, torch.full_like(a, -1)[:, None]).mul_(a[:, None])
            slope = own if slope is None else slope.add_(own)
        assert slope is not None
        return total, slope
