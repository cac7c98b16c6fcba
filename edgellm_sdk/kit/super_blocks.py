"""GGUF block formats that are 256 weights wide: bytes, decoding, and the search for a lattice.

A super-block stores fp16 units d (and dmin) once, and for each of its parts, runs of 16 or 32 weights, a small whole
scale sc (and a whole minimum m); a weight is d * sc * k (- dmin * m), k an integer or an entry of a fixed table:

    format   bytes  bits/weight  parts   value
    q2_k      84    2.625        16 x 16  d * sc * code - dmin * m       code 0..3,  sc and m 0..15
    q3_k     110    3.4375       16 x 16  d * sc * (code - 4)            code 0..7,  sc -32..31
    q4_k     144    4.5           8 x 32  d * sc * code - dmin * m       code 0..15, sc and m 0..63
    q5_k     176    5.5           8 x 32  d * sc * code - dmin * m       code 0..31, sc and m 0..63
    q6_k     210    6.5625       16 x 16  d * sc * (code - 32)           code 0..63, sc -128..127
    iq4_xs   136    4.25          8 x 32  d * sc * table[code]           code 0..15, sc -32..31

`SuperLattice` chooses the units of a super-block from current weights and, part by part, whole scales given the units,
so that what is rounded onto is what is stored. The layouts are those of ggml's quantisation code. `nearest` is our own
search with equal weights; the engine's differs from one compiler to the next and is left to the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit.blocks import NONLINEAR, BlockFormat, Frame, Lattice, Parameters

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from edgellm_sdk.kit.blocks import Bytes, Half
    from edgellm_sdk.types import Float32

    Small = NDArray[np.int16]
    Planes = tuple[int, int, int]  # bytes are `runs` x `wide`, each holding `folded` neighbours-by-wide

SUPER = 256


@dataclass(frozen=True)
class SuperFormat(BlockFormat):
    """`part` weights share a whole scale in `scales`; `layout` is the order of a block's fields, `low_bits` (how many,
    planes) and `high_bits` (planes) say how codes are spread over bytes, see `_fold`."""

    part: int = 32
    scales: tuple[int, int] = (0, 63)
    layout: tuple[str, ...] = ()
    low_bits: tuple[int, tuple[int, int, int]] = (4, (4, 2, 32))
    high_bits: tuple[int, int, int] | None = None

    @property
    def parts(self) -> int:
        return self.width // self.part


_NIBBLES, _BIT, _PAIRS = (4, (4, 2, 32)), (1, 8, 32), (2, 4, 32)
FORMATS = MappingProxyType(
    {
        f.name: f
        for f in (
            SuperFormat(
                "q2_k", "Q2_K", 10, 2, 84, 0, 3, 0, True, (), SUPER, 16, (0, 15),
                ("scales", "low", "d", "dmin"), (2, _PAIRS),
            ),
            SuperFormat(
                "q3_k", "Q3_K", 11, 3, 110, 0, 7, 4, False, (), SUPER, 16, (-32, 31),
                ("high", "low", "scales", "d"), (2, _PAIRS), _BIT,
            ),
            SuperFormat(
                "q4_k", "Q4_K", 12, 4, 144, 0, 15, 0, True, (), SUPER, 32, (0, 63),
                ("d", "dmin", "scales", "low"), _NIBBLES,
            ),
            SuperFormat(
                "q5_k", "Q5_K", 13, 5, 176, 0, 31, 0, True, (), SUPER, 32, (0, 63),
                ("d", "dmin", "scales", "high", "low"), _NIBBLES, _BIT,
            ),
            SuperFormat(
                "q6_k", "Q6_K", 14, 6, 210, 0, 63, 32, False, (), SUPER, 16, (-128, 127),
                ("low", "high", "scales", "d"), (4, (2, 2, 64)), _PAIRS,
            ),
            SuperFormat(
                "iq4_xs", "IQ4_XS", 23, 4, 136, 0, 15, 8, False, NONLINEAR, SUPER, 32, (-32, 31),
                ("d", "scales", "low"), (4, (8, 2, 16)),
            ),
        )
    }
)  # fmt: skip
_SIZES = {"q2_k": 16, "q3_k": 12, "q4_k": 12, "q5_k": 12, "q6_k": 16, "iq4_xs": 6}  # bytes of the scales


def super_format(name: str) -> SuperFormat:
    """The format called `name`; ModelError for one we do not know."""
    if name not in FORMATS:
        raise ModelError(f"unknown block format {name!r}", fix=f"known are {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class Stored:
    """What the blocks of `rows` rows hold: codes (rows, cols) int16 as stored; whole scales and, for formats that have
    them, minima (rows, cols / part) int16; d and dmin (rows, cols / 256) float16."""

    codes: Small
    scales: Small
    mins: Small | None
    d: Half
    dmin: Half | None


def _fold(values: Any, planes: Planes) -> Bytes:
    """(n, runs * folded * wide) small codes -> (n, runs * wide) bytes: byte w of a run holds, from its low bits up, the
    codes w, w + wide, w + 2 wide, ... of that run."""
    runs, folded, wide = planes
    shaped = values.astype(np.uint8).reshape(len(values), runs, folded, wide)
    step, out = 8 // folded, np.zeros((len(values), runs, wide), np.uint8)
    for place in range(folded):
        out |= shaped[:, :, place] << np.uint8(step * place)
    return out.reshape(len(values), runs * wide)


def _unfold(raw: Bytes, planes: Planes) -> Bytes:
    """The inverse of `_fold`."""
    runs, folded, wide = planes
    step = 8 // folded
    shaped, mask = raw.reshape(len(raw), runs, 1, wide), np.uint8((1 << step) - 1)
    shifts = (np.arange(folded) * step).astype(np.uint8).reshape(1, 1, folded, 1)
    return np.asarray(((shaped >> shifts) & mask).reshape(len(raw), runs * folded * wide))


def _pack_scales(name: str, scales: Small, mins: Small | None) -> Bytes:
    """(n, parts) whole scales and minima -> the bytes of a block's `scales` field."""
    if name == "q6_k":
        return scales.astype(np.int8).view(np.uint8)
    if name == "q2_k":
        assert mins is not None
        return np.asarray(scales | (mins << 4), np.uint8)
    if name in ("q4_k", "q5_k"):
        assert mins is not None
        first, last = slice(0, 4), slice(4, 8)
        top = [values[:, first] | ((values[:, last] >> 4) << 6) for values in (scales, mins)]
        rest = (scales[:, last] & 15) | ((mins[:, last] & 15) << 4)
        return np.concatenate([*top, rest], axis=1).astype(np.uint8)
    lifted = scales + 32
    if name == "q3_k":
        return np.concatenate([_fold(lifted & 15, (1, 2, 8)), _fold(lifted >> 4, (1, 4, 4))], axis=1)
    return np.concatenate([_fold(lifted >> 4, (2, 4, 1)), _fold(lifted & 15, (4, 2, 1))], axis=1)  # iq4_xs


