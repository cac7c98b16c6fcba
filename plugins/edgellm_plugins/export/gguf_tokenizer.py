"""A tokenizer as GGUF metadata; those made by SentencePiece are in `gguf_sentencepiece`.

llama.cpp hard-codes the pre-tokenizers (the regular expressions that cut text before merging) and a file only names
one, so a wrong name gives silently different ids. The name is found as the upstream converter finds it, by the sha256
of the ids of a fixed multilingual text; failing that, by reading the pre-tokenizer's own definition, when that is
exactly one that llama.cpp implements. Anything else is refused, never guessed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_plugins.export import gguf_sentencepiece
from edgellm_plugins.export.gguf_container import Value
from edgellm_sdk.checkpoint import read_json
from edgellm_sdk.errors import ModelError, printable

if TYPE_CHECKING:
    from edgellm_sdk.types import ModelHandle

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}

# The text is fixed by the upstream project: the hashes below are of its token ids.
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
KNOWN = {
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "0fe1cf6eda062318a1af7270f3331a85c539a01778ff948e24388e949c5282f4": "gpt-2",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "d30d75d9059f1aa2c19359de71047b3ae408c70875e8a3ccf8c5fba56c9d8af4": "qwen35",
    "877081d19cf6996e2c4ff0e1236341e9b7bde288f5311a56a937f0afbbb3aeb5": "deepseek-v3",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "fcace8b9cac38ce847670c970cd5892031a753a1ef381abd1d9af00f713da085": "phi-2",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "9c2227e4dd922002fb81bde4fc02b0483ca4f12911410dee2255e4987644e3f8": "command-r",
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "8aeee3860c56296a157a1fe2fad249ec40aa59b1bb5709f4ade11c4e6fe652ed": "falcon",
    "a6b57017d60e6edb4d88ecc2845188e0eb333a70357e45dcc9b53964a73bbae6": "falcon-h1",
    "169bf0296a13c4d9b7672313f749eb36501d931022de052aad6e36f2bf34dd51": "lfm2",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
}


def _words(digits: str) -> str:
    """The expression of Llama 3 and Qwen 2, which only differ in how many digits they keep together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )


_LLAMA3, _QWEN2 = _words(r"\p{N}{1,3}"), _words(r"\p{N}")


def metadata(model: ModelHandle, vocabulary: int) -> tuple[dict[str, Value], str, list[str]]:
    """The `tokenizer.*` keys of the tokenizer that transformers loads, how its pre-tokenizer was recognised, and what
    llama.cpp will read otherwise.

    `vocabulary` is the number of rows of the embedding; ids without a token become `[PADi]`, unused. ModelError for
    tokenizers that llama.cpp would not reproduce.
    """
    tokenizer, folder = _load(model), model.path
    where = str(folder / "tokenizer.json")
    definition = json.loads(tokenizer.to_str())
    pieces = gguf_sentencepiece.is_sentencepiece(definition)
    if pieces:
        rows, how = gguf_sentencepiece.metadata(folder, definition, vocabulary, where)
    else:
        rows, how = _byte_level(tokenizer, definition, vocabulary, where)
    settings = _optional_json(folder / "tokenizer_config.json")
    rows |= _special_ids(tokenizer, settings, _optional_json(folder / "config.json"), vocabulary, where)
    rows |= _other_ends(model, rows, where)
    rows |= _added(tokenizer, rows, where)
    if isinstance(settings.get("add_prefix_space"), bool) and not pieces:
        rows["add_space_prefix"] = Value("bool", settings["add_prefix_space"])
    found = {f"tokenizer.ggml.{key}": value for key, value in rows.items()}
    template = chat_template(folder)
    if template:
        found["tokenizer.chat_template"] = Value("string", template)
    return found, how, [*limits(definition), *gguf_sentencepiece.limits(definition)]


def _byte_level(
    tokenizer: Any, definition: Mapping[str, Any], vocabulary: int, where: str
) -> tuple[dict[str, Value], str]:
    _require_bpe(definition, where)
    pre, how = _pretokenizer(tokenizer, definition, where)
    tokens, types = _tokens(tokenizer, definition, vocabulary, where)
    rows = {
        "model": Value("string", "gpt2"),
        "pre": Value("string", pre),
        "tokens": Value("array[string]", tokens),
        "token_type": Value("array[i32]", types),
        "merges": Value("array[string]", _merges(definition["model"]["merges"], where)),
    }
    return rows, how


