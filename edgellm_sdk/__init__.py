"""edgellm: personalise, shrink, export, prove and run language models on edge devices.

import edgellm_sdk as edgellm

tuned = edgellm.finetune("fwdllm", model="smollm2-135m", data="my.jsonl", output="runs/a", clients=8)
small = edgellm.compress("gptq", model="runs/a", output="runs/b")
edgellm.export("gguf", model="runs/b", output="filter.gguf")
with edgellm.deploy("filter.gguf") as session:
    print(session.generate(session.prompt_ids("Hello"), max_tokens=20).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgellm_sdk.steps import (
        Outcome,
        aggregate,
        bench,
        compare,
        compress,
        deploy,
        evaluate,
        export,
        finetune,
        run,
        verify,
    )

__all__ = [
    "Outcome", "aggregate", "bench", "compare", "compress", "deploy", "evaluate", "export", "finetune", "run", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The verbs, imported when first asked for: `import edgellm_sdk` stays light."""
    if name in __all__:
        from edgellm_sdk import steps

        return getattr(steps, name)
    raise AttributeError(f"module 'edgellm_sdk' has no attribute {name!r}")
