"""GPTQ safetensors: words worked by hand, exact round trips, and files that lie."""

from __future__ import annotations

import numpy as np
import pytest

from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import gptq_format as gf


def test_four_bit_words_worked_by_hand() -> None:
    codes = np.arange(8, dtype=np.uint8)[:, None]
    assert gf.pack_codes(codes, 4).view(np.uint32).tolist() == [[0x76543210]]
    eights = np.full((1, 8), 8, np.uint8)
    assert gf.pack_zeros(eights, 4, 1).view(np.uint32).tolist() == [[0x77777777]]
    assert gf.pack_zeros(eights, 4, 2).view(np.uint32).tolist() == [[0x88888888]]


def test_three_bit_codes_cross_words_as_one_stream() -> None:
    codes = np.zeros((32, 1), np.uint8)
    codes[10], codes[11] = 0b111, 0b101
    words = gf.pack_codes(codes, 3).view(np.uint32)[:, 0]
    stream = int(words[0]) | int(words[1]) << 32 | int(words[2]) << 64
    assert stream == 0b111 << 30 | 0b101 << 33


@pytest.mark.parametrize("bits", gf.BITS)
@pytest.mark.parametrize("version", [1, 2])
def test_decode_gives_back_exactly_what_was_quantised(bits: int, version: int) -> None:
    rng = np.random.default_rng(bits)
    inputs, outputs, groups = 96, 64, 4
    codes = rng.integers(0, 1 << bits, (inputs, outputs)).astype(np.uint8)
    zeros = rng.integers(1, 1 << bits, (groups, outputs)).astype(np.uint8)
    scales = rng.standard_normal((groups, outputs)).astype(np.float16)
    g_idx = rng.permutation(np.arange(inputs) % groups).astype(np.int32)  # act-order: groups scattered
    qweight, qzeros = gf.pack_codes(codes, bits), gf.pack_zeros(zeros, bits, version)
    assert qweight.shape == (inputs * bits // 32, outputs) and qzeros.shape == (groups, outputs * bits // 32)
    assert np.array_equal(gf.unpack_codes(qweight, bits), codes)
    assert np.array_equal(gf.unpack_zeros(qzeros, bits, version), zeros)
    decoded = gf.decode(qweight, qzeros, scales, g_idx, bits, version)
    assert decoded.shape == (outputs, inputs) and decoded.dtype == np.float32
    for i in (0, 17, 95):
        for o in (0, 63):
            g = g_idx[i]
            assert decoded[o, i] == np.float32(scales[g, o]) * np.float32(int(codes[i, o]) - int(zeros[g, o]))


def read_by_hand(words: np.ndarray, bits: int, count: int) -> list[int]:
    """`count` codes of a column of words, by the format's description: a stream of bits, lowest first."""
    stream = sum((int(word) & 0xFFFFFFFF) << 32 * place for place, word in enumerate(words))
    return [stream >> bits * place & (1 << bits) - 1 for place in range(count)]


@pytest.mark.parametrize("bits", gf.BITS)
@pytest.mark.parametrize("version", [1, 2])
def test_another_reader_gets_the_same_weights(bits: int, version: int) -> None:
    rng = np.random.default_rng(7 * bits + version)
    inputs, outputs, groups = 64, 32, 3
    codes = rng.integers(0, 1 << bits, (inputs, outputs)).astype(np.uint8)
    zeros = rng.integers(1, 1 << bits, (groups, outputs)).astype(np.uint8)
    scales = rng.standard_normal((groups, outputs)).astype(np.float16)
    g_idx = (np.arange(inputs) * groups // inputs).astype(np.int32)
    qweight, qzeros = gf.pack_codes(codes, bits), gf.pack_zeros(zeros, bits, version)
    expected = np.empty((outputs, inputs), np.float32)
    offsets = [read_by_hand(qzeros[g], bits, outputs) for g in range(groups)]
    for o in range(outputs):
        for i, code in enumerate(read_by_hand(qweight[:, o], bits, inputs)):
            zero = offsets[g_idx[i]][o] + (1 if version == 1 else 0)
            expected[o, i] = np.float32(scales[g_idx[i], o]) * np.float32(code - zero)
    np.testing.assert_array_equal(gf.decode(qweight, qzeros, scales, g_idx, bits, version), expected)


def test_the_same_weights_are_two_different_files_and_a_wrong_label_is_noticed() -> None:
    zeros = np.full((2, 32), 8, np.uint8)
    one, two = gf.pack_zeros(zeros, 4, 1), gf.pack_zeros(zeros, 4, 2)
    assert not np.array_equal(one, two)
    gf.check_symmetric(one, 4, 1)
    gf.check_symmetric(two, 4, 2)
    with pytest.raises(ModelError, match="not 8"):
        gf.check_symmetric(one, 4, 2)
    with pytest.raises(ModelError, match="not 8"):
        gf.check_symmetric(two, 4, 1)
    with pytest.raises(ModelError, match="version 1"):
        gf.pack_zeros(np.zeros((1, 8), np.uint8), 4, 1)


def test_arrays_that_do_not_fit_are_refused() -> None:
    qweight, qzeros = np.zeros((8, 16), np.int32), np.zeros((2, 2), np.int32)
    scales, g_idx = np.ones((2, 16), np.float16), np.zeros(64, np.int32)
    assert gf.decode(qweight, qzeros, scales, g_idx, 4, 2).shape == (16, 64)
    with pytest.raises(ModelError, match="outside"):
        gf.decode(qweight, qzeros, scales, g_idx + 2, 4, 2)
    with pytest.raises(ModelError, match="outside"):
        gf.decode(qweight, qzeros, scales, g_idx - 1, 4, 2)
    with pytest.raises(ModelError, match="does not fit 64"):
        gf.decode(qweight, qzeros, scales, g_idx[:-1], 4, 2)
    with pytest.raises(ModelError, match="do not fit zeros"):
        gf.decode(qweight, qzeros, scales[:1], g_idx, 4, 2)
    with pytest.raises(ModelError, match="5-bit"):
        gf.decode(qweight, qzeros, scales, g_idx, 5, 2)
    with pytest.raises(ModelError, match="does not hold"):
        gf.unpack_codes(qweight[:1], 3)
    with pytest.raises(ModelError, match="32-bit words"):
        gf.pack_codes(np.zeros((9, 1), np.uint8), 4)
    with pytest.raises(ModelError, match="more than 2 bits"):
        gf.pack_codes(np.full((16, 1), 4, np.uint8), 2)
