"""`PATTERN=FORMAT,PATTERN=FORMAT`: which tensors get another format than the rest, as a user types it.

A pattern is part of a tensor's name (`down_proj`, `layers.0.`) or, with `*`, `?` or `[...]` in it, a glob for the whole
name. The first that matches wins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

Overrides = tuple[tuple[str, str], ...]


def parse(text: str, known: Collection[str], option: str) -> Overrides:
    """(pattern, format) pairs in the order given; ValueError, worded for a config, for what cannot be meant."""
    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        pattern, equals, name = (word.strip() for word in part.rpartition("="))
        if not equals or not pattern:
            raise ValueError(f"{option}: {part[:60]!r} is not PATTERN=FORMAT")
        if name.lower() not in known:
            raise ValueError(f"{option}: no format {name[:30]!r}; {', '.join(known)}")
        found.append((pattern, name.lower()))
    return tuple(found)


def chosen(overrides: Overrides, name: str) -> str | None:
    """The format for the tensor `name`, or None when no pattern matches."""
    for pattern, fmt in overrides:
        if fnmatchcase(name, pattern) if set(pattern) & set("*?[") else pattern in name:
            return fmt
    return None


def idle(overrides: Overrides, names: Iterable[str]) -> list[str]:
    """Patterns that match none of `names`: most likely a mistake."""
    listed = list(names)
    return [pattern for pattern, fmt in overrides if not any(chosen(((pattern, fmt),), name) for name in listed)]
