"""Blocks of 256 weights: bytes against the gguf package and by hand, the search against the engine's own."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk import checkpoint
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import blocks, super_blocks
from edgellm_sdk.kit.super_blocks import Stored

NAMES = tuple(super_blocks.FORMATS)


def drawn(fmt: str, seed: int, rows: int = 3, across: int = 2) -> Stored:
    """Any content that the format can hold, with units that are zero, subnormal and negative among them."""
    rng, f = np.random.default_rng(seed), super_blocks.FORMATS[fmt]
    shape = (rows, across * f.parts)
    units = rng.standard_normal((2, rows, across)).astype(np.float16)
    units[0, 0, 0], units[0, 1, 0] = 0, 6e-8
    return Stored(
        rng.integers(f.low, f.high + 1, (rows, across * 256)).astype(np.int16),
        rng.integers(f.scales[0], f.scales[1] + 1, shape).astype(np.int16),
        rng.integers(0, f.scales[1] + 1, shape).astype(np.int16) if f.minimum else None,
        units[0],
        units[1] if f.minimum else None,
    )


def same(a: Stored, b: Stored) -> bool:
    pairs = ((getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "mins", "d", "dmin"))
    return all((x is None) == (y is None) and (x is None or np.array_equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("fmt", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_everything_survives_storage_and_decodes_as_in_the_gguf_package(fmt: str, seed: int) -> None:
    from gguf import GGMLQuantizationType, quants

    held = drawn(fmt, seed)
    packed = super_blocks.pack(held, fmt)
    f = super_blocks.FORMATS[fmt]
    assert packed.dtype == np.uint8 and packed.shape == (3, 2 * f.bytes)
    assert same(super_blocks.unpack(packed, fmt), held)
    theirs = quants.dequantize(packed, GGMLQuantizationType[f.ggml])
    assert np.array_equal(blocks.decode(packed, fmt).view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("fmt", NAMES)
def test_any_bytes_are_a_block(fmt: str) -> None:
    f = super_blocks.FORMATS[fmt]
    raw = np.random.default_rng(0).integers(0, 256, (4, 3 * f.bytes)).astype(np.uint8)
    assert np.array_equal(super_blocks.pack(super_blocks.unpack(raw, fmt), fmt), raw)


@pytest.mark.parametrize("fmt", NAMES)
def test_sizes_are_those_of_ggml(fmt: str) -> None:
    from gguf import GGMLQuantizationType
    from gguf.constants import GGML_QUANT_SIZES

    f = super_blocks.FORMATS[fmt]
    kind = GGMLQuantizationType[f.ggml]
    assert (int(kind), GGML_QUANT_SIZES[kind]) == (f.type_id, (f.width, f.bytes))
    assert checkpoint.BLOCKS[fmt] == (f.width, f.bytes) and blocks.any_format(fmt) is f


def test_bits_per_weight() -> None:
    assert {f.name: f.bits_per_weight for f in super_blocks.FORMATS.values()} == {
        "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "iq4_xs": 4.25,
    }  # fmt: skip


def test_a_q4_k_block_worked_by_hand() -> None:
    """sc = 1, 2, .., 7, 63 and m = 0, .., 6, 33 in 12 bytes; d = 0.5, dmin = 0.25."""
    codes = np.zeros((1, 256), np.int16)
    codes[0, [0, 32, 255]] = 3, 5, 15
    scales, mins = np.array([[1, 2, 3, 4, 5, 6, 7, 63]], np.int16), np.array([[0, 1, 2, 3, 4, 5, 6, 33]], np.int16)
    half = np.array([[0.5]], np.float16)
    packed = super_blocks.pack(Stored(codes, scales, mins, half, half / 2), "q4_k")
    assert packed[0, :4].tolist() == [0x00, 0x38, 0x00, 0x34]
    assert packed[0, 4:16].tolist() == [
        1, 2, 3, 4 | 3 << 6, 0, 1, 2, 3 | 2 << 6, 5 | 4 << 4, 6 | 5 << 4, 7 | 6 << 4, 15 | 1 << 4,
    ]  # fmt: skip
    assert packed[0, 16] == 3 | 5 << 4 and packed[0, 143] == 15 << 4
    got = blocks.decode(packed, "q4_k")[0]
    assert got[[0, 1, 32, 255]].tolist() == [1.5, 0.0, 4.75, 0.5 * 63 * 15 - 0.25 * 33]


def test_a_q6_k_block_worked_by_hand() -> None:
    codes = np.full((1, 256), 32, np.int16)
    codes[0, [0, 64, 96, 255]] = 0, 63, 33, 31
    scales = np.arange(-8, 8, dtype=np.int16)[None]
    packed = super_blocks.pack(Stored(codes, scales, None, np.array([[2.0]], np.float16), None), "q6_k")
    assert packed[0, 192:208].view(np.int8).tolist() == list(range(-8, 8)) and packed[0, 208:].tolist() == [0, 0x40]
    assert packed[0, 0] == 0 | 15 << 4  # weight 0 low, weight 64 high
    assert packed[0, 128] == 0 | 2 << 2 | 3 << 4 | 2 << 6  # two high bits of weights 0, 32, 64, 96
    assert blocks.decode(packed, "q6_k")[0, [0, 1, 64, 96, 255]].tolist() == [512.0, 0.0, -248.0, -4.0, -14.0]


def values(seed: int = 0, rows: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, 512)) * 0.1).astype(np.float32)
    x[0], x[1], x[2] = 0, np.abs(x[1]), -np.abs(x[2])
    x[3, :256] = 0
    x[4] = rng.standard_t(3, 512) * 0.1
    return x


def engine(x: np.ndarray, fmt: str) -> np.ndarray:
    """The engine's own quantiser without an importance matrix."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ggml = ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))
    f = super_blocks.FORMATS[fmt]
    out = np.zeros((len(x), x.shape[1] // 256 * f.bytes), np.uint8)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    written = ggml.ggml_quantize_chunk(
        f.type_id, x.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0), ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), None,
    )  # fmt: skip
    assert written == out.size
    return out


