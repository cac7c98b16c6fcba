"""Which rule a run aggregates with, and whether it needs more than the mean of what clients send."""

from __future__ import annotations

from edgellm_sdk import registry
from edgellm_sdk.context import Context
from edgellm_sdk.errors import PrivacyError


def not_linear(ctx: Context) -> str:
    """Why the rule of this run cannot be given the mean of the clients' updates instead of the updates; "" if it can.

    The rule is the plugin that answers `edgellm_aggregate`: the last of the run that implements it.
    """
    for name in reversed(ctx.configs):
        loaded = registry.get(name)
        if "edgellm_aggregate" in loaded.hooks:
            linear = loaded.plugin.linear
            reason = "needs every client's update" if linear is None else linear(ctx.configs[name])
            return f"{loaded.plugin.name}: {reason}" if reason else ""
    return "no plugin of the run aggregates"


def comes_first(name: str, ctx: Context) -> None:
    """PrivacyError unless `name` is the first plugin of the run that changes what the rule sees."""
    changing = [other for other in ctx.configs if "edgellm_incoming" in registry.get(other).hooks]
    if changing[:1] != [name]:
        what = f"{changing[0]} would change updates before {name} has bounded them"
        raise PrivacyError(what, "around", f"name {name} before it")


def forget(ctx: Context, *beginnings: str) -> None:
    """Drop the curves whose names begin so: what a rule draws of single updates says nothing where it saw one mean."""
    for name in [name for name in ctx.curves if name.startswith(beginnings)]:
        del ctx.curves[name]
