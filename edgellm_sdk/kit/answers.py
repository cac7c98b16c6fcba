"""Answers to a batch of prompts, with keys and values kept, for models that are perturbed while they run.

Prompts are padded on the right, so reading them needs no mask. What is generated comes after the longest prompt in the
cache; a mask hides the padding in between, and positions count on from each prompt's own end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgellm_sdk.kit import prompts
from edgellm_sdk.kit.scoring import AnswerKey

Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ids (R, 1), positions (R, 1), mask (R, tokens so far) of 0 and 1) -> the next ids (R,), likeliest or drawn."""


@dataclass
class Begun:
    """The prompts of one batch up to the lowest trained layer: the hidden states that enter it (B, T, H), the keys and
    values of the layers below, and the prompts' lengths (B,)."""

    hidden: Tensor
    calls: list[dict[str, Any]]
    below: list[tuple[Tensor, Tensor]]
    lengths: Tensor
    key: AnswerKey

    @property
    def examples(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        held = [self.hidden, *(tensor for pair in self.below for tensor in pair)]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids with zeros on the right: (rows, longest) int64."""
    tokens = torch.zeros((len(rows), max(len(row) for row in rows)), dtype=torch.long)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
    return tokens


def prompts_of(examples: Sequence[prompts.Encoded]) -> list[tuple[int, ...]]:
    """What stands before each completion, shortened as it is for the loss."""
    return [example.tokens[: example.start] for example in examples]


def stop_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer of this model."""
    configs = (model.config, getattr(model, "generation_config", None))
    return tuple(sorted({i for config in configs for i in prompts.stop_ids(tokenizer, config)}))


def greedy(first: Tensor, lengths: Tensor, stops: Sequence[int], new_tokens: int, step: Step) -> list[list[int]]:
    """As `continued`, without the ids that ended the answers."""
    ending = set(stops)
    found = continued(first, lengths, stops, new_tokens, step)
    return [row[:-1] if row[-1] in ending else row for row in found]


def continued(first: Tensor, lengths: Tensor, stops: Sequence[int], new_tokens: int, step: Step) -> list[list[int]]:
    """The ids of each answer up to and with the first of `stops`; at least one of them, at most `new_tokens`.

    `first` (R,) are the first ids, `lengths` (R,) those of the prompts, whose longest is what the cache holds so far.
    """
    rows, width = len(first), int(lengths.max())
    ending = torch.tensor(stops, device=first.device)
    mask = torch.ones((rows, width + new_tokens), dtype=torch.long, device=first.device)
    mask[:, :width] = torch.arange(width, device=first.device) < lengths[:, None]
    found = [first]
    done = torch.isin(first, ending)
    while len(found) < new_tokens and not bool(done.all()):
        taken = len(found)
        found.append(step(found[-1][:, None], (lengths + taken - 1)[:, None], mask[:, : width + taken]))
        done = done | torch.isin(found[-1], ending)
    return [_to_stop(row, set(stops)) for row in torch.stack(found, 1).tolist()]


def _to_stop(tokens: list[int], stops: set[int]) -> list[int]:
    place = next((k for k, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: place + 1]


def decoded(tokenizer: Any, answers: Sequence[Sequence[int]]) -> list[str]:
    """The texts, without special tokens."""
    return [str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) for ids in answers]
