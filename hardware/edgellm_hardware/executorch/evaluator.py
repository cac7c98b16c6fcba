"""Losses of a model under many LoRA-FA adapters, computed by ExecuTorch: the `Objective` for zeroth-order methods.

One `candidates` program is lowered when the run starts and kept; batches are cut into its static shapes and the last
part of anything is filled up with rows, slots or candidates whose results are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from edgellm_hardware.executorch import Config
from edgellm_hardware.executorch.method import check_installed, prepared
from edgellm_hardware.executorch.program import Shape, lower
from edgellm_hardware.executorch.trainer import Program
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError
from edgellm_sdk.kit import adapters, loading, prompts, scoring
from edgellm_sdk.types import Array, Arrays, Dataset, Float32, Metric, ModelHandle

METHODS = ("noise", "tokens", "rank", "alpha", "layers", "targets", "verify")
"""Options of an exported program that an evaluation takes from the method, or has no use for."""
Slot = tuple[int, int, int]
"""(row of the batch, column of what predicts, token to score)."""


class Evaluator:
    """`Objective` on ExecuTorch. The config's `queries`, `batch` and `labels` are the program's sizes."""

    def __init__(self, model: ModelHandle, spec: adapters.Spec, max_length: int, config: Config, ctx: Context) -> None:
        check_installed()
        if spec.kind != "lora-fa":
            raise ConfigError(f"{spec.kind} cannot be trained on executorch", "train", "use lora-fa")
        for name in METHODS:
            if getattr(config, name) != getattr(Config(), name):
                raise ConfigError(f"{name}: is the method's to choose in training", "executorch", "leave it out")
        self.shape = Shape(config.queries, config.batch, max_length, config.labels)
        self.tokenizer = loading.load_tokenizer(model)
        _, self.trainables, llama = prepared(model, spec, max_length, ctx)
        self.layout = llama.layout
        self._program = Program(lower(llama, self.shape, "candidates", config.backend))
        self._encoded: dict[str, list[prompts.Encoded]] = {}

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
        if name not in self._encoded:
            self._encoded[name] = prompts.encode(self.tokenizer, make().examples, self.shape.tokens)
        rows = self._encoded[name]
        slots = [
            (index, position - 1, row.tokens[position])
            for index, row in enumerate(rows)
            for position in range(max(row.start, 1), len(row.tokens))
        ]
        centre, share, found = self.layout.pack(theta), 2 * self.shape.queries, []
        for at in range(0, len(directions), share):
            stack = np.repeat(centre[None], share, 0)
            for copy, v, step in zip(stack, directions[at : at + share], steps[at : at + share], strict=False):
                copy += np.float32(step) * self.layout.pack(v)
            count = len(directions[at : at + share])
            found.append(self._losses(rows, slots, stack)[:count].astype(np.float64).mean(1))
        return np.concatenate(found)

    def _losses(self, rows: Sequence[prompts.Encoded], slots: Sequence[Slot], stack: Float32) -> Float32:
        """Negative log-likelihood of every slot under every adapter of `stack`: (P, slots)."""
        shape, out = self.shape, np.empty((len(stack), len(slots)), np.float32)
        at = 0
        while at < len(slots):
            first = slots[at][0]
            here = [slot for slot in slots[at : at + shape.labels] if slot[0] < first + shape.batch]
            tokens = np.zeros((shape.batch, shape.tokens), np.int64)
            for k, row in enumerate(rows[first : first + shape.batch]):
                tokens[k, : len(row.tokens)] = row.tokens
            places, targets = np.zeros(shape.labels, np.int64), np.zeros(shape.labels, np.int64)
            places[: len(here)] = [(row - first) * shape.tokens + column for row, column, _ in here]
            targets[: len(here)] = [token for _, _, token in here]
            inputs = [torch.from_numpy(array) for array in (tokens, places, targets, stack)]
            out[:, at : at + len(here)] = self._program(inputs)[:, : len(here)]
            at += len(here)
        return out

    def measure(self, theta: Arrays, data: Dataset) -> dict[str, Metric]:
        """As in `Objective`: each label's first token is one more slot at the place where the answer starts."""
        stack = np.repeat(self.layout.pack(theta)[None], 2 * self.shape.queries, 0)
        firsts = scoring.first_tokens(data, self._ids) if data.labels else []
        rows = prompts.encode(self.tokenizer, data.examples, self.shape.tokens)
        slots: list[Slot] = []
        for index, row in enumerate(rows):
            slots += [(index, max(row.start, 1) - 1, token) for token in firsts]
            slots += [
                (index, position - 1, row.tokens[position]) for position in range(max(row.start, 1), len(row.tokens))
            ]
        nll, losses, predicted, at = self._losses(rows, slots, stack)[0], [], [], 0
        for row in rows:
            scored = len(row.tokens) - max(row.start, 1)
            if firsts:
                predicted.append(data.labels[int(nll[at : at + len(firsts)].argmin())])
            losses.append(nll[at + len(firsts) : at + len(firsts) + scored].astype(np.float64))
            at += len(firsts) + scored
        if not losses:
            raise DataError("has nothing to score", data.name)
        return scoring.metrics(np.concatenate(losses), predicted, data)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def write(self, folder: Path, theta: Arrays, base: Mapping[str, str]) -> None:
        adapters.write(folder, self.trainables, theta, base)
