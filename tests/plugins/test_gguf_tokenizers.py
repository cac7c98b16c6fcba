"""Tokenizers: llama.cpp reads every text into the ids that transformers gives it."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
sys.path[:0] = [str(Path(__file__).parents[1] / "core"), str(Path(__file__).parent)]

import decoders  # noqa: E402
from edgellm_plugins.export import gguf_sentencepiece, gguf_tokenizer  # noqa: E402
from edgellm_plugins.export.gguf import Config, edgellm_export  # noqa: E402
from test_gguf import varied_strings  # noqa: E402

from edgellm_sdk import gguf_file  # noqa: E402
from edgellm_sdk.context import Context  # noqa: E402
from edgellm_sdk.errors import ModelError  # noqa: E402
from edgellm_sdk.types import Artifact, ModelHandle  # noqa: E402

COUNT = 1200
MARK = "\u2581"


def handle(folder: Path) -> ModelHandle:
    return ModelHandle(folder, "0" * 64, "hf", "any", "float32", 1, (), "tiny")


def export(folder: Path, target: Path) -> Artifact:
    return edgellm_export(handle(folder), target, Config(modelfile=False), Context(target.parent / "run"))


def split(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2(folder: Path) -> Path:
    from tokenizers import pre_tokenizers

    decoders.write_kind(folder, "llama")
    decoders.write_bpe(folder, pre_tokenizers.ByteLevel(add_prefix_space=False))
    return folder


def llama3(folder: Path) -> Path:
    decoders.write_kind(folder, "llama")
    decoders.write_bpe(folder, split(gguf_tokenizer._LLAMA3), whole_words=True)
    return folder


def pieces(kind: str, style: str, model_file: bool) -> Callable[[Path], Path]:
    return lambda folder: decoders.with_sentencepiece(folder, kind, style, model_file)


TOKENIZERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "smollm": ("smollm", lambda folder: decoders.write_kind(folder, "llama")),
    "gpt-2": ("gpt-2", gpt2),
    "llama-bpe": ("llama-bpe", llama3),
    "qwen2": ("qwen2", lambda folder: decoders.write_kind(folder, "qwen2")),
    "llama 2": ("default", pieces("llama", "llama", True)),
    "llama 2, merges only": ("default", pieces("llama", "llama", False)),
    "mistral": ("default", pieces("mistral", "llama", True)),
    "phi3": ("default", pieces("phi3", "llama", True)),
    "gemma2": ("default", pieces("gemma2", "gemma", True)),
    "gemma3": ("default", pieces("gemma3", "gemma", False)),
    "unigram": ("default", pieces("llama", "unigram", True)),
    "unigram, tokenizer.json only": ("default", pieces("llama", "unigram", False)),
}


class Pair:
    """A tokenizer and the engine that reads its file."""

    def __init__(self, folder: Path, name: str) -> None:
        from edgellm_sdk.kit.loading import load_tokenizer

        self.name, (self.pre, make) = name, TOKENIZERS[name]
        self.folder = make(folder / "model")
        self.artifact = export(self.folder, folder / "m.gguf")
        self.tokenizer = load_tokenizer(handle(self.folder))
        self.engine = llama_cpp.Llama(str(self.artifact.path), vocab_only=True, verbose=False)
        self.composed = any("NFC" in text for text in self.artifact.verified.get("limits", ()))
        self.unigram = name.startswith("unigram")

    def texts(self) -> list[str]:
        """Varied strings with this tokenizer's own added tokens, composed and without spaces alone where that is a
        stated limit."""
        own = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        names = dict(zip(("<|im_start|>", "<|im_end|>", "<|endoftext|>"), (own * 3)[-3:], strict=True))
        found = []
        for text in varied_strings(COUNT + 200):
            for old, new in names.items():
                text = text.replace(old, new)
            parts = re.split("|".join(map(re.escape, own)), text)
            if not (self.unigram and ("  " in text + " " or " " in parts)):
                found.append(unicodedata.normalize("NFC", text) if self.composed else text)
        return found

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        want = self.tokenizer.encode(text, add_special_tokens=False)
        return want, self.engine.tokenize(text.encode(), add_bos=False, special=True)


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("tokenizer"), request.param)


@pytest.mark.llama
def test_varied_strings_give_the_same_ids(pair: Pair) -> None:
    texts = pair.texts()
    assert len(texts) >= (300 if pair.unigram else 1000)
    wrong = [text for text in texts if len(set(map(tuple, pair.ids(text)))) != 1]
    assert wrong == []
    assert sum(len(pair.ids(text)[0]) for text in texts[:100]) > 1000


@pytest.mark.llama
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_text_gives_the_same_ids(pair: Pair, data: Any) -> None:
    letters = st.characters(exclude_categories=("Cs",), exclude_characters="\0" + MARK)
    some = st.one_of(st.text(letters, max_size=12), st.sampled_from((" a", "the ", "12", "\n", "Don't", "é")))
    text = "".join(data.draw(st.lists(some, max_size=6)))
    if pair.composed:
        text = unicodedata.normalize("NFC", text)
    if pair.unigram:
        text = " ".join(text.split(" ")).strip(" ").replace("  ", " ")
        while "  " in text:
            text = text.replace("  ", " ")
    want, got = pair.ids(text)
    assert got == want


@pytest.mark.llama
def test_the_file_says_which_tokenizer(pair: Pair) -> None:
    found = gguf_file.read(pair.artifact.path).metadata
    assert found["tokenizer.ggml.pre"] == pair.pre
    kind = "t5" if pair.unigram else "llama" if pair.pre == "default" else "gpt2"
    assert found["tokenizer.ggml.model"] == kind
    assert found["tokenizer.chat_template"] == (pair.folder / "chat_template.jinja").read_text()
    if kind == "gpt2":
        return
    types = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert types["<|end|>"] == types["<s>"] == 3 and types["<tool>"] == 4 and types["<0x0A>"] == 6
    assert [kind for text, kind in types.items() if text.startswith("[PAD")] == [5, 5, 5]
    scores = found["tokenizer.ggml.scores"]
    assert scores[found["tokenizer.ggml.tokens"].index("<tool>")] == -1000.0 and scores[-1] == -10000.0


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def come_back(merges: list[list[str]]) -> None:
    """Move one of two ways to make a piece to the end of the list."""
    made = ["".join(pair) for pair in merges]
    merges.append(merges.pop(next(i for i, text in enumerate(made) if made.count(text) > 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda t: t.update(normalizer=None), "mark spaces"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "Whitespace"),
        (lambda t: t["model"]["merges"].pop(3), "which llama.cpp would"),
        (lambda t: come_back(t["model"]["merges"]), "no scores"),
        (lambda t: t["model"]["vocab"].update({"zzz": 4000}), "holes|rows"),
    ],
)
def test_sentencepiece_that_llama_cpp_would_read_otherwise_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = decoders.with_sentencepiece(tmp_path / "model", "llama", "llama", model_file=False)
    edit(folder, change)
    with pytest.raises(ModelError, match=message) as caught:
        export(folder, tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_model_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = decoders.with_sentencepiece(tmp_path / "model", "llama", "llama")
    good = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(good.replace(b"the", b"eht"))
    with pytest.raises(ModelError, match="disagree about token"):
        export(folder, tmp_path / "m.gguf")
    other = decoders.with_sentencepiece(tmp_path / "other", "llama", "unigram")
    (folder / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes())
    with pytest.raises(ModelError, match="another kind"):
        export(folder, tmp_path / "m.gguf")
    edit(other, lambda t: t["model"].update(byte_fallback=True))
    with pytest.raises(ModelError, match="bytes"):
        export(other, tmp_path / "m.gguf")


def test_damaged_models_are_refused_in_one_line(tmp_path: Path) -> None:
    rows = [("<unk>", 0.0, 2), ("a", -1.0, 1), ("b", -2.0, 1), ("ab", -0.5, 1)]
    good, path = decoders.sentencepiece_model(rows, 2, True), tmp_path / "tokenizer.model"
    path.write_bytes(good)
    found = gguf_sentencepiece.read_model(path)
    assert found.texts == ("<unk>", "a", "b", "ab") and found.scores == (0.0, -1.0, -2.0, -0.5) and found.kind == 2
    refused = 0
    for place in range(len(good)):
        for raw in (good[:place], good[:place] + b"\xff" * 11 + good[place:], good[:place] + good[place + 1 :]):
            path.write_bytes(raw)
            try:
                gguf_sentencepiece.read_model(path)
            except ModelError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > len(good)


def test_our_reader_agrees_with_sentencepiece(tmp_path: Path) -> None:
    """A model that SentencePiece itself trained."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("\n".join(decoders.CORPUS * 30))
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / kind), vocab_size=320, model_type=kind, byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
        model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / f"{kind}.model"))
        found = gguf_sentencepiece.read_model(tmp_path / f"{kind}.model")
        assert found.texts == tuple(model.id_to_piece(i) for i in range(model.vocab_size()))
        assert found.scores == tuple(model.get_score(i) for i in range(model.vocab_size()))
        assert found.kind == (2 if kind == "bpe" else 1)
