"""GGUF block formats that are 32 weights wide: bytes, decoding, the stock quantiser, and the search for a lattice.

Those of 256 weights are in `super_blocks`; `decode`, `nearest`, `any_format` and `lattice` take the name of either.

A weight row is cut into runs of 32 along the input dimension; a run stores one fp16 scale d (and one fp16 minimum m)
and 32 small codes, so what a run can hold is a lattice `d * k (+ m)` with k an integer or an entry of a fixed table:

    format   bytes  bits/weight  value
    q4_0     18     4.5          d * (code - 8)               code 0..15
    q4_1     20     5.0          d * code + m                 code 0..15
    q5_0     22     5.5          d * (code - 16)              code 0..31
    q5_1     24     6.0          d * code + m                 code 0..31
    iq4_nl   18     4.5          d * table[code]              code 0..15
    q8_0     34     8.5          d * code                     code -128..127

`nearest` is the engine's own rounding. `Lattice` chooses d and m in their stored fp16 precision *first*, so codes that
were optimised against it survive storage unchanged (arXiv 2210.17323 rounds onto a given grid; which grid is ours to
choose). Requantising decoded floats instead re-derives d and changes codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit.chosen import Frame as Frame
from edgellm_sdk.kit.chosen import Parameters as Parameters

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from edgellm_sdk.types import Float32

    Bytes = NDArray[np.uint8]
    Codes = NDArray[np.int8]
    Half = NDArray[np.float16]

WIDTH = 32


@dataclass(frozen=True)
class BlockFormat:
    """One format. Stored codes run from `low` to `high`; the code `zero` stands for k = 0 (for a table, for ~0).

    `bytes` per block of `width` weights; `ggml` and `type_id` name it in a GGUF file; `minimum` says a block stores m.
    """

    name: str
    ggml: str
    type_id: int
    bits: int
    bytes: int
    low: int
    high: int
    zero: int
    minimum: bool = False
    table: tuple[int, ...] = ()
    width: int = WIDTH

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.width

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights; ModelError when they do not fill whole blocks."""
        if columns % self.width:
            raise ModelError(f"{columns} columns do not divide into blocks of {self.width}", self.name)
        return columns // self.width * self.bytes

    def columns(self, row_bytes: int) -> int:
        """Weights in a row of `row_bytes` bytes; ModelError when the bytes are no whole blocks."""
        if row_bytes % self.bytes:
            raise ModelError(f"{row_bytes} bytes are no whole number of {self.bytes}-byte blocks", self.name)
        return row_bytes // self.bytes * self.width


NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FORMATS = MappingProxyType(
    {
        f.name: f
        for f in (
            BlockFormat("q4_0", "Q4_0", 2, 4, 18, 0, 15, 8),
            BlockFormat("q4_1", "Q4_1", 3, 4, 20, 0, 15, 0, minimum=True),
            BlockFormat("q5_0", "Q5_0", 6, 5, 22, 0, 31, 16),
            BlockFormat("q5_1", "Q5_1", 7, 5, 24, 0, 31, 0, minimum=True),
            BlockFormat("iq4_nl", "IQ4_NL", 20, 4, 18, 0, 15, 8, table=NONLINEAR),
            BlockFormat("q8_0", "Q8_0", 8, 8, 34, -128, 127, 0),
        )
    }
)


def block_format(name: str) -> BlockFormat:
    """The format called `name`; ModelError for one we do not know."""
    if name not in FORMATS:
        raise ModelError(f"unknown block format {name!r}", fix=f"known are {', '.join(FORMATS)}")
    return FORMATS[name]


def any_format(name: str) -> BlockFormat:
    """The format called `name`, 32 or 256 weights wide; ModelError for one we do not know."""
    if name in FORMATS:
        return FORMATS[name]
    from edgellm_sdk.kit.super_blocks import super_format

    return super_format(name)


def lattice(name: str) -> Lattice:
    """The lattice of a format, 32 or 256 weights wide."""
    if any_format(name).width == WIDTH:
        return Lattice(name)
    from edgellm_sdk.kit.super_blocks import SuperLattice

    return SuperLattice(name)


def _midpoints(table: tuple[int, ...]) -> Float32:
    entries = np.array(table, np.float32)
    return np.asarray((entries[1:] + entries[:-1]) / 2, np.float32)


