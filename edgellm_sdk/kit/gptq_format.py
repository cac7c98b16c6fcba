"""GPTQ checkpoints in safetensors: group-wise 2, 3, 4 or 8 bit codes, one zero and one fp16 scale per group.

A linear layer with c inputs and r outputs is stored as

    qweight  int32 (c * bits / 32, r)   per output one stream of codes along the inputs, least significant bit first
    qzeros   int32 (groups, r * bits / 32)   per group one stream of zeros along the outputs
    scales   fp16  (groups, r)
    g_idx    int32 (c,)   the group of each input

and weight[o, i] = scales[g_idx[i], o] * (code[i, o] - zero[g_idx[i], o]). Version 1 files (`checkpoint_format: gptq`)
store zero - 1, version 2 files (`gptq_v2`) store the zero. 3-bit codes cross word borders; the stream stays contiguous.
The layout is that of the reference code of arXiv 2210.17323 as its ports froze it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgellm_sdk.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgellm_sdk.types import Float32

    Codes = NDArray[np.uint8]
    Words = NDArray[np.int32]

BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}


def _check(bits: int, version: int = 2) -> None:
    if bits not in BITS:
        raise ModelError(f"{bits}-bit GPTQ weights are unknown", fix="bits are 2, 3, 4 or 8")
    if version not in (1, 2):
        raise ModelError(f"version {version} of the GPTQ format is unknown")


def pack_codes(codes: Codes, bits: int) -> Words:
    """(n, r) uint8 codes below 2^bits -> (n * bits / 32, r) int32. ModelError when n codes do not fill whole words."""
    _check(bits)
    count, outputs = codes.shape
    if count * bits % 32:
        raise ModelError(f"{count} codes of {bits} bits do not fill 32-bit words")
    if codes.size and int(codes.max()) >> bits:
        raise ModelError(f"code {int(codes.max())} needs more than {bits} bits")
    stream = (codes[:, None, :] >> np.arange(bits, dtype=np.uint8)[None, :, None]) & 1
    parts = np.packbits(stream.reshape(-1, 32, outputs), axis=1, bitorder="little")
    return np.ascontiguousarray(parts.transpose(0, 2, 1)).view("<i4")[:, :, 0].astype(np.int32)


def unpack_codes(words: Words, bits: int) -> Codes:
    """(m, r) int32 -> (m * 32 / bits, r) uint8. ModelError when the words hold no whole number of codes."""
    _check(bits)
    if words.dtype != np.int32 or words.ndim != 2 or words.shape[0] * 32 % bits:
        raise ModelError(f"{words.dtype}{list(words.shape)} does not hold {bits}-bit codes")
    outputs = words.shape[1]
    parts = np.ascontiguousarray(words, "<i4")[:, :, None].view(np.uint8).transpose(0, 2, 1)
    stream = np.unpackbits(np.ascontiguousarray(parts), axis=1, bitorder="little").reshape(-1, bits, outputs)
    return np.asarray((stream << np.arange(bits, dtype=np.uint8)[None, :, None]).sum(axis=1, dtype=np.uint8))


def pack_zeros(zeros: Codes, bits: int, version: int) -> Words:
    """(groups, r) uint8 -> (groups, r * bits / 32) int32. ModelError for a zero of 0 in version 1: it has no code."""
    _check(bits, version)
    if version == 1:
        if not zeros.all():
            raise ModelError("a zero point of 0 does not exist in version 1", fix="write version 2 (gptq_v2)")
        zeros = zeros - np.uint8(1)
    return np.ascontiguousarray(pack_codes(np.ascontiguousarray(zeros.T), bits).T)


def unpack_zeros(words: Words, bits: int, version: int) -> NDArray[np.int32]:
    """(groups, r * bits / 32) int32 -> (groups, r) int32, the zeros themselves whatever the version."""
    _check(bits, version)
    stored = unpack_codes(np.ascontiguousarray(words.T), bits).T.astype(np.int32)
    return stored + 1 if version == 1 else stored


def check_symmetric(qzeros: Words, bits: int, version: int) -> None:
    """ModelError unless every zero is 2^(bits-1), as a symmetric checkpoint's must be: catches a file whose
    `checkpoint_format` names the wrong version, which would shift every weight by one step."""
    if (unpack_zeros(qzeros, bits, version) != 1 << (bits - 1)).any():
        raise ModelError(f"zeros of a symmetric {bits}-bit layer are not {1 << (bits - 1)}", fix="check its version")


def decode(
    qweight: Words, qzeros: Words, scales: NDArray[np.float16], g_idx: NDArray[np.int32], bits: int, version: int
) -> Float32:
    """The weights, (out, in) float32, exactly. ModelError for arrays that do not fit each other."""
    codes, zeros = unpack_codes(qweight, bits), unpack_zeros(qzeros, bits, version)
    if scales.dtype != np.float16 or scales.shape != zeros.shape or scales.shape[1] != codes.shape[1]:
        raise ModelError(f"scales {scales.dtype}{list(scales.shape)} do not fit zeros {list(zeros.shape)}")
    if g_idx.shape != codes.shape[:1] or g_idx.dtype.kind != "i":
        raise ModelError(f"g_idx {g_idx.dtype}{list(g_idx.shape)} does not fit {codes.shape[0]} inputs")
    if g_idx.size and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < len(scales):
        raise ModelError(f"g_idx points outside {len(scales)} groups")
    levels = (codes.astype(np.int32) - zeros[g_idx]).astype(np.float32)
    return np.ascontiguousarray((scales.astype(np.float32)[g_idx] * levels).T)
