"""The gate on SmolLM2-135M: ten seeded faults it must catch, twenty clean exports it must let through.

    python cookbook/benchmarks/gate.py

Writes cookbook/benchmarks/results/gate.json. Clean: five types of the model as it is and with two LoRAs merged, and
five block formats written as they are. Faults are the ones of tests/core/gguf_edit.py, seeded by copying a clean file
while changing one thing. For each fault the checks that caught it are listed, and whether running the file would have
been enough, without comparing facts and weights. About six minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgellm_plugins.export import gguf

from edgellm_sdk.context import Context
from edgellm_sdk.gate import GateResult, verify_export
from edgellm_sdk.models import resolve
from edgellm_sdk.report import environment
from edgellm_sdk.types import Artifact, ModelHandle, Prompt

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "core"))
import gguf_edit  # noqa: E402

RESULT = Path(__file__).parent / "results" / "gate.json"
TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
BLOCKS = ("q4_0", "iq4_nl", "q4_1", "q5_0", "q8_0")
SCALE = 2.0
TASK = "Classify the message as ham or spam. Answer with one word."
MESSAGES = (
    "Free entry in a weekly competition to win cup final tickets. Text WIN to 87121 to receive entry",
    "Ok, I'll be home by seven. Do you want me to pick up some milk on the way?",
)
QUESTIONS = ("Name a colour.", "What is 2 + 2?", "Write one sentence about the sea.")
PROMPTS: tuple[Prompt, ...] = (
    *(({"role": "system", "content": TASK}, {"role": "user", "content": text}) for text in MESSAGES),
    *(({"role": "user", "content": text},) for text in QUESTIONS),
    "The quick brown fox jumps over",
)


def export(handle: ModelHandle, target: Path, kind: str, ctx: Context) -> Path:
    return gguf.edgellm_export(handle, target, gguf.Config(type=kind, modelfile=False), ctx).path


def verify(handle: ModelHandle, path: Path, ctx: Context) -> tuple[GateResult, float]:
    begin = time.perf_counter()
    result = verify_export(handle, Artifact((path,), ("",), "gguf", "llama_cpp", handle.digest), ctx, PROMPTS)
    return result, time.perf_counter() - begin


def clean_row(name: str, handle: ModelHandle, kind: str, ctx: Context) -> dict[str, Any]:
    path = export(handle, ctx.folder / "clean.gguf", kind, ctx)
    result, seconds = verify(handle, path, ctx)
    path.unlink()
    figures = {key: result.value(key) for key in ("weights", "kl mean", "kl p99", "top-1")}
    detail = {check.name: check.detail for check in result.checks if check.name in ("top-1", "continuation", "stop")}
    row = {"export": name, "type": kind, "passed": result.passed, "reason": result.reason, "seconds": seconds}
    print(
        f"clean {name} {kind}: {'passed' if result.passed else result.reason}, KL {figures['kl mean']:.3g}", flush=True
    )
    return {**row, "positions": result.positions, "figures": figures, "detail": detail}


def fault_row(name: str, handle: ModelHandle, path: Path, ctx: Context) -> dict[str, Any]:
    result, seconds = verify(handle, path, ctx)
    path.unlink()
    caught_by = [check.name for check in result.checks if not check.passed]
    by_running = [check for check in caught_by if check not in ("facts", "weights")]
    print(f"fault {name}: {', '.join(caught_by) or 'MISSED'}", flush=True)
    return {
        "fault": name,
        "caught": not result.passed,
        "caught_by": caught_by,
        "running_alone_catches_it": bool(by_running),
        "reason": result.reason[:400],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--threads", type=int, default=2, help="of llama.cpp; 1 on a busy machine, its threads spin")
    given = parser.parse_args()
    output = given.output
    base = resolve("smollm2-135m")
    layers = json.loads((base.path / "config.json").read_text())["num_hidden_layers"]
    clean, faults = [], []
    with tempfile.TemporaryDirectory() as folder:
        ctx, where = Context(Path(folder), threads=given.threads), Path(folder)
        tuned, factors = [], []
        for seed in (1, 2):
            adapter = where / f"lora-{seed}"
            factors.append(gguf_edit.add_lora(adapter, base.path, seed, range(layers - 4, layers), 0.04, SCALE, 8))
            tuned.append(dataclasses.replace(base, adapters=(adapter,)))
        for kind in TYPES:
            for name, handle in (("base", base), ("lora 1", tuned[0]), ("lora 2", tuned[1])):
                clean.append(clean_row(name, handle, kind, ctx))
        for kind in BLOCKS:
            compressed = resolve(str(gguf_edit.as_blocks(base.path, where / f"blocks-{kind}", kind)))
            clean.append(clean_row(f"{kind} blocks as they are", compressed, "auto", ctx))
        for name, change in gguf_edit.FILE_FAULTS.items():
            kind = "q4_0" if name == "wrong block order" else "f16"
            source = export(base, where / "source.gguf", kind, ctx)
            faults.append(fault_row(name, base, gguf_edit.copy(source, where / "fault.gguf", change), ctx))
        source = export(tuned[0], where / "source.gguf", "f16", ctx)
        for name, wrong in gguf_edit.LORA_FAULTS.items():
            draft = gguf_edit.load(source)
            wrong(draft, factors[0], SCALE)
            faults.append(fault_row(name, tuned[0], gguf_edit.save(draft, where / "fault.gguf"), ctx))
    caught, alarms = sum(row["caught"] for row in faults), sum(not row["passed"] for row in clean)
    summary = {"faults": len(faults), "caught": caught, "clean": len(clean), "false_alarms": alarms}
    told = {"command": "python cookbook/benchmarks/gate.py", "model": base.name, "prompts": len(PROMPTS)}
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {**told, "summary": summary, "environment": environment(), "faults": faults, "clean": clean}, indent=2
    )
    output.write_text(text + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
