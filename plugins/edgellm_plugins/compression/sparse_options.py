"""Options that methods share which set weights to zero. A method inherits them and adds its own."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_sdk.config import opt

DEFAULT = 0.5


@dataclass(frozen=True)
class Sparse:
    sparsity: float | None = opt(
        None, f"share of every linear layer's weights that become zero; {DEFAULT} if no pattern is given", ge=0, le=0.99
    )
    pattern: str = opt("", "N:M, at most N weights are kept of every M neighbouring inputs, as in 2:4; empty: anywhere")
    first_block: int = opt(0, "number of the first block to prune", ge=0)
    blocks: int = opt(0, "how many blocks to prune from there on, 0 for all", ge=0)
    only: str = opt("", "prune only linear layers with this in their name, as in mlp; empty: all of a block")

    def __post_init__(self) -> None:
        kept = self.kept
        if self.pattern and kept is None:
            raise ValueError(f"pattern: {self.pattern!r} is not N:M with 0 < N < M and M one of 2, 4, 8, 16, 32")
        if kept is not None and self.sparsity is not None:
            raise ValueError(f"sparsity: the pattern {self.pattern} decides it; leave it out")

    @property
    def kept(self) -> tuple[int, int] | None:
        """(N, M) of the pattern, or None without a valid one."""
        left, _, right = self.pattern.partition(":")
        if not (left.isdecimal() and right.isdecimal() and self.pattern.isascii() and len(self.pattern) <= 5):
            return None
        keep, of = int(left), int(right)
        return (keep, of) if 0 < keep < of and of in (2, 4, 8, 16, 32) else None

    @property
    def share(self) -> float:
        """The share of zeros asked for."""
        if self.kept is not None:
            return 1 - self.kept[0] / self.kept[1]
        return DEFAULT if self.sparsity is None else self.sparsity

    def prunes(self, block: int, name: str) -> bool:
        """Whether the linear `name` of block number `block` is to be pruned."""
        last = self.first_block + self.blocks if self.blocks else block + 1
        return self.first_block <= block < last and self.only in name


@dataclass(frozen=True)
class Calibrated(Sparse):
    calibration_samples: int = opt(16, "windows of text to calibrate on", ge=1, le=4096)
    calibration_length: int = opt(512, "length of a window", unit="tokens", ge=16, le=32768)
    calibration_text: str = opt("", "text file to calibrate on; empty: the data of the run")
    sequential: bool = opt(True, "calibrate each layer on what the pruned layers before it put out")
    dtype: str = opt("float32", "precision of the calibration forwards", choices=("float32", "bfloat16"))
