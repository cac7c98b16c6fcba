"""A model all of whose weights train, evaluated beside its weights and never in place.

While a perturbed model runs, each layer's weight + c * z is made in a scratch the size of the largest layer just before
it is used, the embedding is perturbed only in the rows that are looked up, and the output matrix goes by in pieces of
its vocabulary under a running log-sum-exp. So theta is untouched by any number of evaluations in any dtype, and memory
is that of inference. Only `move` writes weights.
"""

from __future__ import annotations

import shutil
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache

from edgellm_sdk import checkpoint, store
from edgellm_sdk.kit import answers, prompts, scoring
from edgellm_sdk.kit.rowwise import Flips, rowwise
from edgellm_sdk.types import Array, Dataset, Metric, ModelHandle

HEAD_ROWS = 4096
EXACT_POSITIONS = 128
PARTS = 16


class Shift(Protocol):
    """theta + c * z, tensor by tensor, in each tensor's dtype; `out` may be used for the result."""

    def weight(self, name: str, weight: Tensor, out: Tensor) -> Tensor:
        """A whole tensor."""

    def part(self, name: str, weight: Tensor, begin: int, out: Tensor) -> Tensor:
        """Rows begin .. begin + len(out) - 1 of a matrix."""

    def rows(self, name: str, weight: Tensor, rows: Tensor) -> Tensor:
        """The given rows (n,) of a matrix: (n, columns)."""


