"""What a round adds to the weights themselves, kept beside them as a folded LoRA `X.folded_A` (R, d_in),
`X.folded_B` (d_out, R) of scale 1, so that a quantised base stays as it is.

Exact rules make updates of a rank that grows with clients and rounds. The server sends a client of the last round only
that round's `step`, which the client adds to what it holds; others get all that was ever folded. A folded LoRA that is
larger than its matrix is written as the matrix and an identity.

What is folded is the same for all clients, so it is the device that remembers it: one that plays many clients keeps it
once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgellm_plugins.aggregation import turns
from edgellm_plugins.aggregation.factors import Product
from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.types import FOLDED, SERVER, Array, Arrays, Assignment, State

STEP = "step/"
DEVICE, MEMORY = "", "folded"


def scale(state: State) -> float:
    """s = alpha / r of the method's LoRAs. FederationError when the method does not tell it."""
    if "scale" not in state.scalars:
        raise FederationError("the method does not tell the scale of its LoRAs", "aggregate", "use --plugin lora")
    return float(state.scalars["scale"])


def named(products: Mapping[str, Product], size: float) -> dict[str, Array]:
    """`size` times each product as a folded LoRA, float32; none where the rank is 0."""
    found: dict[str, Array] = {}
    for module, product in products.items():
        if product.rank:
            found[f"{module}.{FOLDED[0]}"] = product.a.astype(np.float32)
            found[f"{module}.{FOLDED[1]}"] = (product.b * size).astype(np.float32)
    return found


def products_of(arrays: Arrays) -> dict[str, Product]:
    """The folded LoRAs among `arrays`, by module."""
    heads = [name.removesuffix(f".{FOLDED[0]}") for name in sorted(arrays) if name.endswith(FOLDED[0])]
    sides = {head: [arrays[f"{head}.{end}"].astype(np.float64) for end in FOLDED] for head in heads}
    return {head: Product(b, a) for head, (a, b) in sides.items()}


def fold(old: Arrays, step: Arrays) -> dict[str, Array]:
    """The sum of two sets of folded LoRAs: side by side, or as a matrix where that is smaller. float32."""
    found: dict[str, Array] = {}
    for head in sorted({name.rpartition(".")[0] for name in (*old, *step)}):
        names = [f"{head}.{end}" for end in FOLDED]
        a, b = ([arrays[name] for arrays in (old, step) if name in arrays] for name in names)
        low, high = np.concatenate(a), np.concatenate(b, axis=1)
        if len(low) > min(low.shape[1], len(high)):
            matrix = (high.astype(np.float64) @ low.astype(np.float64)).astype(np.float32)
            tall = len(matrix) > matrix.shape[1]
            side = np.eye(min(matrix.shape), dtype=np.float32)
            low, high = (side, matrix) if tall else (matrix, side)
        found |= dict(zip(names, (low, high), strict=True))
    return found


def folded(arrays: Arrays) -> dict[str, Array]:
    """The folded LoRAs among a State's or an assignment's arrays."""
    return {name: array for name, array in arrays.items() if name.endswith(FOLDED) and "/" not in name}


def part(arrays: Arrays, prefix: str) -> dict[str, Array]:
    """The arrays under `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def sent(state: State, client: str, ctx: Context) -> dict[str, Array]:
    """What `client` lacks of what is folded: the last round's step if it took part in it, else all."""
    if state.round and turns.last(state, client, ctx) == state.round:
        return {STEP + name: array for name, array in part(state.arrays, SERVER + STEP).items()}
    return folded(state.arrays)


def since(state: State, client: str, ctx: Context) -> int:
    """The round whose folded LoRA the client is to add the step to; 0 when it is sent all."""
    return state.round if turns.last(state, client, ctx) == state.round else 0


def prepare(assignment: Assignment, ctx: Context) -> Assignment:
    """With all that is folded, from the device's memory and what was sent; the memory then is of this round."""
    number, arrays = assignment.round, assignment.arrays
    newest = ctx.recall(DEVICE, MEMORY, number + 1)
    if newest is not None and newest[1]["round"] == number:
        whole = newest[0]
    else:
        held = turns.held(DEVICE, MEMORY, number, assignment.scalars["since"], ctx)
        whole = fold({**held, **folded(arrays)}, part(arrays, STEP))
        ctx.remember(DEVICE, MEMORY, number, whole, {"round": number})
    rest = {name: array for name, array in arrays.items() if not name.startswith(STEP)}
    scalars, options = assignment.scalars, assignment.options
    return Assignment(assignment.base, number, assignment.client, {**rest, **whole}, scalars, options)


def advanced(state: State, theta: Arrays, step: Arrays) -> dict[str, Array]:
    """A State's arrays after a round: new theta, all that is folded, and the round's step apart."""
    kept = {
        name: array for name, array in state.arrays.items() if not name.startswith(SERVER + STEP) and name not in theta
    }
    apart = {SERVER + STEP + name: array for name, array in step.items()}
    return {**kept, **theta, **fold(folded(state.arrays), step), **apart}
