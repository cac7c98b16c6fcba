"""P-RGE inside ExecuTorch on a CPU: what a training program weighs, what a step takes, what it learns.

    python cookbook/benchmarks/executorch_training.py --part time --noise graph --queries 4 [--layers 0] [--tokens 64]
    python cookbook/benchmarks/executorch_training.py --part learn [--steps 60]

SmolLM2-135M, float32, XNNPACK, LoRA-FA of rank 16 on every linear layer of the last `layers` (0: all). Each part adds
its figures to the one result file. `time`: a step of four queries, in one call of q = 4 or in four of q = 1, in a fresh
process, on four examples of T tokens; the median of the repeats after one warm-up. `learn`: host noise, real messages,
half of them spam; the held-out loss is computed by the program itself, its state restored afterwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from edgellm_hardware.executorch import Config, method
from edgellm_hardware.executorch.trainer import Trainer

from edgellm_sdk import models, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.kit import loading, prompts
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment
from edgellm_sdk.types import Dataset

MB = 1 << 20
HELD = 32


def exported(folder: Path, config: Config) -> tuple[Path, dict[str, Any]]:
    path, began = folder / f"{config.noise}-{config.queries}.pte", time.perf_counter()
    artifact = method.export(models.resolve("smollm2-135m"), path, config, Context(folder, seed=0))
    seconds = time.perf_counter() - began
    return path, {
        "export_seconds": seconds,
        "file_mb": path.stat().st_size / MB,
        "companion_mb": artifact.files[1].stat().st_size / MB,
        "loss_difference": artifact.verified["loss difference"],
    }


def timed(noise: str, queries: int, layers: int, tokens: int, repeats: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    rows = [Encoded(tuple(draw.integers(0, 49152, tokens).tolist()), tokens - 2, k) for k in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        config = Config(noise=noise, queries=queries, batch=4, tokens=tokens, labels=8, layers=layers)
        path, facts = exported(Path(folder), config)
        before = psutil.Process().memory_info().rss
        began = time.perf_counter()
        trainer = Trainer(path, 1e-3)
        facts["load_seconds"] = time.perf_counter() - began
        times, drawing = [], []
        for step in range(repeats + 1):
            began = time.perf_counter()
            for _ in range(4 // queries):
                trainer.step(rows)
            times.append(time.perf_counter() - began)
            began = time.perf_counter()
            trainer.noise(step)
            drawing.append(time.perf_counter() - began)
    return {
        **facts,
        "state_mb": trainer.state.numel() * 4 / MB,
        "rss_mb_loading_and_training": (psutil.Process().memory_info().rss - before) / MB,
        "seconds_of_four_queries": statistics.median(times[1:]),
        "seconds_each": times[1:],
        "seconds_of_which_noise": statistics.median(drawing[1:]) if noise == "host" else 0.0,
    }


def balanced(data: Dataset, skip: int, count: int) -> Dataset:
    order = Stream(0, "benchmark").permutation(len(data)).tolist()
    each, first = count // len(data.labels), skip // len(data.labels)
    of = [[i for i in order if data.examples[i].label == label][first : first + each] for label in data.labels]
    return data.select([index for group in zip(*of, strict=True) for index in group])


def learned(steps: int, rate: float) -> dict[str, Any]:
    data, tokenizer = read("sms-spam"), loading.load_tokenizer(models.resolve("smollm2-135m"))
    config = Config(noise="host", queries=4, batch=4, tokens=80, labels=8, layers=2)
    batches = {
        name: [rows[k : k + 4] for k in range(0, len(rows), 4)]
        for name, rows in (
            ("train", prompts.encode(tokenizer, balanced(data, 0, 4 * steps).examples, config.tokens)),
            ("held out", prompts.encode(tokenizer, balanced(data, 4 * steps, HELD).examples, config.tokens)),
        )
    }
    with tempfile.TemporaryDirectory() as folder:
        path, facts = exported(Path(folder), config)
        trainer, curve, losses, rss = Trainer(path, rate, seed=0), [], [], []
        spent = 0.0
        for step in range(steps + 1):
            if step % (steps // 3) == 0:
                curve.append([step, spent, statistics.mean(trainer.evaluate(rows) for rows in batches["held out"])])
                rss.append(psutil.Process().memory_info().rss / MB)
                print(curve[-1], flush=True)
            if step < steps:
                began = time.perf_counter()
                losses.append(float(trainer.step(batches["train"][step % len(batches["train"])]).mean()))
                spent += time.perf_counter() - began
    return {
        **facts, "learning_rate": rate, "held_out_examples": HELD, "trainable": trainer.layout.size,
        "step, seconds in steps, held-out loss": curve, "training_losses": losses, "rss_mb": rss,
        "seconds_per_step": spent / steps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("time", "learn"), required=True)
    parser.add_argument("--noise", choices=("graph", "host"), default="graph")
    parser.add_argument("--queries", type=int, choices=(1, 2, 4), default=4)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    here = Path(__file__).parent / "results" / "executorch_training.json"
    parser.add_argument("--output", type=Path, default=here)
    asked = parser.parse_args()
    result = store.read_json(asked.output) if asked.output.exists() else {}
    command = "python cookbook/benchmarks/executorch_training.py"
    if asked.part == "time":
        part = timed(asked.noise, asked.queries, asked.layers, asked.tokens, asked.repeats)
        command += f" --part time --noise {asked.noise} --queries {asked.queries} --layers {asked.layers}"
        command += f" --tokens {asked.tokens} --repeats {asked.repeats}"
        calls = f"{4 // asked.queries} call(s) of q={asked.queries}"
        name = f"time, layers {asked.layers}, {asked.tokens} tokens, noise {asked.noise}, {calls}"
    else:
        part, name = learned(asked.steps, asked.learning_rate), "learning"
        command += f" --part learn --steps {asked.steps} --learning-rate {asked.learning_rate:g}"
    result |= {"environment": environment(), name: {"command": command, **part}}
    store.write_json(asked.output, result)
    print(json.dumps(part, indent=1))


if __name__ == "__main__":
    main()
