"""Weights in memory, from any model folder we understand, or one tensor at a time. Never downloads, never guesses.

Every tensor goes through `checkpoint`'s strict reader and is handed to transformers by name, so a missing, misshapen
or surplus tensor is an error here and not a randomly initialised layer there.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgellm_sdk import checkpoint, widths
from edgellm_sdk.errors import ConfigError, DeviceError, ModelError
from edgellm_sdk.types import ModelHandle

if TYPE_CHECKING:
    from edgellm_sdk.types import Array

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BUFFERS = ("inv_freq", "masked_bias", "attn.bias", "position_ids")  # old checkpoints store what is computed now


@dataclass
class LoadedModel:
    """A transformers model in eval mode without gradients, its tokenizer, where it came from, its torch dtype."""

    model: Any
    tokenizer: Any
    handle: ModelHandle
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def auto_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the hardware multiplies in it (CUDA, AVX512-BF16, AMX), float32 elsewhere."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    return torch.bfloat16 if "avx512_bf16" in flags or "amx_bf16" in flags else torch.float32


def _dtype(name: str, device: str) -> torch.dtype:
    if name == "auto":
        return auto_dtype(device)
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}", "dtype", f"use {', '.join(DTYPES)} or auto")
    return DTYPES[name]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its progress bars and load reports; our own errors say what is wrong."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load(handle: ModelHandle, dtype: str = "float32", device: str = "cpu", merge: bool = False) -> LoadedModel:
    """The model with its adapters on top, or folded in with `merge`.

    `dtype` is float32, bfloat16, float16 or auto. ModelError for anything wrong with the folder, DeviceError when the
    device is not there or too small, ConfigError for an unknown dtype.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError("CUDA is not available on this machine", device, "use --device cpu")
    kind = _dtype(dtype, device)
    found = checkpoint.inspect(handle.path)
    try:
        model = build(found, kind)
        for folder in handle.adapters:
            from edgellm_sdk.kit import adapters

            with _quiet():
                (adapters.merge if merge else adapters.apply)(model, folder)
        model.to(device)
    except MemoryError:
        raise DeviceError("not enough memory for the model", str(handle.path)) from None
    except torch.OutOfMemoryError:
        raise DeviceError("not enough memory for the model", device) from None
    model.eval()
    model.requires_grad_(False)
    return LoadedModel(model, load_tokenizer(handle), handle, kind)


def build(found: checkpoint.Checkpoint, dtype: torch.dtype) -> Any:
    """The transformers model of a folder, its tensors read, decoded and converted one by one."""
    import transformers

    names = found.config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else ""
    settings = copy.deepcopy(dict(found.config))
    settings.pop("quantization_config", None)  # decoded here; transformers would look for a GPTQ library
    settings.pop("auto_map", None)  # never run a model's own code
    where = str(found.folder)
    layers = widths.read(settings, where) if settings.get(widths.TABLE) else ()
    settings.pop(widths.TABLE, None)  # the library's own classes do not build layers by it
    with _quiet():
        try:
            config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        except Exception as error:  # any of its checks may fail, each with an exception of its own
            raise ModelError("config.json is not of a kind that transformers knows", where) from error
        made: Any = getattr(transformers, name, None) if name.isidentifier() else None
        known = isinstance(made, type) and issubclass(made, transformers.PreTrainedModel)
        if not known:
            raise ModelError(f"its architecture {name[:60]!r} is unknown", where, "config.json: architectures")
        weights = dict(_tensors(found, dtype))
        try:
            model, report = (_uneven(made, layers) if layers else made).from_pretrained(
                None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
            )
            model.__class__ = made
        except MemoryError:
            raise
        except Exception as error:
            raise ModelError("its tensors do not fit config.json", where) from error
    for cause, key in (("lacks", "missing_keys"), ("has another shape for", "mismatched_keys")):
        wrong = sorted(item[0] if isinstance(item, tuple) else item for item in report[key])
        if wrong:
            raise ModelError(f"{cause} {wrong[0][:80]}", where)
    surplus = sorted(key for key in report["unexpected_keys"] if not key.endswith(_BUFFERS))
    if surplus and name.endswith("ForCausalLM"):
        raise ModelError(f"has the tensor {surplus[0][:80]}, which {name} does not", where)
    return model


