"""FedKSeed: federated tuning with K shared seeds (arXiv 2312.06353, ICML 2024)."""

from __future__ import annotations

from edgellm_plugins.zeroth_order.hooks import seed_hooks
from edgellm_plugins.zeroth_order.options import Candidates as Config
from edgellm_plugins.zeroth_order.options import own_directions
from edgellm_sdk.registry import Plugin

PLUGIN = Plugin(
    name="fedkseed",
    summary="K seeds for the whole training; a message is K scalars down, a few pairs up",
    version="0.1.0",
    config=Config,
    paper="arXiv 2312.06353",
    linear=own_directions,
)


(
    edgellm_initialise,
    edgellm_assign,
    edgellm_finetune,
    edgellm_screen,
    edgellm_aggregate,
    edgellm_personalise,
    edgellm_measure,
) = seed_hooks(__name__)