def _load(model: ModelHandle) -> Any:
    """The `tokenizers.Tokenizer` that the model is used with, which may differ from the one in tokenizer.json."""
    from edgellm_sdk.kit.loading import load_tokenizer

    folder = model.path
    if not (folder / "tokenizer.json").is_file():
        kind = "SentencePiece" if (folder / "tokenizer.model").is_file() else "slow"
        raise ModelError(f"has no tokenizer.json; {kind} tokenizers are not supported", str(folder))
    backend = getattr(load_tokenizer(model), "backend_tokenizer", None)
    if backend is None:
        raise ModelError("its tokenizer is not a fast one", str(folder))
    return backend


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _require_bpe(definition: Mapping[str, Any], where: str) -> None:
    """ModelError unless this is byte-level BPE without the extras that llama.cpp lacks."""
    model = definition["model"]
    if model.get("type") != "BPE" or (definition.get("decoder") or {}).get("type") != "ByteLevel":
        kind = printable(str(model.get("type")))[:40]
        raise ModelError(f"is a {kind} tokenizer; byte-level BPE and SentencePiece can be exported", where)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise ModelError(f"its BPE uses {key}, which GGUF cannot say", where)


def _pretokenizer(tokenizer: Any, definition: Mapping[str, Any], where: str) -> tuple[str, str]:
    """(name for `tokenizer.ggml.pre`, how it was found)."""
    digest = hashlib.sha256(str(tokenizer.encode(CHECK_TEXT).ids).encode()).hexdigest()
    if digest in KNOWN:
        return KNOWN[digest], f"pre-tokenizer {KNOWN[digest]!r}, recognised by the ids of the check text"
    name = _by_structure(definition)
    if name is None:
        raise ModelError(
            f"its pre-tokenizer is not one that llama.cpp is known to have (check text {digest[:16]})", where
        )
    return name, f"pre-tokenizer {name!r}, recognised by its definition"


def _by_structure(definition: Mapping[str, Any]) -> str | None:
    """The llama.cpp name of a pre-tokenizer whose definition equals it rule for rule, else None. Qwen's NFC is let
    through: llama.cpp has it for no tokenizer, which shows on decomposed letters only (see `limits`)."""
    normalizer = definition.get("normalizer")
    if normalizer and normalizer != {"type": "NFC"}:
        return None
    cut = definition.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", []) if cut.get("type") == "Sequence" else [cut]
    described = tuple(_step(step) for step in steps)
    merges_whole_words = bool(definition["model"].get("ignore_merges"))
    known = {
        (("bytes", True),): ("gpt-2", False),
        (("digits",), ("bytes", True)): ("smollm", False),
        (("split", _LLAMA3), ("bytes", False)): ("llama-bpe", True),
        (("split", _QWEN2), ("bytes", False)): ("qwen2", False),
    }
    name, ignores = known.get(described, (None, merges_whole_words))
    if ignores != merges_whole_words or (normalizer and name != "qwen2"):
        return None
    return name


def limits(definition: Mapping[str, Any]) -> list[str]:
    """What llama.cpp will read otherwise than this tokenizer, in words."""
    found = []
    normalizer = definition.get("normalizer") or {}
    if normalizer.get("type") == "NFC":
        found.append("llama.cpp does not compose letters (NFC): give it composed text, as keyboards make it")
    strips = [t for t in definition.get("added_tokens", []) if t.get("lstrip") or t.get("rstrip")]
    if strips:
        names = ", ".join(printable(str(token["content"]))[:30] for token in strips[:3])
        found.append(f"llama.cpp keeps the spaces beside added tokens that drop them: {names}")
    return found


def _step(step: Mapping[str, Any]) -> tuple[Any, ...]:
    match step.get("type"):
        case "ByteLevel" if not step.get("add_prefix_space"):
            return "bytes", bool(step.get("use_regex", True))
        case "Digits" if step.get("individual_digits"):
            return ("digits",)
        case "Split" if step.get("behavior") == "Isolated" and not step.get("invert"):
            return "split", (step.get("pattern") or {}).get("Regex")
    return ("unknown",)


