"""What structural pruning costs and pays: SmolLM2-135M without a quarter of its blocks' weights.

    python cookbook/benchmarks/pruning.py

Rows: the dense model; LLM-Pruner by vector, element (first order, Hessian, both), L2 norm and at random (3 seeds), all
with the same number of weights; whole blocks by influence; two of them after a LoRA recovery; bytes, speed and the gate
of Q8_0 files in llama.cpp; and how well the scores rank what removing a channel really costs.

Judged and recovered on presidential addresses, perplexity on others that were held out, as llama.cpp measures it:
chunks of 512 tokens, of which the second half is scored. Each row is stored when it is done: a rerun goes on where the
last one stopped, and `--seconds` bounds a visit. Speeds are of files loaded side by side and run in turn, as ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from edgellm_plugins.compression import depth_prune, layerwise, llm_pruner, pruned, recovery
from edgellm_plugins.compression.llm_pruner import method
from gptq_perplexity import CHUNK, environment, score, texts, token_windows

from edgellm_sdk import store
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.gate import verify_export
from edgellm_sdk.kit.loading import load_tokenizer
from edgellm_sdk.models import resolve
from edgellm_sdk.steps.delivery import PROMPTS
from edgellm_sdk.types import ModelHandle

RESULT = Path(__file__).parent / "results" / "pruning.json"
KINDS = ("element-first", "element-second", "element-mix", "vector", "l2", "random 0", "random 1", "random 2")
RECOVERED = ("element-first", "depth")
SPEED_ROUNDS, PROMPT, ANSWER = 5, 256, 48
GROUPS = 60
CHARACTERS = 600_000  # of either text: some 130 000 tokens


class Benchmark:
    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.ctx = Context(folder, threads=given.threads)
        self.base = resolve("smollm2-135m")
        found = texts()
        self.text = folder / "train.txt"
        self.text.write_text(found["train"][:CHARACTERS])
        self.tokenizer = load_tokenizer(self.base)
        held_out = found["addresses"][:CHARACTERS]
        self.chunks = token_windows(self.tokenizer, held_out, CHUNK, given.chunks, self.ctx, "addresses")

    def pruned(self, name: str) -> tuple[ModelHandle, dict[str, Any]]:
        """The pruned model called `name`, from the work folder or made now, and what was said when it was made."""
        kind, _, seed = name.partition(" ")
        folder = self.folder / name.replace(" ", "-")
        if (folder / "told.json").is_file():
            return resolve(str(folder / "model")), store.read_json(folder / "told.json")
        ctx, began = Context(folder, int(seed or 0), threads=self.given.threads), time.monotonic()
        if kind == "depth":
            plugin: Any = depth_prune
            chosen: Any = build(depth_prune.Config, self.options(), "depth-prune")
        else:
            plugin, chosen = llm_pruner, build(llm_pruner.Config, self.options() | {"importance": kind}, "llm-pruner")
        handle: ModelHandle = plugin.edgellm_compress(self.base, None, chosen, ctx)
        told = {"seconds": round(time.monotonic() - began, 1), "notes": ctx.notes}
        store.write_json(folder / "told.json", told)
        return handle, told

    def options(self, recovery: int = 0) -> dict[str, Any]:
        return {
            "ratio": self.given.ratio, "calibration_samples": self.given.samples, "calibration_text": str(self.text),
            "recovery_steps": recovery,
        }  # fmt: skip

    def recovered(self, name: str) -> dict[str, Any]:
        """What the plugin's `recovery_steps` do to the pruned model called `name`."""
        ctx, began = Context(self.folder / f"{name}-recovered", threads=self.given.threads), time.monotonic()
        handle, _ = self.pruned(name)
        copy = pruned.write(handle, pruned.whole_of(handle), ctx)
        chosen: Any = build(llm_pruner.Config, self.options(self.given.recovery), "llm-pruner")
        after = recovery.recovered(copy, None, chosen, ctx)
        return self.perplexity(after) | {"seconds": round(time.monotonic() - began, 1), "notes": ctx.notes}

    def perplexity(self, handle: ModelHandle) -> dict[str, Any]:
        return {"parameters": handle.parameters, **score(handle.load().model, self.chunks)}

    def rows(self) -> dict[str, Callable[[], dict[str, Any]]]:
        found: dict[str, Callable[[], dict[str, Any]]] = {"dense": lambda: self.perplexity(self.base)}
        for name in (*KINDS, "depth"):
            found[name] = lambda name=name: self.row(name)  # type: ignore[misc]
        for name in RECOVERED:
            found[f"{name}, recovered"] = lambda name=name: self.recovered(name)  # type: ignore[misc]
        return found | {"device": self.device, "ranks": self.ranks}

    def row(self, name: str) -> dict[str, Any]:
        handle, told = self.pruned(name)
        return self.perplexity(handle) | told

    def device(self) -> dict[str, Any]:
        """Q8_0 files: bytes, the gate, and tokens/s against the dense file's, run in turn."""
        from edgellm_plugins.export.gguf import Config, edgellm_export
        from llama_cpp import Llama

        handles = {"dense": self.base, **{name: self.pruned(name)[0] for name in RECOVERED}}
        found: dict[str, Any] = {}
        engines = {}
        for name, handle in handles.items():
            ctx = Context(self.folder / f"device-{name}")
            target = self.folder / f"{name}.gguf"
            target.unlink(missing_ok=True)
            artifact = edgellm_export(handle, target, Config(type="q8_0", modelfile=False), ctx)
            found[name] = {"bytes": artifact.path.stat().st_size, "parameters": handle.parameters}
            if name != "dense":
                verdict = verify_export(handle, artifact, ctx, PROMPTS[:3])
                found[name] |= {"gate": verdict.passed, "kl_mean": verdict.value("kl mean"), "why": verdict.reason}
            engines[name] = Llama(
                str(artifact.path), n_ctx=512, n_batch=512, n_threads=self.given.threads,
                n_threads_batch=self.given.threads, verbose=False,
            )  # fmt: skip
        times: dict[str, dict[str, list[float]]] = {name: {"prompt": [], "answer": []} for name in engines}
        ids = self.chunks[0, :PROMPT].tolist()
        for turn in range(SPEED_ROUNDS + 1):
            for name, engine in engines.items():
                engine.reset()
                clock = [time.perf_counter()]
                engine.eval(ids)
                clock.append(time.perf_counter())
                for _ in range(ANSWER):
                    engine.eval([engine.sample(temp=0.0)])
                clock.append(time.perf_counter())
                if turn:  # the first turn warms up
                    times[name]["prompt"].append(clock[1] - clock[0])
                    times[name]["answer"].append(clock[2] - clock[1])
        for name in engines:
            for part, tokens in (("prompt", PROMPT), ("answer", ANSWER)):
                here = times[name][part]
                against = [a / b for a, b in zip(times["dense"][part], here, strict=True)]
                found[name][f"{part} tokens/s"] = round(tokens / statistics.median(here), 2)
                found[name][f"{part} speed against dense"] = round(statistics.median(against), 4)
            found[name]["bytes against dense"] = round(found[name]["bytes"] / found["dense"]["bytes"], 4)
        return found

    def ranks(self) -> dict[str, Any]:
        """Spearman's correlation of scores with the loss that zeroing a channel costs, over random FFN channels."""
        loaded = self.base.load()
        model = loaded.model
        windows = layerwise.calibration(self.tokenizer, None, str(self.text), 10, 64, self.ctx)
        blocks = layerwise.decoder(model)[1]
        kept = pruned.whole_of(self.base)
        layers = [method.Layer(blocks[row.layer], row, len(row.heads), len(row.channels)) for row in kept]
        scores: dict[str, list[float]] = {}
        wide = layers[0].channels
        places = [divmod(n, wide) for n in self.ctx.stream("channels").sample(range(wide * len(layers)), GROUPS)]
        for kind in ("element-first", "element-second", "element-mix", "vector", "l2"):
            method.score(
                layers, model, windows, build(llm_pruner.Config, {"importance": kind}, "llm-pruner"), self.ctx, 0
            )
            scores[kind] = [float(layers[layer].scores["channels"][channel]) for layer, channel in places]
        true = []
        with torch.no_grad():
            whole = _loss(model, windows)
            for layer, channel in places:
                down = blocks[layer].mlp.down_proj.weight
                column = down[:, channel].clone()
                down[:, channel] = 0
                true.append(abs(_loss(model, windows) - whole))
                down[:, channel] = column
        return {
            "groups": GROUPS,
            "spearman": {kind: round(_spearman(values, true), 4) for kind, values in scores.items()},
        }


