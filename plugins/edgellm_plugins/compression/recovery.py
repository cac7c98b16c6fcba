"""What pruning took, trained back: a short LoRA on the pruned model, merged (LLM-Pruner, arXiv 2305.11627).

LoRA (r = 8, alpha = 16) on all linear layers, AdamW, warm-up, and an early stop: the paper's own curve (its figure 5)
turns after a while, so the loss on held-out examples is measured a few times and the best state is merged.

Where we differ: no dropout; a linear warm-up over a tenth of the steps in place of 100 of some 1 500; the optimiser's
step is on 4 examples by default, the paper's on 64. The same is reached in steps of its own with `edgellm finetune
--plugin lora` on the pruned model.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_plugins.compression import layerwise, pruned
from edgellm_plugins.compression.pruning_options import Options
from edgellm_plugins.training import backprop
from edgellm_plugins.training.lora import Config as Lora
from edgellm_sdk.errors import DataError, ModelError
from edgellm_sdk.kit import adapters, objective
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.types import Dataset, Example

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Arrays, ModelHandle

WARMUP, HELD_OUT, MOST_HELD_OUT, CHUNK = 0.1, 0.1, 32, 64
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def recovered(pruned_model: ModelHandle, data: Dataset | None, options: Options, ctx: Context) -> ModelHandle:
    """`pruned_model`, which lies in `ctx.folder / "model"`, after `options.recovery_steps` steps, merged and in its
    place; as it is for 0 steps. DataError for too few examples, ModelError when the loss stops being finite."""
    if not options.recovery_steps:
        return pruned_model
    spec = adapters.Spec("lora", 0, options.recovery_rank, options.recovery_alpha, TARGETS)
    frozen = Frozen(pruned_model, spec, ctx.stream("recovery"), "float32", ctx.device, 0, options.recovery_length)
    train, held = _parts(frozen, data, options, ctx)
    best = train_back(frozen, train, held, options, ctx)
    folder = ctx.folder / "recovery"
    try:
        adapted = objective.written(frozen, folder, best, pruned_model)
        return pruned.write(adapted, pruned.whole_of(pruned_model), ctx)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def train_back(frozen: Frozen, train: Dataset, held: Dataset, options: Options, ctx: Context) -> Arrays:
    """The state with the lowest loss on `held` among the start and `recovery_checks` states of one run on `train`."""
    schedule = Lora(learning_rate=options.recovery_rate, warmup=WARMUP)
    leaves = backprop.leaves_of(frozen.initial)
    slope, rule = backprop.exact_slope(frozen, CHUNK), backprop.StepRule(leaves, "adamw")
    total, size = options.recovery_steps, options.recovery_batch
    best: Arrays = dict(frozen.initial)
    lowest = before = _loss(frozen, best, held)
    at, wanted = 0, {math.ceil(total * (i + 1) / options.recovery_checks) for i in range(options.recovery_checks)}
    ctx.curve("held-out loss over recovery steps", 0, before)
    with ctx.progress("recovering", total) as bar:
        for step in range(total):
            place, rows = backprop.minibatch(len(train), "recovery", step, size, ctx)
            loss = slope(step, f"recovery/{place}", lambda rows=rows: train.select(rows), leaves)  # type: ignore[misc]
            if not math.isfinite(loss):
                raise ModelError("the recovery's loss is not finite", fix="lower --recovery-rate")
            backprop.clip(leaves, 1.0)
            rule.step(backprop.learning_rate(step, total, schedule))
            bar.advance(1, f"loss {loss:.3f}")
            if step + 1 in wanted:
                state = {name: leaf.detach()[0].cpu().numpy().copy() for name, leaf in leaves.items()}
                found = _loss(frozen, state, held)
                ctx.curve("held-out loss over recovery steps", step + 1, found)
                if found < lowest:
                    lowest, best, at = found, state, step + 1
    ctx.note(f"recovery: held-out loss {before:.4f} -> {lowest:.4f} nats/token, best at step {at} of {total}")
    return best


def _loss(frozen: Frozen, state: Arrays, held: Dataset) -> float:
    return frozen.measure(state, held)["validation loss"].value


def _parts(frozen: Frozen, data: Dataset | None, options: Options, ctx: Context) -> tuple[Dataset, Dataset]:
    """(to train on, held out), apart; of the calibration text, or of the user's examples when there is none."""
    found = _of_text(frozen.tokenizer, options, ctx) if options.calibration_text else data
    if found is None or len(found) < 2:
        raise DataError("fewer than two examples to recover on", fix="pass --data or a longer --calibration-text")
    order = ctx.stream("recovery held out").permutation(len(found)).tolist()
    count = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(found))))
    plain = Dataset(found.examples, found.fingerprint, found.name)  # judged by the loss, labels or not
    return plain.select(sorted(order[count:])), plain.select(sorted(order[:count]))


def _of_text(tokenizer: Any, options: Options, ctx: Context) -> Dataset:
    """The text in pieces a little longer than an example, so that none ends with an end-of-text of its own."""
    length = options.recovery_length + 8
    wanted = options.recovery_steps * options.recovery_batch + MOST_HELD_OUT
    windows = layerwise.calibration(tokenizer, None, options.calibration_text, wanted, length, ctx)
    pieces = tuple(Example("", tokenizer.decode(row, skip_special_tokens=False)) for row in windows.tolist())
    return Dataset(pieces, f"{Path(options.calibration_text).name}/{len(pieces)}", "calibration text")
