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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgellm_sdk.kit import adapters, prompts, scoring
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

    @property
    def nbytes(self) -> int:
        return self.hidden.numel() * self.hidden.element_size()


class Frozen:
    """The `Objective` in torch.

    `budget` bounds the kept hidden states, in bytes; `dtype` is that of the base, trainables stay float32; `share`
    candidates go into one call, 0 chooses by batch size.
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
    ) -> None:
        loaded = handle.load(dtype=dtype, device=device)
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.trainables = adapters.install(self.model, spec, stream)
        self.budget, self.max_length, self.share = budget, max_length, share
        self.device = next(self.model.parameters()).device
        layers = adapters.decoder_layers(self.model)
        self.tail = list(layers)[self.trainables.lowest :]
        self.splits = _splits(self.tail[-1])
        above = f"model.layers.{len(layers) - 1}.mlp."
        self.rows_only = self.splits and all(name.startswith(above) for name in self.trainables.names)
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

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
        examples = int(self.batch(name, make).rows[-1]) + 1
        share = self.share or self.best_share(examples)
        found = []
        for i in range(0, len(directions), share):
            chosen = directions[i : i + share]
            self.trainables.set(_stack(theta, chosen, steps[i : i + share]))
            found.append(self.losses(name, make, len(chosen)))
        return np.concatenate(found)

    def measure(self, theta: Arrays, data: Dataset) -> dict[str, Metric]:
        self.trainables.set_one(theta)
        return scoring.of_frozen(self, data)

    def write(self, folder: Path, theta: Arrays, base: Mapping[str, str]) -> None:
        adapters.write(folder, self.trainables, theta, base)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def batch(self, name: str, make: Callable[[], Dataset]) -> Kept:
        """The batch called `name`, from memory or computed from `make()` now."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        kept = self.prepare(prompts.encode(self.tokenizer, make().examples, self.max_length))
        if kept.nbytes <= self.budget:
            self._kept[name] = kept
            self._bytes += kept.nbytes
            while self._bytes > self.budget:
                self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return kept

    def prepare(self, examples: Sequence[prompts.Encoded]) -> Kept:
        """Run the frozen layers over right-padded `examples`."""
        tokens = torch.zeros((len(examples), max(len(e.tokens) for e in examples)), dtype=torch.long)
        rows, columns, targets = [], [], []
        for row, example in enumerate(examples):
            tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
            for position in range(max(example.start, 1), len(example.tokens)):
                rows.append(row)
                columns.append(position - 1)
                targets.append(example.tokens[position])
        hidden, calls = self._record(tokens.to(self.device))
        places = [torch.tensor(values, device=self.device) for values in (rows, columns, targets)]
        kept = Kept(hidden, calls, *places)
        if self.rows_only:
            with torch.inference_mode():
                kept = Kept(self._attended(kept, hidden, 1), [], *places)
        return kept

    @torch.inference_mode()
    def _record(self, tokens: Tensor) -> tuple[Tensor, list[dict[str, Any]]]:
        """Hidden states entering the lowest trained layer, and the keywords each later layer would be called with."""
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
            self.model.model(input_ids=tokens, use_cache=False)
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

    @torch.inference_mode()
    def logits(self, kept: Kept, probes: int = 1) -> Tensor:
        """Next-token logits at the scored positions for each probe now installed: (P, N, vocabulary) float32."""
        hidden = kept.hidden.repeat(probes, *[1] * (kept.hidden.dim() - 1)) if probes > 1 else kept.hidden
        top = self.tail[-1]
        if not self.rows_only:
            for layer, keywords in zip(self.tail[: -1 if self.splits else None], kept.calls, strict=False):
                out = layer(hidden, **keywords)
                hidden = out[0] if isinstance(out, tuple) else out
            hidden = self._attended(kept, hidden, probes) if self.splits else self._picked(kept, hidden, probes)
        if self.splits:
            hidden = hidden + top.mlp(top.post_attention_layernorm(hidden))  # type: ignore[operator]
        scored = self.model.lm_head(self.model.model.norm(hidden)).float()
        return scored.view(probes, len(kept.targets), -1)

    def losses(self, name: str, make: Callable[[], Dataset], probes: int = 1) -> Array:
        """Mean cross-entropy over the scored tokens of batch `name`, for each probe now installed: (P,) float64."""
        kept = self.batch(name, make)
        logits = self.logits(kept, probes)
        each = F.cross_entropy(logits.flatten(0, 1), kept.targets.repeat(probes), reduction="none")
        return each.view(probes, -1).double().mean(1).cpu().numpy()

    def best_share(self, batch: int) -> int:
        """How many probes to put in one call. Eight rows of text keep two cores busy and more only costs memory; when
        only scored positions run, more probes share one reading of the head's weights."""
        return max(1, (128 if self.rows_only else 8) // batch)


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


def _splits(layer: nn.Module) -> bool:
    """Whether `layer` is attention and FFN, each after a norm and with a residual, as in Llama and its kin."""
    names = [name for name, _ in layer.named_children()]
    return sorted(names) == ["input_layernorm", "mlp", "post_attention_layernorm", "self_attn"]