def _loss(model: Any, windows: torch.Tensor) -> float:
    return float(model(input_ids=windows, labels=windows, use_cache=False).loss.double())


def _spearman(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(x, dtype=torch.float64).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def checks(rows: dict[str, Any]) -> dict[str, bool | None]:
    """The bars, None where a row is missing."""

    def ppl(name: str) -> float:
        return float(rows[name]["perplexity"])

    def mean_random() -> float:
        return sum(ppl(f"random {seed}") for seed in range(3)) / 3

    wanted: dict[str, Callable[[], bool]] = {
        "element-first < l2": lambda: ppl("element-first") < ppl("l2"),
        "element-first < mean of random": lambda: ppl("element-first") < mean_random(),
        "equal parameters": lambda: len({rows[name]["parameters"] for name in KINDS}) == 1,
        "recovery lowers perplexity": lambda: all(ppl(f"{name}, recovered") < ppl(name) for name in RECOVERED),
        "gate passes": lambda: all(rows["device"][name]["gate"] for name in RECOVERED),
        "bytes at least 15 % fewer": lambda: all(rows["device"][n]["bytes against dense"] <= 0.85 for n in RECOVERED),
        "generation at least 15 % faster": lambda: all(
            rows["device"][name]["answer speed against dense"] >= 1.15 for name in RECOVERED
        ),
        "prompt at least 15 % faster": lambda: all(
            rows["device"][name]["prompt speed against dense"] >= 1.15 for name in RECOVERED
        ),
        "spearman above 0.3 and above l2": lambda: (
            rows["ranks"]["spearman"]["element-first"] > max(0.3, rows["ranks"]["spearman"]["l2"])
        ),
    }
    found: dict[str, bool | None] = {}
    for name, check in wanted.items():
        try:
            found[name] = check()
        except KeyError:
            found[name] = None
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.25, help="share of the blocks' weights to remove")
    parser.add_argument("--samples", type=int, default=10, help="windows of 128 tokens to judge by")
    parser.add_argument("--chunks", type=int, default=40, help="chunks of 512 tokens to score")
    parser.add_argument("--recovery", type=int, default=100, help="steps of recovery, 4 windows of 128 tokens each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no further row after this long")
    parser.add_argument("--only", default="", help="rows to do, comma-separated")
    parser.add_argument("--work", default="", help="folder that keeps pruned models between visits; empty: none")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    setting = {name: getattr(given, name) for name in ("ratio", "samples", "chunks", "recovery", "threads")}
    result: dict[str, Any] = {"rows": {}}
    if given.result.is_file():
        result = json.loads(given.result.read_text())
        if result["setting"] != setting:
            print(f"{given.result} is of another setting {result['setting']}; remove it", file=sys.stderr)
            return 2
    command = f"python cookbook/benchmarks/pruning.py {' '.join(sys.argv[1:])}".strip()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        Path(given.work or folder).mkdir(parents=True, exist_ok=True)
        benchmark = Benchmark(given, Path(given.work or folder))
        asked = given.only.split(",") if given.only else list(benchmark.rows())
        for name, row in benchmark.rows().items():
            if name in result["rows"] or name not in asked or time.monotonic() - began > given.seconds:
                continue
            result["rows"][name] = row()
            result |= {
                "benchmark": "pruning", "command": command, "setting": setting,
                "model": {"name": "smollm2-135m", "digest": benchmark.base.digest}, "environment": environment(),
                "checks": checks(result["rows"]),
            }  # fmt: skip
            store.write_json(given.result, result)
            told = {key: value for key, value in result["rows"][name].items() if key != "chunk_losses"}
            print(f"{name:28} {time.monotonic() - began:6.0f} s  {json.dumps(told)}", flush=True)
    print(json.dumps(result.get("checks", {}), indent=2))
    return 1 if False in result.get("checks", {}).values() else 0


if __name__ == "__main__":
    sys.exit(main())