def pack(codes: Codes, scales: Half, mins: Half | None, fmt: str) -> Bytes:
    """Block bytes from stored codes: codes (rows, cols) int8, scales and mins (rows, cols / 32) float16 ->
    (rows, row bytes) uint8. Layout: d, m if any, fifth bits if any (bit t for weight t), then codes; of a block's
    nibbles byte t holds weight t low and weight t + 16 high."""
    f = block_format(fmt)
    rows, cols = codes.shape
    width, blocks = f.row_bytes(cols), cols // WIDTH
    if scales.shape != (rows, blocks) or (mins is not None) != f.minimum:
        raise ModelError(f"scales {scales.shape} do not fit codes {codes.shape}", fmt)
    if codes.size and (codes.min() < f.low or codes.max() > f.high):
        raise ModelError(f"codes outside {f.low}..{f.high}", fmt)
    parts = [_halves(scales)]
    if mins is not None:
        parts.append(_halves(mins))
    grouped = codes.reshape(rows, blocks, WIDTH)
    if f.bits == 8:
        parts.append(np.ascontiguousarray(grouped, np.int8).view(np.uint8))
    else:
        unsigned = grouped.astype(np.uint8)
        if f.bits == 5:
            parts.append(np.packbits(unsigned >> 4, axis=2, bitorder="little"))
        nibbles = unsigned & 15
        parts.append(np.asarray(nibbles[:, :, :16] | (nibbles[:, :, 16:] << 4), np.uint8))
    return np.concatenate(parts, axis=2).reshape(rows, width)


def _halves(values: Half) -> Bytes:
    return np.ascontiguousarray(values, "<f2")[:, :, None].view(np.uint8)


def unpack(packed: Bytes, fmt: str) -> tuple[Codes, Half, Half | None]:
    """(codes, scales, mins) as `pack` takes them; ModelError when rows are no whole blocks."""
    f = block_format(fmt)
    if packed.dtype != np.uint8 or packed.ndim != 2:
        raise ModelError(f"packed weights are {packed.dtype}{list(packed.shape)}, not rows of bytes", fmt)
    rows, cols = packed.shape[0], f.columns(packed.shape[1])
    raw = np.ascontiguousarray(packed).reshape(rows, cols // WIDTH, f.bytes)
    scales = raw[:, :, :2].copy().view("<f2")[:, :, 0]
    mins, at = None, 2
    if f.minimum:
        mins, at = raw[:, :, 2:4].copy().view("<f2")[:, :, 0], 4
    if f.bits == 8:
        return raw[:, :, at:].copy().view(np.int8).reshape(rows, cols), scales, mins
    nibbles = raw[:, :, f.bytes - 16 :]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=2)
    if f.bits == 5:
        codes |= np.unpackbits(raw[:, :, at : at + 4], axis=2, bitorder="little") << 4
    return codes.view(np.int8).reshape(rows, cols), scales, mins


