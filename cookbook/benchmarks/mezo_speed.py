"""What a MeZO step over every weight costs, against its two forward passes and against a step written the public way.

    python cookbook/benchmarks/mezo_speed.py [--seconds 60]

SmolLM2-135M, 8 rows of 64 tokens; every token is scored, and apart from that (`label`) only the last one, as where a
model is to learn labels. `ours` shifts each weight in a scratch while it is used and moves
the weights once; `plain` draws noise tensor by tensor from the framework's generator and writes the weights four times
(+eps, -2 eps, +eps, the update eta (g z + lambda theta) with lambda 0) around transformers' own forward passes, which
compute the logits of all positions, where ours has those that are scored.
Forwards, ours and plain run in turns, plain on a copy of the model, and each forward pair with a step right after it
PAIRS times a turn; a ratio is the median over turns, and beside it stands that of the fastest times, since whatever
else runs on a machine only adds to them. A sweep moves every weight along one direction; it is compared with adding one
array to another of the same size. Memory is the peak of a fresh process for each case.
Replay rebuilds a whole model from its log in numpy, in torch on one thread and on two, and compares digests.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from edgellm_plugins.zeroth_order import differences
from edgellm_plugins.zeroth_order.samplers import Dense
from edgellm_plugins.zeroth_order.space import Full
from edgellm_plugins.zeroth_order.trajectory import sgd

from edgellm_sdk import models, store
from edgellm_sdk.kit import noise
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.prompts import Encoded
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.report import environment, peak_rss
from edgellm_sdk.types import Dataset

ROWS, TOKENS, EPS, ETA = 8, 64, 1e-3, 1e-7
PAIRS = 4
DTYPES = ("float32", "bfloat16")
LOG = tuple(Move((1000 + t,), (1e-4 * (-1) ** t,)) for t in range(20))


def no_data() -> Dataset:
    raise AssertionError("the batch is given")


def setting(dtype: str, label: bool = False) -> tuple[Full, torch.Tensor, torch.Tensor]:
    """The model with its directions, and one batch of token ids (rows, tokens) with what transformers is to score."""
    whole = Whole(models.resolve("smollm2-135m"), dtype, max_length=TOKENS)
    space = Full(whole, Dense("gaussian", whole.shapes))
    ids = np.random.default_rng(0).integers(1000, 40_000, (ROWS, TOKENS))
    start = TOKENS - 1 if label else 1
    space._batches["batch"] = [Encoded(tuple(row.tolist()), start, k) for k, row in enumerate(ids)]
    labels = torch.from_numpy(ids).clone()
    labels[:, :start] = -100
    return space, torch.from_numpy(ids), labels


def our_step(space: Full, seed: int) -> None:
    probe = differences.central(EPS)(space, "batch", no_data, [seed])
    space.step(sgd([seed], probe.scalars.tolist(), ETA))


@torch.no_grad()
def plain_step(model: Any, ids: torch.Tensor, labels: torch.Tensor, seed: int, decay: float = 0.0) -> None:
    def noise() -> Iterator[tuple[Any, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            yield parameter, torch.normal(0, 1, size=parameter.shape, dtype=parameter.dtype, generator=generator)

    def perturb(sign: float) -> None:
        for parameter, z in noise():
            parameter.data = parameter.data + sign * z * EPS

    perturb(1)
    plus = float(model(input_ids=ids, labels=labels, use_cache=False).loss)
    perturb(-2)
    minus = float(model(input_ids=ids, labels=labels, use_cache=False).loss)
    perturb(1)
    slope = (plus - minus) / (2 * EPS)
    for parameter, z in noise():
        parameter.data = parameter.data - ETA * (slope * z + decay * parameter.data)


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speed(dtype: str, seconds: float, label: bool = False) -> dict[str, Any]:
    space, ids, labels = setting(dtype, label)
    model = copy.deepcopy(space.whole.model)
    arrays = [torch.zeros_like(p) for p in space.whole.parameters.values()]

    def forwards() -> None:
        space.losses("batch", no_data, [(0, 0.0), (0, 0.0)])

    @torch.no_grad()
    def theirs() -> None:
        for _ in range(2):
            model(input_ids=ids, labels=labels, use_cache=False)

    @torch.no_grad()
    def add() -> None:
        for parameter, array in zip(space.whole.parameters.values(), arrays, strict=True):
            parameter.data.add_(array)

    our_step(space, 0)
    forwards()
    turns: list[dict[str, list[float]]] = []
    began = time.monotonic()
    while time.monotonic() - began < seconds or len(turns) < 7:
        k = len(turns) + 1
        turn: dict[str, list[float]] = {"two forwards": [], "step": []}
        for pair in range(PAIRS):
            turn["two forwards"].append(timed(forwards))
            turn["step"].append(timed(lambda seed=PAIRS * k + pair: our_step(space, seed)))
        turn["two forwards of transformers"] = [timed(theirs)]
        turn["sweep"] = [timed(lambda k=k: space.step(Move((10_000 + k,), (1e-9,))))]
        turn["add"] = [timed(add)]
        turn["plain step"] = [timed(lambda k=k: plain_step(model, ids, labels, k))]
        turns.append(turn)

    fastest = {name: min(min(t[name]) for t in turns) for name in turns[0]}

    def ratio(above: str, below: str) -> list[float]:
        """Of neighbours where both are measured as often, else of the medians of a turn."""
        found: list[float] = []
        for t in turns:
            if len(t[above]) == len(t[below]):
                found += [x / y for x, y in zip(t[above], t[below], strict=True)]
            else:
                found.append(statistics.median(t[above]) / statistics.median(t[below]))
        return [statistics.median(found), fastest[above] / fastest[below]]

    return {
        "seconds": {name: [statistics.median(x for t in turns for x in t[name]), fastest[name]] for name in turns[0]},
        "step_over_two_forwards": ratio("step", "two forwards"),
        "step_over_two_forwards_of_transformers": ratio("step", "two forwards of transformers"),
        "plain_step_over_step": ratio("plain step", "step"),
        "sweep_over_add": ratio("sweep", "add"),
        "turns": len(turns),
    }


def peak(case: str, dtype: str) -> float:
    """MB that a fresh process needs at most for `inference` or a `step`: the median of five."""
    command = [sys.executable, __file__, "--case", case, "--dtype", dtype]
    found = []
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(float(done.stdout.strip().splitlines()[-1]))
    return statistics.median(found)


def run_case(case: str, dtype: str) -> None:
    space, _, _ = setting(dtype)
    for turn in range(2):
        if case == "inference":
            space.losses("batch", no_data, [(0, 0.0)])
        else:
            our_step(space, turn)
    print(peak_rss() / 2**20)


def replay() -> dict[str, str]:
    """sha256 of SmolLM2-135M after LOG, by who rebuilt it."""
    handle, found = models.resolve("smollm2-135m"), {}
    sha = hashlib.sha256()
    for name, start in handle.tensors():
        weight = np.array(start)
        for step in LOG:
            noise.move("gaussian", weight, name, step)
        sha.update(weight.tobytes())
    found["numpy"] = sha.hexdigest()
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        whole = Whole(handle, "float32")
        space = Full(whole, Dense("gaussian", whole.shapes))
        for step in LOG:
            space.step(step)
        sha = hashlib.sha256()
        for name in sorted(whole.parameters):
            sha.update(whole.parameters[name].numpy().tobytes())
        found[f"torch, {threads} threads"] = sha.hexdigest()
    torch.set_num_threads(before)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--case", default="")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "mezo_speed.json")
    asked = parser.parse_args()
    if asked.case:
        run_case(asked.case, asked.dtype)
        return
    result: dict[str, Any] = {
        "command": f"python cookbook/benchmarks/mezo_speed.py --seconds {asked.seconds:g}",
        "environment": environment(),
    }
    for dtype in DTYPES:
        memory = {case: peak(case, dtype) for case in ("inference", "step")}
        result[dtype] = speed(dtype, asked.seconds)
        result[dtype]["label"] = speed(dtype, asked.seconds, label=True)
        result[dtype] |= {"peak_rss_mb": memory, "step_over_inference_memory": memory["step"] / memory["inference"]}
    digests = replay()
    result |= {"replay": digests, "replay_equal": len(set(digests.values())) == 1}
    store.write_json(asked.output, result)
    print(json.dumps({k: v for k, v in result.items() if k != "environment"}, indent=2))


if __name__ == "__main__":
    main()
