"""From what a user typed to a Dataset: JSONL and CSV files, folders of splits, and the built-in `sms-spam`.

Shapes of a JSONL row, told apart by the first row; every row of a file has the same shape:

    {"messages": [{"role": ..., "content": ...}, ...]}     one example for each assistant turn
    {"prompt": ..., "completion": ...}                      one user turn and its answer
    {"instruction": ..., "input": ..., "output": ...}       the same; `input` may be missing
    {"text": ..., "label": ...}                             classification: the label is the answer
    {"text": ...}                                           plain text: the loss falls on all of it

Any row may carry `user`, the natural client it belongs to. Other fields are ignored.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, overload

from edgellm_sdk.errors import ConfigError, DataError
from edgellm_sdk.jsonl import bad, gunzip, records, table, text_field, word_field
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset, Example, Message, Prompt

SPLITS = ("train", "valid", "test")
ROLES = ("system", "user", "assistant", "tool")
TASK_PROMPT = "Message: {text}\n\nIs this message {labels}? Answer with the label only."
MAX_LISTED_LABELS = 64
BUILT_IN = "sms-spam"
SMS_PROMPT = "Message: {text}\n\nIs this spam? Yes or No?"
SMS_ANSWERS = {"ham": "No", "spam": "Yes"}
SMS_SHA256 = "d29ed549ec599dd1efad4331066ee617c69440b7e85b65f64fe6a72db9eafbc8"
_SUFFIXES = (".jsonl", ".csv")
_FILE_NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
_TEXT_COLUMNS = ("text", "message", "sms", "sentence", "v2")
_LABEL_COLUMNS = ("label", "category", "class", "target", "v1")


@dataclass(frozen=True)
class _Shape:
    """Fields that make a row one of this shape, and how such a row becomes examples."""

    name: str
    fields: tuple[str, ...]
    parse: Callable[[dict[str, Any], Path, int, str | None], Sequence[Example | _Pair]]


@dataclass(frozen=True, slots=True)
class _Pair:
    """What a row asks and its answer: a completion, or a label, whose prompt needs the labels of all rows."""

    text: str
    answer: str
    user: str | None


class _Labelled(_Pair):
    __slots__ = ()


class _Asked(Sequence[Example]):
    """Pairs as examples, each built when asked for: a million prompts held as messages would take a gigabyte."""

    def __init__(self, pairs: Sequence[_Pair], fill: Callable[[str], str], answers: Mapping[str, str] | None) -> None:
        self._pairs, self._fill, self._answers = pairs, fill, answers

    def _example(self, pair: _Pair) -> Example:
        prompt = _ask(self._fill(pair.text))
        if self._answers is None:
            return Example(prompt, pair.answer, user=pair.user)
        return Example(prompt, self._answers[pair.answer], pair.answer, pair.user)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> _Asked: ...
    def __getitem__(self, index: int | slice) -> Example | _Asked:
        if isinstance(index, slice):
            return _Asked(self._pairs[index], self._fill, self._answers)
        return self._example(self._pairs[index])

    def __len__(self) -> int:
        return len(self._pairs)

    def take(self, indices: Sequence[int]) -> _Asked:
        return _Asked([self._pairs[i] for i in indices], self._fill, self._answers)


def _messages(row: dict[str, Any], path: Path, line: int, user: str | None) -> list[Example]:
    turns = row["messages"]
    if not isinstance(turns, list) or not turns:
        raise bad(path, line, "'messages' is not a list of turns")
    before: list[Message] = []
    found = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise bad(path, line, f"turn {number} is not an object")
        role = text_field(turn, "role", path, line)
        if role not in ROLES:
            raise bad(path, line, f"turn {number} has the role {role[:20]!r}, not one of {', '.join(ROLES)}")
        content = text_field(turn, "content", path, line, empty=role != "assistant")
        if role == "assistant":
            if not before:
                raise bad(path, line, "the conversation starts with the assistant")
            found.append(Example(tuple(before), content, user=user))
        before.append({"role": role, "content": content})
    if not found:
        raise bad(path, line, "the conversation has no assistant turn")
    return found


def _ask(text: str) -> Prompt:
    return ({"role": "user", "content": text},)


def _completion(row: dict[str, Any], path: Path, line: int, user: str | None) -> list[_Pair]:
    return [_Pair(text_field(row, "prompt", path, line), text_field(row, "completion", path, line), user)]


def _instruction(row: dict[str, Any], path: Path, line: int, user: str | None) -> list[_Pair]:
    asked = text_field(row, "instruction", path, line)
    extra = text_field({"input": "", **row}, "input", path, line, empty=True)
    return [_Pair(f"{asked}\n\n{extra}" if extra else asked, text_field(row, "output", path, line), user)]


def _text(row: dict[str, Any], path: Path, line: int, user: str | None) -> list[Example]:
    return [Example("", text_field(row, "text", path, line), user=user)]


def _labelled(row: dict[str, Any], path: Path, line: int, user: str | None) -> list[_Labelled]:
    return [_Labelled(text_field(row, "text", path, line), sys.intern(word_field(row, "label", path, line)), user)]


_SHAPES = (
    _Shape("messages", ("messages",), _messages),
    _Shape("prompt and completion", ("prompt", "completion"), _completion),
    _Shape("instruction and output", ("instruction", "output"), _instruction),
    _Shape("text and label", ("text", "label"), _labelled),
    _Shape("text", ("text",), _text),
)


def _shape(row: Mapping[str, Any], path: Path, line: int) -> _Shape:
    """The one shape `row` has; DataError when it has none or parts of two."""
    found = [shape for shape in _SHAPES if all(name in row for name in shape.fields)]
    if not found:
        for shape in _SHAPES:
            have = [name for name in shape.fields if name in row]
            if have:
                missing = next(name for name in shape.fields if name not in row)
                raise bad(path, line, f"has {have[0]!r} but lacks the field {missing!r}")
        raise bad(path, line, "has none of the known shapes", "see `edgellm data info --help`")
    if len({shape.fields[0] for shape in found}) > 1:
        raise bad(path, line, f"is both {found[0].name!r} and {found[1].name!r}")
    return found[0]


def _jsonl(path: Path) -> Iterator[Example | _Pair]:
    shape: _Shape | None = None
    for line, row in records(path):
        now = _shape(row, path, line)
        if shape is None:
            shape, first = now, line
        if now is not shape:
            raise bad(path, line, f"has the shape {now.name!r}, but line {first} has {shape.name!r}")
        user = word_field(row, "user", path, line) if row.get("user") is not None else None
        yield from shape.parse(row, path, line, user)


def _csv(path: Path) -> Iterator[_Labelled]:
    text = label = ""
    for line, row in table(path):
        if not text:
            text = next((name for name in _TEXT_COLUMNS if name in row), "")
            label = next((name for name in _LABEL_COLUMNS if name in row), "")
            if not text or not label:
                columns = ", ".join(repr(name[:20]) for name in list(row)[:8])
                missing = "text" if not text else "label"
                raise bad(path, 1, f"has no {missing!r} column; it has {columns}", "rename the header")
        user = word_field(row, "user", path, line) if row.get("user") else None
        yield _Labelled(text_field(row, text, path, line), sys.intern(word_field(row, label, path, line)), user)


def _rows(path: Path) -> list[Example] | list[_Pair] | list[_Labelled]:
    """All rows of one file; the reader streams, so a bad line stops it before the rest is read."""
    rows: list[Any] = list(_csv(path) if path.suffix.lower() == ".csv" else _jsonl(path))
    if not rows:
        raise bad(path, 1, "the file holds no examples")
    return rows


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, a loop of links, a NUL byte: opening it will say which
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _files(source: str) -> dict[str, Path]:
    """Split name -> file, for a folder; DataError when there is none or two for one split."""
    folder = Path(source)
    found: dict[str, Path] = {}
    for split, names in _FILE_NAMES.items():
        here = [folder / (name + suffix) for name in names for suffix in _SUFFIXES]
        here = [path for path in here if path.exists()]
        if len(here) > 1:
            raise DataError(f"has both {here[0].name} and {here[1].name}", source, "keep one of them")
        if here:
            found[split] = here[0]
    if not found:
        raise DataError("the folder has no train, valid or test file", source, "name them train.jsonl, test.csv, ...")
    return found


def _sms() -> dict[str, list[_Labelled]]:
    """The SMS Spam Collection in fixed splits: 70 % train, 10 % valid, 20 % test of each label."""
    raw = gunzip((resources.files("edgellm_sdk") / "assets" / "sms_spam.csv.gz").read_bytes())
    if hashlib.sha256(raw).hexdigest() != SMS_SHA256:
        raise DataError("assets/sms_spam.csv.gz is damaged", fix="reinstall edgellm-sdk")
    rows = [_Labelled(row["text"], sys.intern(row["label"]), None) for row in csv.DictReader(io.StringIO(raw.decode()))]
    train, rest = _stratify([row.answer for row in rows], 0.7, Stream(0, "sms-spam"))
    valid, test = _stratify([rows[i].answer for i in rest], 1 / 3, Stream(0, "sms-spam", 1))
    chosen = (train, [rest[i] for i in valid], [rest[i] for i in test])
    return {name: [rows[i] for i in part] for name, part in zip(SPLITS, chosen, strict=True)}


def _template(task_prompt: str, labels: Sequence[str]) -> Callable[[str], str]:
    """text -> the user message. `{text}` and `{labels}` are replaced, every other brace is left as it is."""
    if "{text}" not in task_prompt:
        raise ConfigError("the task prompt has no {text}", "task-prompt", "say where the text goes")
    if "{labels}" in task_prompt and len(labels) > MAX_LISTED_LABELS:
        raise DataError(f"{len(labels)} labels do not fit in a prompt", "label", "give a task prompt without {labels}")
    listed = " or ".join([", ".join(labels[:-1]), labels[-1]]) if len(labels) > 1 else "".join(labels)
    pieces = re.split(r"(\{text\}|\{labels\})", task_prompt)

    def fill(text: str) -> str:
        return "".join(text if piece == "{text}" else listed if piece == "{labels}" else piece for piece in pieces)

    return fill


def read(source: str, split: str = "train", task_prompt: str | None = None) -> Dataset:
    """The examples of `source`: a JSONL or CSV file, a folder of splits, or the name of a built-in data set.

    A single file has one split, whatever is asked for. `task_prompt` (with `{text}` and, if wanted, `{labels}`) turns
    a text/label row into the user's message. DataError names file, line and cause; ConfigError a wrong split.
    """
    if split not in SPLITS:
        raise ConfigError(f"{split!r} is not a split", "split", f"use {', '.join(SPLITS)}")
    labels: set[str] = set()
    rows: Sequence[Example | _Pair]
    if source == BUILT_IN:
        splits = _sms()
        rows, name, labels = splits[split], source, {row.answer for part in splits.values() for row in part}
    else:
        path = Path(source)
        name = path.name
        if _is_folder(path):
            files = _files(source)
            if split not in files:
                raise DataError(f"has no {split} file", source, f"it has {', '.join(files)}")
            rows = _rows(files[split])
            if isinstance(rows[0], _Labelled):
                # A prompt that lists the labels must list the same ones in every split.
                others = [_rows(files[other]) for other in files if other != split]
                labels = {row.answer for other in others for row in other if isinstance(row, _Labelled)}
        else:
            if "/" not in source and "." not in source and not _exists(path):
                raise DataError(f"no such file, folder or built-in data set ({BUILT_IN})", source)
            rows = _rows(path)
    if isinstance(rows[0], Example):
        return _dataset(tuple(row for row in rows if isinstance(row, Example)), name, ())
    pairs = [row for row in rows if isinstance(row, _Pair)]
    if not isinstance(pairs[0], _Labelled):
        return _dataset(_Asked(pairs, str, None), name, ())
    ordered = tuple(sorted(labels | {row.answer for row in pairs}))
    ours = source == BUILT_IN and task_prompt is None
    answers = {label: SMS_ANSWERS[label] if ours else label for label in ordered}
    fill = _template(SMS_PROMPT if ours else TASK_PROMPT if task_prompt is None else task_prompt, ordered)
    return _dataset(_Asked(pairs, fill, answers), name, ordered, tuple(answers.values()))


def _canonical(example: Example) -> bytes:
    prompt = example.prompt if isinstance(example.prompt, str) else [dict(turn) for turn in example.prompt]
    row = [prompt, example.completion, example.label, example.user]
    return json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _dataset(examples: Sequence[Example], name: str, labels: tuple[str, ...], answers: tuple[str, ...] = ()) -> Dataset:
    sha = hashlib.sha256(json.dumps([labels, answers]).encode())
    for example in examples:
        sha.update(_canonical(example))
    return Dataset(examples, sha.hexdigest(), name, labels, answers)


def select(dataset: Dataset, indices: Sequence[int]) -> Dataset:
    """The examples at `indices`, in that order; equal content gives an equal fingerprint."""
    held = dataset.examples
    chosen = held.take(indices) if isinstance(held, _Asked) else tuple(held[i] for i in indices)
    return _dataset(chosen, dataset.name, dataset.labels, dataset.answers)


def _stratify(labels: Sequence[str | None], fraction: float, stream: Stream) -> tuple[list[int], list[int]]:
    """Indices of a random `fraction` of each label, and of the rest, both ascending.

    Parts are rounded so that their total is the rounded total: the largest remainders get the odd ones.
    """
    groups: dict[str | None, list[int]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(index)
    ordered = sorted(groups.items(), key=lambda item: (item[0] is not None, item[0] or ""))
    shares = [fraction * len(group) for _, group in ordered]
    counts = [int(share) for share in shares]
    odd = round(sum(shares)) - sum(counts)
    for k in sorted(range(len(shares)), key=lambda k: counts[k] - shares[k])[:odd]:
        counts[k] += 1
    first: list[int] = []
    for (_, group), count in zip(ordered, counts, strict=True):
        first += stream.sample(group, count)
    chosen = set(first)
    return sorted(first), [index for index in range(len(labels)) if index not in chosen]


def split(dataset: Dataset, fraction: float, stream: Stream) -> tuple[Dataset, Dataset]:
    """A random `fraction` of the examples and the rest, file order kept, stratified by label where there is one.

    ConfigError unless both parts get at least one example.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"{fraction!r} is not between 0 and 1", "split")
    first, rest = _stratify([example.label for example in dataset.examples], fraction, stream)
    if not first or not rest:
        raise ConfigError(f"{len(dataset)} examples cannot be split at {fraction:g}", dataset.name, "give more data")
    return select(dataset, first), select(dataset, rest)


