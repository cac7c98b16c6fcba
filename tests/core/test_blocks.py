"""Block formats: bytes, decoding and the stock rounding, each against llama.cpp's own code or worked by hand."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import blocks

NAMES = tuple(blocks.FORMATS)


def weights(seed: int = 0, rows: int = 24, cols: int = 192) -> np.ndarray:
    """Ordinary, heavy-tailed, tiny, one-sided, constant and zero blocks, and exact ties."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    x[2] = rng.standard_t(2, cols)
    x[3] *= 1e-5
    x[4] = np.abs(x[4])
    x[5] = -np.abs(x[5])
    x[6] = 0.25
    x[7] = 0
    x[8, :40] = 0
    x[9] = np.round(x[9] * 4) / 8  # many weights half-way between two codes
    x[10] *= 1e-9
    x[11] *= 1000
    x[12] = np.where(np.arange(cols) % 2, 1.5, -1.5)  # two of the largest magnitude
    return x


def random_codes(fmt: str, rows: int = 5, cols: int = 96) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(3)
    f = blocks.FORMATS[fmt]
    codes = rng.integers(f.low, f.high + 1, (rows, cols)).astype(np.int8)
    scales = rng.standard_normal((rows, cols // 32)).astype(np.float16)
    scales[0, 0], scales[1, 0] = 0, 6e-8  # zero and subnormal
    mins = rng.standard_normal((rows, cols // 32)).astype(np.float16) if f.minimum else None
    return codes, scales, mins


@pytest.mark.parametrize("fmt", NAMES)
def test_codes_survive_storage(fmt: str) -> None:
    codes, scales, mins = random_codes(fmt)
    packed = blocks.pack(codes, scales, mins, fmt)
    f = blocks.FORMATS[fmt]
    assert packed.dtype == np.uint8 and packed.shape == (5, 3 * f.bytes)
    got_codes, got_scales, got_mins = blocks.unpack(packed, fmt)
    assert np.array_equal(got_codes, codes) and np.array_equal(got_scales, scales)
    assert (got_mins is None) == (mins is None) and (mins is None or np.array_equal(got_mins, mins))
    assert np.array_equal(blocks.pack(got_codes, got_scales, got_mins, fmt), packed)


@pytest.mark.parametrize("fmt", NAMES)
def test_decode_is_bit_equal_to_the_gguf_reader(fmt: str) -> None:
    from gguf import GGMLQuantizationType, quants
    from gguf.constants import GGML_QUANT_SIZES

    f = blocks.FORMATS[fmt]
    kind = GGMLQuantizationType[f.ggml]
    assert (int(kind), GGML_QUANT_SIZES[kind]) == (f.type_id, (f.width, f.bytes))
    packed = blocks.pack(*random_codes(fmt), fmt)
    theirs = quants.dequantize(packed, kind)
    assert np.array_equal(blocks.decode(packed, fmt).view(np.uint32), theirs.view(np.uint32))


def test_a_block_worked_by_hand() -> None:
    codes = np.full((1, 32), 8, np.int8)
    codes[0, 0], codes[0, 1], codes[0, 16] = 0, 15, 12
    packed = blocks.pack(codes, np.array([[0.5]], np.float16), None, "q4_0")
    assert packed[0, :4].tolist() == [0x00, 0x38, 0xC0, 0x8F]  # fp16 0.5, then 0 | 12 << 4, 15 | 8 << 4
    assert blocks.decode(packed, "q4_0")[0, [0, 1, 16, 2]].tolist() == [-4.0, 3.5, 2.0, 0.0]


@pytest.mark.parametrize("fmt", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_nearest_equals_the_gguf_package(fmt: str) -> None:
    from gguf import GGMLQuantizationType, quants

    x = weights()
    theirs = quants.quantize(x, GGMLQuantizationType[blocks.FORMATS[fmt].ggml])
    assert np.array_equal(blocks.nearest(x, fmt), theirs)


@pytest.mark.llama
@pytest.mark.parametrize("fmt", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"])
def test_nearest_is_byte_equal_to_llama_cpp(fmt: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))
    ggml, f = ctypes.CDLL(str(library)), blocks.FORMATS[fmt]
    for seed in range(5):
        x = weights(seed)
        if fmt == "iq4_nl":
            x = x[np.abs(x).reshape(len(x), -1, 32).max(2).min(1) > 0]  # the engine leaves codes of d = 0 undefined
        out = np.zeros((len(x), x.shape[1] // 32 * f.bytes), np.uint8)
        source = x.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if fmt == "iq4_nl":  # ggml_quantize_chunk searches here; the reference rule has its own entry
            ggml.quantize_row_iq4_nl_ref(source, out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(x.size))
        else:
            ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
            written = ggml.ggml_quantize_chunk(
                f.type_id, source, out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0), ctypes.c_int64(len(x)),
                ctypes.c_int64(x.shape[1]), None,
            )  # fmt: skip
            assert written == out.size
        assert np.array_equal(blocks.nearest(x, fmt), out), seed


@pytest.mark.parametrize("fmt", NAMES)
def test_the_lattice_codes_decode_to_what_was_rounded(fmt: str) -> None:
    x = torch.from_numpy(weights()[:, :32]).t().contiguous()
    lattice = blocks.Lattice(fmt)
    p = lattice.fit(x, torch.ones(32))
    levels = lattice.level(x, p)
    packed = lattice.pack(levels, p.scale[None], None if p.shift is None else p.shift[None])
    assert np.array_equal(blocks.decode(packed, fmt), lattice.value(levels, p).t().numpy())
    assert not blocks.decode(packed, fmt)[7].any()  # the row of zeros


@pytest.mark.parametrize("fmt", NAMES)
def test_the_search_beats_the_stock_rule_and_follows_the_weights(fmt: str) -> None:
    x = torch.from_numpy(weights(1)[:2, :32].repeat(50, 0) * np.linspace(0.5, 2, 100, dtype=np.float32)[:, None])
    x = (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).t().contiguous()
    lattice, flat = blocks.Lattice(fmt), torch.ones(32)
    steep = torch.logspace(-2, 2, 32)

    def error(omega: torch.Tensor, values: torch.Tensor) -> float:
        return float((omega @ (values - x).square()).sum())

    searched = lattice.fit(x, flat)
    weighted = lattice.fit(x, steep)
    stock = torch.from_numpy(blocks.decode(blocks.nearest(x.t().numpy(), fmt), fmt)).t()
    flat_values = lattice.value(lattice.level(x, searched), searched)
    steep_values = lattice.value(lattice.level(x, weighted), weighted)
    assert error(flat, flat_values) <= error(flat, stock) * 1.0001
    assert error(steep, steep_values) <= error(steep, flat_values)


@pytest.mark.parametrize("fmt", NAMES)
def test_unusable_weights_are_refused_in_one_line(fmt: str) -> None:
    for bad in (np.nan, np.inf, 1e38):
        x = np.ones((2, 64), np.float32)
        x[1, 3] = bad
        with pytest.raises(ModelError):
            blocks.nearest(x, fmt)
        with pytest.raises(ModelError):
            blocks.Lattice(fmt).fit(torch.from_numpy(x[:, :32]).t().contiguous(), torch.ones(32))


def test_shapes_that_are_no_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="33 columns"):
        blocks.nearest(np.zeros((1, 33), np.float32), "q4_0")
    with pytest.raises(ModelError, match="19 bytes"):
        blocks.decode(np.zeros((1, 19), np.uint8), "q4_0")
    with pytest.raises(ModelError, match="unknown block format"):
        blocks.decode(np.zeros((1, 18), np.uint8), "q3_0")
    with pytest.raises(ModelError, match="outside"):
        blocks.pack(np.full((1, 32), 16, np.int8), np.ones((1, 1), np.float16), None, "q4_0")
    with pytest.raises(ModelError, match="do not fit"):
        blocks.pack(np.zeros((1, 32), np.int8), np.ones((1, 1), np.float16), None, "q4_1")


def test_widths_and_names() -> None:
    assert [(f.name, f.bits_per_weight) for f in blocks.FORMATS.values()] == [
        ("q4_0", 4.5), ("q4_1", 5.0), ("q5_0", 5.5), ("q5_1", 6.0), ("iq4_nl", 4.5), ("q8_0", 8.5)
    ]  # fmt: skip
