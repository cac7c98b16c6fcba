"""What a training step needs in memory and time: LoRA and LoRA-FA here, LoRA by peft and plain autograd, inference.

    python cookbook/benchmarks/lora_memory.py [--only messages|texts] [--steps 3] [--output FILE]

SmolLM2-135M in the precision that `auto` picks, LoRA of rank 8 (LoRA-FA: 16, about as many scalars) on all linear
layers of the last 4 and of all decoder layers, AdamW. Two minibatches: `messages`, 8 real messages of at most 64 tokens
with their label scored, and `texts`, 4 x 256 tokens of joined messages with every token scored. Each case is a fresh
process; its figures are the kernel's peak resident size (VmHWM) over everything it did, loading included, the peak of
the steps alone (the mark reset after loading), and the median wall and CPU seconds of a step after a first one.
Nothing is kept between steps. Inference makes logits at the last two positions only, the smallest it can be. `load` is
the machine's load average before the case: above the number of cores, wall seconds say more about other programs.
`--only` runs one minibatch and leaves the other's cases in the file as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgellm_sdk import models, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.kit import prompts
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment
from edgellm_sdk.types import Assignment, Dataset, Example

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BATCHES = {"messages": 64, "texts": 256}  # longest example
METHODS = ("lora", "lora-fa", "peft")
MODEL_LAYERS, RANK = 30, 8
BAR = 1.5


def minibatch(batch: str) -> Dataset:
    data = read("sms-spam")
    if batch == "messages":
        return data.select(Stream(0, "benchmark").sample(range(len(data)), 8))
    words = [str(example.prompt[-1]["content"]) for example in data.examples[:200]]  # type: ignore[index]
    rows = tuple(Example("", "\n".join(words[k::4])) for k in range(4))
    return Dataset(rows, "joined messages", "texts")


def padded(tokenizer: Any, data: Dataset, length: int) -> Any:
    import torch

    rows = prompts.encode(tokenizer, data.examples, length)
    tokens = torch.zeros(len(rows), max(len(row.tokens) for row in rows), dtype=torch.long)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, -100)
    for k, row in enumerate(rows):
        tokens[k, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[k, : len(row.tokens)] = 1
        labels[k, row.start : len(row.tokens)] = tokens[k, row.start : len(row.tokens)]
    return tokens, mask, labels


def inference(data: Dataset, length: int) -> Callable[[], object]:
    import torch

    loaded = models.resolve("smollm2-135m").load(dtype="auto")
    tokens, _, _ = padded(loaded.tokenizer, data, length)

    def step() -> object:
        with torch.inference_mode():
            hidden = loaded.model.model(input_ids=tokens, use_cache=False).last_hidden_state
            return loaded.model.lm_head(hidden[:, -2:].reshape(-1, hidden.shape[-1]))  # strided rows would cost a copy

    return step


def plain(data: Dataset, length: int, layers: int) -> Callable[[], object]:
    """peft's layers, transformers' loss, torch's autograd and AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model

    loaded = models.resolve("smollm2-135m").load(dtype="auto")
    which = list(range(MODEL_LAYERS - layers, MODEL_LAYERS))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEARS), layers_to_transform=which)
    model = get_peft_model(loaded.model, config).eval()
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    tokens, mask, labels = padded(loaded.tokenizer, data, length)

    def step() -> None:
        model(input_ids=tokens, attention_mask=mask, labels=labels).loss.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)

    return step


def client(method: str, data: Dataset, length: int, layers: int, folder: Path) -> Callable[[], object]:
    """One round of one step: the whole way of a client, from the theta it is sent to the change it sends back."""
    from edgellm_plugins.training import lora, lora_fa

    plugin: Any = lora if method == "lora" else lora_fa
    rank = RANK if method == "lora" else 2 * RANK
    config = plugin.Config(
        layers=layers % MODEL_LAYERS, rank=rank, alpha=2.0 * rank, steps=1, batch_size=len(data), max_length=length,
        hidden_memory=0,
    )  # fmt: skip
    handle = models.resolve("smollm2-135m")
    ctx = Context(folder, rounds=100, configs={method: config})
    start = plugin.edgellm_initialise(handle, config, ctx)
    sent = Assignment(start.base, 1, "client", start.arrays, start.scalars)
    return lambda: plugin.edgellm_finetune(handle, data, sent, config, ctx)


def status(name: str) -> float:
    """MB of one line of this process's status."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(name)).split()[1]) / 1024


def run_case(method: str, batch: str, layers: int, steps: int) -> None:
    data, length = minibatch(batch), BATCHES[batch]
    with tempfile.TemporaryDirectory() as folder:
        if method == "inference":
            step = inference(data, length)
        elif method == "peft":
            step = plain(data, length, layers)
        else:
            step = client(method, data, length, layers, Path(folder))
        loading, loaded = status("VmHWM"), status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the mark starts again from what is resident now
        seconds, work = [], []
        for _ in range(steps + 1):
            began, used = time.perf_counter(), time.process_time()
            step()
            seconds.append(time.perf_counter() - began)
            work.append(time.process_time() - used)
        high = status("VmHWM")
    found = {
        "peak_rss_mb": max(loading, high), "peak_of_steps_mb": high, "after_loading_mb": loaded,
        "seconds_per_step": statistics.median(seconds[1:]), "cpu_seconds_per_step": statistics.median(work[1:]),
    }  # fmt: skip
    print(json.dumps(found))


def fresh(method: str, batch: str, layers: int, steps: int) -> dict[str, float]:
    words = ["--case", method, "--batch", batch, "--layers", str(layers), "--steps", str(steps)]
    load = os.getloadavg()[0]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "load": load}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", choices=tuple(BATCHES), default=None)
    parser.add_argument("--case", default="")
    parser.add_argument("--batch", default="messages")
    parser.add_argument("--layers", type=int, default=MODEL_LAYERS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "lora_memory.json")
    asked = parser.parse_args()
    if asked.case:
        run_case(asked.case, asked.batch, asked.layers, asked.steps)
        return
    cases: dict[str, dict[str, float]] = {}
    commands: dict[str, str] = {}
    only = f" --only {asked.only}" if asked.only else ""
    if asked.only and asked.output.exists():
        before = store.read_json(asked.output)
        cases, commands = dict(before["cases"]), dict(before["commands"])
    for batch in [asked.only] if asked.only else BATCHES:
        commands[batch] = f"python cookbook/benchmarks/lora_memory.py{only} --steps {asked.steps}"
        base = cases[f"{batch}, inference"] = fresh("inference", batch, MODEL_LAYERS, asked.steps)
        for layers in (4, MODEL_LAYERS):
            for method in METHODS:
                found = fresh(method, batch, layers, asked.steps)
                for peak in ("peak_rss_mb", "peak_of_steps_mb"):
                    found[f"{peak.removesuffix('_mb')}_over_inference"] = found[peak] / base[peak]
                cases[f"{batch}, {method}, {'all' if layers == MODEL_LAYERS else 'last 4'} layers"] = found
    worst = max(c["peak_rss_over_inference"] for name, c in cases.items() if ", lora, " in name)
    result = {
        "commands": commands,
        "environment": environment(),
        "cases": cases,
        "lora_over_inference_at_most": worst,
        "bar": BAR,
        "bar_met": worst <= BAR,
    }
    store.write_json(asked.output, result)
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=2))


if __name__ == "__main__":
    main()
