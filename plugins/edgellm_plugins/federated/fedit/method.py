"""FedIT, arXiv 2305.05644: y = W x + s B A x with s = alpha / r; clients train phi = {A, B}, the server averages it.

One phi_0 is drawn from the run's seed (A kaiming-uniform, B zero) and sent to everybody. A client of round t starts
from phi_t with a new AdamW and a new linear decay without warm-up, makes E passes and sends its factors themselves.
The server's phi_{t+1} = sum_k p_k phi_k with p_k = n_k / sum_j n_j over the clients that were selected and accepted,
A and B each on its own: sum_k p_k B_k A_k is another matrix than that of the means.

Where we differ from the paper and its code (and why):
- No dropout in the adapter: a client's work is then a function of its data and the seed.
- The loss falls on the answer by default, as everywhere here; `train_on_inputs` adds the prompt, the code's default.
- The model's own chat template by default, so that what is trained is what a chat asks for later. `template=alpaca`
  writes Alpaca's; a model so trained wants its prompts in that form.
- The linear layers of attention by default, as the authors' example has them; their code's default is q_proj alone.
- Clients are drawn by our own stream from seed and round, not numpy's; all of them take part unless told otherwise.
- The base is in 16 or 32 bits, not 8. A minibatch's loss is the mean over its tokens, also where it is accumulated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellm_plugins.federated import local
from edgellm_plugins.federated.fedit import PLUGIN, Config
from edgellm_plugins.training import backprop
from edgellm_plugins.training.backprop import Leaves, Slope
from edgellm_sdk.context import Context
from edgellm_sdk.errors import DataError
from edgellm_sdk.kit.adapters import Spec
from edgellm_sdk.types import Assignment, Dataset, Example, Metric, ModelHandle, State, Update

ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{asked}\n\n{given}### Response:\n"
)
MORE = ", paired with an input that provides further context"


def spec_of(config: Config) -> Spec:
    """phi: A (r, d_in) and B (d_out, r) of every target."""
    return Spec("lora", config.layers, config.rank, config.alpha, local.targets_of(config.targets))


def _told(config: Config) -> str:
    return local.digest(spec_of(config), config.template)


def initialise(model: ModelHandle, config: Config, ctx: Context) -> State:
    """phi_0, float32."""
    state = backprop.initialise(model, local.frozen_of(model, spec_of(config), config, ctx))
    return replace(state, scalars={**state.scalars, local.ADAPTER: _told(config)})


def finetune(model: ModelHandle, data: Dataset, assignment: Assignment, config: Config, ctx: Context) -> Update:
    """One client's E passes: kind `weights`, float32 arrays of phi's names and shapes."""
    frozen = local.frozen_of(model, spec_of(config), config, ctx)
    slope = local.slope_of(frozen, config, backprop.folded(assignment.arrays), config.train_on_inputs)
    if config.template == "alpaca":
        slope = _written_out(slope)
    return local.finetune(slope, _told(config), data, assignment, config, ctx)


def _written_out(slope: Slope) -> Slope:
    def written(step: int, name: str, make: Any, leaves: Leaves) -> float:
        return slope(step, name, lambda: alpaca(make()), leaves)

    return written


def alpaca(data: Dataset) -> Dataset:
    """Instructions in Alpaca's words, as plain text. A blank line ends the instruction where an input follows it, as
    `edgellm_sdk.data` joins the two. DataError for anything but unlabelled pairs of one question and one answer."""
    if data.labels:
        raise DataError("Alpaca's template is for instructions, these are labelled texts", data.name, "use chat")
    return replace(data, examples=tuple(_alpaca(example, data.name) for example in data.examples))


def _alpaca(example: Example, name: str) -> Example:
    turns = example.prompt
    if isinstance(turns, str) or [turn["role"] for turn in turns] != ["user"]:
        raise DataError("Alpaca's template is for one instruction and its answer", name, "use chat")
    asked, _, given = turns[0]["content"].partition("\n\n")
    extra = f"### Input:\n{given}\n\n" if given else ""
    return replace(example, prompt=ALPACA.format(more=MORE if given else "", asked=asked, given=extra))


def screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str]:
    """As `local.screen`."""
    return local.screen(updates, state, ctx.configs[PLUGIN.name], ctx)


def measure(subject: Any, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    """As `backprop.measure`, with prompts written as they are trained."""
    if not isinstance(subject, State):
        return None
    config: Config = ctx.configs[PLUGIN.name]
    return backprop.measure(subject, alpaca(data) if config.template == "alpaca" else data, ctx)


def personalise(model: ModelHandle, state: State, folder: Path, config: Config, ctx: Context) -> ModelHandle:
    """phi as a PEFT adapter on its base."""
    if config.template == "alpaca":
        ctx.note("this model wants its prompts in Alpaca's template, not in a chat's")
    return backprop.personalise(model, state, folder, local.frozen_of(model, spec_of(config), config, ctx))
