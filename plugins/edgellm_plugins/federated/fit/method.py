"""What a client is asked for, cut to what it has. Only the batch and the number of steps change, so that every client
trains the same theta and rules of aggregation need not know; ranks are theirs to deal (`flexlora`, `flora`, `mixed`).

batch   halved until the foretold memory is what the client has, down to one example;
steps   as many as the foretold time allows, at least one.

The forecast is `edgellm_sdk.kit.footprint`: an upper one, since it takes texts to be as long as they may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgellm_plugins.federated.fit import PLUGIN, Config
from edgellm_plugins.federated.options import Local, steps_of
from edgellm_plugins.training.options import Options
from edgellm_sdk.context import Context, Cost
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import averaging, footprint
from edgellm_sdk.kit.footprint import Shape, Turn
from edgellm_sdk.types import Assignment, Profile


def fitted(assigned: Mapping[str, Assignment], data: Mapping[str, int], ctx: Context) -> dict[str, Assignment]:
    """The assignments with `batch_size` and `steps` among their options where they differ from the method's. A method
    of whole passes over a client's `data` is asked for the steps that these take at its own batch.

    ConfigError for a method that does not back-propagate, ModelError where the model's shape is not known.
    """
    config: Config = ctx.configs[PLUGIN.name]
    method = next((found for found in ctx.configs.values() if isinstance(found, Options)), None)
    if method is None or ctx.model is None:
        raise ConfigError(
            "fits work of methods that back-propagate", PLUGIN.name, "use --plugin lora, lora-fa or fedit"
        )
    model = ctx.model
    shape = ctx.keep(f"shape {model.digest}", lambda: footprint.shape_of(model, method.precision))
    rate = ctx.keep(f"rate of a core {model.digest}", lambda: footprint.core_rate(shape))
    found = {}
    for client, assignment in assigned.items():
        profile = ctx.profiles.get(client, Profile())
        carried = sum(array.nbytes for array in assignment.arrays.values())
        turn = _turn(method, assignment, shape, data.get(client, 0))
        turn, cost = fit(turn, shape, profile, config, rate, carried)
        ctx.foretold[client] = cost
        if profile.memory and cost.peak > profile.memory:
            told = f"{client} has {profile.memory / 1e6:.0f} MB, one example takes {cost.peak / 1e6:.0f} MB"
            if told not in ctx.notes:
                ctx.note(told)
        changed = {"batch_size": turn.batch, "steps": turn.steps}
        options = {name: value for name, value in changed.items() if value != getattr(method, name)}
        found[client] = replace(assignment, options={**assignment.options, **options})
    return found


def _turn(method: Options, assignment: Assignment, shape: Shape, examples: int) -> Turn:
    scalars = sum(array.size for array in averaging.theta(assignment.arrays).values())
    asked: dict[str, Any] = {"batch_size": method.batch_size, "steps": method.steps} | dict(assignment.options)
    layers = min(method.layers or shape.layers, shape.layers)
    steps = int(asked["steps"]) or (steps_of(method, examples) if isinstance(method, Local) else 1)
    return Turn(layers, scalars, steps, int(asked["batch_size"]), method.max_length, method.chunk)


def fit(turn: Turn, shape: Shape, profile: Profile, config: Config, rate: float, carried: int) -> tuple[Turn, Cost]:
    """The largest part of `turn` that the client bears, and what it is foretold to cost. `rate` is in flop/s of a core,
    `carried` bytes each way."""
    floor = config.floor * 1_000_000
    while profile.memory and turn.batch > 1 and footprint.memory(shape, turn, floor) > profile.memory:
        turn = replace(turn, batch=turn.batch // 2)

    def seconds(steps: int) -> float:
        speed = rate * (profile.cores or footprint.cores_here())
        return footprint.seconds(shape, replace(turn, steps=steps), speed, profile, carried, carried)

    if config.seconds:
        least, most = 1, turn.steps
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if seconds(middle) <= config.seconds else (least, middle - 1)
        turn = replace(turn, steps=least)
    return turn, Cost(footprint.memory(shape, turn, floor), seconds(turn.steps))
