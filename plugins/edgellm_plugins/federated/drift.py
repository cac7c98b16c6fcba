"""What corrections of client drift share: the Drift that a method adds to every gradient, and the proof that it did."""

from __future__ import annotations

from edgellm_sdk.context import Context, Drift
from edgellm_sdk.errors import ConfigError


def drift_of(ctx: Context) -> Drift:
    """The Drift of the turn at hand, made where there is none yet: several corrections add up."""
    if ctx.drift is None:
        ctx.drift = Drift()
    return ctx.drift


def insist(ctx: Context, name: str) -> None:
    """ConfigError unless the method added the Drift to its gradients."""
    if ctx.drift is None or not ctx.drift.applied:
        what = f"{name} changes gradients, and this method steps without any"
        raise ConfigError(what, f"around {name}", "use a method of back-propagation, such as lora or lora-fa")