@pytest.mark.llama
@pytest.mark.parametrize("fmt", NAMES)
def test_the_search_is_as_good_as_the_engines(fmt: str) -> None:
    """Root mean square error within 3 % of the engine's own search, or below it; zero rows stay zero."""
    x = values()
    ours, theirs = (blocks.decode(packed, fmt) for packed in (blocks.nearest(x, fmt), engine(x, fmt)))
    assert not ours[0].any() and not ours[3, :256].any()
    assert np.linalg.norm(ours - x) < 1.03 * np.linalg.norm(theirs - x)


@pytest.mark.parametrize("fmt", NAMES)
def test_a_lattice_packs_what_it_rounded_to(fmt: str) -> None:
    x = torch.from_numpy(values(1)).t().contiguous()
    lattice = blocks.lattice(fmt)
    omega = torch.logspace(-1, 1, 512)
    levels, parameters = [], []
    for at in range(0, 512, lattice.group):
        if at % 256 == 0:
            frame = lattice.frame(x[at : at + 256], omega[at : at + 256])
        part = slice(at, at + lattice.group)
        parameters.append(lattice.fit(x[part], omega[part], frame))
        levels.append(lattice.level(x[part], parameters[-1]))
    packed = lattice.pack_all(torch.cat(levels), parameters)
    rounded = torch.cat([lattice.value(part, p) for part, p in zip(levels, parameters, strict=True)])
    assert np.array_equal(blocks.decode(packed, fmt), rounded.t().numpy())


def test_what_is_no_block_is_refused() -> None:
    held = drawn("q4_k", 0)
    with pytest.raises(ModelError, match="codes outside 0..15"):
        super_blocks.pack(replace(held, codes=held.codes + 16), "q4_k")
    with pytest.raises(ModelError, match="whole scales do not fit 0..63"):
        super_blocks.pack(replace(held, scales=held.scales - 64), "q4_k")
    with pytest.raises(ModelError, match="minima"):
        super_blocks.pack(replace(held, mins=None), "q4_k")
    with pytest.raises(ModelError, match="145 bytes"):
        blocks.decode(np.zeros((1, 145), np.uint8), "q4_k")
    with pytest.raises(ModelError, match="300 columns"):
        blocks.nearest(np.zeros((1, 300), np.float32), "q6_k")
    with pytest.raises(ModelError, match="not rows of bytes"):
        super_blocks.unpack(np.zeros(144, np.uint8), "q4_k")
    with pytest.raises(ModelError, match="unknown block format"):
        blocks.any_format("q7_k")
    for bad in (np.nan, np.inf, 1e38):
        x = values()
        x[5, 5] = bad
        with pytest.raises(ModelError):
            blocks.nearest(x, "q4_k")