def describe(dataset: Dataset) -> dict[str, Any]:
    """What `edgellm data info` shows: counts, labels, users, lengths in characters, fingerprint, one example."""
    lengths = sorted(len(example.completion) for example in dataset.examples)
    prompts = sorted(
        len(p) if isinstance(p, str) else sum(len(turn["content"]) for turn in p)
        for p in (example.prompt for example in dataset.examples)
    )
    users = {example.user for example in dataset.examples if example.user is not None}
    first = dataset.examples[0]
    shown = first.prompt if isinstance(first.prompt, str) else [dict(turn) for turn in first.prompt]
    return {
        "name": dataset.name,
        "examples": len(dataset),
        "labels": dict(sorted(Counter(e.label for e in dataset.examples if e.label is not None).items())),
        "users": len(users),
        "prompt_characters": {"median": prompts[len(prompts) // 2], "max": prompts[-1]},
        "completion_characters": {"median": lengths[len(lengths) // 2], "max": lengths[-1]},
        "fingerprint": dataset.fingerprint,
        "first": {"prompt": shown, "completion": first.completion},
    }


def has_split(source: str, split: str) -> bool:
    """Whether `source` has a file of its own for `split`; a single file has none."""
    if source == BUILT_IN:
        return True
    return _is_folder(Path(source)) and split in _files(source)
