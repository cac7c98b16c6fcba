"""A frozen base with a few trainable tensors, run for its loss only, and never twice over what cannot change.

Layers below the lowest trainable one give the same hidden states for every perturbation and every round, so they are
computed once per batch and kept, within a memory budget. In the top layer everything after attention works position by
position, so only the positions that the loss reads go through its FFN, the last norm and the head; and when nothing
before that FFN trains, only those positions are kept. Probes share calls.

Batches are padded on the right and causal attention never looks right, so no mask is needed and the valid positions
are exact. A batch is always made of the same examples: its hidden states have the same bits whenever computed.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from edgellm_sdk.kit import adapters, answers, prompts, scoring
from edgellm_sdk.kit.answers import Begun
from edgellm_sdk.kit.hidden import Shelf
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Array, Arrays, Dataset, Float32, Metric, ModelHandle


@dataclass
class Kept:
    """One batch as the trainable part needs it, in the model's dtype, and where the loss reads it.

    `rows`, `columns` (N,) index the positions whose next token is scored, `targets` (N,) those tokens. `hidden` enters
    the lowest trained layer (B, T, H), or, when nothing before the top FFN trains, that FFN's norm at those positions
    (N, H).
    """

    hidden: Tensor
    calls: list[dict[str, Any]]
    rows: Tensor
    columns: Tensor
    targets: Tensor
    key: scoring.AnswerKey = scoring.AnswerKey()

    @property
    def nbytes(self) -> int:
        return self.hidden.numel() * self.hidden.element_size()

    @property
    def examples(self) -> int:
        return int(self.rows[-1]) + 1

    @property
    def starts(self) -> Tensor:
        """Of each example, the place among the scored positions where its completion starts: (B,)."""
        return torch.searchsorted(self.rows, torch.arange(self.examples, device=self.rows.device))


class Frozen:
    """The `Objective` in torch.

    `budget` bounds the kept hidden states, in bytes; `dtype` is that of the base, trainables stay float32; `share`
    candidates go into one call, 0 chooses by batch size; `goal` is what `evaluate` gives. Where nothing before the top
    FFN trains, the folder `shelf` keeps hidden states for other processes.
    """

    def __init__(
        self,
        handle: ModelHandle,
        spec: adapters.Spec,
        stream: Stream,
        dtype: str = "auto",
        device: str = "cpu",
        budget: int = 512 << 20,
        max_length: int = 128,
        share: int = 0,
        goal: scoring.Goal = scoring.LOSS,
        shelf: Path | None = None,
    ) -> None:
        loaded = handle.load(dtype=dtype, device=device)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.trainables = adapters.install(self.model, spec, stream)
        self.budget, self.max_length, self.share, self.goal = budget, max_length, share, goal
        self.device = next(self.model.parameters()).device
        layers = adapters.decoder_layers(self.model)
        self.tail = list(layers)[self.trainables.lowest :]
        self.splits = _splits(self.tail[-1])
        above = f"model.layers.{len(layers) - 1}.mlp."
        self.rows_only = self.splits and all(name.startswith(above) for name in self.trainables.names)
        self.stops = answers.stop_ids(self.model, self.tokenizer)
        self._kept: OrderedDict[str, Kept | Begun] = OrderedDict()
        self._bytes = 0
        made_by, width = f"{handle.digest} {self.device.type} torch {torch.__version__}", self.model.config.hidden_size
        self._shelf = Shelf(shelf, made_by, width, loaded.dtype) if shelf is not None and self.rows_only else None

    @property
    def initial(self) -> Mapping[str, Float32]:
        return self.trainables.initial

    def evaluate(
        self,
        name: str,
        make: Callable[[], Dataset],
        theta: Arrays,
        directions: Sequence[Arrays],
        steps: Sequence[float],
    ) -> Array:
        """As in `Objective`."""
        held = self._held(name, make)
        share = self.share or self.best_share(held.examples)
        found = []
        for i in range(0, len(directions), share):
            chosen = directions[i : i + share]
            self.trainables.set(_stack(theta, chosen, steps[i : i + share]))
            if isinstance(held, Kept) and self.goal.name == "loss":
                found.append(self._losses(held, len(chosen)))
            else:
                found.append(-self.scores(held, len(chosen)).mean(1))
        return np.concatenate(found)

    def evaluate_each(
        self,
        name: str,
        make: Callable[[], Dataset],
        theta: Arrays,
        directions: Sequence[Arrays],
        steps: Sequence[float],
    ) -> Array:
        """As in `ExampleWise`: one row of text is one group of candidates, so a call costs what a batch costs."""
        held = self._held(name, make)
        copies, found = self.best_share(held.examples), []
        for i in range(0, len(steps), copies):
            chosen = steps[i : i + copies]
            scales = [step for step in chosen for _ in range(held.examples)]
            self.trainables.set(_stack(theta, [*directions[: held.examples]] * len(chosen), scales))
            if isinstance(held, Kept) and self.goal.name == "loss":
                found.append(self._each_loss(held, len(chosen)))
            else:
                found.append(-self.scores(held, len(chosen), each=True))
        return np.concatenate(found)

    def measure(self, theta: Arrays, data: Dataset) -> dict[str, Metric]:
        self.trainables.set_one(theta)
        return scoring.of_frozen(self, data)

    def write(self, folder: Path, theta: Arrays, base: Mapping[str, str]) -> None:
        adapters.write(folder, self.trainables, theta, base)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def batch(self, name: str, make: Callable[[], Dataset], inputs: bool = False) -> Kept:
        """The batch called `name`, from memory or computed from `make()` now. With `inputs` the loss falls on the
        prompts too; such a batch needs a name of its own."""
        found = self._kept.get(name)
        if isinstance(found, Kept):
            self._kept.move_to_end(name)
            return found
        data = make()
        rows = prompts.encode(self.tokenizer, data.examples, self.max_length)
        kept = self.prepare([replace(row, start=1) for row in rows] if inputs else rows)
        if self.goal.name == "accuracy":
            kept.key = scoring.answer_key(self.goal, data, self.encode)
        self._keep(name, kept)
        return kept

    def begun(self, name: str, make: Callable[[], Dataset]) -> Begun:
        """The prompts of the batch called `name`, from memory or read now. DataError for an empty one."""
        found = self._kept.get(f"{name}/begun")
        if isinstance(found, Begun):
            self._kept.move_to_end(f"{name}/begun")
            return found
        data = make()
        key = scoring.answer_key(self.goal, data, self.encode)
        given = answers.prompts_of(prompts.encode(self.tokenizer, data.examples, self.max_length))
        lengths = torch.tensor([len(row) for row in given], device=self.device)
        cache = DynamicCache(config=self.model.config)
        hidden, calls = self._record(answers.padded(given).to(self.device), cache)
        below = [(layer.keys, layer.values) for layer in cache.layers[: self.trainables.lowest]]
        calls = [{name: value for name, value in call.items() if name != "past_key_values"} for call in calls]
        begun = Begun(hidden, calls, below, lengths, key)
        self._keep(f"{name}/begun", begun)
        return begun

    def _keep(self, name: str, value: Kept | Begun) -> None:
        if value.nbytes <= self.budget:
            self._kept[name] = value
            self._bytes += value.nbytes
            while self._bytes > self.budget:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def _held(self, name: str, make: Callable[[], Dataset]) -> Kept | Begun:
        """What the goal is computed from."""
        return self.begun(name, make) if self.goal.writes else self.batch(name, make)

    def prepare(self, examples: Sequence[prompts.Encoded]) -> Kept:
        """Run the frozen layers over right-padded `examples`."""
        rows, columns, targets = [], [], []
        for row, example in enumerate(examples):
            for position in example.scored:
                rows.append(row)
                columns.append(position - 1)
                targets.append(example.tokens[position])
        at, where, wanted = (torch.tensor(values, device=self.device) for values in (rows, columns, targets))
        if self._shelf is not None:
            states = [self._shelf.get(example, self._alone).to(self.device) for example in examples]
            return Kept(torch.cat(states), [], at, where, wanted)
        hidden, calls = self._record(answers.padded([e.tokens for e in examples]).to(self.device))
        kept = Kept(hidden, calls, at, where, wanted)
        if self.rows_only:
            with torch.inference_mode():
                kept = Kept(self._attended(kept, hidden, 1), [], at, where, wanted)
        return kept

    def _alone(self, example: prompts.Encoded) -> Tensor:
        """What the top FFN reads of an example that is its own batch: (its scored positions, H)."""
        tokens = torch.tensor([example.tokens], device=self.device)
        columns = torch.tensor([at - 1 for at in example.scored], device=self.device)
        hidden, calls = self._record(tokens)
        with torch.inference_mode():
            return self._attended(Kept(hidden, calls, torch.zeros_like(columns), columns, columns), hidden, 1)

    @torch.inference_mode()
    def _record(self, tokens: Tensor, cache: Any = None) -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states entering the lowest trained layer, and the keywords each later layer would be called with.
        The layers below leave their keys and values in `cache`."""
        calls: list[dict[str, Any]] = []
        seen: list[Tensor] = []

        def stand_in(layer: nn.Module, hidden: Tensor, **keywords: Any) -> Tensor:
            seen.append(hidden)
            calls.append(keywords)
            return hidden

        def pass_on(norm: nn.Module, hidden: Tensor) -> Tensor:
            return hidden

        norm = self.model.model.norm
        for layer in self.tail:
            layer.forward = types.MethodType(stand_in, layer)
        norm.forward = types.MethodType(pass_on, norm)
        try:
            self.model.model(input_ids=tokens, use_cache=cache is not None, past_key_values=cache)
        finally:
            for module in (*self.tail, norm):
                del module.forward
        return seen[0].clone(), calls

    def _attended(self, kept: Kept, hidden: Tensor, probes: int) -> Tensor:
        """The top layer up to its attention's residual, at the scored positions: (P * N, H)."""
        top = self.tail[-1]
        attention: Any = top.self_attn
        mixed = attention(hidden_states=top.input_layernorm(hidden), **kept.calls[-1])  # type: ignore[operator]
        return self._picked(kept, hidden + mixed[0], probes)

    def _picked(self, kept: Kept, hidden: Tensor, probes: int) -> Tensor:
        by_probe = hidden.view(probes, -1, *hidden.shape[1:])
        return by_probe[:, kept.rows, kept.columns].reshape(-1, hidden.shape[-1])

    def logits(self, kept: Kept, probes: int = 1) -> Tensor:
        """Next-token logits at the scored positions for each probe now installed: (P, N, vocabulary) float32."""
        return self._logits(kept, probes)

    @torch.inference_mode()
    def _logits(self, kept: Kept, copies: int, each: bool = False, among: Sequence[int] = ()) -> Tensor:
        """(copies, N, vocabulary or `among`) float32. The batch is run `copies` times; a probe has a copy of it, or,
        with `each`, one example of one copy."""
        hidden = kept.hidden.repeat(copies, *[1] * (kept.hidden.dim() - 1)) if copies > 1 else kept.hidden
        top = self.tail[-1]
        if not self.rows_only:
            for layer, keywords in zip(self.tail[: -1 if self.splits else None], kept.calls, strict=False):
                hidden = _output(layer(hidden, **keywords))
            hidden = self._attended(kept, hidden, copies) if self.splits else self._picked(kept, hidden, copies)
        if each:
            hidden, places = _spread(hidden.view(copies, len(kept.targets), -1), kept)
        if self.splits:
            hidden = hidden + top.mlp(top.post_attention_layernorm(hidden))  # type: ignore[operator]
        hidden = self.model.model.norm(hidden)
        if each:
            hidden = hidden.view(copies, -1, hidden.shape[-1])[:, places].flatten(0, 1)
        head = self.model.lm_head
        if among:
            chosen = torch.tensor(among, device=self.device)
            scored = F.linear(hidden, head.weight[chosen], None if head.bias is None else head.bias[chosen])
        else:
            scored = head(hidden)
        return scored.float().view(copies, len(kept.targets), -1)

    def losses(self, name: str, make: Callable[[], Dataset], probes: int = 1) -> Array:
        """Mean cross-entropy over the scored tokens of batch `name`, for each probe now installed: (P,) float64."""
        return self._losses(self.batch(name, make), probes)

    def _losses(self, kept: Kept, probes: int) -> Array:
        return _cross_entropy(self.logits(kept, probes), kept.targets).mean(1).cpu().numpy()

    def _each_loss(self, kept: Kept, copies: int) -> Array:
        """Mean cross-entropy of every example under its own probe: (copies, B) float64."""
        losses = _cross_entropy(self._logits(kept, copies, each=True), kept.targets)
        counts = torch.bincount(kept.rows).double()
        sums = torch.zeros((copies, len(counts)), dtype=torch.float64, device=self.device)
        return (sums.index_add_(1, kept.rows, losses) / counts).cpu().numpy()

    def scores(self, held: Kept | Begun, copies: int = 1, each: bool = False) -> Array:
        """The goal's score of every example, for each probe now installed: (P, B) float64; with `each` a probe is for
        one example of one copy of the batch: (copies, B)."""
        if isinstance(held, Begun):
            texts = self.written(held, copies)
            return np.stack([scoring.text_scores(self.goal, row, held.key.references) for row in texts])
        starts = held.starts
        hidden = held.hidden[starts] if self.rows_only else held.hidden
        first = Kept(hidden, held.calls, held.rows[starts], held.columns[starts], held.targets[starts])
        chosen = self._logits(first, copies, each, held.key.firsts).argmax(-1)
        return (chosen.cpu().numpy() == np.array(held.key.truth)).astype(np.float64)

    def written(self, begun: Begun, copies: int = 1) -> list[list[str]]:
        """The texts of `generate`, one list for each copy."""
        texts = answers.decoded(self.tokenizer, self.generate(begun, copies))
        return [texts[i : i + begun.examples] for i in range(0, len(texts), begun.examples)]

    @torch.inference_mode()
    def generate(self, begun: Begun, copies: int = 1) -> list[list[int]]:
        """What the model writes after every prompt, greedily, under the probes now installed, which lie along the rows
        of `copies` copies of the batch: token ids, copy by copy."""
        lengths, rows = begun.lengths.repeat(copies), torch.arange(copies * begun.examples, device=self.device)
        cache = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(begun.below):
            cache.update(keys.repeat(copies, 1, 1, 1), values.repeat(copies, 1, 1, 1), index)
        hidden = begun.hidden.repeat(copies, 1, 1)
        for layer, keywords in zip(self.tail, begun.calls, strict=True):
            hidden = _output(layer(hidden, **keywords, past_key_values=cache))
        first = self._likeliest(self.model.model.norm(hidden[rows, lengths - 1][:, None]))

        def step(ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
            seen = self.model.model(
                input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
            )
            return self._likeliest(seen.last_hidden_state)

        return answers.greedy(first, lengths, self.stops, self.goal.new_tokens, step)

    def _likeliest(self, normed: Tensor) -> Tensor:
        """The next token of each row (R, 1, H): (R,)."""
        chosen: Tensor = self.model.lm_head(normed)[:, -1].float().argmax(-1)
        return chosen

    def best_share(self, batch: int) -> int:
        """How many probes to put in one call. Eight rows of text keep two cores busy and more only costs memory; when
        only scored positions run, more probes share one reading of the head's weights; so do they in generation, where
        each row has its own keys and values."""
        return max(1, (32 if self.goal.writes else 128 if self.rows_only else 8) // batch)


def _stack(theta: Arrays, directions: Sequence[Arrays], steps: Sequence[float]) -> dict[str, Tensor]:
    """theta + step_k * v_k for every k: name -> (P, *shape) float32."""
    stacked = {}
    for name, value in theta.items():
        out = np.empty((len(directions), *value.shape), np.float32)
        for row, v, step in zip(out, directions, steps, strict=True):
            np.multiply(v[name], np.float32(step), out=row)
            row += value
        stacked[name] = torch.from_numpy(out)
    return stacked


def _output(out: Any) -> Tensor:
    """A layer's hidden states."""
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of (P, N, vocabulary) logits against (N,) targets: (P, N) float64."""
    each = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none")
    return each.view(len(logits), -1).double()


def _spread(hidden: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
    """Scored positions (C, N, H) with zeros between, so that every example has equally many: (C * B * M, H), and the
    places of the N among the B * M."""
    starts = kept.starts
    width = int(torch.bincount(kept.rows).max())
    places = kept.rows * width + torch.arange(len(kept.rows), device=kept.rows.device) - starts[kept.rows]
    out = hidden.new_zeros((len(hidden), len(starts) * width, hidden.shape[-1]))
    out[:, places] = hidden
    return out.flatten(0, 1), places


def _splits(layer: nn.Module) -> bool:
    """Whether `layer` is attention and FFN, each after a norm and with a residual, as in Llama and its kin."""
    names = [name for name, _ in layer.named_children()]
    return sorted(names) == ["input_layernorm", "mlp", "post_attention_layernorm", "self_attn"]
