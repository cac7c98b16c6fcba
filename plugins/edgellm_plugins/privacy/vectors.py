"""A client's update as a vector of integers modulo 2^32, and what is read off the sum of such vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from edgellm_plugins.privacy import masks
from edgellm_plugins.privacy.clipping import clipped
from edgellm_sdk.errors import FederationError
from edgellm_sdk.types import Array, Update

LOSSES = 64.0
"""The grid of losses reaches this far: nats."""
PUBLIC = ("steps", "forwards", "alone", "adapter")
"""Scalars of an update that follow from options and from the sizes clients enrolled with."""
Terms: TypeAlias = Mapping[str, Any]
"""What the server asks for: `clip`, `levels` of the grid, the `heaviest` weight, the `weighting`."""


def public(update: Update) -> dict[str, Any]:
    """What of an update's scalars may be told as it is; `dropped` steps are told as none."""
    told = {name: update.scalars[name] for name in PUBLIC if name in update.scalars}
    return told | ({"dropped": 0} if "dropped" in update.scalars else {})


def laid_out(update: Update, start: Mapping[str, Array], terms: Terms) -> tuple[Array, dict[str, Any]]:
    """(the vector (d,) uint32, what the server must know to read the sum). FederationError for what has no sum."""
    for name, array in update.arrays.items():
        if "/" in name or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise FederationError(f"{name[:60]} is no finite number that secagg could add up", update.client)
    change = {name: array for name, array in update.arrays.items() if name != "loss"}
    if update.kind.startswith("weights"):
        change = {name: array.astype(np.float64) - start[name] for name, array in change.items()}
    losses = [np.ravel(update.arrays.get("loss", np.empty(0))), np.ravel(update.scalars.get("loss", []))]
    weight = min(update.examples, terms["heaviest"]) if terms["weighting"] == "examples" else 1
    share = weight / terms["heaviest"]
    vector = clipped(change, terms["clip"])
    flat = np.concatenate([vector[name].reshape(-1) for name in sorted(vector)])
    parts = [
        masks.quantised(share * flat, terms["clip"], terms["levels"]),
        masks.quantised(share * np.concatenate(losses), LOSSES, terms["levels"]),
        np.array([weight], np.uint32),
    ]
    shapes = {name: [list(a.shape), a.dtype.str] for name, a in sorted(update.arrays.items())}
    about = {"kind": update.kind, "rng": update.rng, "loss": "loss" in update.scalars}
    return np.concatenate(parts), {**about, "shapes": shapes}


def read_off(total: Array, form: Mapping[str, Any], terms: Terms) -> tuple[dict[str, Array], float | None, int]:
    """(the mean of the arrays float64, the mean loss, the sum of the weights) from the sum of vectors."""
    weight = int(total[-1])
    scale = terms["heaviest"] / weight
    sizes = {name: math.prod(shape) for name, (shape, _) in form["shapes"].items()}
    count = sum(size for name, size in sizes.items() if name != "loss")
    values = masks.restored(total[:count], terms["clip"], terms["levels"]) * scale
    losses = masks.restored(total[count:-1], LOSSES, terms["levels"]) * scale
    arrays, place = {}, 0
    for name in sorted(sizes):
        shape = form["shapes"][name][0]
        if name == "loss":
            arrays[name] = losses[: sizes[name]].reshape(shape)
        else:
            arrays[name] = values[place : place + sizes[name]].reshape(shape)
            place += sizes[name]
    return arrays, float(losses[-1]) if form["loss"] else None, weight