def _uneven(made: Any, layers: Sequence[widths.Widths]) -> Any:
    """`made` with layers of these widths, which its configuration cannot tell it. They are made before weights come."""

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        made.__init__(self, config, *args, **kwargs)
        for layer, width in zip(self.model.layers, layers, strict=True):
            attention, head = layer.self_attn, layer.self_attn.head_dim
            for name, outputs in (("q_proj", width.heads), ("k_proj", width.kv_heads), ("v_proj", width.kv_heads)):
                _resize(attention, name, rows=outputs * head)
            _resize(attention, "o_proj", columns=width.heads * head)
            attention.num_key_value_groups = width.heads // width.kv_heads
            for name in ("gate_proj", "up_proj"):
                _resize(layer.mlp, name, rows=width.ffn)
            _resize(layer.mlp, "down_proj", columns=width.ffn)

    return type(made.__name__, (made,), {"__init__": __init__, "__module__": made.__module__})


def _resize(parent: nn.Module, name: str, rows: int = 0, columns: int = 0) -> None:
    old: Any = getattr(parent, name)
    setattr(parent, name, nn.Linear(columns or old.in_features, rows or old.out_features, old.bias is not None))


def _tensors(found: checkpoint.Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    skip = "lm_head.weight" if found.tied and "model.embed_tokens.weight" in found.tensors else ""
    for name in found.tensors:
        if name == skip:
            continue
        tensor = torch.from_numpy(found.array(name))
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
            if not torch.isfinite(tensor).all():
                raise ModelError(f"{name[:80]} holds values that are not finite in {dtype}", str(found.folder))
        yield name, tensor


def stream_tensors(handle: ModelHandle) -> Iterator[tuple[str, Array]]:
    """(HF name, float32 array) in name order, adapters folded in, quantised tensors decoded; one in memory at a time.

    A tied output matrix is not repeated. ModelError when an adapter cannot be merged.
    """
    from edgellm_sdk.kit import adapters

    found = checkpoint.inspect(handle.path)
    skip = "lm_head.weight" if found.tied and "model.embed_tokens.weight" in found.tensors else ""
    for name in sorted(found.tensors):
        if name == skip:
            continue
        array = found.array(name)
        for folder in handle.adapters:
            array = adapters.merged(folder, name, array)
        yield name, array


def load_tokenizer(handle: ModelHandle) -> Any:
    """The folder's tokenizer, or None when it has none. Its chat template is rendered by `templates`, never by it."""
    folder = handle.path
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        return None
    from transformers import AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", checkpoint.CONFIG)
    found = {name: checkpoint.read_json(folder / name) for name in names if (folder / name).is_file()}
    with _quiet():
        try:
            config = _enough(folder, found.get(checkpoint.CONFIG, {}), found.get("tokenizer_config.json", {}))
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise ModelError("its tokenizer cannot be read", str(folder)) from error
    if not callable(getattr(tokenizer, "encode", None)):
        raise ModelError("its tokenizer cannot be read", str(folder))
    return tokenizer


def _enough(folder: Path, model: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> Any:
    """All that AutoTokenizer asks of a model's configuration when the tokenizer names its own class, else None: then it
    imports the model's own configuration class, which takes longer than reading the tokenizer."""
    from transformers import PreTrainedConfig

    if not isinstance(tokenizer.get("tokenizer_class"), str) or not isinstance(model.get("model_type"), str):
        return None
    config = PreTrainedConfig(name_or_path=str(folder), tokenizer_class=model.get("tokenizer_class"))
    config.model_type = model["model_type"]
    return config


def eos_ids(handle: ModelHandle) -> tuple[int, ...]:
    """The ids that the folder's generation_config.json, or else config.json, says end a generation."""
    for name in ("generation_config.json", checkpoint.CONFIG):
        if not (handle.path / name).is_file():
            continue
        value = json.loads((handle.path / name).read_bytes()).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if ids and all(type(token) is int and token >= 0 for token in ids):
            return tuple(sorted(set(ids)))
    return ()
