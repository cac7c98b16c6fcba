"""Writing P-RGE's training program (see `program`) and checking the file against the model it came from.

The check runs the written file and transformers' own forward, with the kit's LoRA layers in place of ours, on the same
random tokens and the adapters that the program's state holds, and compares the losses of all 2q candidates.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgellm_hardware.executorch import INSTALL, Config
from edgellm_hardware.executorch.llama import Llama
from edgellm_hardware.executorch.program import Shape, lower, quiet
from edgellm_hardware.executorch.trainer import Trainer, companion, facts, write_companion
from edgellm_sdk import store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DeviceError, GateError, ModelError
from edgellm_sdk.kit import adapters
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.types import Artifact, ModelHandle

BOUND = 1e-4  # nats: two float32 forwards of thirty layers that sum in different orders


def check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("executorch") is None:
        raise DeviceError("executorch is not installed", "", INSTALL)
    with quiet():  # torchao, which ExecuTorch needs, is met by transformers too and complains about other machines
        importlib.import_module("executorch.exir")
        importlib.import_module("transformers.quantizers")


def prepared(
    model: ModelHandle, spec: adapters.Spec, tokens: int, ctx: Context
) -> tuple[Any, adapters.Trainables, Llama]:
    """(live transformers model, its trainables, the same as an exportable module), float32. ModelError if it cannot."""
    if model.format != "hf" or model.adapters:
        what = "already has an adapter" if model.adapters else "is a GGUF file"
        raise ModelError(f"a training program starts from a plain model; this one {what}", str(model.path))
    live = model.load(dtype="float32").model
    trainables = adapters.install(live, spec, ctx.stream("adapter"))
    return live, trainables, Llama(live, trainables, tokens)


def export(model: ModelHandle, target: Any, config: Config, ctx: Context) -> Artifact:
    """Write the training program of `model`. GateError when the written file computes other losses than the model."""
    check_installed()
    target = Path(target)
    if target == companion(target):
        raise ConfigError("the program cannot be a .safetensors file", str(target), "name it .pte")
    targets = adapters.module_names(config.targets)
    spec = adapters.Spec("lora-fa", config.layers, config.rank, config.alpha, targets)
    live, trainables, llama = prepared(model, spec, config.tokens, ctx)
    shape = Shape(config.queries, config.batch, config.tokens, config.labels)
    store.write_bytes(target, lower(llama, shape, config.noise, config.backend))
    base = {"path": str(model.path), "digest": model.digest, "name": model.name}
    write_companion(target, trainables.frozen, facts(config.noise, shape, llama.layout, spec, base))
    verified: dict[str, Any] = {"kind": "training"}
    if config.verify:
        verified |= {"loss difference": drift(target, live, trainables), "bound": BOUND}
        if not verified["loss difference"] <= BOUND:
            aside = target.with_name(f"{target.stem}.rejected{target.suffix}")
            target.replace(aside)
            found = f"its losses are {verified['loss difference']:.2g} nats from the model's"
            raise GateError(found, str(target), f"kept as {aside.name}")
        ctx.note(f"the program's losses are within {verified['loss difference']:.1e} nats of the model's")
    files = (target, companion(target))
    return Artifact(files, tuple(map(store.digest_file, files)), "executorch", "executorch", model.digest, verified)


def drift(program: Path, live: Any, trainables: adapters.Trainables) -> float:
    """Largest difference between the program's losses and transformers', nats, over two steps from the start."""
    trainer = Trainer(program, learning_rate=1e-3, step=0.05)
    shape, stream = trainer.shape, np.random.default_rng(0)
    each = max(1, min(shape.labels // shape.batch, shape.tokens - 1))
    worst = 0.0
    for _ in range(2):
        rows = [
            Encoded(
                tuple(stream.integers(0, live.config.vocab_size, shape.tokens).tolist()), shape.tokens - each, index
            )
            for index in range(min(shape.batch, shape.labels))
        ]
        losses = trainer.step(rows)
        copies = [trainer.layout.unpack(row) for row in trainer.state.numpy()]
        trainables.set({name: torch.from_numpy(np.stack([copy[name] for copy in copies])) for name in copies[0]})
        tokens = torch.tensor([row.tokens for row in rows])
        with torch.inference_mode():
            hidden = live.model(input_ids=tokens.repeat(len(copies), 1), use_cache=False).last_hidden_state
            scores = live.lm_head(hidden[:, -each - 1 : -1]).log_softmax(-1)
        wanted = tokens[:, -each:].repeat(len(copies), 1)[..., None]
        expected = -scores.gather(-1, wanted).reshape(len(copies), -1).double().mean(1).numpy()
        worst = max(worst, float(np.abs(losses - expected).max()))
    return worst
