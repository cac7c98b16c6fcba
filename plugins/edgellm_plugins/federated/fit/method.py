"""What a client is asked for, cut to what it has; ranks are dealt by the rules that average them (`flexlora`, `flora`)
and by `mixed`.

batch   halved until the foretold memory is what the client has, down to one example;
layers  then as many of the trained ones, from the last on, as it bears with one example, at least one. It is sent all
        of theta and its forward pass uses it; below its lowest layer nothing is kept and nothing trains. An array is
        averaged over the clients that train it, by their weights among themselves (`averaging.having`);
steps   as many as the foretold time allows, at least one.

Layers are not cut where a rule needs equal updates: under plugins that hide single ones, and for methods that evaluate
theta as a whole. Rules that compare clients (krum, median) refuse unlike layers: `layers = false` is for them.

The forecast is `edgellm_sdk.kit.footprint`: an upper one, since it takes texts to be as long as they may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgellm_plugins.federated.fit import PLUGIN, Config
from edgellm_plugins.federated.options import Local, steps_of
from edgellm_plugins.training.options import Options
from edgellm_sdk import registry
from edgellm_sdk.context import Context, Cost
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import averaging, footprint
from edgellm_sdk.kit.adapters import layer_of
from edgellm_sdk.kit.footprint import Shape, Turn
from edgellm_sdk.types import FROZEN, Arrays, Assignment, Profile

LOWEST = "fit/lowest"


def fitted(assigned: Mapping[str, Assignment], data: Mapping[str, int], ctx: Context) -> dict[str, Assignment]:
    """The assignments with `batch_size` and `steps` among their options where they differ from the method's, and the
    lowest layer that trains among their scalars where that is not the method's. A method of whole passes over a
    client's `data` is asked for the steps that these take at its own batch.

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
    cuts = config.layers and method.parts and not any(registry.get(name).plugin.hides for name in ctx.configs)
    found = {}
    for client, assignment in assigned.items():
        profile = ctx.profiles.get(client, Profile())
        carried = sum(array.nbytes for array in assignment.arrays.values())
        theta = dict(ctx.starts.get(client, averaging.theta(assignment.arrays)))
        sizes = sizes_of(theta, shape) if cuts else ()
        whole = _turn(method, assignment, theta, shape, data.get(client, 0))
        turn, cost = fit(whole, shape, profile, config, rate, carried, sizes)
        ctx.foretold[client] = cost
        if profile.memory and cost.peak > profile.memory:
            told = f"{client} has {profile.memory / 1e6:.0f} MB, one example takes {cost.peak / 1e6:.0f} MB"
            if told not in ctx.notes:
                ctx.note(told)
        changed = {"batch_size": turn.batch, "steps": turn.steps}
        options = {name: value for name, value in changed.items() if value != getattr(method, name)}
        scalars = assignment.scalars
        if turn.trained < whole.trained:
            lowest = shape.layers - turn.trained
            scalars = {**scalars, LOWEST: lowest}
            ctx.starts = {**ctx.starts, client: {n: array for n, array in theta.items() if not below(n, lowest)}}
        found[client] = replace(assignment, scalars=scalars, options={**assignment.options, **options})
    return found


def below(name: str, lowest: int) -> bool:
    """Whether an array is of a layer below `lowest`; one outside of all layers always trains."""
    place = layer_of(name)
    return place is not None and place < lowest


def sizes_of(theta: Arrays, shape: Shape) -> tuple[int, ...]:
    """Scalars of theta in every layer, the last one first; nothing where it is in none."""
    found = [0] * shape.layers
    for name, array in theta.items():
        place = layer_of(name)
        if place is not None and place < shape.layers:
            found[shape.layers - 1 - place] += array.size
    return tuple(found) if any(found) else ()


def prepare(assignment: Assignment) -> Assignment | None:
    """On the client: what does not train there is used as it was sent."""
    lowest = assignment.scalars.get(LOWEST)
    if lowest is None:
        return None
    own = averaging.theta(assignment.arrays)
    arrays = {FROZEN + n if n in own and below(n, int(lowest)) else n: a for n, a in assignment.arrays.items()}
    return replace(assignment, arrays=arrays)


def _turn(method: Options, assignment: Assignment, theta: Arrays, shape: Shape, examples: int) -> Turn:
    scalars = sum(array.size for array in theta.values())
    asked: dict[str, Any] = {"batch_size": method.batch_size, "steps": method.steps} | dict(assignment.options)
    layers = min(method.layers or shape.layers, shape.layers)
    steps = int(asked["steps"]) or (steps_of(method, examples) if isinstance(method, Local) else 1)
    return Turn(layers, scalars, steps, int(asked["batch_size"]), method.max_length, method.chunk)


def fit(
    turn: Turn,
    shape: Shape,
    profile: Profile,
    config: Config,
    rate: float,
    carried: int,
    sizes: Sequence[int] = (),
) -> tuple[Turn, Cost]:
    """The largest part of `turn` that the client bears, and what it is foretold to cost. `rate` is in flop/s of a core,
    `carried` bytes that it is sent and sends back if all layers train; `sizes` are the scalars that train in each
    layer, the last one first, where layers may be left out."""
    floor = config.floor * 1_000_000
    while profile.memory and turn.batch > 1 and footprint.memory(shape, turn, floor) > profile.memory:
        turn = replace(turn, batch=turn.batch // 2)
    whole = turn
    while sizes and profile.memory and turn.trained > 1 and footprint.memory(shape, turn, floor) > profile.memory:
        out = sum(sizes[turn.trained - 1 : whole.trained])
        turn = replace(turn, trained=turn.trained - 1, scalars=whole.scalars - out, held=whole.held + out)

    def seconds(steps: int) -> float:
        speed = rate * (profile.cores or footprint.cores_here())
        return footprint.seconds(shape, replace(turn, steps=steps), speed, profile, carried, carried - 4 * turn.held)

    if config.seconds:
        least, most = 1, turn.steps
        while least < most:
            middle = (least + most + 1) // 2
            least, most = (middle, most) if seconds(middle) <= config.seconds else (least, middle - 1)
        turn = replace(turn, steps=least)
    return turn, Cost(footprint.memory(shape, turn, floor), seconds(turn.steps))
