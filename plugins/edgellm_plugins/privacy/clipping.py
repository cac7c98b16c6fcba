"""The clip that every claim of this family rests on."""

from __future__ import annotations

import math

import numpy as np

from edgellm_sdk.types import Array, Arrays


def clipped(vector: Arrays, limit: float) -> dict[str, Array]:
    """x min(1, C / |x|) over all arrays together, float64. Zeros when x or its norm is not finite; |x| = 0 is legal."""
    wide = {name: np.asarray(array, np.float64) for name, array in vector.items()}
    with np.errstate(over="ignore", invalid="ignore"):
        norm = math.sqrt(sum(float(np.square(array).sum()) for array in wide.values()))
    if not math.isfinite(norm):
        return {name: np.zeros_like(array) for name, array in wide.items()}
    factor = min(1.0, limit / norm) if norm else 1.0
    return {name: array * factor for name, array in wide.items()}
