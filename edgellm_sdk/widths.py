"""How wide each layer of a model is, where structural pruning left layers of different widths. No torch.

Beside the model's own values in `config.json`, the table `edgellm_widths` maps a layer's number to those that differ
there: {"4": {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 1152}}. Models whose layers agree
have none. The length of a head is the model's own in every layer. (transformers 5 has a `per_layer_config` of this
form, but refuses to read even the tokenizer of a Llama that has one.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from edgellm_sdk.errors import ModelError, printable

TABLE = "edgellm_widths"
KEYS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
MOST, MOST_LAYERS = 1 << 20, 1 << 16


@dataclass(frozen=True)
class Widths:
    """One layer: query heads, key-value heads, and channels of the FFN."""

    heads: int
    kv_heads: int
    ffn: int


def read(config: Mapping[str, Any], where: str) -> tuple[Widths, ...]:
    """The widths of every layer, in order. ModelError for values that are missing, no whole numbers above 0, or not
    known to vary from layer to layer, and for query heads that do not share the key-value heads evenly."""
    layers, table = config.get("num_hidden_layers"), config.get(TABLE) or {}
    own = {key: config.get(key) for key in KEYS}
    if own[KEYS[1]] is None:
        own[KEYS[1]] = own[KEYS[0]]
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise ModelError(f"config.json says num_hidden_layers = {printable(repr(layers))[:20]}", where)
    if not isinstance(table, Mapping):
        raise ModelError(f"{TABLE} is not a table", where)
    rows: dict[int, Mapping[str, Any]] = {}
    for name, row in table.items():
        number = int(name) if isinstance(name, str) and name.isascii() and name.isdigit() and len(name) < 6 else -1
        if not 0 <= number < layers or number in rows or not isinstance(row, Mapping):
            raise ModelError(f"{TABLE} has the entry {printable(str(name))[:20]!r} for one of {layers} layers", where)
        odd = sorted(key for key in row if key not in KEYS)
        if odd:
            raise ModelError(f"{TABLE} sets {printable(str(odd[0]))[:40]!r} for layer {number}", where, "not supported")
        rows[number] = row
    found = []
    for number in range(layers):
        values: list[Any] = [rows.get(number, {}).get(key, own[key]) for key in KEYS]
        for key, value in zip(KEYS, values, strict=True):
            if type(value) is not int or not 0 < value <= MOST:
                raise ModelError(f"layer {number} has {key} = {printable(repr(value))[:40]}", where)
        if values[0] % values[1]:
            raise ModelError(f"layer {number}: {values[0]} heads on {values[1]} key-value heads do not fit", where)
        found.append(Widths(*values))
    return tuple(found)


def uneven(widths: Sequence[Widths]) -> bool:
    return len(set(widths)) > 1


def written(config: Mapping[str, Any], widths: Sequence[Widths]) -> dict[str, Any]:
    """`config` for layers of these widths.

    The FFN width that most layers have becomes the model's own. Its heads stay, unless all layers agree on others and
    the hidden size is a multiple of them, which transformers asks of every model.
    """
    settings = {key: value for key, value in config.items() if key != TABLE}
    hidden, heads = settings.get("hidden_size", 0), settings["num_attention_heads"]
    if settings.get("head_dim") is None:
        settings["head_dim"] = hidden // heads
    settings.setdefault(KEYS[1], heads)
    settings |= {"num_hidden_layers": len(widths), KEYS[2]: Counter(row.ffn for row in widths).most_common(1)[0][0]}
    agreed = {(row.heads, row.kv_heads) for row in widths}
    if len(agreed) == 1 and hidden % widths[0].heads == 0:
        settings |= dict(zip(KEYS, *agreed, strict=False))
    table = {}
    for number, row in enumerate(widths):
        pairs = zip(KEYS, astuple(row), strict=True)
        if differing := {key: value for key, value in pairs if value != settings[key]}:
            table[str(number)] = differing
    return settings | ({TABLE: table} if table else {})
