"""One function for each verb. The command line and the Python API call these; both write the same files.

Every step owns its run folder while it works, leaves `recipe.json` (what was asked), `report.json` and `report.html`,
and publishes its result with a manifest written last. A finished step is never overwritten.
"""

from edgellm_sdk.steps.comparison import compare
from edgellm_sdk.steps.delivery import deploy, evaluate, export
from edgellm_sdk.steps.demo import demo
from edgellm_sdk.steps.devices import bench
from edgellm_sdk.steps.recipe import run
from edgellm_sdk.steps.step import Outcome
from edgellm_sdk.steps.training import aggregate, compress, finetune
from edgellm_sdk.steps.verification import verify

__all__ = [
    "Outcome", "aggregate", "bench", "compare", "compress", "demo", "deploy", "evaluate", "export", "finetune", "run",
    "verify",
]  # fmt: skip