def _unpack_scales(name: str, raw: Bytes) -> tuple[Small, Small | None]:
    """The inverse of `_pack_scales`."""
    wide = raw.astype(np.int16)
    if name == "q6_k":
        return np.ascontiguousarray(raw).view(np.int8).astype(np.int16), None
    if name == "q2_k":
        return wide & 15, wide >> 4
    if name in ("q4_k", "q5_k"):
        scales, mins, rest = wide[:, :4], wide[:, 4:8], wide[:, 8:]
        return (
            np.concatenate([scales & 63, (rest & 15) | ((scales >> 6) << 4)], axis=1),
            np.concatenate([mins & 63, (rest >> 4) | ((mins >> 6) << 4)], axis=1),
        )
    if name == "q3_k":
        low, high = _unfold(raw[:, :8], (1, 2, 8)), _unfold(raw[:, 8:], (1, 4, 4))
    else:
        low, high = _unfold(raw[:, 2:], (4, 2, 1)), _unfold(raw[:, :2], (2, 4, 1))
    return (low | (high << np.uint8(4))).astype(np.int16) - np.int16(32), None


def pack(stored: Stored, fmt: str) -> Bytes:
    """Block bytes, (rows, row bytes) uint8. ModelError for codes or scales that the format cannot hold."""
    f = super_format(fmt)
    rows, cols = stored.codes.shape
    f.row_bytes(cols)
    blocks = cols // SUPER
    if stored.codes.size and not (f.low <= stored.codes.min() and stored.codes.max() <= f.high):
        raise ModelError(f"codes outside {f.low}..{f.high}", fmt)
    for whole, low in ((stored.scales, f.scales[0]), (stored.mins, 0)):
        if whole is not None and (
            whole.shape != (rows, blocks * f.parts) or whole.min(initial=0) < low or whole.max(initial=0) > f.scales[1]
        ):
            raise ModelError(f"whole scales do not fit {low}..{f.scales[1]}", fmt)
    if (stored.mins is not None) != f.minimum or (stored.dmin is not None) != f.minimum:
        raise ModelError("minima are missing or not wanted", fmt)
    codes = stored.codes.reshape(rows * blocks, SUPER)
    bits, planes = f.low_bits
    mins = None if stored.mins is None else stored.mins.reshape(rows * blocks, f.parts)
    fields: dict[str, Bytes] = {
        "low": _fold(codes & ((1 << bits) - 1), planes),
        "scales": _pack_scales(fmt, stored.scales.reshape(rows * blocks, f.parts), mins),
        "d": np.ascontiguousarray(stored.d, "<f2").reshape(-1, 1).view(np.uint8),
    }
    if stored.dmin is not None:
        fields["dmin"] = np.ascontiguousarray(stored.dmin, "<f2").reshape(-1, 1).view(np.uint8)
    if f.high_bits is not None:
        fields["high"] = _fold(codes >> bits, f.high_bits)
    return np.concatenate([fields[name] for name in f.layout], axis=1).reshape(rows, blocks * f.bytes)


