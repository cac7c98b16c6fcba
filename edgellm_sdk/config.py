"""Options: one flat frozen dataclass per plugin, one validator for the command line, TOML and Python.

@dataclass(frozen=True)
class Config:
    rank: int = opt(8, "rank of the update", ge=1, le=256)
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from edgellm_sdk.errors import ConfigError, printable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_RECIPE_BYTES = 1 << 20
MAX_NESTING = 64
Config = TypeVar("Config")


def opt(
    default: Any,
    help: str,
    *,
    unit: str = "",
    ge: float | None = None,
    le: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with its help text, unit and bounds (inclusive)."""
    return dataclasses.field(
        default=default, metadata={"help": help, "unit": unit, "ge": ge, "le": le, "choices": choices}
    )


@dataclass(frozen=True)
class Option:
    """One field of a config class, as the command line and the help page need it."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    unit: str
    ge: float | None
    le: float | None
    choices: tuple[str, ...]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def bounds(self) -> str:
        """`1..256`, `>= 1`, `a|b`, or nothing."""
        if self.choices:
            return "|".join(self.choices)
        if self.ge is not None and self.le is not None:
            return f"{self.ge:g}..{self.le:g}"
        if self.ge is not None:
            return f">= {self.ge:g}"
        return f"<= {self.le:g}" if self.le is not None else ""


def options(config: type) -> tuple[Option, ...]:
    """The options of a config class in the order they were written."""
    hints = typing.get_type_hints(config)
    found = []
    for field in dataclasses.fields(config):
        hint, optional = hints[field.name], False
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            members = [m for m in typing.get_args(hint) if m is not type(None)]
            optional, hint = True, members[0]
        if hint not in (bool, int, float, str):
            raise TypeError(f"{config.__name__}.{field.name}: options are bool, int, float or str, not {hint}")
        meta = field.metadata
        found.append(
            Option(
                field.name,
                hint,
                optional,
                field.default,
                meta.get("help", ""),
                meta.get("unit", ""),
                meta.get("ge"),
                meta.get("le"),
                meta.get("choices", ()),
            )
        )
    return tuple(found)


def overridden(settings: Config, asked: Mapping[str, Any], where: str) -> Config:
    """`settings` with some options changed, checked as `build` checks them (ConfigError)."""
    return build(type(settings), {**as_dict(settings), **asked}, where)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`, did you mean 'x'?` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _convert(option: Option, value: Any) -> Any:
    """`value` as the option's type, or ValueError with the reason. Text is accepted for every type."""
    if value is None:
        if option.optional:
            return None
        raise ValueError("needs a value")
    kind = option.type
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise ValueError(f"{value!r} is not true or false")
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not text")
        if option.choices and value not in option.choices:
            raise ValueError(f"{value!r} is not one of {', '.join(option.choices)}{nearest(value, option.choices)}")
        return value
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    if isinstance(value, str):
        if not value.isascii() or "_" in value or len(value) > 64:
            raise ValueError(f"{value[:64]!r} is not a number")
        try:
            value = int(value) if kind is int else float(value)
        except ValueError:
            raise ValueError(f"{value!r} is not {'a whole number' if kind is int else 'a number'}") from None
    if not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is not a number")
    if kind is int:
        if isinstance(value, float) or abs(value) >= 1 << 63:
            raise ValueError(f"{value!r} is not a whole number below 2^63")
    else:
        try:
            value = float(value)
        except OverflowError:
            raise ValueError("is too large") from None
        if not math.isfinite(value):
            raise ValueError(f"{value!r} is not finite")
    if (option.ge is not None and value < option.ge) or (option.le is not None and value > option.le):
        raise ValueError(f"{value:g} is outside {option.bounds}")
    return value


def build(config: type[Config], given: Mapping[str, Any], where: str) -> Config:
    """An instance of `config`; ConfigError names every unknown key and bad value at once. `where` e.g. `fwdllm`."""
    known = {option.name: option for option in options(config)}
    problems, values = [], {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            problems.append(f"unknown option {printable(key)!r}{nearest(name, known)}")
            continue
        try:
            values[name] = _convert(known[name], value)
        except ValueError as error:
            problems.append(f"{name.replace('_', '-')}: {error}")
    instance: Config | None = None
    if not problems:
        try:
            instance = config(**values)
        except ValueError as error:  # a config's own __post_init__ checks what spans two options
            problems.append(str(error))
    if instance is None:
        raise ConfigError("; ".join(problems), where, "see --help", problems=tuple(problems))
    return instance


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return dataclasses.asdict(config)


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as nested mappings; ConfigError for anything malformed, too large, too deep or not finite."""
    try:
        raw = path.read_bytes() if path.stat().st_size <= MAX_RECIPE_BYTES else None
    except OSError as error:
        raise ConfigError(f"cannot read the recipe: {error.strerror}", str(path)) from None
    if raw is None:
        raise ConfigError("the recipe is larger than 1 MiB", str(path))
    if raw.startswith(b"\xef\xbb\xbf"):
        raise ConfigError("the recipe starts with a byte-order mark", str(path), "save it as plain UTF-8")
    try:
        parsed = tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"byte {error.start} is not UTF-8", str(path), "save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}", str(path)) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"not valid TOML: {type(error).__name__}", str(path), "flatten it") from None
    _check_tree(parsed, str(path), 0)
    return parsed


def _check_tree(value: Any, where: str, depth: int) -> None:
    if depth > MAX_NESTING:
        raise ConfigError(f"nested deeper than {MAX_NESTING}", where)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{value!r} is not a finite number", where)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_tree(item, where, depth + 1)