def _tokens(tokenizer: Any, definition: Mapping[str, Any], vocabulary: int, where: str) -> tuple[list[str], list[int]]:
    """Token texts and their types in the order of ids."""
    ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    by_id = {number: text for text, number in ids.items()}
    if len(by_id) != len(ids) or min(by_id, default=0) < 0:
        raise ModelError("two tokens share one id", where)
    if max(by_id, default=0) >= vocabulary:
        raise ModelError(
            f"has a token with id {max(by_id)}, the model only {vocabulary} rows", where, "resize the embeddings"
        )
    added = {token["id"]: token for token in definition.get("added_tokens", [])}
    tokens, types = [], []
    for number in range(vocabulary):
        text = by_id.get(number)
        if text is None:
            tokens.append(f"[PAD{number}]")
            types.append(UNUSED)
        elif number in added:
            token = added[number]
            if not token.get("normalized"):  # llama.cpp looks for the text as it stands in the input
                encoded = tokenizer.encode(text, add_special_tokens=False).ids
                text = tokenizer.decode(encoded, skip_special_tokens=False)
            control = token.get("special") or gguf_sentencepiece.looks_special(text)
            tokens.append(text)
            types.append(CONTROL if control else USER_DEFINED)
        else:
            tokens.append(text)
            types.append(NORMAL)
    return tokens, types


def _merges(merges: Any, where: str) -> list[str]:
    """`left right` lines; a space inside a piece becomes its byte-level letter, so that the line splits in two."""
    lines = []
    for merge in merges:
        pieces = merge.split(" ") if isinstance(merge, str) else list(merge)
        if len(pieces) != 2:
            raise ModelError(f"merge {printable(str(merge))[:40]!r} is not a pair", where)
        lines.append(" ".join(piece.replace(" ", "Ġ") for piece in pieces))
    return lines


def _special_ids(
    tokenizer: Any, settings: Mapping[str, Any], config: Mapping[str, Any], size: int, where: str
) -> dict[str, Value]:
    """bos, eos, ... ids: the token that tokenizer_config.json names, else the id in config.json."""
    rows = {}
    for kind, key in SPECIAL.items():
        token = settings.get(f"{kind}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            number = config.get(f"{kind}_token_id")
            number = number[0] if isinstance(number, list) and number else number
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < size:
            raise ModelError(f"{kind} token id {printable(str(number))[:20]} is outside the vocabulary", where)
        rows[f"{key}_token_id"] = Value("u32", number)
    return rows


def _other_ends(model: ModelHandle, rows: Mapping[str, Value], where: str) -> dict[str, Value]:
    """Tokens besides eos that end a generation; GGUF has room for two (end of turn, end of message)."""
    from edgellm_sdk.kit.loading import eos_ids

    eos = rows.get("eos_token_id")
    ends = [number for number in eos_ids(model) if eos and number != eos.value]
    if len(ends) > 2 or any(number >= len(rows["tokens"].value) for number in ends):
        raise ModelError(f"{len(ends) + 1} tokens end a generation, GGUF can name 3 of the vocabulary", where)
    return {f"{key}_token_id": Value("u32", number) for key, number in zip(("eot", "eom"), ends, strict=False)}


def _added(tokenizer: Any, rows: Mapping[str, Value], where: str) -> dict[str, Value]:
    """What is put around every text, seen on one: nothing, BOS before it, EOS behind it; else ModelError."""
    inner = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    starts = {f"{kind}_token_id": rows.get(f"{kind}_token_id") for kind in ("bos", "eos")}
    before = [value.value] if (value := starts["bos_token_id"]) else []
    after = [value.value] if (value := starts["eos_token_id"]) else []
    for add_bos in (False, True):
        for add_eos in (False, True):
            if whole == before * add_bos + inner + after * add_eos and (before or not add_bos):
                added = {"add_bos_token": Value("bool", add_bos)}
                return added | ({"add_eos_token": Value("bool", True)} if add_eos else {})
    raise ModelError("puts tokens around a text that are neither BOS before nor EOS behind it", where)


def chat_template(folder: Path) -> str | None:
    """The model's Jinja chat template (the one named `default` of several), or None."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            raise ModelError("cannot be read as UTF-8 text", str(file)) from None
    template = _optional_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
