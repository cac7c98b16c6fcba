"""The whole extension surface of edgellm, API 1.

A plugin is a module with a `PLUGIN` (see `edgellm_sdk.registry.Plugin`) and some of the functions below, marked
`@hookimpl`. Implement what you do, leave the rest out; take only the arguments you need. A run's plugin manager holds
exactly the plugins that the run names, so nobody else's plugin can interfere, and no implementation needs to check
names. Returning None means "not mine".

What works around another method (clipping, noise, masks, a proximal term) is named in `--around`, outermost last. It
implements `edgellm_prepare` and `edgellm_incoming`, and `edgellm_assign`, `edgellm_finetune` or `edgellm_aggregate`
with `@hookimpl(wrapper=True)`: `result = yield`, then return what the next one out is to see. A wrapper finds its own
options in `ctx.configs`. One that needs more than a message and a reply in a round implements `edgellm_exchange` on the
server and `edgellm_answer` on the clients.

Keep the plugin's `__init__.py` light: import torch and the like inside the hook, or in `method.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.federate.rounds import Engine, Failure
    from edgellm_sdk.kit.adapters import Spec
    from edgellm_sdk.kit.objective import Objective
    from edgellm_sdk.report import Report
    from edgellm_sdk.types import (
        Artifact,
        Assignment,
        Dataset,
        DeviceInfo,
        Metric,
        ModelHandle,
        Session,
        State,
        Update,
    )

API = 1
hookspec = pluggy.HookspecMarker("edgellm")
hookimpl = pluggy.HookimplMarker("edgellm")


@hookspec(firstresult=True)
def edgellm_initialise(model: ModelHandle, config: Any, ctx: Context) -> State | None:
    """Round 0 of a federation: the trainable arrays every client starts from. Optional; the default State is empty."""


@hookspec(firstresult=True)
def edgellm_cohort(
    clients: Sequence[str], count: int, cohort: int, attempt: int, config: Any, ctx: Context
) -> Sequence[str] | None:
    """Who takes part in a round: about `count` of the enrolled `clients`.

    Optional; the default draws exactly `count` from the run's seed, the same for one `cohort` and `attempt`.
    """


@hookspec(firstresult=True)
def edgellm_assign(
    state: State, clients: Sequence[str], data: Mapping[str, int], config: Any, ctx: Context
) -> Mapping[str, Assignment] | None:
    """What each of this round's clients is sent: arrays, seeds, option overrides (rank, layers, probes).

    `data` maps every client to the number of examples it enrolled with. Optional; the default sends `state.arrays`.
    """


@hookspec(firstresult=True)
def edgellm_exchange(
    messages: Mapping[str, bytes], engine: Engine, state: State, config: Any, ctx: Context
) -> Iterable[tuple[str, bytes | Failure]] | None:
    """On the server: the replies to a round's `messages`, for plugins that need more than one message for a reply.

    `engine` carries one message to each client and may be called as often as needed. Optional; the default calls it
    once.
    """


@hookspec(firstresult=True)
def edgellm_answer(data: Dataset, assignment: Assignment, config: Any, ctx: Context) -> Update | None:
    """On the client, before anything else: the reply to a message of `edgellm_exchange` that asks for no training."""


@hookspec
def edgellm_prepare(data: Dataset, assignment: Assignment, config: Any, ctx: Context) -> Assignment | None:
    """On the client, before its work: the assignment as the method is to see it. Optional.

    Every plugin is asked, in the order in which the run names them, each given what the one before returned.
    """


@hookspec(firstresult=True)
def edgellm_finetune(
    model: ModelHandle, data: Dataset, assignment: Assignment, config: Any, ctx: Context
) -> Update | None:
    """One client's work in one round, on that client's data only. Must not change its inputs."""


@hookspec
def edgellm_screen(updates: Sequence[Update], state: State, ctx: Context) -> Mapping[str, str] | None:
    """Reasons to reject, by client, or an empty mapping. The reasons of all plugins are united."""


@hookspec
def edgellm_incoming(state: State, updates: Sequence[Update], config: Any, ctx: Context) -> Sequence[Update] | None:
    """On the server, before it aggregates: the updates as the rule is to see them. Optional; asked as `prepare` is."""


@hookspec(firstresult=True)
def edgellm_aggregate(state: State, updates: Sequence[Update], config: Any, ctx: Context) -> State | None:
    """The next State from updates sorted by client. The order they arrived in must not change a byte."""


@hookspec(firstresult=True)
def edgellm_personalise(model: ModelHandle, state: State, folder: Any, config: Any, ctx: Context) -> ModelHandle | None:
    """Write what `state` learned as an adapter into `folder`; return the base with that adapter, unmerged."""


@hookspec(firstresult=True)
def edgellm_compress(model: ModelHandle, data: Dataset | None, config: Any, ctx: Context) -> ModelHandle | None:
    """Write a smaller model into `ctx.folder / "model"` and return it. `data` is for calibration."""


@hookspec(firstresult=True)
def edgellm_export(model: ModelHandle, target: Any, config: Any, ctx: Context) -> Artifact | None:
    """Write the file(s) a device runs at the path `target`. The gate compares them with `model` afterwards."""


@hookspec
def edgellm_probe() -> DeviceInfo | None:
    """What this backend finds on the machine. Must be quick and must not raise."""


@hookspec(firstresult=True)
def edgellm_deploy(subject: ModelHandle | Artifact, device: str, config: Any, ctx: Context) -> Session | None:
    """Load a model or an exported file and give back a live Session; the caller closes it."""


@hookspec(firstresult=True)
def edgellm_objective(model: ModelHandle, spec: Spec, max_length: int, config: Any, ctx: Context) -> Objective | None:
    """The loss of `model` as a function of the small trainable tensors that `spec` names, on a backend that can infer.

    For `--device NAME` of a training run; `max_length` is in tokens. Optional.
    """


@hookspec
def edgellm_measure(subject: Session | State, data: Dataset, ctx: Context) -> Mapping[str, Metric] | None:
    """Metrics on held-out data of a live model, or of the State in the middle of a federation; united."""


@hookspec
def edgellm_report(report: Report, ctx: Context) -> None:
    """A finished run's report, for plugins that publish it somewhere."""
