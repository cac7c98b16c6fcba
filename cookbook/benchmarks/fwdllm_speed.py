"""FwdLLM on a CPU: perturbed inferences per second against the plain way, and peak memory against inference.

    python cookbook/benchmarks/fwdllm_speed.py [--layers 4] [--seconds 20] [--output FILE]

Both ways evaluate the same losses: SmolLM2-135M, the same base precision, the same minibatch of real messages, LoRA on
the last layers, theta +- h v for the same number of directions. The plain way runs the whole model for each, through
peft's LoRA layers, with noise drawn tensor by tensor and every position through the head. The two run in turns, and
the figure is the median of the ratios. Memory is the peak of a fresh process for each case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from edgellm_plugins.zeroth_order import estimator

from edgellm_sdk import models, store
from edgellm_sdk.data import read
from edgellm_sdk.kit import adapters, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment
from edgellm_sdk.types import Dataset

BATCH, PROBES, STEP, RANK, ALPHA = 8, 8, 0.05, 8, 16
TARGETS = ("q_proj", "v_proj")


def minibatch() -> Dataset:
    data = read("sms-spam")
    return data.select(Stream(0, "benchmark").sample(range(len(data)), BATCH))


def ours(layers: int, budget: int) -> Frozen:
    spec = adapters.Spec("lora", layers, RANK, ALPHA, TARGETS)
    return Frozen(models.resolve("smollm2-135m"), spec, Stream(0, "a"), "auto", budget=budget)


def our_step(frozen: Frozen, data: Dataset, pool: int) -> None:
    """PROBES perturbations of one minibatch, two forwards each."""
    theta = frozen.trainables.initial
    directions = [estimator.direction(estimator.shapes_of(theta), pool, k) for k in range(PROBES)]

    estimator.probe(partial(frozen.evaluate, "batch", lambda: data), theta, directions, STEP)


CASES = ("inference", "client", "client-kept", "back-propagation with Adam", "back-propagation with Adam, all layers")
MODEL_LAYERS = 30


class Plain:
    """The way the published code does it, on peft's layers."""

    def __init__(self, layers: int) -> None:
        from peft import LoraConfig, get_peft_model

        loaded = models.resolve("smollm2-135m").load(dtype="auto")
        total = loaded.model.config.num_hidden_layers
        which = list(range(total - layers, total))
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), layers_to_transform=which)
        self.model = get_peft_model(loaded.model, config).eval()
        self.tokenizer = loaded.tokenizer
        self.theta = [p for p in self.model.parameters() if p.requires_grad]

    def inputs(self, data: Dataset) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = prompts.encode(self.tokenizer, data.examples, 128)
        width = max(len(row.tokens) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
        for k, row in enumerate(rows):
            tokens[k, : len(row.tokens)] = torch.tensor(row.tokens)
            mask[k, : len(row.tokens)] = 1
            labels[k, row.start : len(row.tokens)] = tokens[k, row.start : len(row.tokens)]
        return tokens, mask, labels

    @torch.no_grad()
    def loss(self, tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> float:
        return float(self.model(input_ids=tokens, attention_mask=mask, labels=labels).loss)


def plain_step(plain: Plain, data: Dataset) -> None:
    """PROBES perturbations of one minibatch, two whole forwards each."""
    batch = plain.inputs(data)
    with torch.no_grad():
        for _ in range(PROBES):
            v = [torch.randn_like(p) for p in plain.theta]
            for scale, evaluate in ((STEP, True), (-2 * STEP, True), (STEP, False)):
                for p, direction in zip(plain.theta, v, strict=True):
                    p.add_(direction, alpha=scale)
                if evaluate:
                    plain.loss(*batch)


def peak(case: str, layers: int) -> float:
    """MB that a fresh process needed at most for one of CASES."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", case, "--layers", str(layers)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def run_case(case: str, layers: int) -> None:
    data = minibatch()
    if case == "inference":
        loaded = models.resolve("smollm2-135m").load(dtype="auto")
        rows = prompts.encode(loaded.tokenizer, data.examples, 128)
        tokens = torch.zeros(len(rows), max(len(r.tokens) for r in rows), dtype=torch.long)
        for k, row in enumerate(rows):
            tokens[k, : len(row.tokens)] = torch.tensor(row.tokens)
        with torch.inference_mode():
            hidden = loaded.model.model(input_ids=tokens, use_cache=False).last_hidden_state
            loaded.model.lm_head(hidden[:, -2:].reshape(-1, hidden.shape[-1]))  # strided rows would cost a copy
    elif case.startswith("back-propagation"):
        plain = Plain(MODEL_LAYERS if case.endswith("all layers") else layers)
        adam = torch.optim.Adam(plain.theta, lr=1e-3)
        tokens, mask, labels = plain.inputs(data)
        for _ in range(2):
            plain.model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
            adam.step()
            adam.zero_grad(set_to_none=True)
    else:
        frozen = ours(layers, (512 << 20) if case == "client-kept" else 0)
        for pool in range(2):
            our_step(frozen, data, pool)
    status = Path("/proc/self/status").read_text()
    high = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(int(high.split()[1]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--case", default="")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fwdllm_speed.json")
    asked = parser.parse_args()
    if asked.case:
        run_case(asked.case, asked.layers)
        return
    memory = {case: peak(case, asked.layers) for case in CASES}
    data, frozen, plain = minibatch(), ours(asked.layers, 512 << 20), Plain(asked.layers)
    our_step(frozen, data, 0)
    frozen._kept.clear()  # every timed turn starts with a fresh minibatch: its frozen layers are paid for
    frozen._bytes = 0
    plain_step(plain, data)
    turns, began = [], time.monotonic()
    while time.monotonic() - began < asked.seconds or len(turns) < 5:
        frozen._kept.clear()
        frozen._bytes = 0
        start = time.perf_counter()
        our_step(frozen, data, len(turns))
        middle = time.perf_counter()
        our_step(frozen, data, len(turns) + 1000)
        kept = time.perf_counter()
        plain_step(plain, data)
        turns.append((middle - start, kept - middle, time.perf_counter() - kept))
    per = 2 * PROBES
    result = {
        "command": f"python cookbook/benchmarks/fwdllm_speed.py --layers {asked.layers} --seconds {asked.seconds:g}",
        "environment": environment(),
        "perturbed_inferences_per_second": {
            "ours, first visit of a minibatch": per / statistics.median(t[0] for t in turns),
            "ours, minibatch kept": per / statistics.median(t[1] for t in turns),
            "plain": per / statistics.median(t[2] for t in turns),
        },
        "ratio_first_visit": statistics.median(t[2] / t[0] for t in turns),
        "ratio_kept": statistics.median(t[2] / t[1] for t in turns),
        "turns": len(turns),
        "peak_rss_mb": memory,
        "peak_rss_client_over_inference": memory["client"] / memory["inference"],
    }
    store.write_json(asked.output, result)
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=2))


if __name__ == "__main__":
    main()
