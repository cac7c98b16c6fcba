"""GPTQ against llm-compressor's: 4 bits, groups of 128, the same calibration windows; perplexity, seconds, memory.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python cookbook/benchmarks/gptq_peer.py --peer peer/bin/python --work runs/gptq_peer

The model and the texts are those of `gptq_perplexity.py`. Both sides get one float32 model folder and one array of
token windows, quantise every linear of the blocks symmetrically and store it, each in processes of its own, in turn,
on the same threads: wall seconds and peak memory are those of whole processes; `quantising` leaves out imports, and for
llm-compressor loading and storing as well. It runs with its defaults (static activation order); ours as its defaults
are, and without passes behind the sweep. Scored is what is read back from the stored files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "gptq_peer.json"
GROUP, TEXT = 128, "calibration.txt"
OURS: dict[str, dict[str, Any]] = {"ours": {}, "ours without passes": {"passes": 0}}
PEER = "llm-compressor"


def run_ours(name: str, model: str, windows: str, target: Path, threads: int) -> float:
    import numpy as np
    import torch
    from edgellm_plugins.compression.gptq import Config
    from edgellm_plugins.compression.gptq.method import compress

    from edgellm_sdk.context import Context
    from edgellm_sdk.models import resolve

    torch.set_num_threads(threads)
    text = Path(windows).with_name(TEXT)  # its seed draws the very windows that were stored
    samples = len(np.load(windows, mmap_mode="r"))
    config = Config(
        format="int4", group_size=GROUP, calibration_text=str(text), calibration_samples=samples, **OURS[name]
    )
    began = time.perf_counter()
    compress(resolve(model), None, config, Context(target, threads=threads))
    return time.perf_counter() - began


def run_peer(model: str, windows: str, target: Path, threads: int) -> float:
    import numpy as np
    import torch
    from datasets import Dataset  # type: ignore[import-untyped,import-not-found,unused-ignore]
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.gptq import GPTQModifier  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    rows = np.load(windows)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows).tolist()})
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
    }  # fmt: skip
    recipe = GPTQModifier(
        ignore=["lm_head"], config_groups={"all": {"targets": ["Linear"], "weights": weights}},
    )  # fmt: skip
    began = time.perf_counter()
    oneshot(model=loaded, dataset=data, recipe=recipe, max_seq_length=rows.shape[1], num_calibration_samples=len(rows))
    seconds = time.perf_counter() - began
    loaded.save_pretrained(target / "model", save_compressed=True)
    return seconds


def decode_peer(folder: Path) -> None:
    """The stored file as float32 weights, in the file `weights.safetensors` beside it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    how = CompressedTensorsConfig(run_compressed=False)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, quantization_config=how)
    linears = [name for name, module in loaded.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {f"{name}.weight": loaded.get_submodule(name).weight.detach().float().contiguous() for name in linears}
    found.pop("lm_head.weight", None)
    save_file(found, folder / "weights.safetensors")


def child(given: list[str]) -> None:
    name, model, windows, target, threads = given
    Path(target).mkdir(parents=True, exist_ok=True)
    if name == "decode":
        decode_peer(Path(target))
        return
    sides = run_peer if name == PEER else lambda *rest: run_ours(name, *rest)
    seconds = sides(model, windows, Path(target), int(threads))
    (Path(target) / "seconds.json").write_text(json.dumps(seconds))


class Bench:
    def __init__(self, given: argparse.Namespace) -> None:
        import numpy as np
        import torch
        from edgellm_plugins.compression import layerwise
        from gptq_perplexity import CHUNK, STEPS, fine_tune, texts, token_windows

        from edgellm_sdk.context import Context
        from edgellm_sdk.models import resolve

        torch.manual_seed(0)
        self.given, self.work = given, given.work
        ctx, found = Context(given.work, threads=given.threads), texts()
        self.folder = given.work / "tuned"
        if not self.folder.is_dir():
            fresh = given.work / "tuning"
            shutil.rmtree(fresh, ignore_errors=True)
            fine_tune(resolve("smollm2-135m"), found["train"], STEPS, fresh, ctx)
            fresh.replace(self.folder)
        text = given.work / TEXT
        text.write_text(found["train"])
        self.tuned = resolve(str(self.folder))
        tokenizer = self.tuned.load().tokenizer
        self.windows = given.work / "windows.npy"
        np.save(self.windows, layerwise.calibration(tokenizer, None, str(text), given.samples, CHUNK, ctx).numpy())
        self.chunks = {
            name: token_windows(tokenizer, found[name], CHUNK, given.chunks, ctx, name) for name in ("addresses", "web")
        }

    def command(self, name: str, target: Path) -> list[str]:
        python = self.given.peer if name in (PEER, "decode") else sys.executable
        return [python, __file__, "--child", name, str(self.folder), str(self.windows), str(target),
                str(self.given.threads)]  # fmt: skip

    def turn(self, name: str) -> dict[str, float]:
        from exporter import measured

        target = self.work / name.replace(" ", "-")
        shutil.rmtree(target, ignore_errors=True)
        seconds, peak, cpu = measured(self.command(name, target))
        inside = json.loads((target / "seconds.json").read_text())
        print(f"{name}: {seconds:.1f} s, {inside:.1f} s of it quantising, {peak / 1e6:.0f} MB", flush=True)
        return {"seconds": seconds, "quantising": inside, "peak_rss_bytes": peak, "cpu_seconds": cpu}

    def scored(self, name: str) -> dict[str, Any]:
        from gptq_perplexity import score
        from safetensors.torch import load_file

        from edgellm_sdk.models import resolve

        target = self.work / name.replace(" ", "-")
        if name == PEER:
            subprocess.run(self.command("decode", target), check=True, capture_output=True)
            model = self.tuned.load().model
            wanted = {key for key in model.state_dict() if key.endswith("_proj.weight")}
            stored = load_file(target / "weights.safetensors")
            assert stored.keys() == wanted, sorted(stored.keys() ^ wanted)[:4]
            model.load_state_dict(stored, strict=False)
        else:
            model = (self.tuned if name == "float32" else resolve(str(target / "model"))).load().model
        return {text: score(model, tokens) for text, tokens in self.chunks.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--peer", default=sys.executable, help="a Python that has llmcompressor")
    parser.add_argument("--work", type=Path, default=Path("runs/gptq_peer"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--chunks", type=int, default=32, help="chunks of 512 tokens to score, of each text")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return 0
    from gptq_perplexity import environment

    bench = Bench(given)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in (*OURS, PEER)}
    for _ in range(given.turns):
        for name, rows in turns.items():
            rows.append(bench.turn(name))
    figures: dict[str, Any] = {"float32": bench.scored("float32")}
    for name, rows in turns.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        figures[name] = {**bench.scored(name), **middle, "turns": rows}
    checks = {}
    for name in OURS:
        ours, peer = figures[name], figures[PEER]
        checks[name] = {
            **{f"{key} against the peer": ours[key] / peer[key] for key in turns[name][0]},
            **{f"perplexity on {text} no worse": ours[text]["loss"] <= peer[text]["loss"] for text in bench.chunks},
        }
    version = subprocess.run(
        [given.peer, "-c", "from importlib.metadata import version; print(version('llmcompressor'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    settings = {key: getattr(given, key) for key in ("samples", "chunks", "turns", "threads")}
    result = {
        "command": "python cookbook/benchmarks/gptq_peer.py", "environment": environment(), "settings": settings,
        "peer": f"llmcompressor {version}", "group": GROUP, "figures": figures, "checks": checks,
    }  # fmt: skip
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, row in figures.items():
        print(f"{name:22}", {text: row[text]["perplexity"] for text in bench.chunks})
    print(json.dumps(checks, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
