"""FedYogi: Yogi on the server (arXiv 2003.00295)."""

from __future__ import annotations

from dataclasses import dataclass

from edgellm_plugins.aggregation.hooks import rule_hooks
from edgellm_plugins.aggregation.options import Forgetting
from edgellm_sdk.registry import Plugin


@dataclass(frozen=True)
class Config(Forgetting):
    """The options of the family, none of its own."""


PLUGIN = Plugin(
    name="fedyogi",
    summary="Yogi over the rounds on the clients' weighted mean change",
    version="0.1.0",
    config=Config,
    paper="arXiv 2003.00295",
    linear=lambda config: "",
)


edgellm_screen, edgellm_aggregate = rule_hooks(__name__)
