"""Scaled rotary embeddings in GGUF: the keys and the tensors of frequency divisors.

Sources: llama3 and linear as transformers computes them, yarn arXiv 2309.00071, longrope arXiv 2402.13753; what ggml
makes of the keys was read in its graphs and contexts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from edgellm_plugins.export.gguf_container import Value
from edgellm_sdk.errors import ModelError, printable

if TYPE_CHECKING:
    from edgellm_plugins.export.llama_family import Llama
    from edgellm_sdk.types import Float32

LONG = ("longrope", "su")


def number(model: Llama, key: str, default: float | None = None) -> float:
    """A positive number among the rotary parameters; ModelError when it is missing or no number."""
    value = model.rope.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ModelError(f"rotary parameter {key} is {printable(repr(value))[:40]}", model.where)
    return float(value)


def factors(model: Llama) -> dict[str, Float32]:
    """GGUF name -> divisors of the rotary frequencies, (rotated / 2,) float32, for the scalings that need them.

    `llama3`: wavelengths below `original context / high_freq_factor` are left alone, those above `original context /
    low_freq_factor` are stretched by `factor`, between them the frequency is interpolated. `longrope` (arXiv
    2402.13753): the lists of the config, one for contexts beyond the original one, one for others.
    """
    import numpy as np

    if model.rope_type in LONG:
        found = {}
        for key in ("long", "short"):
            values: Any = model.rope.get(f"{key}_factor")
            if not isinstance(values, list) or len(values) != model.rope_dimensions // 2:
                raise ModelError(f"{key}_factor is no list of {model.rope_dimensions // 2} numbers", model.where)
            if any(type(v) not in (int, float) or not 0 < v < math.inf for v in values):
                raise ModelError(f"{key}_factor holds something else than positive numbers", model.where)
            found[f"rope_factors_{key}.weight"] = np.array(values, np.float32)
        return found
    if model.rope_type != "llama3":
        return {}
    factor = number(model, "factor")
    low, high = number(model, "low_freq_factor", 1.0), number(model, "high_freq_factor", 4.0)
    context = number(model, "original_max_position_embeddings", 8192)
    if high <= low:
        raise ModelError("rotary high_freq_factor is not above low_freq_factor", model.where)
    exponents = np.arange(0, model.head_dim, 2, dtype=np.float32) / np.float32(model.head_dim)
    wavelength = 2 * math.pi * np.float32(model.rope_base) ** exponents
    blend = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return {"rope_freqs.weight": (1 / ((1 - blend) / factor + blend)).astype(np.float32)}


def scaling(model: Llama) -> dict[str, Value]:
    """The `rope.scaling.*` keys.

    A yarn attention factor other than the paper's 0.1 ln(factor) + 1 (arXiv 2309.00071) is also written as
    `attn_factor`, which the engine multiplies its own with: it reads `yarn_attn_factor` and then forgets it.
    """
    if model.rope_type in LONG:
        factor = number(model, "factor", model.context / model.original_context)
        usual = math.sqrt(1 + math.log(factor) / math.log(model.original_context)) if factor > 1 else 1.0
        return {"rope.scaling.attn_factor": Value("f32", number(model, "attention_factor", usual))}
    if model.rope_type not in ("linear", "yarn"):
        return {}
    factor = number(model, "factor")
    rows = {"type": Value("string", model.rope_type), "factor": Value("f32", factor)}
    if model.rope_type == "yarn":
        rows["original_context_length"] = Value("u32", model.original_context)
        for theirs, ours in (
            ("attention_factor", "yarn_attn_factor"), ("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow"),
        ):  # fmt: skip
            if model.rope.get(theirs) is not None:
                rows[ours] = Value("f32", number(model, theirs))
        usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        wanted = number(model, "attention_factor", _yarn_mscale(model, factor) or usual)
        if not math.isclose(wanted, usual, rel_tol=1e-6):
            rows["attn_factor"] = Value("f32", wanted / usual)
    return {f"rope.scaling.{key}": value for key, value in rows.items()}


def _yarn_mscale(model: Llama, factor: float) -> float | None:
    """The attention factor of a config with `mscale` and `mscale_all_dim`, as transformers computes it."""
    if not model.rope.get("mscale") or not model.rope.get("mscale_all_dim") or factor <= 1:
        return None
    above, below = (0.1 * number(model, k) * math.log(factor) + 1 for k in ("mscale", "mscale_all_dim"))
    return above / below
