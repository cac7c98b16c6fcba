"""`bench device` and `verify`: exported files measured side by side, and held against a model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm_sdk as edgellm
from edgellm_sdk import charts, page_tables, steps
from edgellm_sdk.cli.main import main
from edgellm_sdk.errors import ConfigError, DataError, GateError, ModelError
from edgellm_sdk.kit import perplexity
from edgellm_sdk.steps import devices
from edgellm_sdk.types import Generation, SessionStats

TEXT = " ".join(f"the {n} quick brown fox jumps over lazy dogs, number {n * n}." for n in range(60))


class Counting:
    """Logits of token t + 1 after token t are `lead`, of every other 0; BOS is token 9."""

    device, vocabulary, eos = "none", 10, (0,)

    def __init__(self, lead: float = 0.0) -> None:
        self.lead = lead
        self.seen: list[tuple[list[int], int]] = []

    def encode(self, text: str) -> list[int]:
        return [int(c) for c in text]

    def prompt_ids(self, prompt: Any) -> list[int]:
        return [9, *self.encode(prompt)]

    def logits(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[Any]:
        (ids,), (begin,) = sequences, first or [len(sequences[0]) - 1]
        self.seen.append((list(ids), begin))
        found = np.zeros((len(ids) - begin, self.vocabulary), np.float32)
        for row, token in enumerate(ids[begin:]):
            found[row, (token + 1) % 10] = self.lead
        return [found]


def test_perplexity_is_of_the_second_half_of_every_chunk() -> None:
    """Three predictions of eight tokens: those of the tokens 5, 6 and 7."""
    session: Any = Counting()
    given = perplexity.chunks(session, "1234567801230123456", 8, 9)
    assert given == [[9, 2, 3, 4, 5, 6, 7, 8], [9, 1, 2, 3, 0, 1, 2, 3]]
    found = perplexity.quality(session, given)
    assert session.seen == [([9, 2, 3, 4, 5, 6, 7], 4), ([9, 1, 2, 3, 0, 1, 2], 4)]
    assert found.losses.tolist() == pytest.approx([math.log(10)] * 6)
    assert found.metrics()["perplexity"].value == pytest.approx(10) and found.metrics()["perplexity"].n == 6
    with pytest.raises(DataError, match="3 tokens, a chunk needs 8"):
        perplexity.chunks(session, "123", 8, 1)


def test_divergence_is_from_the_reference() -> None:
    flat: Any = Counting()
    sure: Any = Counting(2.0)
    p = math.exp(2) / (math.exp(2) + 9)
    wanted = p * math.log(10 * p) + (1 - p) * math.log(10 * (1 - p) / 9)
    found = perplexity.quality(flat, [[1, 2, 3, 4, 5, 6, 7, 8]], sure)
    assert found.kl.tolist() == pytest.approx([wanted] * 3)
    assert found.metrics()["KL"].value == pytest.approx(wanted)
    sure.vocabulary = 11
    with pytest.raises(ModelError, match="10 logits, its reference 11"):
        perplexity.quality(flat, [[1, 2, 3]], sure)


def test_the_clock_is_read_around_the_second_pass() -> None:
    class Clock(Counting):
        told = iter(((64, 9.0, 0, 0.0, 5), (96, 11.0, 0, 0.0, 6), (112, 12.0, 8, 4.0, 7)))

        def stats(self) -> SessionStats:
            return SessionStats(1, *next(self.told))

        def generate(self, tokens: Sequence[int], most: int) -> Generation:
            assert (len(tokens), most) == (devices.OPENING, 8)
            return Generation((), "", "length", 1.0)

    session: Any = Clock()
    assert devices.timed(session, [1] * 32, 8) == devices.Timing(1, 16.0, 2.0, 7)


def test_the_front_is_who_nobody_beats() -> None:
    dots = [charts.Dot(str(n), x, y, y, y) for n, (x, y) in enumerate([(1, 9), (2, 5), (3, 6), (4, 5), (5, 1)])]
    assert [dot.name for dot in page_tables._front(dots, more=False)] == ["0", "1", "4"]
    assert [dot.name for dot in page_tables._front(dots, more=True)] == ["4"]


@pytest.fixture(scope="module")
def files(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("files")
    made = []
    for kind in ("f32", "q8_0"):
        path = folder / f"{kind}.gguf"
        edgellm.export("gguf", str(tiny_llama), path, gate=False, options={"type": kind, "modelfile": False})
        made.append(path)
    return made


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.mark.llama
def test_files_side_by_side(
    files: list[Path], tiny_llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["bench", "device", *map(str, files), "--against", str(tiny_llama), "--text", str(text)]
    asked += ["--chunk", "64", "--chunks", "3", "--tokens", "4", "--turns", "2", "--output", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as done:
        main([*asked, "--quiet"])
    assert done.value.code == 0
    told = capsys.readouterr().out
    assert "2 files on llama_cpp" in told and "report.html" in told
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (table,) = report["tables"]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    exact, rounded = rows
    assert exact["file"] == "f32.gguf" and exact["size, MB"] > rounded["size, MB"]
    assert float(exact["KL, nats"].split()[0]) < 1e-6 < float(rounded["KL, nats"].split()[0]) < 1e-2
    assert all(row["generated tokens/s"] > 0 and row["prompt tokens/s"] > 0 and row["peak MB"] > 1 for row in rows)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "KL against size" in page and "KL against speed" in page and 'class="front"' in page
    before = (tmp_path / "run" / "found.json").read_bytes()
    (tmp_path / "run" / "report.json").unlink()
    (tmp_path / "run" / "found.json").write_bytes(before.replace(b'"nats"', b'"kept"'))
    with pytest.raises(SystemExit) as done:
        main([*asked, "--quiet", "--resume"])
    assert done.value.code == 0 and b'"kept"' in (tmp_path / "run" / "found.json").read_bytes()


@pytest.mark.llama
def test_perplexity_in_llama_cpp_is_torchs(files: list[Path], tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = steps.bench([str(files[0])], tmp_path / "run", text=str(text), chunk=64, chunks=2, tokens=2, turns=1)
    table = done.report.tables[0]
    row = dict(zip(table["columns"], table["rows"][0], strict=True))
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    plain = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    opened = tokenizer(TEXT)["input_ids"] != plain
    losses = []
    for start in (0, 64):
        ids = list(plain[start : start + 64])
        ids = [tokenizer.bos_token_id, *ids[1:]] if opened else ids
        logits = model(torch.tensor([ids])).logits[0].detach().double().log_softmax(-1)
        losses += [-float(logits[at - 1, ids[at]]) for at in range(33, 64)]
    assert float(row["perplexity"].split()[0]) == pytest.approx(math.exp(np.mean(losses)), rel=2e-3)
    assert any("--against" in note for note in done.report.notes)


def test_what_cannot_be_measured_is_told(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    for given, error, told in (
        (([str(tiny_llama)], {"text": str(text)}), ModelError, "no exported file"),
        (([str(tmp_path / "none.gguf")], {"text": str(text)}), ModelError, "no such file"),
        ((["a/x.gguf", "b/x.gguf"], {"text": str(text)}), ConfigError, "two files have one name"),
        ((["x.gguf"], {}), ConfigError, "something to measure on"),
        ((["x.gguf"], {"text": str(tmp_path / "nothing.txt")}), DataError, "cannot be read"),
    ):
        with pytest.raises(error, match=told):
            steps.bench(given[0], tmp_path / "run", **given[1])
    assert not (tmp_path / "run").exists()


@pytest.mark.llama
def test_a_file_is_held_against_its_model(
    files: list[Path], tiny_llama: Path, tiny_llama_tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["verify", str(files[0]), "--against", str(tiny_llama), "--output", str(tmp_path / "run"), "--quiet"])
    told = capsys.readouterr().out
    assert done.value.code == 0 and "behaves like its model" in told and "weights" in told
    assert json.loads((tmp_path / "run" / "report.json").read_text())["verified"]["passed"]
    before = files[0].read_bytes()
    with pytest.raises(SystemExit) as done:
        main(["verify", str(files[0]), "--against", str(tiny_llama_tied), "--quiet"])
    told = capsys.readouterr().out
    assert done.value.code == GateError.exit_code and "does not behave like its model" in told
    assert files[0].read_bytes() == before
    with pytest.raises(ModelError, match="no such file"):
        steps.verify(tmp_path / "none.gguf", str(tiny_llama))
    with pytest.raises(ModelError, match="no GGUF file"):
        steps.verify(tiny_llama / "config.json", str(tiny_llama))
