"""Options of rules for LoRA factors of unlike rank."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.aggregation.options import Weighted
from edgellm_sdk.config import opt
from edgellm_sdk.errors import ConfigError


@dataclass(frozen=True)
class Ranked(Weighted):
    ranks: str = opt("", "ranks with commas, dealt to clients by name, over and over; empty: all that of the method")
    upload_seconds: float = opt(
        30.0, "a client whose uplink is known (--profiles) gets the largest rank that it sends in this", unit="s", ge=0
    )

    def chosen(self, most: int) -> list[int]:
        """The ranks, of which none may be above `most`, that of the method. ConfigError for anything else."""
        if not self.ranks.strip():
            return [most]
        words = [word.strip() for word in self.ranks.split(",")]
        if not all(word.isascii() and word.isdigit() and 1 <= int(word) <= most for word in words):
            raise ConfigError(f"ranks: {self.ranks[:60]!r} are not ranks from 1 to {most}", "ranks", "raise --rank")
        return [int(word) for word in words]
