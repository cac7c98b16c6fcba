"""What an attacker gets out of one round, under each protection: a span check and a membership test.

    python cookbook/benchmarks/privacy.py --output runs/privacy.json

A tiny random Llama, LoRA-FA on q and v, one step of SGD; real SMS texts, cut short. The attacker knows the
model, A, the options and every text it asks about, and sees what the protection lets out: one client's update, that
update clipped, the sum that secagg opens, or the noised sum of dp.

span        Which tokens did a client hold? The change of B in the first layer is sum_t g_t (A x_t)^T, so that A x of a
            token that was there lies in its row space (the idea of DAGER). AUC of the distance from that space, tokens
            of one client, which trains on one text, against tokens of nobody.
membership  Was this text in a client's batch of four? The change along the text's own gradient, less that of texts in
            general, scored by the ratio of two normal densities that were fitted to rounds with and without the text
            (the idea of LiRA). AUC over targets.

0.5 is chance. The epsilon shown is for one round and for the client; both attacks look at less than a client.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from edgellm_plugins.privacy import accountant, masks
from edgellm_plugins.privacy.clipping import clipped
from edgellm_plugins.privacy.dp.method import noised
from numpy.typing import NDArray

from edgellm_sdk import config, data, models, registry, store
from edgellm_sdk.checkpoint import inspect
from edgellm_sdk.context import Context
from edgellm_sdk.kit.tiny import write_model
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Array, Dataset, Example

Values = NDArray[np.float64]
CLIENTS, BATCH, WORDS, POOL = 8, 4, 5, 120
DELTA, LEVELS = 1e-3, (1 << 20) - 1
OPTIONS = {
    "optimizer": "sgd", "learning_rate": 1.0, "steps": 1, "batch_size": 1, "clip": 0.0, "rank": 32, "layers": 0,
    "targets": "q_proj,v_proj", "precision": "float32", "max_length": 64,
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """Texts with the change that each makes alone; the frozen A and the inputs of the first layer by token."""

    tokens: list[set[int]]
    changes: Values  # (texts, d)
    first: slice  # where the first layer's q_proj.lora_B lies in a change
    width: int
    seen: Values  # (vocabulary, r): A x of each token


def world(folder: Path) -> World:
    """One step of SGD for each text by the plugin itself. For one step the change of a batch is the mean of these."""
    whole = [str(example.prompt[0]["content"]) for example in data.read("sms-spam").examples[:400]]  # type: ignore[index]
    messages = [text.removeprefix("Message: ").partition("\n")[0].split() for text in whole]
    texts = sorted({" ".join(words[:WORDS]) for words in messages if len(words) >= WORDS})[:POOL]
    model = models.resolve(str(write_model(folder / "model", texts)))
    method = registry.get("lora-fa", "finetune")
    settings: Any = config.build(method.plugin.config, OPTIONS, "lora-fa")
    relay = Relay([method], {"lora-fa": settings})
    ctx = Context(folder / "run", seed=1, rounds=1, configs=relay.configs)
    state = relay.initialise(model, ctx)
    names = sorted(state.arrays)
    changes = []
    for k, text in enumerate(texts):
        shard = Dataset((Example("", text),), f"text {k}")
        assignment = relay.assign(state, [f"c{k}"], {f"c{k}": 1}, ctx)[f"c{k}"]
        arrays = relay.finetune(model, shard, assignment, ctx).arrays
        changes.append(np.concatenate([arrays[name].reshape(-1) for name in names]).astype(np.float64))
    live: Any = next(kept for _, kept in ctx.kept("objective "))
    q = next(name for name in names if name.endswith("layers.0.self_attn.q_proj.lora_B"))
    start = sum(state.arrays[name].size for name in names[: names.index(q)])
    weights = inspect(model.path)
    embedding = weights.array("model.embed_tokens.weight").astype(np.float64)
    scale = weights.array("model.layers.0.input_layernorm.weight").astype(np.float64)
    normed = embedding / np.sqrt(np.square(embedding).mean(1, keepdims=True) + 1e-5) * scale
    frozen = live.trainables.frozen[q[:-1] + "A"].astype(np.float64)
    tokens = [set(live.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    place = slice(start, start + state.arrays[q].size)
    return World(tokens, np.stack(changes), place, state.arrays[q].shape[1], normed @ frozen.T)


# What a protection lets out of one round; `parts` (clients, d), the first client is the one attacked

Release = Callable[[Values], Values]


def cut(part: Values, limit: float) -> Values:
    return np.asarray(clipped({"": part}, limit)[""])


def settings(limit: float) -> dict[str, Release]:
    """By name; `limit` is the clip C."""

    def summed(parts: Values) -> Values:
        total = np.zeros(parts.shape[1], np.uint32)
        for part in parts:
            total += masks.quantised(cut(part, limit), limit, LEVELS)
        return np.asarray(masks.restored(total, limit, LEVELS)) / len(parts)

    def private(epsilon: float) -> Release:
        z = accountant.enough(1.0, 1, DELTA, epsilon)
        return lambda parts: (
            np.asarray(noised({"": np.sum([cut(p, limit) for p in parts], axis=0)}, z * limit)[""]) / len(parts)
        )

    return {
        "none": lambda parts: parts[0],
        "clip": lambda parts: cut(parts[0], limit),
        "secagg": summed,
        **{f"dp, epsilon {epsilon:g}": private(epsilon) for epsilon in (8.0, 2.0)},
    }


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The chance that a positive scores above a negative, ties half."""
    above = np.subtract.outer(np.array(positive), np.array(negative))
    return float((above > 0).mean() + (above == 0).mean() / 2)


