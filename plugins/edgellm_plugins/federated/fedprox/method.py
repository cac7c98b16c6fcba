"""FedProx, arXiv 1812.06127, equation 2: a client minimises h(theta) = F_k(theta) + (mu / 2) |theta - theta_0|^2.

theta_0 is what the client was sent; every gradient gets mu (theta - theta_0), before it is clipped. With mu 0 it is the
method alone, bit for bit.

Where we differ: clients take as many steps as the method says; the paper also lets slow clients take fewer.
"""

from __future__ import annotations

from edgellm_plugins.federated.drift import drift_of
from edgellm_plugins.federated.fedprox import Config
from edgellm_sdk.context import Context


def prepare(config: Config, ctx: Context) -> None:
    """Add mu to the pull of the turn at hand."""
    drift_of(ctx).proximal += config.mu
