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

from edgellm_sdk import checkpoint, store
from edgellm_sdk.kit import prompts, scoring
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
    """`parameters` maps each tensor's name to it, tied ones once, in the model's order."""

    def __init__(self, handle: ModelHandle, dtype: str = "auto", device: str = "cpu", max_length: int = 128) -> None:
        loaded = handle.load(dtype=dtype, device=device, merge=True)
        self.handle, self.model, self.tokenizer, self.max_length = handle, loaded.model, loaded.tokenizer, max_length
        self.device = loaded.device
        self.parameters: dict[str, nn.Parameter] = dict(loaded.model.named_parameters())  # drops duplicates
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._embed: Any = loaded.model.get_input_embeddings()
        self._head: Any = loaded.model.get_output_embeddings()
        inner = [p for m in self._inner() for p in m.parameters(recurse=False)]
        size = max((p.numel() for p in inner), default=0)
        columns = self._head.weight.shape[1]
        self._scratch = torch.empty(max(size, HEAD_ROWS * columns), dtype=loaded.dtype, device=self.device)

    @torch.no_grad()
    def reload(self) -> None:
        """theta_0 again, from disk."""
        fresh = dict(
            self.handle.load(dtype=str(self._scratch.dtype).removeprefix("torch."), merge=True).model.named_parameters()
        )
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

    @contextmanager
    def _shifted(self, shift: Shift) -> Iterator[None]:
        """Every module computes with shifted weights inside this block."""

        def run(module: nn.Module, *inputs: Any, **keywords: Any) -> Any:
            own, used = list(module.named_parameters(recurse=False)), 0
            held = [parameter.data for _, parameter in own]
            for _, parameter in own:
                out = self._scratch[used : used + parameter.numel()].view(parameter.shape)
                used += parameter.numel()
                parameter.data = shift.weight(self._names[id(parameter)], parameter.data, out)
            try:
                return type(module).forward(module, *inputs, **keywords)
            finally:
                for (_, parameter), data in zip(own, held, strict=True):
                    parameter.data = data

        def look_up(module: nn.Module, ids: Tensor) -> Tensor:
            weight: Any = module.weight
            unique, place = torch.unique(ids, return_inverse=True)
            return shift.rows(self._names[id(weight)], weight.data, unique)[place]

        modules = list(self._inner())
        for module in modules:
            module.forward = types.MethodType(run, module)
        self._embed.forward = types.MethodType(look_up, self._embed)
        try:
            yield
        finally:
            for module in (*modules, self._embed):
                del module.forward

    @torch.no_grad()
    def loss(self, batch: Sequence[prompts.Encoded], shift: Shift | None = None) -> float:
        """Mean cross-entropy per scored token of right-padded examples, at theta or at theta + c * z: float64."""
        hidden, targets = self._hidden(batch, shift)
        return float(self._losses(hidden, targets, shift).mean())

    def _hidden(self, batch: Sequence[prompts.Encoded], shift: Shift | None) -> tuple[Tensor, Tensor]:
        """Last hidden states at the scored positions (N, H), and the tokens they should predict (N,)."""
        tokens = torch.zeros((len(batch), max(len(e.tokens) for e in batch)), dtype=torch.long)
        places = [(row, e, at) for row, e in enumerate(batch) for at in range(max(e.start, 1), len(e.tokens))]
        for row, example in enumerate(batch):
            tokens[row, : len(example.tokens)] = torch.tensor(example.tokens)
        rows = torch.tensor([row for row, _, _ in places], device=self.device)
        columns = torch.tensor([at - 1 for _, _, at in places], device=self.device)
        targets = torch.tensor([e.tokens[at] for _, e, at in places], device=self.device)
        if shift is None:
            hidden = self.model.model(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        else:
            with self._shifted(shift):
                hidden = self.model.model(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        return hidden[rows, columns], targets

    def _pieces(self, shift: Shift | None) -> Iterator[tuple[int, Tensor]]:
        weight: Tensor = self._head.weight.data
        name = self._names[id(self._head.weight)]
        for begin in range(0, len(weight), HEAD_ROWS):
            piece = weight[begin : begin + HEAD_ROWS]
            if shift is not None:
                out = self._scratch[: piece.numel()].view(piece.shape)
                piece = shift.part(name, weight, begin, out)
            yield begin, piece

    def _losses(self, hidden: Tensor, targets: Tensor, shift: Shift | None) -> Tensor:
        """-log p of each target: (N,) float64. Few positions are scored in float32 whatever the model's dtype."""
        exact = len(hidden) <= EXACT_POSITIONS
        hidden = hidden.float() if exact else hidden
        total = torch.full((len(hidden),), -torch.inf, device=self.device)
        wanted = torch.empty(len(hidden), device=self.device)
        for begin, piece in self._pieces(shift):
            logits = F.linear(hidden, piece.float() if exact else piece).float()
            mine = (targets >= begin) & (targets < begin + len(piece))
            wanted[mine] = logits[mine, targets[mine] - begin]
            total = torch.logaddexp(total, logits.logsumexp(1))
        return (total - wanted).double()

    @torch.no_grad()
    def measure(self, data: Dataset) -> dict[str, Metric]:
        """Loss per token and, for labelled data, balanced accuracy at theta."""

        def encode(text: str) -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=False))

        firsts = scoring.first_tokens(data, encode) if data.labels else []
        losses: list[Array] = []
        predicted: list[str] = []
        for start in range(0, len(data), PARTS):
            part = prompts.encode(self.tokenizer, data.examples[start : start + PARTS], self.max_length)
            hidden, targets = self._hidden(part, None)
            losses.append(self._losses(hidden, targets, None).cpu().numpy())
            if firsts:
                counts = [len(e.tokens) - max(e.start, 1) for e in part]
                first = np.cumsum([0, *counts[:-1]])
                answers = F.linear(hidden[first].float(), self._head.weight[firsts].float())
                predicted += [data.labels[i] for i in answers.argmax(1).tolist()]
        return scoring.metrics(np.concatenate(losses), predicted, data)

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