def draw(here: World, rng: Any, target: int, present: bool) -> Values:
    """The clients' changes: batches of other texts, with `target` in the first one's if it is to be there."""
    order = [k for k in rng.permutation(len(here.tokens)).tolist() if k != target]
    if present:
        order[0] = target
    return np.stack([here.changes[order[BATCH * k : BATCH * (k + 1)]].mean(0) for k in range(CLIENTS)])


def span(here: World, release: Release, rng: Any, trials: int) -> list[float]:
    """AUC of each round: tokens of the first client, which trains on one text, against tokens of nobody."""
    found = []
    for _ in range(trials):
        order = rng.permutation(len(here.tokens)).tolist()
        mine, others = order[0], order[1 : 1 + BATCH * (CLIENTS - 1)]
        parts = [here.changes[mine], *(here.changes[others[k :: CLIENTS - 1]].mean(0) for k in range(CLIENTS - 1))]
        b = release(np.stack(parts))[here.first].reshape(-1, here.width)
        _, sizes, rows = np.linalg.svd(b, full_matrices=False)
        rank = min(int((sizes > 1e-4 * sizes[0]).sum()), here.width - 1)
        inside = rows[:rank]
        length = np.linalg.norm(here.seen, axis=1, keepdims=True)
        seen = here.seen / np.maximum(length, 1e-12)
        distance = np.linalg.norm(seen - seen @ inside.T @ inside, axis=1)
        held = here.tokens[mine]
        nobody = set(np.flatnonzero(length).tolist()) - held - set().union(*(here.tokens[k] for k in others))
        found.append(auc([-distance[t] for t in sorted(held)], [-distance[t] for t in sorted(nobody)]))
    return found


def membership(here: World, release: Release, rng: Any, targets: int, shadows: int) -> tuple[float, float]:
    """(AUC over targets, half of its 95 % interval by resampling targets).

    The score is the log ratio of normal densities fitted to `shadows` rounds each with and without the text.
    """
    general = here.changes.mean(0)
    scores: dict[bool, list[float]] = {True: [], False: []}
    for target in np.resize(rng.permutation(len(here.tokens)), targets).tolist():
        along = here.changes[target] - general
        along = along / np.linalg.norm(along)

        def look(present: bool, target: int = target, along: Array = along) -> float:
            return float(release(draw(here, rng, target, present)) @ along)

        fits = {}
        for present in (True, False):
            values = np.array([look(present) for _ in range(shadows)])
            fits[present] = float(values.mean()), float(values.std()) + 1e-12
        for present in (True, False):
            value = look(present)
            logs = [-np.log(s) - ((value - m) / s) ** 2 / 2 for m, s in (fits[True], fits[False])]
            scores[present].append(float(logs[0] - logs[1]))
    values = np.array([scores[True], scores[False]])
    again = [auc(*values[:, rng.integers(0, len(values[0]), len(values[0]))]) for _ in range(400)]
    return auc(*values), 1.96 * float(np.std(again))


def study(folder: Path, trials: int, targets: int, shadows: int) -> list[dict[str, Any]]:
    """One row for each setting."""
    here = world(folder)
    limit = float(np.median(np.linalg.norm(here.changes, axis=1)) / 2)
    rows = []
    for name, release in settings(limit).items():
        rng = np.random.default_rng(1)
        spans = span(here, release, rng, trials)
        half = 1.96 * float(np.std(spans)) / max(1, len(spans)) ** 0.5
        found, about = membership(here, release, rng, targets, shadows)
        row = {"setting": name, "span": float(np.mean(spans)), "span_ci95": half}
        rows.append({**row, "membership": found, "membership_ci95": about})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--trials", type=int, default=40, help="rounds of the span check")
    parser.add_argument("--targets", type=int, default=200, help="questions about a text, each once there and once not")
    parser.add_argument("--shadows", type=int, default=16, help="rounds fitted for each answer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = study(Path(folder), given.trials, given.targets, given.shadows)
    print(f"{'setting':<16}{'span':>16}{'membership':>16}   (AUC, 0.5 is chance; {CLIENTS} clients)")
    for row in rows:
        cells = [f"{row[name]:.3f} +- {row[name + '_ci95']:.3f}" for name in ("span", "membership")]
        print(f"{row['setting']:<16}{cells[0]:>16}{cells[1]:>16}")
    if given.output:
        about = {"clients": CLIENTS, "delta": DELTA, **{k: v for k, v in vars(given).items() if k != "output"}}
        store.write_bytes(given.output, json.dumps({"about": about, "rows": rows}, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
