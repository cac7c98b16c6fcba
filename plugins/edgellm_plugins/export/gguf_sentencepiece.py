"""SentencePiece tokenizers as GGUF metadata.

llama.cpp's `llama` tokenizer joins, again and again, the two neighbours whose joint piece has the highest score.
`tokenizer.json` says the same with a list of merges. With a `tokenizer.model` beside it the scores are read there.
Without one they follow from the merges, which is exact when every way to join two pieces to a third is a merge and the
merges come piece by piece, as in every list that was derived from scores; another list is refused. Unigram models,
which look for the likeliest cut of a word instead, go to llama.cpp's `t5` tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_plugins.export.gguf_container import Value
from edgellm_sdk.errors import ModelError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
PAD_SCORE, ADDED_SCORE = -10000.0, -1000.0  # what the upstream converter writes
MAX_MODEL = 64 << 20
UNIGRAM, BPE = 1, 2
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Pieces:
    """Texts, scores and types in the order of ids, and the model's kind: UNIGRAM or BPE."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    kind: int


def is_sentencepiece(definition: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json describes a converted SentencePiece model."""
    model = definition["model"]
    return model.get("type") == "Unigram" or (model.get("type") == "BPE" and bool(model.get("byte_fallback")))


def metadata(folder: Path, definition: Mapping[str, Any], vocabulary: int, where: str) -> tuple[dict[str, Value], str]:
    """The keys `model`, `pre`, `tokens`, `scores`, `token_type` (and `add_space_prefix` where it is not the engine's
    default), and how the scores were found. ModelError for what llama.cpp would read otherwise."""
    model, unigram = definition["model"], definition["model"].get("type") == "Unigram"
    prefix = _spaces(definition, unigram, where)
    path = folder / "tokenizer.model"
    if path.is_file():
        pieces, how = read_model(path), "SentencePiece scores from tokenizer.model"
        if (pieces.kind == UNIGRAM) != unigram:
            raise ModelError("is another kind of model than tokenizer.json describes", str(path))
    elif unigram:
        pieces, how = _from_unigram(model), "unigram scores from tokenizer.json"
    else:
        pieces, how = _from_merges(definition, where), "SentencePiece scores derived from the merges of tokenizer.json"
    tokens, scores, types = _laid_out(pieces, definition, vocabulary, where)
    rows = {
        "model": Value("string", "t5" if unigram else "llama"),
        "pre": Value("string", "default"),
        "tokens": Value("array[string]", tokens),
        "scores": Value("array[f32]", scores),
        "token_type": Value("array[i32]", types),
    }
    if unigram:
        if model.get("byte_fallback"):
            raise ModelError("falls back to bytes, which llama.cpp's unigram tokenizer does not", where)
        rows["remove_extra_whitespaces"] = Value("bool", False)
    if unigram or not prefix:
        rows["add_space_prefix"] = Value("bool", prefix)
    return rows, how


def _spaces(definition: Mapping[str, Any], unigram: bool, where: str) -> bool:
    """Whether a space is put before the text. ModelError unless spaces become the mark and nothing else changes."""
    normalizer, cut = definition.get("normalizer") or {}, definition.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    prefix, replaced = False, False
    for step in steps:
        kind = step.get("type")
        if kind == "Prepend" and step.get("prepend") == SPACE and not replaced:
            prefix = True
        elif kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            replaced = True
        elif kind is not None:
            raise ModelError(f"normalises text by {printable(str(kind))[:30]}, which llama.cpp would not", where)
    kind = cut.get("type")
    if kind == "Metaspace" and cut.get("replacement") == SPACE and (unigram or not cut.get("split", True)):
        prefix, replaced = prefix or cut.get("prepend_scheme", "always") != "never", True
    elif kind is not None and not (kind == "Split" and cut.get("pattern") == {"String": " "} and replaced):
        raise ModelError(f"cuts text by {printable(str(kind))[:30]}, which llama.cpp would not", where)
    if not replaced:
        raise ModelError("does not mark spaces as SentencePiece does", where)
    return prefix


def limits(definition: Mapping[str, Any]) -> list[str]:
    """What llama.cpp will read otherwise, in words."""
    found = []
    if (definition.get("pre_tokenizer") or {}).get("prepend_scheme") == "first":
        found.append("llama.cpp puts a space behind every special token, this tokenizer only before the text")
    if definition["model"].get("type") == "Unigram":
        found.append("llama.cpp puts no space before spaces alone, and may cut runs of spaces at other places")
    return found


def _laid_out(
    pieces: Pieces, definition: Mapping[str, Any], vocabulary: int, where: str
) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types for every row of the embedding, added tokens in their places."""
    vocab: Any = definition["model"]["vocab"]
    named = {number: text for text, number in vocab.items()} if isinstance(vocab, dict) else dict(
        enumerate(text for text, _ in vocab)
    )  # fmt: skip
    added = {token["id"]: token for token in definition.get("added_tokens", [])}
    highest = max([*named, *added], default=0)
    if highest >= vocabulary:
        raise ModelError(f"has a token with id {highest}, the model only {vocabulary} rows", where, "resize it")
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    scores, types = [PAD_SCORE] * vocabulary, [UNUSED] * vocabulary
    for number, text in enumerate(pieces.texts[:vocabulary]):
        if number not in added and named.get(number) != text:
            raise ModelError(f"tokenizer.model and tokenizer.json disagree about token {number}", where)
        tokens[number], scores[number], types[number] = text, pieces.scores[number], pieces.types[number]
    for number, text in named.items():
        if number >= len(pieces.texts) and number not in added:
            raise ModelError(f"token {number} ({printable(text)[:30]!r}) has no score", where)
    for number, token in added.items():
        text = token["content"]
        control = bool(token.get("special")) or looks_special(text)
        tokens[number], scores[number] = text if control else text.replace(SPACE, " "), ADDED_SCORE
        types[number] = CONTROL if control else USER_DEFINED
    return tokens, scores, types


def looks_special(text: str) -> bool:
    """Markers that some models leave unflagged although a reader must never see them."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    pairs = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return any(text.startswith(left) and text.endswith(right) for left, right in pairs)


def _from_unigram(model: Mapping[str, Any]) -> Pieces:
    texts, scores = [str(text) for text, _ in model["vocab"]], [float(score) for _, score in model["vocab"]]
    types = [BYTE if _BYTE.fullmatch(text) else NORMAL for text in texts]
    if type(model.get("unk_id")) is int and model["unk_id"] < len(types):
        types[model["unk_id"]] = UNKNOWN
    return Pieces(tuple(texts), tuple(scores), tuple(types), UNIGRAM)


def _from_merges(definition: Mapping[str, Any], where: str) -> Pieces:
    """Scores under which joining by the highest one is merging by rank: minus how many pieces are made before it."""
    model = definition["model"]
    texts = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if [model["vocab"][text] for text in texts] != list(range(len(texts))):
        raise ModelError("its ids leave holes", where)
    own = {token["content"] for token in definition.get("added_tokens", [])}
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    order: dict[str, int] = {}
    last = ""
    for left, right in merges:
        made = left + right
        if made != last and made in order:
            raise ModelError(f"comes back to the piece {printable(made)[:30]!r}: its merges have no scores", where)
        order.setdefault(made, len(order))
        last = made
    known = set(merges)
    for text in texts:
        if text in own or _BYTE.fullmatch(text):
            continue
        for left, right in ((text[:i], text[i:]) for i in range(1, len(text))):
            joins = all(len(side) == 1 or side in model["vocab"] for side in (left, right))
            if joins and (left, right) not in known:
                raise ModelError(
                    f"does not merge {printable(left)[:20]!r} and {printable(right)[:20]!r}, which llama.cpp would",
                    where,
                    "put the tokenizer.model beside it",
                )
    scores: list[float] = []
    types: list[int] = []
    for text in texts:
        byte = _BYTE.fullmatch(text) is not None
        scores.append(0.0 if byte or text in own else -float(order.get(text, len(order) + len(scores))))
        types.append(BYTE if byte else UNKNOWN if text == model.get("unk_token") else NORMAL)
    return Pieces(tuple(texts), tuple(scores), tuple(types), BPE)


def read_model(path: Path) -> Pieces:
    """The pieces of a `tokenizer.model`: a protocol buffer with repeated field 1 {1: piece, 2: score, 3: type} and
    field 2 {3: model type}. ModelError when it is none."""
    from struct import unpack

    try:
        if path.stat().st_size > MAX_MODEL:
            raise ModelError(f"is above {MAX_MODEL >> 20} MiB", str(path))
        texts, scores, types, kind = [], [], [], UNIGRAM
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(_raw(value)))
                texts.append(_raw(piece[1]).decode("utf-8"))
                scores.append(float(unpack("<f", _raw(piece.get(2, bytes(4))))[0]))
                types.append(int(piece.get(3, NORMAL)))
            elif number == 2:
                kind = int(dict(_fields(_raw(value))).get(3, UNIGRAM))
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", str(path)) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise ModelError("is no SentencePiece model", str(path)) from None
    if not texts or kind not in (UNIGRAM, BPE) or any(not NORMAL <= each <= BYTE for each in types):
        raise ModelError("is no SentencePiece model of a kind that llama.cpp has", str(path))
    types = [NORMAL if each == USER_DEFINED else each for each in types]  # tokenizer.json says which are added
    return Pieces(tuple(texts), tuple(scores), tuple(types), kind)


def _raw(value: bytes | int) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where bytes belong")
    return value


def _fields(data: Sequence[int] | bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protocol buffer message: bytes, or an integer for varints. ValueError at nonsense."""
    raw, at = bytes(data), 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(raw):
        key = varint()
        wire, size = key & 7, 0
        if wire == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(wire, -1) if wire != 2 else varint()
        if size < 0 or at + size > len(raw):
            raise ValueError("a field that leaves the message")
        yield key >> 3, raw[at : at + size]
        at += size