def decode(packed: Bytes, fmt: str) -> Float32:
    """(rows, bytes per row) uint8 -> (rows, cols) float32, bit-equal to llama.cpp's own dequantisation."""
    if fmt not in FORMATS:
        from edgellm_sdk.kit import super_blocks

        return super_blocks.decode(packed, fmt)
    f = block_format(fmt)
    codes, scales, mins = unpack(packed, fmt)
    rows, cols = codes.shape
    levels = np.array(f.table, np.float32)[codes] if f.table else codes.astype(np.float32) - np.float32(f.zero)
    values = levels.reshape(rows, cols // WIDTH, WIDTH)
    values *= scales.astype(np.float32)[:, :, None]
    if mins is not None:
        values += mins.astype(np.float32)[:, :, None]
    return np.asarray(values.reshape(rows, cols))


def nearest(weights: Float32, fmt: str) -> Bytes:
    """Round to nearest as llama.cpp's reference quantisers do without importance matrix: (rows, cols) float32 ->
    (rows, bytes per row) uint8, byte-equal. The scale comes from the block alone and codes are chosen against its
    float32 value, before it is stored as fp16. ModelError for weights that are not finite or overflow fp16.
    256-wide formats: see `super_blocks.nearest`."""
    if fmt not in FORMATS:
        from edgellm_sdk.kit import super_blocks

        return super_blocks.nearest(weights, fmt)
    f = block_format(fmt)
    rows, cols = weights.shape
    f.row_bytes(cols)
    x = np.ascontiguousarray(weights, np.float32).reshape(rows, cols // WIDTH, WIDTH)
    if not np.isfinite(x).all():
        raise ModelError("weights are not finite", fmt)
    half, one = np.float32(0.5), np.float32(1)
    mins = None
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if f.minimum:
            mins = x.min(axis=2)
            scale = (x.max(axis=2) - mins) / np.float32(f.high)
            inverse = np.where(scale != 0, one / scale, np.float32(0))
            codes = np.minimum(np.floor((x - mins[:, :, None]) * inverse[:, :, None] + half), f.high)
        elif f.table:
            scale, codes = _nearest_table(x, f)
        elif f.bits == 8:
            scale = np.abs(x).max(axis=2) / np.float32(127)
            inverse = np.where(scale != 0, one / scale, np.float32(0))
            scaled = x * inverse[:, :, None]
            whole = np.trunc(scaled)
            codes = whole + np.where(np.abs(scaled - whole) >= half, np.copysign(one, scaled), np.float32(0))
        else:
            scale = _largest(x) / np.float32(-f.zero)
            inverse = np.where(scale != 0, one / scale, np.float32(0))
            shifted = x * inverse[:, :, None] + np.float32(f.zero + 0.5)
            codes = np.minimum(np.floor(shifted), f.high)
        stored = scale.astype(np.float16)
        stored_mins = None if mins is None else mins.astype(np.float16)
    if not np.isfinite(stored).all() or (stored_mins is not None and not np.isfinite(stored_mins).all()):
        raise ModelError("weights too large for an fp16 scale", fmt)
    return pack(codes.astype(np.int8).reshape(rows, cols), stored, stored_mins, fmt)


def _largest(x: Float32) -> Float32:
    """Per block the signed element of largest magnitude, the first of equals: (rows, blocks, 32) -> (rows, blocks)."""
    place = np.abs(x).argmax(axis=2)
    return np.asarray(np.take_along_axis(x, place[:, :, None], axis=2)[:, :, 0])


def _nearest_table(x: Float32, f: BlockFormat) -> tuple[Float32, Any]:
    """Codes against largest / table[0], then the scale refitted to them by least squares with weights x^2."""
    largest = _largest(x)
    alive = np.abs(largest) >= np.float32(1e-15)
    inverse = np.where(alive, np.float32(1) / (largest / np.float32(f.table[0])), np.float32(0))
    codes = np.searchsorted(_midpoints(f.table), x * inverse[:, :, None], side="right")
    levels = np.array(f.table, np.float32)[codes]
    weighted = x * x * levels
    over, under = np.zeros_like(largest), np.zeros_like(largest)
    for t in range(WIDTH):  # in the engine's order: float32 sums depend on it
        over += weighted[:, :, t] * x[:, :, t]
        under += weighted[:, :, t] * levels[:, :, t]
    return np.where(alive, over / under, np.float32(0)), np.where(alive[:, :, None], codes, f.zero)


class Lattice:
    """Choosing a block's fp16 parameters for current weights, and rounding single columns onto what was chosen.

    Tensors are column-major here, (columns, rows): the sweep that uses this walks along columns. Levels are k, not
    stored codes: `code = level + format.zero`, except for tables, where the level is the index itself.
    """

    def __init__(self, fmt: str) -> None:
        self._prepare(block_format(fmt))

    def _prepare(self, f: BlockFormat) -> None:
        import torch

        self.group = self.span = f.width
        self.format = f
        self.low, self.high = (0, f.high) if f.table else (max(f.low, -127) - f.zero, f.high - f.zero)
        self._table = torch.tensor(f.table, dtype=torch.float64)
        self._middles = (self._table[1:] + self._table[:-1]) / 2
        outermost = f.table[0] if f.table else -f.zero
        steps = sorted(range(-9, 10), key=abs)
        self._ends = [127.0] if f.bits == 8 else [outermost * (1 + 0.03 * t) for t in steps]
        finest = 25 if f.high > 3 else 12  # two bits gain from cutting more off
        self._shrinks = sorted(((a / finest, b / finest) for a in range(6) for b in range(6)), key=sum)

    def frame(self, columns: Tensor, omega: Tensor) -> Frame | None:
        """What groups of one super-block share; None for formats without. columns (span, r), omega (span,)."""
        return None

    def fit(self, columns: Tensor, omega: Tensor, frame: Frame | None = None) -> Parameters:
        """The candidate with the least sum of omega * (rounded - weight)^2, per row.

        columns (32, r), omega (32,) of one dtype -> parameters (r,). The candidates map the signed element of largest
        magnitude onto the outermost level (-8, -16, -127) times 1 + 0.03 t, t = -9..9, or onto 127 for q8_0; for q4_1
        and q5_1 they shrink the range (min, max) from either end in steps of 4 %. (llama.cpp searches as many
        candidates with an importance matrix, but within 11, 6 and 6 %; the wider net cut q4_0 and iq4_nl errors by 5
        to 9 %.) Ties go to the plainest. ModelError when no candidate fits fp16. A block of zeros gets d = 0.
        """
        return Parameters.of(*self._search(columns, omega[:, None], self._candidates(columns)))

    def _search(
        self, columns: Tensor, omega: Tensor, candidates: list[tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        """The best (scale, shift) for each of r rows: columns (group, r), omega (group, r or 1) -> (r,), (r,)."""
        import torch

        best = torch.full_like(columns[0], torch.inf)
        scale, shift = torch.zeros_like(best), torch.zeros_like(best)
        for candidate_scale, candidate_shift in candidates:
            p = Parameters.of(candidate_scale, candidate_shift)
            error = (self.value(self.level(columns, p), p).sub_(columns).square_().mul_(omega)).sum(0)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, candidate_scale, scale)
            if candidate_shift is not None:
                shift = torch.where(better, candidate_shift, shift)
        if not torch.isfinite(best).all():
            raise ModelError("weights too large for an fp16 scale, or not finite", self.format.name)
        return scale, shift if self.format.minimum else None

    def _candidates(self, columns: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        def stored(values: Tensor) -> Tensor:
            return values.half().to(columns.dtype)

        if self.format.minimum:
            low, high = columns.amin(0), columns.amax(0)
            span = high - low
            return [(stored(span * (1 - a - b) / self.format.high), stored(low + a * span)) for a, b in self._shrinks]
        largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
        if self.format.bits == 8:
            largest = largest.abs()
        return [(stored(largest / end), None) for end in self._ends]

    def level(self, weights: Tensor, p: Parameters) -> Tensor:
        """The nearest level of every weight, (..., r) -> (..., r), as a float; the upper one on a table's midpoint."""
        import torch

        scaled = (weights if p.shift is None else weights - p.shift) * p.inverse
        if self.format.table:
            return torch.bucketize(scaled, self._middles.to(scaled.dtype), right=True).to(scaled.dtype)
        return scaled.round_().clamp_(self.low, self.high)

    def basis(self, levels: Tensor) -> Tensor:
        """What the scale multiplies: the level itself or its table entry."""
        return self._table.to(levels.dtype)[levels.long()] if self.format.table else levels

    def value(self, levels: Tensor, p: Parameters) -> Tensor:
        """The weight that a level stands for; bit-equal to `decode` in float32."""
        values = self.basis(levels) * p.scale
        return values if p.shift is None else values + p.shift

    def rounded(self, columns: Tensor, omega: Tensor) -> Bytes:
        """Every weight to its nearest level, scales searched with column j costing omega_j: columns (cols, r), omega
        (cols,) -> (r, row bytes) uint8. ModelError when the columns are no whole blocks."""
        import torch

        self.format.row_bytes(len(columns))
        levels, parameters = [], []
        for block, cost in zip(columns.split(self.span), omega.split(self.span), strict=True):
            frame = self.frame(block, cost)
            for part, price in zip(block.split(self.group), cost.split(self.group), strict=True):
                parameters.append(p := self.fit(part, price, frame))
                levels.append(self.level(part, p))
        return self.pack_all(torch.cat(levels), parameters)

    def pack_all(self, levels: Tensor, parameters: list[Parameters]) -> Bytes:
        """Block bytes: levels (cols, r) and the parameters of every group, all fp16-exact -> (r, row bytes) uint8."""
        import torch

        shifts = [p.shift for p in parameters if p.shift is not None]
        return self.pack(levels, torch.stack([p.scale for p in parameters]), torch.stack(shifts) if shifts else None)

    def pack(self, levels: Tensor, scales: Tensor, shifts: Tensor | None) -> Bytes:
        """Block bytes: levels (cols, r), scales and shifts (cols / 32, r), all fp16-exact -> (r, row bytes) uint8."""
        import torch

        codes = levels if self.format.table else levels + self.format.zero
        mins = None if shifts is None else shifts.t().to(torch.float16).contiguous().numpy()
        return pack(
            codes.t().to(torch.int8).contiguous().numpy(),
            scales.t().to(torch.float16).contiguous().numpy(),
            mins,
            self.format.name,
        )
