"""GGUF export of a real model: time, peak memory, agreement with torch, token ids.

    python cookbook/benchmarks/gguf_export.py
    python cookbook/benchmarks/gguf_export.py --model gemma3-270m

Writes cookbook/benchmarks/results/gguf_export.json, or gguf_export_gemma3.json. Each export runs in a process of its
own, so that its peak memory is its own; logits are compared on held-out text messages (built-in data set sms-spam) that
llama.cpp reads with a float32 cache; token ids are compared on the messages and on seeded random text of many scripts.
Gemma 3 is published as GGUF: it is converted to Hugging Face's form first, and what the export says of the model and
its tokenizer is held against the published file.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import archives
import numpy as np

from edgellm_sdk import gguf_file
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.models import resolve
from edgellm_sdk.report import Meter, environment
from edgellm_sdk.types import ModelHandle

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
RESULTS = Path(__file__).parent / "results"
PART = 128  # positions compared at once: a vocabulary has up to 262 144 words
MODELS = {"smollm2-135m": "gguf_export.json", "gemma3-270m": "gguf_export_gemma3.json"}
SCRIPTS = ((0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x590, 0x700), (0x900, 0xE80), (0x3040, 0x3100),
           (0x4E00, 0x5200), (0xAC00, 0xAD00), (0x2000, 0x2800), (0x1F300, 0x1F650))  # fmt: skip


def published(target: Path) -> dict[str, bool]:
    """Which of the published file's tokenizer entries, and how the model is built, the export has just so. Scores are
    equal when they put the pieces in one order: they are not in the converted model, and are made from its merges."""
    wanted, found = gguf_file.read(archives.gemma3()).metadata, gguf_file.read(target).metadata
    told = {}
    for key, value in sorted(wanted.items()):
        if key.startswith(("tokenizer.", "gemma3.")):
            mine = found.get(key, False)  # what llama.cpp takes an absent flag for
            if key == "tokenizer.ggml.scores":
                value, mine = (np.argsort(-np.asarray(x), kind="stable") for x in (value, mine))
            told[key] = bool(np.array_equal(value, mine))
    return told


def export_once(model: ModelHandle, kind: str, target: Path) -> dict[str, Any]:
    """Export in a fresh process; seconds inside the hook, peak resident memory of the process, bytes of the file."""
    import subprocess

    command = [sys.executable, __file__, "--child", str(model.path), kind, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def child(path: str, kind: str, target: str) -> None:
    """The measured process: everything imported first, so that seconds are those of the export."""
    from edgellm_plugins.export.gguf import Config, edgellm_export, method
    from transformers import AutoTokenizer

    assert method and AutoTokenizer
    model = ModelHandle(Path(path), "0" * 64, "hf", "any", "float32", 1)
    with Meter() as meter:
        began = meter.read().peak_rss_bytes
        artifact = edgellm_export(model, Path(target), Config(type=kind), Context(Path(target).parent / "run"))
    figures = {
        "seconds": meter.wall_seconds,
        "peak_rss_bytes": meter.peak_rss_bytes,
        "rss_before_bytes": began,
        "file_bytes": artifact.path.stat().st_size,
        "tensors": artifact.verified["reader"]["tensors"],
        "types": artifact.verified["reader"]["types"],
        "tokenizer": artifact.verified["tokenizer"],
    }
    print(json.dumps(figures))


def reader_seconds(target: Path) -> float:
    """Median time of the strict reader over the whole header, 5 runs."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        gguf_file.read(target)
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 4)


def agreement(model: ModelHandle, target: Path, texts: list[str]) -> dict[str, Any]:
    """Top-1 agreement and mean KL(torch || llama.cpp) in nats over every position of `texts`."""
    import torch
    from llama_cpp import Llama

    loaded = model.load()
    engine = Llama(str(target), n_ctx=1024, n_batch=512, logits_all=True, type_k=0, type_v=0, verbose=False)
    agree = positions = 0
    divergence = largest = 0.0
    for text in texts:
        ids = loaded.tokenizer.encode(text, add_special_tokens=False)[:1000]
        with torch.no_grad():
            wanted = loaded.model(torch.tensor([ids])).logits[0]
        engine.reset()
        engine.eval(ids)
        for begin in range(0, len(ids), PART):
            part = slice(begin, min(begin + PART, len(ids)))
            p = wanted[part].double().log_softmax(-1)
            q = torch.from_numpy(engine.scores[part].copy()).double().log_softmax(-1)
            kl = (p.exp() * (p - q)).sum(-1)
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            divergence += float(kl.sum())
            largest = max(largest, float(kl.max()))
        positions += len(ids)
    return {"top1": agree / positions, "kl_mean": divergence / positions, "kl_max": largest, "positions": positions}


def varied(count: int) -> Iterator[str]:
    """Seeded random text: characters of ten ranges of Unicode, digits, spaces and special tokens between them."""
    rng = random.Random(0)
    fixed = (" ", "  ", "\n", "\n\n", "\t", "12", "3.14", "don't", "'S", "<|im_start|>", "<|im_end|>", "1234567", "...")
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 10)):
            low, high = rng.choice(SCRIPTS)
            letters = (chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 8)))
            parts += ["".join(letters), rng.choice(fixed)]
        yield "".join(parts)


def token_ids(model: ModelHandle, target: Path, texts: list[str]) -> dict[str, int]:
    """On how many texts transformers and llama.cpp give the same ids."""
    from llama_cpp import Llama

    from edgellm_sdk.kit.loading import load_tokenizer

    tokenizer, engine = load_tokenizer(model), Llama(str(target), vocab_only=True, verbose=False)
    equal = tokens = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        equal += ids == engine.tokenize(text.encode(), add_bos=False, special=True)
        tokens += len(ids)
    return {"texts": len(texts), "equal": equal, "tokens": tokens}


def messages() -> list[str]:
    """The built-in messages as plain text, test split first."""
    found = []
    for split in ("test", "train"):
        for example in read("sms-spam", split, task_prompt="{text}").examples:
            prompt = example.prompt
            found.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, default="smollm2-135m")
    parser.add_argument("--result", type=Path, help="default: by the model's name")
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    name, texts = given.model, messages()
    result_file = given.result or RESULTS / MODELS[name]
    model = resolve(str(archives.gemma3()) if name == "gemma3-270m" else name)
    passages = ["\n".join(texts[i * 24 : i * 24 + 24]) for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        exports = {kind: export_once(model, kind, Path(folder) / f"{kind}.gguf") for kind in TYPES}
        wide = Path(folder) / "f32.gguf"
        result = {
            "benchmark": "gguf_export",
            "command": "python cookbook/benchmarks/gguf_export.py" + f" --model {name}" * (name == "gemma3-270m"),
            "model": name,
            "exports": exports,
            "reader_seconds": reader_seconds(wide),
            "against_torch": {
                kind: agreement(model, Path(folder) / f"{kind}.gguf", passages) for kind in ("f32", "f16", "q8_0")
            },
            "token_ids": {
                "messages": token_ids(model, wide, texts),
                "random_unicode": token_ids(model, wide, list(varied(3000))),
            },
            "environment": environment(),
        }
        if name == "gemma3-270m":
            result["as_published"] = published(wide)
    result_file.parent.mkdir(parents=True, exist_ok=True)
    result_file.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
