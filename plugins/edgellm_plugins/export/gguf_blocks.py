"""Weights that are blocks already: found in a compressed model and carried into GGUF without a second rounding.

Two kinds of folder hold them (see `edgellm_sdk.checkpoint`). Ours keeps block bytes, ready to write. A GPTQ checkpoint
keeps codes, zeros and scales; a symmetric one in which every run of 32 inputs shares a scale is exactly a Q4_0 (4 bit,
d = scale, zero 8) or Q8_0 (8 bit, d = scale, zero 128) tensor. Everything else would have to be rounded again, which
changes codes (GPTQ's point is which code it chose), so it is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgellm_sdk import checkpoint
from edgellm_sdk.errors import ModelError
from edgellm_sdk.kit import blocks, gptq_format

if TYPE_CHECKING:
    from edgellm_sdk.types import Array

ADVICE = "compress it with `gptq --format q4_0`, which writes blocks that GGUF can hold"


def packed_type(found: checkpoint.Checkpoint, name: str) -> str | None:
    """The ggml type that tensor `name` is stored as already, or None for a plain one. ModelError for GPTQ weights
    whose bits have no GGUF block."""
    stored = found.tensors[name].stored
    if stored in checkpoint.BLOCKS:
        return stored.upper()
    if stored != "gptq":
        return None
    bits = found.config["quantization_config"]["bits"]
    if bits not in (4, 8):
        raise ModelError(f"GPTQ weights of {bits} bits have no GGUF blocks", str(found.folder), ADVICE)
    return "Q4_0" if bits == 4 else "Q8_0"


def packed_bytes(found: checkpoint.Checkpoint, name: str) -> Array:
    """The blocks of such a tensor, (rows, row bytes) uint8, with the codes and scales it has. ModelError as above."""
    tensor = found.tensors[name]
    arrays = [part.read() for part in tensor.parts]
    if tensor.stored != "gptq":
        return arrays[0]
    settings: dict[str, Any] = found.config["quantization_config"]
    return repack(arrays, settings["bits"], checkpoint.gptq_version(settings), f"{found.folder}: {name[:80]}")


def repack(arrays: Sequence[Array], bits: int, version: int, where: str) -> Array:
    """GPTQ `arrays` qweight, qzeros, scales, g_idx of one layer (see `kit.gptq_format`) as Q4_0 or Q8_0 bytes,
    (out, row bytes) uint8. ModelError when 32 inputs of a block do not share one scale, or a zero is not in the middle.
    """
    import numpy as np

    qweight, qzeros, scales, groups = arrays
    codes, zeros = gptq_format.unpack_codes(qweight, bits), gptq_format.unpack_zeros(qzeros, bits, version)
    inputs, middle = len(codes), 1 << (bits - 1)
    if (zeros != middle).any():
        raise ModelError(f"asymmetric GPTQ weights (zeros other than {middle}) have no exact GGUF form", where, ADVICE)
    if scales.dtype != np.float16 or scales.shape != zeros.shape or scales.shape[1] != codes.shape[1]:
        raise ModelError(f"scales {scales.dtype}{list(scales.shape)} do not fit the weights", where)
    if groups.shape != (inputs,) or groups.min(initial=0) < 0 or groups.max(initial=0) >= len(scales):
        raise ModelError("g_idx does not fit the weights", where)
    if inputs % blocks.WIDTH or (groups.reshape(-1, blocks.WIDTH) != groups[:: blocks.WIDTH, None]).any():
        raise ModelError("its groups are not whole runs of 32 inputs (desc_act, or the group size)", where, ADVICE)
    per_block = np.ascontiguousarray(scales[groups[:: blocks.WIDTH]].T)
    if bits == 4:
        return blocks.pack(np.ascontiguousarray(codes.T).view(np.int8), per_block, None, "q4_0")
    centred = (codes.T.astype(np.int16) - middle).astype(np.int8)
    return blocks.pack(centred, per_block, None, "q8_0")
