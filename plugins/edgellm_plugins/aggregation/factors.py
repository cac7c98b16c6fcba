"""Products of LoRA factors, never formed: exact means, inner products, distances, the best approximation of a rank.

`X.lora_A` (r, d_in) and `X.lora_B` (d_out, r) of a set of arrays stand for one matrix B A, and (B Q, Q^-1 A) for the
same one: what is to be compared or averaged is the product. A sum of products is a product of stacked factors,
sum_k w_k B_k A_k = [w_1 B_1 .. w_K B_K] [A_1; ..; A_K], of rank sum_k r_k at most; weights go on one side only. QR of
both sides leaves a small matrix with the same singular values. Inner products need r x r matrices alone:
<B_i A_i, B_j A_j> = tr(B_i^T B_j A_j A_i^T).

numpy alone, float64 throughout, in the order of the arguments and of sorted names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from edgellm_sdk.context import Context
from edgellm_sdk.errors import FederationError
from edgellm_sdk.kit import averaging
from edgellm_sdk.types import Array, Arrays

A, B = "lora_A", "lora_B"
Float64: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Product:
    """The matrix b a, (d_out, d_in): b (d_out, R), a (R, d_in), float64."""

    b: Float64
    a: Float64

    @property
    def rank(self) -> int:
        """R, the number of columns of b; the matrix may have a smaller rank."""
        return len(self.a)

    def dense(self) -> Float64:
        """The matrix itself."""
        return self.b @ self.a

    def norm(self) -> float:
        """Its Frobenius norm, from the triangles of the two QR, where nothing is squared that cancels; of the matrix
        where that is no larger than its factors."""
        if self.rank >= min(len(self.b), self.a.shape[1]):
            return float(np.linalg.norm(self.dense()))
        low, high = (np.asarray(np.linalg.qr(side, mode="r")) for side in (self.b, self.a.T))
        return float(np.linalg.norm(low @ high.T))

    def svd(self) -> tuple[Float64, Float64, Float64]:
        """U (d_out, k), S (k,) falling, V^T (k, d_in), k = min(R, d_out, d_in). Every row of V^T has its largest entry
        positive, so that equal matrices have equal factors."""
        left, low = np.linalg.qr(self.b)
        right, high = np.linalg.qr(self.a.T)
        u, s, vt = np.linalg.svd(low @ high.T, full_matrices=False)
        u, vt = left @ u, vt @ right.T
        signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)]) if vt.size else np.ones(len(vt))
        return u * signs, s, vt * signs[:, None]


def modules(arrays: Iterable[str]) -> list[str]:
    """X of every pair `X.lora_A`, `X.lora_B`, sorted."""
    names = set(arrays)
    heads = [name.removesuffix(f".{A}") for name in names if name.endswith(f".{A}")]
    return sorted(head for head in heads if f"{head}.{B}" in names)


def factors(arrays: Arrays) -> dict[str, Product]:
    """Every pair of `arrays`, by module. FederationError for factors that do not fit each other, and for those under
    the names of an adapter that is more than products."""
    found = {}
    for name in sorted(arrays):
        if f".{A}." in name or f".{B}." in name:
            raise FederationError(f"{name[:80]}: more than a product B A", "aggregate", "use fedavg")
    for module in modules(arrays):
        a, b = arrays[f"{module}.{A}"], arrays[f"{module}.{B}"]
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != len(a):
            what = f"{module}: A {list(a.shape)} and B {list(b.shape)} are no factors of one matrix"
            raise FederationError(what, "aggregate")
        found[module] = Product(b.astype(np.float64), a.astype(np.float64))
    return found


def others(arrays: Arrays) -> dict[str, Array]:
    """What is in no pair: norms, biases, a factor alone."""
    paired = {f"{module}.{side}" for module in modules(arrays) for side in (A, B)}
    return {name: array for name, array in arrays.items() if name not in paired}


def stacked(products: Sequence[Product], weights: Sequence[float]) -> Product:
    """sum_k weights[k] products[k], of the sum of their ranks. The weights go into b: in both they would be squared.

    FederationError when the matrices are of unlike shapes.
    """
    shapes = {(len(one.b), one.a.shape[1]) for one in products}
    if len(shapes) != 1:
        raise FederationError(f"matrices of shapes {sorted(shapes)} have no sum", "aggregate")
    b = np.concatenate([one.b * weight for one, weight in zip(products, weights, strict=True)], axis=1)
    return Product(b, np.concatenate([one.a for one in products]))


def mean(several: Sequence[Mapping[str, Product]], weights: Sequence[float]) -> dict[str, Product]:
    """The exact weighted mean of products, module by module, stacked, over those who have it (`averaging.having`)."""
    return {module: stacked(*averaging.having(module, several, weights)) for module in averaging.names(several)}


def difference(one: Product, other: Product) -> Product:
    """one - other, stacked."""
    return stacked([one, other], [1.0, -1.0])


def best(product: Product, rank: int = 0, floor: float = 0.0) -> Product:
    """The best approximation of rank `rank` at most (0: any), without singular values of `floor` or less: b = U S,
    a = V^T. What is left out has the norm sqrt(sum of squares of the singular values left out)."""
    u, s, vt = product.svd()
    kept = int((s > floor).sum())
    kept = min(kept, rank) if rank else kept
    return Product(u[:, :kept] * s[:kept], vt[:kept])


def inner(one: Product, other: Product) -> float:
    """<one, other> = tr(one^T other), from (R, R') matrices."""
    return float(np.sum((one.b.T @ other.b) * (one.a @ other.a.T)))


def gram(several: Sequence[Arrays]) -> Float64:
    """Inner products between K sets of arrays of the same names: (K, K).

    Summed over modules, of products B A for pairs of factors, whose ranks may differ between the sets, and entry by
    entry for all else. The squared distance of i and j is g[i, i] + g[j, j] - 2 g[i, j]: no rotation of a set's factors
    changes it. For distances of changes give new values; for their norms give what they started from as one more set.
    """
    total = np.zeros((len(several), len(several)))
    products = [factors(arrays) for arrays in several]
    for module in products[0]:
        rows = [padded(one[module], 1) for one in products]  # a block of nothing has no sum
        starts = np.cumsum([0, *(row.rank for row in rows[:-1])])
        every = stacked(rows, [1.0] * len(rows))
        blocks = (every.b.T @ every.b) * (every.a @ every.a.T)
        total += np.add.reduceat(np.add.reduceat(blocks, starts, 0), starts, 1)
    for name in sorted(others(several[0])):
        flat = np.stack([arrays[name].astype(np.float64).ravel() for arrays in several])
        total += flat @ flat.T
    return total


def distances(several: Sequence[Arrays]) -> Float64:
    """Squared distances between K sets of arrays, from their `gram`: (K, K), never negative, zero from each to
    itself."""
    inner_products = gram(several)
    squares = np.diag(inner_products)
    found = np.maximum(squares[:, None] + squares - inner_products - inner_products.T, 0)
    np.fill_diagonal(found, 0)
    return found


def aggregation_error(used: Mapping[str, Product], ideal: Mapping[str, Product]) -> float:
    """||used - ideal||_F / ||ideal||_F over all modules together; 0 where the ideal is zero and met."""
    gap = np.linalg.norm([difference(used[module], ideal[module]).norm() for module in ideal])
    whole = np.linalg.norm([product.norm() for product in ideal.values()])
    return float(gap / whole) if whole else float(np.inf if gap else 0.0)


def averaged(several: Sequence[Mapping[str, Product]], weights: Sequence[float]) -> dict[str, Product]:
    """(mean B)(mean A), module by module: what averaging factors gives, which is not the mean of products."""
    found = {}
    for module in averaging.names(several):
        rows, scaled = averaging.having(module, several, weights)
        if len({row.rank for row in rows}) != 1:
            raise FederationError(f"{module}: factors of unlike ranks have no mean", "aggregate")
        found[module] = Product(
            np.sum([row.b * weight for row, weight in zip(rows, scaled, strict=True)], axis=0),
            np.sum([row.a * weight for row, weight in zip(rows, scaled, strict=True)], axis=0),
        )
    return found


def padded(product: Product, rank: int) -> Product:
    """The same matrix with `rank` columns in b, those added all zero."""
    more = max(0, rank - product.rank)
    return Product(np.pad(product.b, ((0, 0), (0, more))), np.pad(product.a, ((0, more), (0, 0))))


def draw_errors(
    ctx: Context,
    round: int,
    several: Sequence[Mapping[str, Product]],
    weights: Sequence[float],
    used: Mapping[str, Product] | None = None,
) -> None:
    """For the report, over rounds: the aggregation error of `used` beside that of averaged factors (unlike ranks filled
    up with zeros); of these alone where `used` is None. Nothing where there are no factors."""
    if not any(several):
        return
    ideal = mean(several, weights)
    widest = {module: max(one[module].rank for one in several if module in one) for module in ideal}
    same = [{module: padded(product, widest[module]) for module, product in one.items()} for one in several]
    plain = aggregation_error(averaged(same, weights), ideal)
    told = [("aggregation error", plain)]
    if used is not None:
        told = [("aggregation error", aggregation_error(used, ideal)), ("error of averaged factors", plain)]
    for name, value in told:
        if np.isfinite(value):
            ctx.curve(f"{name} over rounds", round, value)
