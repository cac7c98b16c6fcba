"""The strict readers: every shape that is accepted, every malformed kind refused in one line that names the place."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk import data
from edgellm_sdk.errors import ConfigError, DataError
from edgellm_sdk.random import Stream
from edgellm_sdk.types import Dataset, Example

GOOD = b'{"prompt": "a", "completion": "b"}\n'
PAIR = '"prompt": "a", "completion": "b"'

BAD_JSONL: dict[str, tuple[bytes, int, str]] = {
    # kind: (bytes, line, part of the cause)
    "empty file": (b"", 1, "empty"),
    "only blank lines": (b"\n\r\n  \n", 1, "no examples"),
    "byte-order mark": (b"\xef\xbb\xbf" + GOOD, 1, "byte-order mark"),
    "UTF-16 LE": (GOOD.decode().encode("utf-16"), 1, "UTF-16"),
    "UTF-16 BE": (b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), 1, "UTF-16"),
    "UTF-16 without a mark": (GOOD.decode().encode("utf-16-le"), 1, "NUL byte"),
    "UTF-32": (GOOD.decode().encode("utf-32"), 1, "UTF-16"),
    "Latin-1": (GOOD + '{"prompt": "é", "completion": "b"}\n'.encode("latin-1"), 2, "not UTF-8"),
    "overlong UTF-8": (b'{"prompt": "\xc0\xaf", "completion": "b"}\n', 1, "not UTF-8"),
    "UTF-8 surrogate": (b'{"prompt": "\xed\xa0\x80", "completion": "b"}\n', 1, "not UTF-8"),
    "cut UTF-8": (GOOD + b'{"prompt": "\xf0\x9f', 2, "not UTF-8"),
    "NUL byte": (GOOD + b'{"prompt": "\0", "completion": "b"}\n', 2, "NUL byte"),
    "escaped NUL": (b'{"prompt": "\\u0000", "completion": "b"}\n', 1, "NUL character"),
    "lone surrogate": (GOOD * 2 + b'{"prompt": "\\ud800", "completion": "b"}\n', 3, "lone surrogate"),
    "lone surrogate in a key": (b'{"\\udfff": 1, "prompt": "a", "completion": "b"}\n', 1, "lone surrogate"),
    "lone surrogate in an ignored field": (b'{"x": ["\\ud800"], "prompt": "a", "completion": "b"}', 1, "surrogate"),
    "raw control character": (b'{"prompt": "\x1b[2J", "completion": "b"}\n', 1, "control character"),
    "NaN": (b'{"prompt": "a", "completion": "b", "x": NaN}\n', 1, "NaN"),
    "Infinity": (b'{"prompt": "a", "completion": "b", "x": -Infinity}\n', 1, "Infinity"),
    "1e400": (b'{"prompt": "a", "completion": "b", "x": 1e400}\n', 1, "too large"),
    "5000 digits": (b'{"prompt": "a", "completion": "b", "x": ' + b"7" * 5000 + b"}\n", 1, "not valid JSON"),
    "duplicate key": (b'{"prompt": "a", "prompt": "c", "completion": "b"}\n', 1, "twice"),
    "duplicate key inside": (b'{"x": {"y": 1, "y": 1}, "prompt": "a", "completion": "b"}\n', 1, "twice"),
    "deep nesting": (b"[" * 100_000 + b"]" * 100_000 + b"\n", 1, "nested"),
    "65 levels": (b'{"x": ' + b"[" * 64 + b"]" * 64 + b', "prompt": "a", "completion": "b"}', 1, "nested deeper"),
    "not JSON": (GOOD + b"hello\n", 2, "not valid JSON"),
    "two objects on a line": (GOOD.strip() + GOOD, 1, "Extra data"),
    "cut line": (GOOD + b'{"prompt": "a", "comple', 2, "not valid JSON"),
    "single quotes": (b"{'prompt': 'a'}\n", 1, "not valid JSON"),
    "trailing comma": (b'{"prompt": "a", "completion": "b",}\n', 1, "not valid JSON"),
    "a JSON array": (b'[{"prompt": "a"}]\n', 1, "a list where an object"),
    "a pretty-printed array": (b'[\n  {"prompt": "a"}\n]\n', 1, "not valid JSON"),
    "a number": (b"7\n", 1, "a number where an object"),
    "null": (b"null\n", 1, "null where an object"),
    "no known field": (b'{"question": "a"}\n', 1, "known shapes"),
    "empty object": (b"{}\n", 1, "known shapes"),
    "completion missing": (GOOD + b'{"prompt": "a"}\n', 2, "lacks the field 'completion'"),
    "output missing": (b'{"instruction": "a"}\n', 1, "lacks the field 'output'"),
    "text missing": (b'{"label": "a"}\n', 1, "lacks the field 'text'"),
    "completion is a number": (b'{"prompt": "a", "completion": 7}\n', 1, "'completion' is a number, not text"),
    "completion is null": (b'{"prompt": "a", "completion": null}\n', 1, "null, not text"),
    "prompt is a list": (b'{"prompt": ["a"], "completion": "b"}\n', 1, "a list, not text"),
    "completion is blank": (b'{"prompt": "a", "completion": "  "}\n', 1, "'completion' is empty"),
    "text is empty": (b'{"text": ""}\n', 1, "'text' is empty"),
    "label is null": (b'{"text": "a", "label": null}\n', 1, "'label' is null"),
    "label is a boolean": (b'{"text": "a", "label": true}\n', 1, "'label' is true or false"),
    "label is a float": (b'{"text": "a", "label": 0.5}\n', 1, "'label' is a number"),
    "label with a line end": (b'{"text": "a", "label": "x\\ny"}\n', 1, "control characters"),
    "label too long": (b'{"text": "a", "label": "' + b"x" * 256 + b'"}\n', 1, "255 bytes"),
    "user is a list": (b'{"text": "a", "user": []}\n', 1, "'user' is a list"),
    "user is blank": (b'{"text": "a", "user": ""}\n', 1, "'user' is empty"),
    "user with an escape": (b'{"text": "a", "user": "\\u001b[2J"}\n', 1, "control characters"),
    "two shapes in a row": (f'{{{PAIR}, "messages": []}}'.encode(), 1, "is both"),
    "mixed shapes": (GOOD + b'{"text": "a"}\n', 2, "line 1 has 'prompt and completion'"),
    "label comes and goes": (b'{"text": "a", "label": "b"}\n{"text": "a"}\n', 2, "has the shape 'text'"),
    "messages is text": (b'{"messages": "hi"}\n', 1, "not a list of turns"),
    "no messages": (b'{"messages": []}\n', 1, "not a list of turns"),
    "a turn is text": (b'{"messages": ["hi"]}\n', 1, "turn 1 is not an object"),
    "a turn without role": (b'{"messages": [{"content": "hi"}]}\n', 1, "lacks the field 'role'"),
    "unknown role": (b'{"messages": [{"role": "human", "content": "hi"}]}\n', 1, "role 'human'"),
    "content is a list": (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n', 1, "not text"),
    "no assistant": (b'{"messages": [{"role": "user", "content": "hi"}]}\n', 1, "no assistant turn"),
    "assistant first": (b'{"messages": [{"role": "assistant", "content": "hi"}]}\n', 1, "starts with the assistant"),
}


def one_line(error: DataError) -> str:
    text = str(error)
    assert error.exit_code == 5 and len(text) <= 300 and text.isprintable()
    return text


@pytest.mark.parametrize("kind", BAD_JSONL)
def test_malformed_jsonl(tmp_path: Path, kind: str) -> None:
    raw, line, cause = BAD_JSONL[kind]
    path = tmp_path / "my.jsonl"
    path.write_bytes(raw)
    with pytest.raises(DataError) as caught:
        data.read(str(path))
    text = one_line(caught.value)
    assert f"my.jsonl:{line}: " in text and cause in text


BAD_CSV: dict[str, tuple[bytes, str]] = {
    "no text column": (b"body,label\na,b\n", "no 'text' column; it has 'body', 'label'"),
    "no label column": (b"text,body\na,b\n", "no 'label' column"),
    "column twice": (b"text,text,label\na,b,c\n", "appears twice"),
    "a cell too many": (b"text,label\na,b,c\n", ":2: has 3 cells"),
    "a cell too few": (b"text,label\na,b\na\n", ":3: has 1 cells"),
    "text after a quote": (b'text,label\n"a"b,c\n', ":2: not valid CSV"),
    "quote never closed": (b'text,label\na,b\n"c,d\n', ":3: not valid CSV"),
    "header only": (b"text,label\n", "no examples"),
    "empty cell": (b"text,label\n,b\n", "'text' is empty"),
    "empty label": (b"text,label\na,\n", "'label' is empty"),
    "NUL": (b"text,label\na\0,b\n", ":2: holds a NUL byte"),
    "byte-order mark": (b"\xef\xbb\xbftext,label\na,b\n", "byte-order mark"),
    "Latin-1": ("text,label\né,b\n".encode("latin-1"), ":2: byte 1 is not UTF-8"),
    "a swallowing quote": (b'text,label\n"a' + b"\nb,c" * 50_000 + b'"\n', "not valid CSV"),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_malformed_csv(tmp_path: Path, kind: str) -> None:
    raw, cause = BAD_CSV[kind]
    (tmp_path / "my.csv").write_bytes(raw)
    with pytest.raises(DataError) as caught:
        data.read(str(tmp_path / "my.csv"))
    assert cause in one_line(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    long = tmp_path / ("x" * 300 + ".jsonl")
    for path, cause in [
        (tmp_path / "pipe.jsonl", "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / "folder.jsonl", "no train, valid or test"),
        (tmp_path / "nothing.jsonl", "No such file"),
        (tmp_path / "gone.jsonl", "No such file"),
        (tmp_path / "loop.jsonl", "oo many"),
        (long, "too long"),
        (tmp_path / "a\0b.jsonl", "NUL"),
        (Path("no-such-name"), "built-in"),
    ]:
        with pytest.raises(DataError, match=cause) as caught:
            data.read(str(path))
        one_line(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "my.jsonl").write_bytes(GOOD)
    (tmp_path / "my.jsonl").chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        data.read(str(tmp_path / "my.jsonl"))


def test_a_line_of_1_gib_is_refused_at_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "huge.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"text": "')
        file.truncate(1 << 30)
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"huge\.jsonl:2: the line is longer than 16 MiB"):
        data.read(str(path))
    assert time.perf_counter() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_unicode_line_ends_do_not_split(tmp_path: Path) -> None:
    path, text = tmp_path / "u.jsonl", "a\u2028b\u2029c\u0085d\x1ce"
    rows = [json.dumps({"text": text}), json.dumps({"text": text}, ensure_ascii=False)]
    path.write_bytes("\r\n".join([*rows, "", ""]).encode())
    assert [e.completion for e in data.read(str(path)).examples] == [text, text]


@pytest.mark.parametrize("name", ["é.jsonl", "e\u0301.jsonl", "👩‍👩‍👧.jsonl", "שלום.jsonl", "-x.jsonl", " a b .jsonl"])
def test_names_of_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD + b"x\n")
    with pytest.raises(DataError, match="not valid JSON") as caught:
        data.read(str(tmp_path / name))
    one_line(caught.value)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\x1b[2J.jsonl"
    Path(os.fsdecode(path)).write_bytes(b"x\n")
    with pytest.raises(DataError) as caught:
        data.read(os.fsdecode(path))
    one_line(caught.value)


def written(folder: Path, *rows: Any, name: str = "d.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def test_shapes(tmp_path: Path) -> None:
    def first(row: dict[str, Any]) -> Example:
        return data.read(written(tmp_path, row)).examples[0]

    assert first({"prompt": "a", "completion": " b"}) == Example(user("a"), " b")
    assert first({"instruction": "a", "output": "b"}) == Example(user("a"), "b")
    assert first({"instruction": "a", "input": None, "output": "b"}) == Example(user("a"), "b")
    assert first({"instruction": "a", "input": "x", "output": "b"}) == Example(user("a\n\nx"), "b")
    assert first({"text": "a", "id": 7, "user": 12}) == Example("", "a", None, "12")
    labelled = first({"text": "hi", "label": 1})
    assert (labelled.completion, labelled.label) == ("1", "1") and "hi" in labelled.prompt[0]["content"]  # type: ignore[index]


def test_a_conversation_gives_an_example_for_each_answer(tmp_path: Path) -> None:
    turns = [("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")]
    messages = [{"role": role, "content": content, "extra": 1} for role, content in turns]
    found = data.read(written(tmp_path, {"messages": messages, "user": "me"})).examples
    assert [e.completion for e in found] == ["2", "4"] and {e.user for e in found} == {"me"}
    assert [turn["content"] for turn in found[1].prompt] == ["s", "1", "2", "3"]  # type: ignore[index]
    assert found[0].prompt == tuple({"role": r, "content": c} for r, c in turns[:2])


def test_csv(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b'Category,Message\r\nspam,"win, ""now""\r\n\r\nhere"\r\nham,ok\r\n')
    found = data.read(str(tmp_path / "d.csv"), task_prompt="{text}|{labels}")
    assert found.labels == ("ham", "spam")
    assert found.examples[0].prompt == user('win, "now"\n\nhere|ham or spam')
    assert [e.label for e in found.examples] == ["spam", "ham"]


def test_task_prompt_replaces_only_its_fields(tmp_path: Path) -> None:
    source = written(tmp_path, {"text": "{labels} {0.__class__}", "label": "a"}, {"text": "x", "label": "b"})
    assert data.read(source, task_prompt="{x} {text}").examples[0].prompt == user("{x} {labels} {0.__class__}")
    with pytest.raises(ConfigError, match="no {text}"):
        data.read(source, task_prompt="hello")
    many = written(tmp_path, *({"text": "x", "label": k} for k in range(65)))
    with pytest.raises(DataError, match="65 labels"):
        data.read(many)
    assert len(data.read(many, task_prompt="{text}?").labels) == 65


def test_folder_of_splits(tmp_path: Path) -> None:
    written(tmp_path, {"text": "1", "label": "a"}, {"text": "2", "label": "b"}, name="train.jsonl")
    (tmp_path / "validation.csv").write_text("text,label\n3,a\n")
    train, valid = data.read(str(tmp_path)), data.read(str(tmp_path), "valid")
    assert (len(train), len(valid)) == (2, 1) and train.labels == valid.labels == ("a", "b")
    assert "a or b" in valid.examples[0].prompt[0]["content"]  # type: ignore[index]
    with pytest.raises(DataError, match="no test file .*; it has train, valid"):
        data.read(str(tmp_path), "test")
    with pytest.raises(ConfigError, match="not a split"):
        data.read(str(tmp_path), "dev")
    (tmp_path / "train.csv").write_text("text,label\n3,a\n")
    with pytest.raises(DataError, match=r"both train\.jsonl and train\.csv"):
        data.read(str(tmp_path))


def test_sms_spam() -> None:
    parts = {name: data.read("sms-spam", name) for name in data.SPLITS}
    assert [len(parts[name]) for name in data.SPLITS] == [3611, 516, 1032]
    texts = [e.prompt[0]["content"] for part in parts.values() for e in part.examples]  # type: ignore[index]
    assert len(set(texts)) == len(texts) == 5159
    assert all(part.labels == ("ham", "spam") for part in parts.values())
    spam = {name: data.describe(part)["labels"]["spam"] for name, part in parts.items()}
    assert spam == {"train": 449, "valid": 64, "test": 128}
    assert parts["test"].fingerprint == data.read("sms-spam", "test").fingerprint


def test_fingerprint_is_the_content(tmp_path: Path) -> None:
    one = data.read(written(tmp_path, {"prompt": "a", "completion": "b"}, name="one.jsonl"))
    two = data.read(written(tmp_path, {"completion": "b", "x": 1, "prompt": "a"}, name="two.jsonl"))
    other = data.read(written(tmp_path, {"prompt": "ab", "completion": "b"}, name="three.jsonl"))
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert data.select(one, [0]).fingerprint == one.fingerprint
    assert one.select([0, 0]).fingerprint != one.fingerprint and len(one.select([0, 0])) == 2


def labelled(labels: list[str | None]) -> Dataset:
    return Dataset(tuple(Example(user(str(i)), "c", label) for i, label in enumerate(labels)), "f")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["a", "b", "c", None]), min_size=2, max_size=60), st.floats(0.05, 0.95), st.integers(0, 9)
)
def test_split_is_stratified(labels: list[str | None], fraction: float, seed: int) -> None:
    whole = labelled(labels)
    try:
        one, two = data.split(whole, fraction, Stream(seed, "s"))
    except ConfigError:
        assert round(fraction * len(labels)) in (0, len(labels))
        return
    assert sorted(map(repr, one.examples + two.examples)) == sorted(map(repr, whole.examples))
    assert len(one) == round(sum(fraction * labels.count(k) for k in dict.fromkeys(labels)))
    for label in set(labels):
        here = sum(e.label == label for e in one.examples)
        assert abs(here - fraction * labels.count(label)) < 1
    again, _ = data.split(whole, fraction, Stream(seed, "s"))
    assert again.fingerprint == one.fingerprint


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_split_wants_a_fraction(fraction: float) -> None:
    with pytest.raises(ConfigError):
        data.split(labelled(["a", "b"]), fraction, Stream(0, "s"))


def test_describe(tmp_path: Path) -> None:
    about = data.describe(data.read(written(tmp_path, {"prompt": "abc", "completion": "b", "user": "x"})))
    assert (about["examples"], about["users"], about["prompt_characters"]["max"]) == (1, 1, 3)
    json.dumps(about)


def test_reading_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    source = written(tmp_path, {"text": "a"})
    code = "import sys; from edgellm_sdk import data; data.describe(data.read(sys.argv[1]));"
    code += "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, source], check=True, env={**os.environ, "LANG": "C", "PYTHONUTF8": "0"})


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
def test_any_bytes_give_a_dataset_or_one_line(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.jsonl", "a.csv"):
        (folder / name).write_bytes(raw)
        try:
            data.read(str(folder / name))
        except DataError as error:
            one_line(error)


@pytest.mark.bar("U2")
@pytest.mark.parametrize("row", ['"text": "{}"', '"text": "{}", "label": "spam"', '"prompt": "{}", "completion": "{}"'])
def test_a_million_lines(tmp_path: Path, row: str) -> None:
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for k in range(1_000_000):
            file.write("{" + row.replace("{}", f"message number {k}") + "}\n")
    # VmHWM, for ru_maxrss would be at least what this process held when it started the other.
    code = "import sys; from edgellm_sdk import data; assert len(data.read(sys.argv[1])) == 10**6;"
    code += "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 300 << 10


def test_answers_stand_for_the_labels_of_the_built_in_set() -> None:
    ours = data.read("sms-spam", "valid")
    assert (ours.labels, ours.answers) == (("ham", "spam"), ("No", "Yes"))
    assert {(e.label, e.completion) for e in ours.examples} == {("ham", "No"), ("spam", "Yes")}
    plain = data.read("sms-spam", "valid", "{text}\n{labels}?")
    assert plain.answers == ("ham", "spam") and {e.completion for e in plain.examples} == {"ham", "spam"}
    assert data.select(ours, [0, 1]).answers == ours.answers
