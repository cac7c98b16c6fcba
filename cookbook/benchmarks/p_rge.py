"""P-RGE on a CPU: seconds of a step with 2q candidates in one call, in two, in 2q; and loss against forward tokens.

    python cookbook/benchmarks/p_rge.py --part time --tokens 64 [--repeats 3]
    python cookbook/benchmarks/p_rge.py --part one --tokens 64 --repeats 20
    python cookbook/benchmarks/p_rge.py --part loss --queries 4 [--steps 512] [--seeds 3]

SmolLM2-135M. Each part adds its figures to the one result file. Always q * B_e = 16, so that a step runs 32 rows,
but for `one`, where a single query of a single example is what a small device has room for.
`time`: LoRA-FA, rank 16, on every linear layer, so that nothing of the model but its embeddings is kept between calls;
examples of exactly `tokens` tokens; the ways take turns, the figure is the median. Drawing the directions is timed
apart. `loss`: the last layer's down_proj (hidden states kept) on real messages, half of them spam; the same learning
rates for each q, and for each q the rate with the lowest final loss on held-out messages, mean over seeds, counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from edgellm_plugins.zeroth_order import estimator
from edgellm_plugins.zeroth_order.p_rge import Config
from edgellm_plugins.zeroth_order.p_rge.method import METHOD

from edgellm_sdk import models, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.kit import adapters, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment
from edgellm_sdk.types import Dataset, Example

RULE = ((1, 16), (4, 4), (16, 1))  # (q, B_e)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATES = (0.03, 0.1, 0.3)
EPS = 0.01
TRAIN, HELD, ROUND = 64, 64, 32


def long_messages(count: int) -> Dataset:
    """Messages long enough that `max_length` decides how many tokens they have."""
    texts = [str(e.prompt[-1]["content"]) for e in read("sms-spam").select(range(40 * count)).examples]  # type: ignore[index]
    rows = [Example(" ".join(texts[k::count]), " Yes") for k in range(count)]
    return Dataset(tuple(rows), "long", "long messages")


def timed(tokens: int, repeats: int, rule: Sequence[tuple[int, int]]) -> dict[str, Any]:
    spec = adapters.Spec("lora-fa", 0, 16, 32.0, TARGETS)
    frozen = Frozen(models.resolve("smollm2-135m"), spec, Stream(0, "adapter"), "auto", max_length=tokens)
    theta, data = frozen.initial, long_messages(16)
    shapes = estimator.shapes_of(theta)
    rows = prompts.encode(frozen.tokenizer, data.examples, tokens)
    assert {len(row.tokens) for row in rows} == {tokens}
    seconds: dict[str, dict[str, list[float]]] = {}
    for turn in range(repeats + 1):  # the first warms up
        for q, each in rule:
            found = seconds.setdefault(f"q={q}, B_e={each}", {"both": [], "outer": [], "none": [], "directions": []})
            start = time.perf_counter()
            z = [estimator.direction(shapes, turn, k) for k in range(q)]
            found["directions"].append(time.perf_counter() - start)
            reference = None
            for loops, share in (("none", 1), ("outer", q), ("both", 2 * q)):
                frozen.share = share
                start = time.perf_counter()
                losses = frozen.evaluate(
                    f"{each}", lambda each=each: data.select(range(each)), theta, [*z, *z], [EPS] * q + [-EPS] * q
                )  # fmt: skip
                found[loops].append(time.perf_counter() - start)
                reference = losses if reference is None else reference
                found.setdefault(f"loss difference, {loops}", []).append(float(np.abs(losses - reference).max()))
    result: dict[str, Any] = {"repeats": repeats, "trainable": frozen.trainables.size}
    for name, found in seconds.items():
        median = {key: statistics.median(values[1:]) for key, values in found.items() if "difference" not in key}
        result[name] = {
            "seconds": median,
            "seconds_each": {key: values[1:] for key, values in found.items() if key in ("both", "outer", "none")},
            "speedup_over_sequential": {
                way: statistics.median(a / b for a, b in zip(found["none"][1:], found[way][1:], strict=True))
                for way in ("outer", "both")
            },
            "largest_loss_difference": max(found["loss difference, both"] + found["loss difference, outer"]),
        }
    return result


def balanced(data: Dataset, skip: int, count: int) -> Dataset:
    """`count` shuffled messages, as many of each label, after `skip` others chosen in the same way."""
    order = Stream(0, "benchmark").permutation(len(data)).tolist()
    each, first = count // len(data.labels), skip // len(data.labels)
    of = [[i for i in order if data.examples[i].label == label][first : first + each] for label in data.labels]
    return data.select([index for group in zip(*of, strict=True) for index in group])


def learned(q: int, steps: int, seeds: int) -> dict[str, Any]:
    handle, data = models.resolve("smollm2-135m"), read("sms-spam")
    spec = adapters.Spec("lora-fa", 1, 16, 32.0, ("down_proj",))
    frozen = Frozen(handle, spec, Stream(0, "adapter"), "auto", share=2 * q)
    train, held = balanced(data, 0, TRAIN), balanced(data, TRAIN, HELD)
    length = statistics.mean(len(row.tokens) for row in prompts.encode(frozen.tokenizer, train.examples, 128))
    arms: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            for seed in range(seeds):
                ctx = Context(Path(folder), seed=seed)
                ctx.keep(f"objective {handle.digest}", lambda: frozen)
                config = Config(probes=q, steps=ROUND, learning_rate=rate, step=EPS, layers=1)
                client, began, curve = f"client {seed}", time.monotonic(), []
                state = METHOD.initialise(handle, config, ctx)
                for done in range(0, steps + 1, ROUND):
                    found = METHOD.measure(state, held, config, ctx) or {}
                    loss, accuracy = (found[k].value for k in ("validation loss", "balanced accuracy"))
                    curve.append([state.scalars["forwards"] * config.batch_size * length, loss, accuracy])
                    if done < steps:
                        given = METHOD.assign(state, [client], config)[client]
                        update = METHOD.finetune(handle, train, given, config, ctx)
                        state = METHOD.aggregate(state, [update], config, ctx)
                arms.append(
                    {
                        "learning_rate": rate,
                        "seed": seed,
                        "seconds": time.monotonic() - began,
                        "forward tokens, held-out loss, balanced accuracy": curve,
                    }
                )
                print(
                    q, rate, seed, [round(point[1], 3) for point in curve], f"{arms[-1]['seconds']:.1f} s", flush=True
                )
    final = {
        rate: statistics.mean(
            arm["forward tokens, held-out loss, balanced accuracy"][-1][1]
            for arm in arms
            if arm["learning_rate"] == rate
        )
        for rate in RATES
    }
    best = min(final, key=lambda rate: final[rate])
    return {
        "steps": steps, "mean_tokens_of_an_example": length, "train": TRAIN, "held_out": HELD,
        "best": {"learning_rate": best, "held_out_loss": final[best]}, "runs": arms,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("time", "one", "loss"), required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--queries", type=int, default=4)
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "p_rge.json")
    asked = parser.parse_args()
    result = store.read_json(asked.output) if asked.output.exists() else {}
    result["environment"] = environment()
    command = "python cookbook/benchmarks/p_rge.py"
    if asked.part in ("time", "one"):
        part = timed(asked.tokens, asked.repeats, RULE if asked.part == "time" else ((1, 1),))
        settings = f"--tokens {asked.tokens} --repeats {asked.repeats}"
        rows = "32 rows" if asked.part == "time" else "one example"
        result[f"time of {rows} of {asked.tokens} tokens"] = {
            "command": f"{command} --part {asked.part} {settings}",
            **part,
        }
    else:
        part = learned(asked.queries, asked.steps, asked.seeds)
        settings = f"--queries {asked.queries} --steps {asked.steps} --seeds {asked.seeds}"
        result[f"loss at q={asked.queries}"] = {"command": f"{command} --part loss {settings}", **part}
    store.write_json(asked.output, result)
    print(json.dumps(part, indent=1))


if __name__ == "__main__":
    main()
