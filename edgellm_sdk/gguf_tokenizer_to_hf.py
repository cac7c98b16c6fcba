"""The tokenizer of a GGUF file as tokenizer.json: byte-level BPE as it is, SentencePiece pieces as merges.

A tokenizer that would cut text otherwise than llama.cpp does with the file is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm_sdk.errors import ModelError, printable
from edgellm_sdk.gguf_file import GGUFFile
from edgellm_sdk.store import write_bytes, write_json

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _GPT2]}


def _regex(digits: str) -> dict[str, Any]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {**_GPT2, "use_regex": False}]}


# How each kind of tokenizer cuts text before merging, by llama.cpp's name for it.
SPLITTERS: Mapping[str, dict[str, Any]] = {
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "command-r": _DIGITS,
    "gpt-2": _GPT2,
    "llama-bpe": _regex(r"\p{N}{1,3}"),
    "llama3": _regex(r"\p{N}{1,3}"),
    "qwen2": _regex(r"\p{N}"),
}
_NORMALIZERS = {"qwen2": {"type": "NFC"}}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3")


def value(file: GGUFFile, key: str, kind: type, default: Any = None) -> Any:
    """A metadata value of this kind; ModelError when it is absent without a default, or of another kind."""
    found = file.metadata.get(key, default)
    if kind is float and type(found) is int:
        found = float(found)
    if type(found) is not kind:
        raise ModelError(f"lacks the {kind.__name__} {key!r}", str(file.path))
    return found


def convert(file: GGUFFile, folder: Path) -> int:
    """Write tokenizer.json and its companions; the number of tokens. ModelError for an unknown kind."""
    where = str(file.path)
    kind, pre = value(file, "tokenizer.ggml.model", str), file.metadata.get("tokenizer.ggml.pre", "default")
    pieces = kind == "llama"
    if not pieces and (kind != "gpt2" or pre not in SPLITTERS):
        what = printable(f"{kind}/{pre}"[:40])
        raise ModelError(f"has a tokenizer of kind {what!r}, which is not converted", where, "give its HF folder")
    tokens = value(file, "tokenizer.ggml.tokens", list)
    kinds = [int(k) for k in file.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens):
        raise ModelError("has a token twice or a token without a kind", where)
    count = len(tokens)
    if pieces:
        while count and kinds[count - 1] == _UNUSED:  # rows that no token stands for
            count -= 1
        vocabulary = {token: i for token, i in vocabulary.items() if i < count}
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": kinds[i] == _CONTROL}
        for i, token in enumerate(tokens)
        if kinds[i] in (_CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    special: dict[str, Any] = {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if type(token) is int:
            if not 0 <= token < len(tokens):
                raise ModelError(f"has the {ours} token {token} of {len(tokens)}", where)
            special[f"{ours}_token"] = tokens[token]
    add_bos = bool(file.metadata.get("tokenizer.ggml.add_bos_token", pieces)) and "bos_token" in special
    parts = _by_scores(file, vocabulary, kinds, special) if pieces else _by_merges(file, vocabulary, pre)
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "post_processor": _post(special["bos_token"], vocabulary) if add_bos else None,
            **parts,
        },
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": value(file, f"{file.metadata['general.architecture']}.context_length", int),
        "add_bos_token": add_bos,
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        write_bytes(folder / "chat_template.jinja", template.encode())
    stops = [file.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    ids = sorted({token for token in stops if type(token) is int})
    generation = {"bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"), "eos_token_id": ids}
    write_json(folder / "generation_config.json", {key: value for key, value in generation.items() if value})
    return len(tokens)


def _post(bos: str, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, text[0], {"SpecialToken": {"id": bos, "type_id": 1}}, text[1]],
        "special_tokens": {bos: {"id": bos, "ids": [vocabulary[bos]], "tokens": [bos]}},
    }


def _model(**given: Any) -> dict[str, Any]:
    fixed = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    return fixed | given


def _by_merges(file: GGUFFile, vocabulary: Mapping[str, int], pre: str) -> dict[str, Any]:
    """The parts of tokenizer.json that are byte-level BPE's."""
    pairs = [merge.split(" ") for merge in value(file, "tokenizer.ggml.merges", list)]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelError("has a broken merge", str(file.path))
    if any(part not in vocabulary for pair in pairs for part in (*pair, pair[0] + pair[1])):
        raise ModelError("has a merge whose parts are no tokens", str(file.path))
    return {
        "normalizer": _NORMALIZERS.get(pre),
        "pre_tokenizer": SPLITTERS[pre],
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _model(
            unk_token=None, fuse_unk=False, byte_fallback=False, ignore_merges=pre in _WHOLE_WORDS_FIRST,
            vocab=vocabulary, merges=pairs,
        ),
    }  # fmt: skip


def _by_scores(
    file: GGUFFile, vocabulary: Mapping[str, int], kinds: Sequence[int], special: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of a SentencePiece model: every way to join two pieces to a third is a merge, the highest score first.
    ModelError when two pieces share a score, because then the engine goes by the place in the text."""
    scores = [float(score) for score in file.metadata.get("tokenizer.ggml.scores", ())]
    if len(scores) != len(kinds):
        raise ModelError("has a token without a score", str(file.path))
    parts = {token for token, i in vocabulary.items() if kinds[i] in (_NORMAL, _UNKNOWN)}
    made = sorted((text for text in parts if len(text) > 1), key=lambda text: (-scores[vocabulary[text]], text))
    merges: list[list[str]] = []
    last = math.inf
    for text in made:
        ways = [[text[:i], text[i:]] for i in range(1, len(text)) if text[:i] in parts and text[i:] in parts]
        if ways and scores[vocabulary[text]] == last:
            raise ModelError("has two pieces of one score, which no list of merges can say", str(file.path))
        if ways:
            last = scores[vocabulary[text]]
        merges += sorted(ways, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = [{"type": "Prepend", "prepend": _SPACE}, mark] if prefix else [mark]
    back: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}]
    back += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": _model(
            unk_token=special.get("unk_token"), fuse_unk=True, byte_fallback=True, ignore_merges=False,
            vocab=vocabulary, merges=merges,
        ),
    }  # fmt: skip
