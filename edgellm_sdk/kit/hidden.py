"""Hidden states on disk: what frozen layers make of an example is computed once, and not again by the next run.

Files are named by a digest of all that the states depend on, so a folder serves any number of models and runs. Every
example goes through the layers by itself, because in a batch its last bits depend on its neighbours; so a run that
keeps states is not bit-equal to one that does not. The states tell of the texts they came from: the folder deserves
the protection of the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from edgellm_sdk import store
from edgellm_sdk.kit.prompts import Encoded

ONE = "hidden"


@dataclass(frozen=True)
class Shelf:
    """States are (scored positions, `width`) of `dtype`; `made_by` names the model and what else decides their bits."""

    folder: Path
    made_by: str
    width: int
    dtype: torch.dtype

    def get(self, example: Encoded, make: Callable[[Encoded], Tensor]) -> Tensor:
        """The states of an example, from disk, else made and then on disk. StorageError when the disk says no."""
        sha = hashlib.blake2b(f"{self.made_by} {self.dtype} from {example.start}".encode(), digest_size=20)
        sha.update(np.array(example.tokens, "<i8").tobytes())
        path = self.folder / f"{sha.hexdigest()}.safetensors"
        found = _read(path)
        if found is not None and found.shape == (len(example.scored), self.width) and found.dtype == self.dtype:
            return found
        states = make(example)
        with store.atomic(path, 0o600) as file:
            file.write(save({ONE: states.detach().cpu().contiguous()}))
        return states


def _read(path: Path) -> Tensor | None:
    """None for a file that is not there or is none of ours."""
    try:
        return load(path.read_bytes()).get(ONE)
    except (OSError, SafetensorError):
        return None
