"""Which token comes next, the same in every backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgellm_sdk.random import Stream

if TYPE_CHECKING:
    from edgellm_sdk.types import Float32


class Chooser:
    """Greedy at temperature 0, else one draw a token from the softmax of logits / temperature.

    The draw inverts the cumulative distribution with a portable stream, so one seed gives one text wherever the
    logits are equal.
    """

    def __init__(self, temperature: float, seed: int) -> None:
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature {temperature} is not a number >= 0")
        self._temperature = temperature
        self._stream = Stream(seed, "generate")

    def choose(self, logits: Float32) -> int:
        """The next id from `logits`: (vocabulary,) float32."""
        import numpy as np

        if self._temperature == 0:
            return int(np.argmax(logits))
        scaled = logits.astype(np.float64) / self._temperature
        total = np.cumsum(np.exp(scaled - scaled.max()))
        place = np.searchsorted(total, self._stream.uniform(1)[0] * total[-1], side="right")
        return int(min(place, len(total) - 1))


def cut(text: str, stop: tuple[str, ...]) -> str | None:
    """`text` up to the first of the `stop` strings in it, or None when there is none."""
    places = [place for place in (text.find(word) for word in stop if word) if place >= 0]
    return text[: min(places)] if places else None
