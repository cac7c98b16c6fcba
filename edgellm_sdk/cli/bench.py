"""`bench compare` and `bench device`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from edgellm_sdk.cli.verb import Answer, Request, Verb
from edgellm_sdk.settings import BenchDevice, Compare


def compare(request: Request) -> Answer:
    from edgellm_sdk.cli import show
    from edgellm_sdk.steps.comparison import compare as run
    from edgellm_sdk.steps.comparison import read_arms

    arms = read_arms(Path(request.words[0])) if request.words else []
    done = run(**asdict(request.settings), arms=arms, quiet=request.quiet)
    return Answer(done.report.to_json(), show.outcome(done))


def device(request: Request) -> Answer:
    from edgellm_sdk.cli import show
    from edgellm_sdk.steps.devices import bench

    done = bench(request.words, **asdict(request.settings), options=request.options, quiet=request.quiet)
    return Answer(done.report.to_json(), show.outcome(done))


VERBS = (
    Verb(
        "bench compare",
        "Train several methods at equal cost and compare them, with intervals over seeds.",
        compare,
        Compare,
        words="[ARMS.toml]",
        most=1,
        required=("model", "data", "output"),
    ),
    Verb(
        "bench device",
        "Measure exported files where they run: bytes, speed, memory, perplexity, divergence, score.",
        device,
        BenchDevice,
        words="FILE...",
        least=1,
        most=-1,
        required=("output",),
        plugin="device",
        stage="deploy",
    ),
)