def _fields(raw: Bytes, f: SuperFormat) -> Iterator[tuple[str, Bytes]]:
    sizes = {"d": 2, "dmin": 2, "scales": _SIZES[f.name], "low": SUPER * f.low_bits[0] // 8}
    sizes["high"] = SUPER * (f.bits - f.low_bits[0]) // 8
    at = 0
    for name in f.layout:
        yield name, np.ascontiguousarray(raw[:, at : at + sizes[name]])
        at += sizes[name]


def unpack(packed: Bytes, fmt: str) -> Stored:
    """What the blocks hold; ModelError when rows are no whole blocks."""
    f = super_format(fmt)
    if packed.dtype != np.uint8 or packed.ndim != 2:
        raise ModelError(f"packed weights are {packed.dtype}{list(packed.shape)}, not rows of bytes", fmt)
    rows, cols = packed.shape[0], f.columns(packed.shape[1])
    parts = dict(_fields(np.ascontiguousarray(packed).reshape(-1, f.bytes), f))
    codes = _unfold(parts["low"], f.low_bits[1]).astype(np.int16)
    if f.high_bits is not None:
        codes |= _unfold(parts["high"], f.high_bits).astype(np.int16) << f.low_bits[0]
    scales, mins = _unpack_scales(fmt, parts["scales"])
    blocks = cols // SUPER

    def halves(name: str) -> Half:
        return np.asarray(parts[name].view("<f2").reshape(rows, blocks))

    return Stored(
        codes.reshape(rows, cols),
        scales.reshape(rows, blocks * f.parts),
        None if mins is None else mins.reshape(rows, blocks * f.parts),
        halves("d"),
        halves("dmin") if f.minimum else None,
    )


def decode(packed: Bytes, fmt: str) -> Float32:
    """(rows, bytes per row) uint8 -> (rows, cols) float32, bit-equal to llama.cpp's own dequantisation."""
    f, held = super_format(fmt), unpack(packed, fmt)
    rows, cols = held.codes.shape
    levels = np.array(f.table, np.float32)[held.codes] if f.table else (held.codes - f.zero).astype(np.float32)
    values = levels.reshape(rows, cols // SUPER, f.parts, f.part)
    whole = held.scales.reshape(rows, cols // SUPER, f.parts).astype(np.float32)
    values *= (held.d.astype(np.float32)[:, :, None] * whole)[..., None]
    if held.mins is not None and held.dmin is not None:
        least = held.mins.reshape(rows, cols // SUPER, f.parts).astype(np.float32)
        values -= (held.dmin.astype(np.float32)[:, :, None] * least)[..., None]
    return np.asarray(values.reshape(rows, cols))


def nearest(weights: Float32, fmt: str) -> Bytes:
    """Round to nearest on the lattice that `SuperLattice` finds with equal weights: (rows, cols) float32 -> (rows,
    bytes per row) uint8. ModelError for weights that are not finite or overflow fp16."""
    import torch

    columns = torch.from_numpy(np.ascontiguousarray(weights, np.float32)).t().contiguous()
    return SuperLattice(fmt).rounded(columns, torch.ones(len(columns)))


class SuperLattice(Lattice):
    """As `Lattice`, with `group` columns to a part and `span` of them to a super-block.

    `frame` chooses d (and dmin) when a super-block begins; `fit` then chooses whole scales part by part, so that each
    part is fitted to current values. The units never change sign of a level's meaning: d carries the sign of the part
    with the largest scale, dmin is positive.
    """

    def __init__(self, fmt: str) -> None:
        self._prepare(super_format(fmt))

    def _prepare(self, f: BlockFormat) -> None:
        assert isinstance(f, SuperFormat)
        super()._prepare(f)
        self.group, self.span, self.whole = f.part, SUPER, f.scales
        self._cut = f.scales[0] if f.scales[0] < 0 else f.scales[1]  # the outermost whole scale

    def frame(self, columns: Tensor, omega: Tensor) -> Frame:
        """Units for a super-block: columns (256, r), omega (256,) -> d and dmin (r,), fp16-exact.

        Every part is searched with scales that need not be whole; the largest of them becomes the outermost whole one.
        """
        import torch

        rows = columns.shape[1]
        parts = columns.view(-1, self.group, rows).transpose(0, 1).reshape(self.group, -1)
        weights = omega.view(-1, self.group).t()[:, :, None].expand(-1, -1, rows).reshape(self.group, -1)
        scale, shift = self._search(parts, weights, self._candidates(parts))
        for _ in range(2 if shift is not None else 0):
            fitted = self._fitted(parts, weights, scale, shift)
            scale, shift = self._search(parts, weights, [(scale, shift), fitted])
        scale = scale.view(-1, rows)
        largest = scale.gather(0, scale.abs().argmax(0, keepdim=True))[0]
        d = (largest / self._cut).half().to(columns.dtype)
        dmin = torch.zeros_like(d) if shift is None else (-shift.view(-1, rows).amin(0) / self.whole[1]).half().to(d)
        return Frame(d, dmin if self.format.minimum else None)

    def fit(self, columns: Tensor, omega: Tensor, frame: Frame | None = None) -> Parameters:
        """Whole scales of one part for units that are fixed: columns (part, r), omega (part,) -> parameters (r,)."""
        assert frame is not None
        tries = [self.whole_of(scale, shift, frame) for scale, shift in self._candidates(columns)]
        scale, shift = self._search(columns, omega[:, None], tries)
        if shift is not None:
            fitted = self.whole_of(*self._fitted(columns, omega[:, None], scale, shift), frame)
            scale, shift = self._search(columns, omega[:, None], [(scale, shift), fitted])
        return Parameters.of(scale, shift, frame=frame)

    def _fitted(
        self, columns: Tensor, omega: Tensor, scale: Tensor, shift: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Least squares (scale, shift <= 0) for the levels that these round to, weights omega; (r,), (r,)."""
        import torch

        q = self.level(columns, Parameters.of(scale, shift))
        omega = omega.expand_as(q)
        total, first, second = omega.sum(0), (omega * q).sum(0), (omega * q * q).sum(0)
        pull, mean = (omega * q * columns).sum(0), (omega * columns).sum(0)
        determinant = second * total - first * first
        t = torch.where(determinant > 0, (second * mean - first * pull) / determinant, 0.0).clamp(max=0)
        return torch.where(second > 0, (pull - first * t) / second, scale), t

    def whole_of(self, scale: Tensor, shift: Tensor | None, frame: Frame) -> tuple[Tensor, Tensor | None]:
        """The nearest whole multiples of the units, in the values they stand for."""
        whole = (scale * frame.inverse).round_().clamp_(*self.whole)
        if shift is None or frame.dmin is None or frame.least is None:
            return whole * frame.d, None
        return whole * frame.d, -((-shift * frame.least).round_().clamp_(0, self.whole[1]) * frame.dmin)

    def _candidates(self, columns: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        if self.format.minimum:
            low, high = columns.amin(0).clamp(max=0), columns.amax(0).clamp(min=0)
            span = high - low
            return [(span * (1 - a - b) / self.format.high, (low + a * span).clamp(max=0)) for a, b in self._shrinks]
        largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
        return [(largest / end, None) for end in self._ends]

    def pack_all(self, levels: Tensor, parameters: list[Parameters]) -> Bytes:
        """Block bytes from levels (cols, r) and the parameters of every part -> (r, row bytes) uint8."""
        import torch

        codes = levels if self.format.table else levels + self.format.zero
        frames = [p.frame for p in parameters[:: self.span // self.group]]
        assert all(frame is not None for frame in frames)

        def whole(values: Any) -> Any:
            return torch.stack(values).round().t().to(torch.int16).contiguous().numpy()

        def half(values: Any) -> Any:
            return torch.stack(values).t().to(torch.float16).contiguous().numpy()

        minimum = self.format.minimum
        return pack(
            Stored(
                codes.t().to(torch.int16).contiguous().numpy(),
                whole([p.scale * p.frame.inverse for p in parameters if p.frame is not None]),
                whole([-p.shift * p.frame.least for p in parameters if p.frame is not None]) if minimum else None,  # type: ignore[operator]
                half([frame.d for frame in frames if frame is not None]),
                half([frame.dmin for frame in frames if frame is not None]) if minimum else None,
            ),
            self.format.name,
        )
