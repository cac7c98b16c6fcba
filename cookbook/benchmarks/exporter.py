"""HF -> GGUF of every architecture against llama.cpp's own converter: tensors, metadata, logits, time, memory.

    python cookbook/benchmarks/exporter.py

Writes cookbook/benchmarks/results/exporter.json. The converter comes from the source archive of llama-cpp-python, which
pip fetches once into the user's cache; models with a SentencePiece tokenizer need the package `sentencepiece`, which it
imports. Tiny seeded models of every architecture and variant (tests/core/decoders.py) are converted to F16 by both and
compared tensor for tensor and key for key; ours in F32 is run in llama.cpp against torch over 400 random tokens. Time
and memory are those of whole processes, taken in turn on SmolLM2-135M, so that both see the same machine; the first
turn warms the file cache and is dropped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgellm_sdk import checkpoint, gguf_file
from edgellm_sdk.context import Context
from edgellm_sdk.models import cache_folder, resolve
from edgellm_sdk.report import environment
from edgellm_sdk.types import ModelHandle

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "tests" / "core"), str(HERE.parents[1] / "tests" / "plugins"), str(HERE)]
import archives  # noqa: E402
import decoders  # noqa: E402

RESULT = HERE / "results" / "exporter.json"
TURNS = 3


def converter() -> Path:
    """The unpacked llama.cpp folder of the source archive."""
    given = os.environ.get("EDGELLM_UPSTREAM_CONVERTER")
    if given:
        return Path(given)
    file = archives.SDISTS["llama_cpp_python"][0]
    top = file.removesuffix(".tar.gz")
    target = cache_folder() / "benchmarks" / top
    if not (target / "vendor/llama.cpp/convert_hf_to_gguf.py").is_file():
        wanted = tuple(f"{top}/vendor/llama.cpp/{name}" for name in ("convert_", "conversion/", "gguf-py/"))
        with archives.sdist("llama_cpp_python") as archive:
            members = [member for member in archive.getmembers() if member.name.startswith(wanted)]
            archive.extractall(target.parent, members, filter="data")
    return target / "vendor" / "llama.cpp"


def measured(command: list[str]) -> tuple[float, int, float]:
    """Wall seconds, peak resident bytes and CPU seconds of a process; CalledProcessError when it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise subprocess.CalledProcessError(process.returncode, command, stderr=errors.read()[-2000:])
    return time.perf_counter() - began, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def theirs(source: Path, folder: Path, target: Path, known: str) -> list[str]:
    """The upstream converter as a command. `known`: the pre-tokenizer of a tiny model, which no table of hashes has."""
    import test_gguf_upstream

    driver = test_gguf_upstream.DRIVER
    return [sys.executable, "-c", driver, str(source), known, str(folder), "--outfile", str(target), "--outtype", "f16"]


def ours(folder: Path, target: Path) -> list[str]:
    return [sys.executable, __file__, "--child", str(folder), str(target)]


def child(folder: str, target: str) -> None:
    from edgellm_plugins.export.gguf import Config, edgellm_export

    handle = ModelHandle(Path(folder), "0" * 64, "hf", "any", "float32", 1)
    edgellm_export(handle, Path(target), Config(type="f16", modelfile=False), Context(Path(target).parent / "run"))


def compared(source: Path, kind: str, where: Path) -> dict[str, Any]:
    """One architecture: what differs from the upstream file, and how far llama.cpp is from torch on ours."""
    import test_gguf_upstream
    from edgellm_plugins.export.gguf import Config, edgellm_export

    style, known = test_gguf_upstream.spec(kind)
    folder = decoders.with_sentencepiece(where, kind, style) if style else decoders.write_kind(where, kind)
    test_gguf_upstream.SOURCE = source
    wrong, count = test_gguf_upstream.differences(folder, where, "f16", known)
    handle = ModelHandle(folder, "0" * 64, "hf", "any", "float32", 1)
    wide = edgellm_export(handle, where / "wide.gguf", Config(type="f32", modelfile=False), Context(where / "run")).path
    ids = np.random.default_rng(2).integers(0, decoders.VOCABULARY, 400).tolist()
    top, kl = decoders.compare(decoders.torch_logits(folder, ids), decoders.engine_logits(wide, ids))
    row = {"kind": kind, "compared": count, "differences": wrong, "top1": top, "kl_mean": kl}
    print(json.dumps(row), flush=True)
    return row


def timed(source: Path, model: ModelHandle, where: Path) -> dict[str, Any]:
    """Both converters in turn on one real model, F16."""
    runs: dict[str, list[tuple[float, int, float]]] = {"ours": [], "upstream": []}
    for _ in range(TURNS + 1):
        runs["ours"].append(measured(ours(model.path, where / "ours.gguf")))
        runs["upstream"].append(measured(theirs(source, model.path, where / "theirs.gguf", "")))
    a, b = gguf_file.read(where / "ours.gguf"), gguf_file.read(where / "theirs.gguf")
    same = all(np.array_equal(a.tensor_bytes(name), b.tensor_bytes(name)) for name in b.tensors)
    found = checkpoint.inspect(model.path)
    largest = max(4 * int(np.prod(tensor.shape)) for tensor in found.tensors.values())
    figures: dict[str, Any] = {
        name: {
            "seconds": statistics.median(seconds for seconds, _, _ in rows[1:]),
            "cpu_seconds": statistics.median(seconds for _, _, seconds in rows[1:]),
            "all_seconds": [round(seconds, 3) for seconds, _, _ in rows],
            "peak_rss_bytes": max(peak for _, peak, _ in rows[1:]),
        }
        for name, rows in runs.items()
    }
    return figures | {
        "model": model.name,
        "time_ratio": figures["ours"]["seconds"] / figures["upstream"]["seconds"],
        "cpu_ratio": figures["ours"]["cpu_seconds"] / figures["upstream"]["cpu_seconds"],
        "largest_tensor_bytes": largest,
        "memory_bar_bytes": int(1.2 * largest) + 300 * (1 << 20),
        "equal_tensors": bool(same and a.tensors.keys() == b.tensors.keys()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--only", choices=("architectures", "time"), help="one half, kept beside the other's figures")
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    source, result = converter(), json.loads(given.output.read_text()) if given.output.is_file() else {}
    result |= {"benchmark": "exporter", "command": "python cookbook/benchmarks/exporter.py"}
    with tempfile.TemporaryDirectory() as temp:
        if given.only != "time":
            if importlib.util.find_spec("sentencepiece") is None:
                sys.exit("the upstream converter needs it: pip install sentencepiece")
            kinds = [*decoders.KINDS, *decoders.VARIANTS]
            result["architectures"] = [compared(source, kind, Path(temp) / kind.replace(" ", "-")) for kind in kinds]
        if given.only != "architectures":
            result["time"] = timed(source, resolve("smollm2-135m"), Path(temp))
            print(json.dumps(result["time"], indent=2), flush=True)
    result["environment"] = environment()
    given.output.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
