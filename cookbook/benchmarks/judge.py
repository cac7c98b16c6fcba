"""Rouge-L and loss of adapters, many on one base, with greedy answers in batches."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edgellm_sdk import models
from edgellm_sdk.data import read
from edgellm_sdk.kit import adapters, prompts, scoring
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.kit.overlap import rouge_l
from edgellm_sdk.random import Stream

NEW_TOKENS = 48
BATCH = 32


class Judge:
    """Rouge-L and loss on each of `sets` (name -> JSONL file) of adapters made as `spec` says.

    The trained tensors must all be in the FFN of the top layer, so that keys and values of prompts are those of the
    base and are computed once.
    """

    def __init__(self, model: Path, spec: adapters.Spec, sets: Mapping[str, Path], max_length: int) -> None:
        self.frozen = Frozen(models.resolve(str(model)), spec, Stream(0, "judge"), max_length=max_length)
        if not self.frozen.rows_only:
            raise ValueError("the trained tensors are not all in the top FFN")
        self.sets = {name: read(str(path)) for name, path in sets.items()}
        self.tokenizer = self.frozen.tokenizer
        self.stops = set(prompts.stop_ids(self.tokenizer, self.frozen.model.config))
        self.asked = {
            name: [prompts.prompt_ids(self.tokenizer, e.prompt) for e in part.examples]
            for name, part in self.sets.items()
        }
        self.started: dict[str, list[Any]] = {}

    def score(self, adapter: Path | None) -> dict[str, Any]:
        """Of an adapter folder, or of the untouched model."""
        trainables = self.frozen.trainables
        theta = dict(trainables.initial)
        if adapter is not None:
            saved = adapters.arrays(adapter)
            trainables.frozen.update({name: saved[name].copy() for name in trainables.frozen})
            theta = {name: saved[name] for name in theta}
        trainables.set_one(theta)
        found: dict[str, Any] = {}
        for name, data in self.sets.items():
            found[f"loss_{name}"] = scoring.of_frozen(self.frozen, data)["validation loss"].value
            texts = self.answers(name)
            each = [rouge_l(text, e.completion) for text, e in zip(texts, data.examples, strict=True)]
            found[f"rouge_l_{name}"] = 100 * statistics.mean(each)
            found[f"words_{name}"] = statistics.mean(len(text.split()) for text in texts)
            found[f"shown_{name}"] = texts[:3]
        return found

    def answers(self, name: str) -> list[str]:
        """Greedy continuations of all prompts of a set, in order, without special tokens."""
        asked = self.asked[name]
        if name not in self.started:
            order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
            groups = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
            self.started[name] = [(group, *self._prefill([asked[i] for i in group])) for group in groups]
        texts = [""] * len(asked)
        with torch.inference_mode():
            for group, cache, mask in self.started[name]:
                last = torch.tensor([asked[i][-1] for i in group])
                for i, tokens in zip(group, self._continued(copy.deepcopy(cache), mask, last), strict=True):
                    texts[i] = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        return texts

    def _prefill(self, asked: list[list[int]]) -> tuple[Any, Any]:
        """Key/value cache of all but the last token, padded on the left, and its mask: (B, T - 1)."""
        length = max(len(p) for p in asked) - 1
        ids = torch.tensor([[0] * (length - len(p) + 1) + p[:-1] for p in asked])
        mask = torch.tensor([[0] * (length - len(p) + 1) + [1] * (len(p) - 1) for p in asked])
        with torch.inference_mode():
            places = (mask.cumsum(1) - 1).clamp(min=0)
            out = self.frozen.model.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)
        return out.past_key_values, mask

    def _continued(self, cache: Any, mask: Any, last: Any) -> list[list[int]]:
        """Greedy tokens after `last` (B,), rows leaving the batch as they end."""
        found: list[list[int]] = [[] for _ in last]
        alive = list(range(len(found)))
        for _ in range(NEW_TOKENS):
            mask = torch.cat([mask, torch.ones((len(mask), 1), dtype=mask.dtype)], 1)
            places = mask.sum(1, keepdim=True) - 1
            out = self.frozen.model(
                input_ids=last[:, None], attention_mask=mask, position_ids=places, past_key_values=cache
            )
            chosen = out.logits[:, -1].argmax(-1)
            staying = [k for k, token in enumerate(chosen.tolist()) if token not in self.stops]
            for k in staying:
                found[alive[k]].append(int(chosen[k]))
            if not staying:
                break
            if len(staying) < len(alive):
                rows = torch.tensor(staying)
                cache.batch_select_indices(rows)
                mask, chosen = mask[rows], chosen[rows]
                alive = [alive[k] for k in staying]
            last = chosen
        return found
