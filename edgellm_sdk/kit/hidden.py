"""Hidden states on disk: what frozen layers make of an example is computed once, and not again by the next run.

Files are named by a digest of all that the states depend on, so a folder serves any number of models and runs. The
states tell of the texts they came from: the folder deserves the protection of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from edgellm_sdk import store
from edgellm_sdk.kit.prompts import Encoded

ONE = "hidden"


@dataclass(frozen=True)
class Shelf:
    """`made_by` names the model, its precision and what else decides the bits of the states."""

    folder: Path
    made_by: str

    def get(self, examples: Sequence[Encoded], make: Callable[[], Tensor]) -> Tensor:
        """The states of a batch, from disk, else from `make` and then on disk. StorageError when the disk says no."""
        path = self.folder / f"{self._name(examples)}.safetensors"
        try:
            return load(path.read_bytes())[ONE]
        except (OSError, SafetensorError, KeyError):  # not there, or cut short
            states = make()
            with store.atomic(path, 0o600) as file:
                file.write(save({ONE: states.detach().cpu().contiguous()}))
            return states

    def _name(self, examples: Sequence[Encoded]) -> str:
        sha = hashlib.blake2b(self.made_by.encode(), digest_size=20)
        for example in examples:
            sha.update(b"/%d" % example.start + torch.tensor(example.tokens).numpy().tobytes())
        return sha.hexdigest()