class Whole:
    """`parameters` maps each tensor's name to it, tied ones once, in the model's order; `goal` says what is evaluated.

    Everything that takes a `shift` computes at theta for None, at theta + c * z for a Shift, and with a direction of
    its own for every example for Flips.
    """

    def __init__(
        self,
        handle: ModelHandle,
        dtype: str = "auto",
        device: str = "cpu",
        max_length: int = 128,
        goal: scoring.Goal = scoring.LOSS,
    ) -> None:
        self.goal = goal
        loaded = handle.load(dtype=dtype, device=device, merge=True)
        self.handle, self.model, self.tokenizer, self.max_length = handle, loaded.model, loaded.tokenizer, max_length
        self.device = loaded.device
        self.parameters: dict[str, nn.Parameter] = dict(loaded.model.named_parameters())  # drops duplicates
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._embed: Any = loaded.model.get_input_embeddings()
        self._head: Any = loaded.model.get_output_embeddings()
        size = max((sum(p.numel() for p in m.parameters(recurse=False)) for m in self._inner()), default=0)
        columns = self._head.weight.shape[1]
        self._scratch = torch.empty(max(size, HEAD_ROWS * columns), dtype=loaded.dtype, device=self.device)
        self._parts = [(module, self._places(module)) for module in self._inner()]
        self._stops = answers.stop_ids(self.model, self.tokenizer)

    @torch.no_grad()
    def reload(self) -> None:
        """theta_0 again, from disk, one tensor at a time unless adapters are merged."""
        if not self.handle.adapters:
            for name, array in self.handle.tensors():
                if name in self.parameters:
                    self.parameters[name].copy_(torch.from_numpy(array))
            return
        dtype = str(self._scratch.dtype).removeprefix("torch.")
        fresh = dict(self.handle.load(dtype=dtype, merge=True).model.named_parameters())
        for name, parameter in self.parameters.items():
            parameter.copy_(fresh[name])

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}

    def _inner(self) -> Iterator[nn.Module]:
        """Modules with weights of their own, but for the embedding and the head."""
        for module in self.model.modules():
            if module not in (self._embed, self._head) and next(module.parameters(recurse=False), None) is not None:
                yield module

    def _places(self, module: nn.Module) -> list[tuple[str, nn.Parameter, Tensor]]:
        """A module's own parameters: name, parameter, and where in the scratch it is shifted to."""
        own, used = list(module.parameters(recurse=False)), 0
        found = []
        for parameter in own:
            out = self._scratch[used : used + parameter.numel()].view(parameter.shape)
            used += parameter.numel()
            found.append((self._names[id(parameter)], parameter, out))
        return found

    @contextmanager
    def _shifted(self, shift: Shift) -> Iterator[None]:
        """Every module computes with shifted weights inside this block."""

        def shifted(module: nn.Module, own: list[tuple[str, nn.Parameter, Tensor]]) -> Any:
            forward = type(module).forward

            def run(*inputs: Any, **keywords: Any) -> Any:
                held = [parameter.data for _, parameter, _ in own]
                for (name, parameter, out), data in zip(own, held, strict=True):
                    parameter.data = shift.weight(name, data, out)
                try:
                    return forward(module, *inputs, **keywords)
                finally:
                    for (_, parameter, _), data in zip(own, held, strict=True):
                        parameter.data = data

            return run

        def look_up(module: nn.Module, ids: Tensor) -> Tensor:
            weight: Any = module.weight
            unique, place = torch.unique(ids, return_inverse=True)
            return shift.rows(self._names[id(weight)], weight.data, unique)[place]

        for module, own in self._parts:  # into __dict__: nn.Module's own assignment takes 3 us each
            module.__dict__["forward"] = shifted(module, own)
        self._embed.__dict__["forward"] = types.MethodType(look_up, self._embed)
        try:
            yield
        finally:
            for module in (*(module for module, _ in self._parts), self._embed):
                del module.__dict__["forward"]

    @contextmanager
    def _at(self, shift: Shift | Flips | None) -> Iterator[None]:
        """The model's modules compute at theta, theta + c * z, or row by row inside this block."""
        if shift is None:
            yield
        elif isinstance(shift, Flips):
            with rowwise(self._inner(), self._embed, self._name, shift, self._scratch):
                yield
        else:
            with self._shifted(shift):
                yield

    def _name(self, parameter: Tensor) -> str:
        return self._names[id(parameter)]

    @torch.no_grad()
    def loss(self, batch: Sequence[prompts.Encoded], shift: Shift | None = None) -> float:
        """Mean cross-entropy per scored token of right-padded examples, at theta or at theta + c * z: float64."""
        hidden, targets = self._hidden(batch, shift)
        return float(self._losses(hidden, targets, shift).mean())

    def evaluate(self, batch: Sequence[prompts.Encoded], key: scoring.AnswerKey, shift: Shift | None = None) -> float:
        """The goal: mean cross-entropy per scored token, or minus the mean score of the examples."""
        return self.loss(batch, shift) if self.goal.name == "loss" else -float(self.scores(batch, key, shift).mean())

    @torch.no_grad()
    def evaluate_each(self, batch: Sequence[prompts.Encoded], key: scoring.AnswerKey, flips: Flips | None) -> Array:
        """The goal of every example, under a direction of its own: (B,) float64."""
        if self.goal.name != "loss":
            return -self.scores(batch, key, flips)
        rows = self._rows(batch)
        hidden, targets = self._hidden(batch, flips)
        losses = self._losses(hidden, targets, flips, rows)
        sums = torch.zeros(len(batch), dtype=torch.float64, device=self.device).index_add_(0, rows, losses)
        return (sums / torch.bincount(rows)).cpu().numpy()

    @torch.no_grad()
    def scores(
        self, batch: Sequence[prompts.Encoded], key: scoring.AnswerKey, shift: Shift | Flips | None = None
    ) -> Array:
        """The goal's score of every example: (B,) float64."""
        if self.goal.writes:
            return scoring.text_scores(self.goal, self.written(batch, shift), key.references)
        hidden, _ = self._hidden(batch, shift)
        chosen = self._among(hidden[self._starts(batch)], key.firsts, shift).argmax(1)
        return (chosen.cpu().numpy() == np.array(key.truth)).astype(np.float64)

    @torch.no_grad()
    def written(self, batch: Sequence[prompts.Encoded], shift: Shift | Flips | None = None) -> list[str]:
        """What the model writes after every prompt, greedily."""
        given = answers.prompts_of(batch)
        tokens = answers.padded(given).to(self.device)
        lengths = torch.tensor([len(row) for row in given], device=self.device)
        rows, cache = torch.arange(len(given), device=self.device), DynamicCache(config=self.model.config)

        def read(**inputs: Tensor) -> Tensor:
            hidden: Tensor = self.model.model(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
            return hidden

        def step(ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
            hidden = read(input_ids=ids, position_ids=positions, attention_mask=mask)
            return self._likeliest(hidden[:, -1], shift)

        with self._at(shift):
            first = self._likeliest(read(input_ids=tokens)[rows, lengths - 1], shift)
            found = answers.greedy(first, lengths, self._stops, self.goal.new_tokens, step)
        return answers.decoded(self.tokenizer, found)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _hidden(self, batch: Sequence[prompts.Encoded], shift: Shift | Flips | None) -> tuple[Tensor, Tensor]:
        """Last hidden states at the scored positions (N, H), and the tokens they should predict (N,)."""
        tokens = answers.padded([example.tokens for example in batch])
        places = [(e, at) for e in batch for at in e.scored]
        columns = torch.tensor([at - 1 for _, at in places], device=self.device)
        targets = torch.tensor([e.tokens[at] for e, at in places], device=self.device)
        with self._at(shift):
            hidden = self.model.model(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        return hidden[self._rows(batch), columns], targets

    def _rows(self, batch: Sequence[prompts.Encoded]) -> Tensor:
        """Of every scored position, whose it is: (N,)."""
        counts = torch.tensor([len(e.scored) for e in batch], device=self.device)
        return torch.repeat_interleave(torch.arange(len(batch), device=self.device), counts)

    def _starts(self, batch: Sequence[prompts.Encoded]) -> Tensor:
        """Of every example, the place of its first scored position among all: (B,)."""
        return torch.searchsorted(self._rows(batch), torch.arange(len(batch), device=self.device))

    def _pieces(self, shift: Shift | None) -> Iterator[tuple[int, Tensor]]:
        weight: Tensor = self._head.weight.data
        name = self._names[id(self._head.weight)]
        for begin in range(0, len(weight), HEAD_ROWS):
            piece = weight[begin : begin + HEAD_ROWS]
            if shift is not None:
                out = self._scratch[: piece.numel()].view(piece.shape)
                piece = shift.part(name, weight, begin, out)
            yield begin, piece

    def _logits(self, hidden: Tensor, shift: Shift | Flips | None, rows: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """Pieces of the logits of hidden states (N, H), (N, piece) float32, and where each begins. `rows` (N,) are the
        examples that the states belong to. Few states are multiplied in float32 whatever the model's dtype."""
        exact = len(hidden) <= EXACT_POSITIONS
        hidden = hidden.float() if exact else hidden
        if not isinstance(shift, Flips):
            for begin, piece in self._pieces(shift):
                yield begin, F.linear(hidden, piece.float() if exact else piece).float()
            return
        weight, name = self._head.weight, self._name(self._head.weight)
        s, r = shift.signs(name, weight) if shift.moves(name) else (hidden, hidden)
        for begin, piece in self._pieces(None):
            logits = F.linear(hidden, piece.float() if exact else piece).float()
            if shift.moves(name):
                u = shift.base(name, weight.data, begin, self._scratch[: piece.numel()].view(piece.shape))
                moved = F.linear(hidden * r[rows], u.float() if exact else u).float()
                logits.add_(moved.mul_(s[rows, begin : begin + len(piece)]), alpha=shift.c)
            yield begin, logits

    def _losses(
        self, hidden: Tensor, targets: Tensor, shift: Shift | Flips | None, rows: Tensor | None = None
    ) -> Tensor:
        """-log p of each target: (N,) float64."""
        total = torch.full((len(hidden),), -torch.inf, device=self.device)
        wanted = torch.empty(len(hidden), device=self.device)
        for begin, logits in self._logits(hidden, shift, rows):
            mine = (targets >= begin) & (targets < begin + logits.shape[1])
            wanted[mine] = logits[mine, targets[mine] - begin]
            total = torch.logaddexp(total, logits.logsumexp(1))
        return (total - wanted).double()

    def _likeliest(self, hidden: Tensor, shift: Shift | Flips | None) -> Tensor:
        """The next token of each example: (B, H) -> (B,)."""
        best = torch.full((len(hidden),), -torch.inf, device=self.device)
        token = torch.zeros(len(hidden), dtype=torch.long, device=self.device)
        for begin, logits in self._logits(hidden, shift, torch.arange(len(hidden), device=self.device)):
            values, places = logits.max(1)
            token = torch.where(values > best, places + begin, token)
            best = torch.maximum(best, values)
        return token

    def _among(self, hidden: Tensor, tokens: Sequence[int], shift: Shift | Flips | None) -> Tensor:
        """Logits of some tokens for one hidden state of each example: (B, H) -> (B, tokens) float32."""
        weight, chosen = self._head.weight, torch.tensor(tokens, device=self.device)
        name, hidden = self._name(weight), hidden.float()
        if shift is not None and not isinstance(shift, Flips):
            return F.linear(hidden, shift.rows(name, weight.data, chosen).float())
        logits = F.linear(hidden, weight[chosen].float())
        if shift is not None and shift.moves(name):
            s, r = shift.signs(name, weight)
            u = shift.base_rows(name, weight.data, chosen)
            logits = logits + shift.c * F.linear(hidden * r, u) * s[:, chosen]
        return logits

    @torch.no_grad()
    def measure(self, data: Dataset, shift: Shift | None = None) -> dict[str, Metric]:
        """Loss per token, for labelled data balanced accuracy, and the text score that is trained."""
        firsts = scoring.first_tokens(data, self.encode) if data.labels else []
        losses: list[Array] = []
        predicted: list[str] = []
        scores: list[Array] = []
        for start in range(0, len(data), PARTS):
            part = data.select(range(start, min(start + PARTS, len(data))))
            batch = prompts.encode(self.tokenizer, part.examples, self.max_length)
            hidden, targets = self._hidden(batch, shift)
            losses.append(self._losses(hidden, targets, shift).cpu().numpy())
            if firsts:
                chosen = self._among(hidden[self._starts(batch)], firsts, shift).argmax(1)
                predicted += [data.labels[i] for i in chosen.tolist()]
            if self.goal.writes:
                scores.append(self.scores(batch, scoring.answer_key(self.goal, part, self.encode), shift))
        found = scoring.metrics(np.concatenate(losses), predicted, data)
        return found | scoring.text_metric(self.goal, scores)

    def write(self, folder: Path) -> None:
        """The model as a folder of its own, in its dtype. StorageError when the disk says no."""
        settings = store.read_json(self.handle.path / checkpoint.CONFIG)
        settings.pop("quantization_config", None)
        settings["dtype"] = str(self._scratch.dtype).removeprefix("torch.")
        tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self.parameters.items()}
        with store.replacing(folder) as temp:
            for name in checkpoint.SIDE_FILES:
                if name != checkpoint.CONFIG and (self.handle.path / name).is_file():
                    shutil.copyfile(self.handle.path / name, temp / name)
            save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})
            store.write_json(temp / checkpoint.CONFIG, settings)
