"""Types that llama.cpp's own quantiser makes: which they are, what is handed to it, what it made of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_plugins.export import imatrix as importance
from edgellm_plugins.export.gguf import ENGINE
from edgellm_sdk import checkpoint, gguf_file, store
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.gguf_file import TYPE_IDS
from edgellm_sdk.kit import overrides

if TYPE_CHECKING:
    from edgellm_plugins.export.gguf import Config
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import ModelHandle

TYPES = tuple(name.lower() for name in TYPE_IDS if not name.startswith(("I8", "I16", "I32", "I64", "F64", "Q8_K")))
HEAD = "output[.]weight"  # a glob: no part of `attn_output.weight`
OURS = ("q4_0", "q8_0")  # rounded here by the engine's rule, unless something is to weigh or override it


def matrix_of(model: ModelHandle, config: Config) -> Path | None:
    """The importance matrix to use: the file named, or with `auto` the one in the model's folder if there is one."""
    if config.imatrix == "auto":
        beside = model.path / importance.NAME
        return beside if model.path.is_dir() and beside.is_file() else None
    return None if config.imatrix == "none" else Path(config.imatrix)


def wanted(model: ModelHandle, config: Config) -> bool:
    """Whether `config` asks for something that the engine's quantiser makes."""
    if config.type in ENGINE or config.types:
        return True
    return config.type in OURS and matrix_of(model, config) is not None


def check(model: ModelHandle, config: Config) -> None:
    """ConfigError for what cannot go together, before anything is written."""
    if config.type not in (*ENGINE, *OURS):
        raise ConfigError(
            f"--types changes some tensors of a quantised file, not of {config.type}", fix="name a --type"
        )
    if config.adapter == "separate":
        raise ConfigError(f"a GGUF adapter is f32 or f16, not {config.type}")
    stored = {tensor.stored for tensor in checkpoint.inspect(model.path).tensors.values()}
    if stored & {*checkpoint.BLOCKS, "gptq"}:
        raise ConfigError(f"the model is quantised already; {config.type} would round it again", fix="use --type auto")
    from edgellm_hardware.llama_cpp.quantiser import NEED_IMATRIX

    if config.type in NEED_IMATRIX and matrix_of(model, config) is None:
        raise ConfigError(
            f"{config.type} needs an importance matrix", fix="make one with `edgellm compress --plugin imatrix`"
        )
    _overrides(config)


def float_type(model: ModelHandle) -> str:
    """What the quantiser is given: the type the weights have, float32 when an adapter is merged into them."""
    kinds = {"float16": "f16", "bfloat16": "bf16"}
    return "f32" if model.adapters else kinds.get(model.dtype, "f32")


def _overrides(config: Config) -> overrides.Overrides:
    asked = config.types
    if config.embedding != "auto":
        asked = f"{asked},token_embd.weight={config.embedding},{HEAD}={config.embedding}"
    try:
        return overrides.parse(asked, TYPES, "types")
    except ValueError as error:
        raise ConfigError(str(error)) from None


def quantise(source: Path, target: Path, model: ModelHandle, config: Config, ctx: Context) -> dict[str, Any]:
    """`source` as `config.type` at `target`; what the strict reader found there.

    ModelError, ConfigError, DeviceError.
    """
    from edgellm_hardware.llama_cpp.quantiser import quantise as by_the_engine

    path = matrix_of(model, config)
    found = None if path is None else importance.read(path)
    before, patterns = gguf_file.read(source), _overrides(config)
    matrices = {t.name: t for t in before.tensors.values() if len(t.shape) == 2}
    wrong = overrides.idle(tuple(p for p in patterns if p[0] != HEAD), matrices)
    if wrong:
        raise ConfigError(
            f"types: {wrong[0]!r} matches no tensor", fix="names are as in a GGUF file: blk.0.attn_q.weight"
        )
    for name, entry in (found.entries if found is not None else {}).items():
        if name in matrices and matrices[name].shape[0] != len(entry.sums):
            raise ModelError(f"{name} has {len(entry.sums)} inputs there, {matrices[name].shape[0]} here", str(path))
    if found is not None and not set(found.entries) & set(matrices):
        raise ModelError("is the importance matrix of another model", str(path))
    explicit = {name: kind for name in matrices if (kind := overrides.chosen(patterns, name))}
    for name, kind in explicit.items():
        width = gguf_file.TENSOR_TYPES[TYPE_IDS[kind.upper()]][1]
        if matrices[name].shape[0] % width:
            raise ConfigError(f"{name}: rows of {matrices[name].shape[0]} do not divide into {kind} blocks of {width}")
    rows = [(f"^{re.escape(name)}$", TYPE_IDS[kind.upper()]) for name, kind in explicit.items()]
    staged = target.with_name(f".{target.name[:80]}.tmp")
    try:
        by_the_engine(source, staged, config.type, found, rows, ctx.threads)
        after = gguf_file.read(staged)
        if set(after.tensors) != set(before.tensors):
            raise ModelError("llama.cpp wrote other tensors than it was given", str(target))
        missed = [name for name, kind in explicit.items() if after.tensors[name].type != kind.upper()]
        if missed:
            raise ModelError(f"llama.cpp stored {missed[0]} as {after.tensors[missed[0]].type}", str(target))
        digest = store.digest_file(staged)
        staged.replace(target)
        store.sync_folder(target.parent)
    finally:
        staged.unlink(missing_ok=True)
    types: dict[str, int] = {}
    census: dict[str, int] = {}
    for tensor in after.tensors.values():
        types[tensor.type] = types.get(tensor.type, 0) + 1
        census[tensor.type] = census.get(tensor.type, 0) + tensor.nbytes
    if found is not None:
        ctx.note(
            f"importance matrix: {found.chunks} windows of {found.chunk_size} tokens of {', '.join(found.datasets)}"
        )
    reader = {"tensors": len(after.tensors), "bytes": target.stat().st_size, "types": types, "sha256": digest}
    return {"reader": reader, "tensor_types": census, "quantiser": "llama.cpp"}
