"""The gate by itself: does a GGUF file that somebody made behave like the model it is said to come from?"""

from __future__ import annotations

from pathlib import Path

from edgellm_sdk import config, models, settings, store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ModelError
from edgellm_sdk.gate import verify_export
from edgellm_sdk.gguf_file import read
from edgellm_sdk.report import Meter
from edgellm_sdk.steps.delivery import gate_prompts
from edgellm_sdk.steps.examples import inherited_data
from edgellm_sdk.steps.step import Outcome, prepare
from edgellm_sdk.types import Artifact, Metric


def verify(
    file: str | Path,
    against: str,
    output: str | Path = "",
    *,
    data: str = "",
    task_prompt: str = "",
    seed: int = 0,
    quiet: bool = True,
) -> Outcome:
    """Hold a GGUF file against the model `against`: facts, weights, token ids, logits, continuations.

    A LoRA adapter file is run on that model's base, exported for the occasion. The file stays as it is, whatever is
    found; `report.verified["passed"]` tells. `output` is a folder for the report, empty writes none.
    """
    path = Path(file)
    asked = {"against": against, "output": str(output), "data": data, "task_prompt": task_prompt, "seed": seed}
    config.build(settings.Verify, asked, "verify")
    if path.suffix != ".gguf" or not path.is_file():
        raise ModelError("is no GGUF file" if path.exists() else "no such file", str(path))
    handle = models.resolve(against)
    prompts = gate_prompts(*inherited_data(against, data, task_prompt), seed)
    step = prepare("verify", "llama_cpp", "deploy", asked | {"file": path.name}, Path(output), seed, {})
    kind = {"kind": "adapter"} if read(path).metadata.get("general.type") == "adapter" else {}
    artifact = Artifact((path,), ("",), "gguf", "llama_cpp", handle.digest, kind)
    report, ctx = step.report(), Context(Path(output), seed, quiet=quiet)
    with Meter() as meter:
        result = verify_export(handle, artifact, ctx, prompts)
    report.finish(meter, ctx)
    report.verified = result.as_dict()
    report.metrics["size"] = Metric(path.stat().st_size, "bytes")
    if output:
        with store.run_folder(step.folder):
            report.write(step.folder)
    return Outcome(report, step.folder)
