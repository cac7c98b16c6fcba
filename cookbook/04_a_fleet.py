"""A federation of unlike clients, one of them hostile, over loopback with TLS; in the end an adapter for each user.

    pip install 'edgellm-sdk[flower]'
    python cookbook/04_a_fleet.py                      # some minutes on two cores
    python cookbook/04_a_fleet.py --rule fedavg        # the same with the plain mean: what one liar does to it

Five clients are processes of their own, with unlike shares of sms-spam (Dirichlet 0.5) and unlike memory; the last one
sends ten times its change, the other way. The server has no data. It sees updates, costs and gains: `fit` gives who has
little memory smaller batches, Multi-Krum leaves out what is far from the others. After the rounds every client trains
an adapter of its own where it is, keeps the best of base, federation and own by its own held-out texts, and tells what
that gained. Ends in `runs/cookbook-04/server/report.html`, a page with who took part, memory foretold and measured and
the users' gains, and for one user in `runs/cookbook-04/fleet`: a base GGUF and the user's adapter GGUF of some hundred
kilobytes, both proven by the gate, with a manifest; `edgellm deploy runs/cookbook-04/fleet --user NAME` runs them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import edgellm_sdk as edgellm
from edgellm_sdk import store, wire
from edgellm_sdk.federate.client import work
from edgellm_sdk.federate.rounds import Failure
from edgellm_sdk.steps import Outcome, federation

FOLDER = Path("runs/cookbook-04")
MEMORY = (2000, 900, 870, 860, 900)
"""MB that each client has for training; the last one lies."""
OPTIONS: dict[str, Any] = {
    "layers": 4, "rank": 8, "alpha": 16.0, "learning_rate": 2e-3, "steps": 2, "batch_size": 4, "max_length": 96,
}  # fmt: skip
RECIPE = """seed = 4
[[step]]
verb = "finetune"
plugin = "lora"
aggregate = "{rule}"
around = "fit"
model = {model}
partition = "dirichlet:0.5"
balance = true
clients = {clients}
rounds = {rounds}
personalise = {personalise}
kept_aside = 0.1
watch = 0
[step.options]
{options}
[step.options.fit]
layers = false      # Krum compares clients number by number
{krum}
"""
KRUM = "[step.options.krum]\nbyzantine = 1\nselect = 0      # the mean of all but one\n"


def liar(*given: Any) -> bytes | Failure:
    """A client runs what it likes: the honest turn, ten times as far the other way."""
    done = work(*given)
    if isinstance(done, Failure):
        return done
    update = wire.update_from_bytes(done, "liar")
    return wire.update_to_bytes(replace(update, arrays={name: -10 * array for name, array in update.arrays.items()}))


def join(folder: Path, address: str, number: int, data: str, model: str) -> None:
    """One client, in a process of its own."""
    if number == len(MEMORY) - 1:
        setattr(federation, "work", liar)  # noqa: B010 - its own process: nobody else is changed
    federation.join(
        address, data, folder / f"client-{number}", model=model, shard=f"{number}/{len(MEMORY)}",
        keys=folder / "keys" / "clients" / f"client-{number:03d}", memory=MEMORY[number],
    )  # fmt: skip


def serve(
    folder: Path,
    model: str = "smollm2-135m",
    data: str = "sms-spam",
    rule: str = "krum",
    rounds: int = 4,
    personalise: int = 8,
    options: Mapping[str, Any] = OPTIONS,
) -> Outcome:
    """The whole federation in `folder`; returns the server's part of it."""
    shutil.rmtree(folder, ignore_errors=True)
    federation.keys(folder / "keys", clients=len(MEMORY))
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in options.items())
    recipe = folder / "recipe.toml"
    recipe.write_text(
        RECIPE.format(
            rule=rule,
            model=json.dumps(model),
            clients=len(MEMORY),
            rounds=rounds,
            personalise=personalise,
            options=lines,
            krum=KRUM if rule == "krum" else "",
        )  # fmt: skip
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    clients = [
        subprocess.Popen(
            [sys.executable, __file__, "--folder", str(folder), "--join", address, "--number", str(number),
             "--data", data, "--model", model],
            env=alone, stdout=subprocess.DEVNULL,
        )
        for number in range(len(MEMORY))
    ]  # fmt: skip
    try:
        done = federation.serve(recipe, folder / "server", address=address, keys=folder / "keys" / "server", wait=240.0)
        if any(client.wait(120) for client in clients):
            raise SystemExit("a client ended with an error")
    finally:
        for client in clients:
            client.kill()
    return done


def told(folder: Path) -> list[dict[str, Any]]:
    """What each user ships and gained, those who gained most first; the liar's word is not asked for."""
    records: list[dict[str, Any]] = store.read_json(folder / "server" / "users.json")["users"]
    honest = [record for record in records if record["user"] != f"client-{len(MEMORY) - 1:03d}"]
    return sorted(honest, key=lambda record: -(record["gains"].get("base") or 0.0))


def export(folder: Path, user: str, gate: bool = True) -> Path:
    """On that user's device: its base and its adapter, proven, with their manifest."""
    bundle = folder / "fleet"
    run = folder / f"client-{int(user.rpartition('-')[2])}"
    edgellm.export("gguf", str(run), bundle, users=True, gate=gate)
    return bundle


def show(done: Outcome, records: Sequence[Mapping[str, Any]]) -> None:
    for row in done.report.federation["costs"]:
        print(
            f"{row['client']}: {row['peak'] / 1e6:.0f} MB at most, {row['foretold_peak'] / 1e6:.0f} foretold; "
            f"{row['took']:.1f} s a turn, {row['foretold_took']:.1f} foretold"
        )
    for record in records:
        over = {name: gain for name, gain in record["gains"].items() if gain is not None}
        gained = ", ".join(f"{gain:+.3f} over {name}" for name, gain in over.items())
        print(f"{record['user']} ships {record['chosen']}: {gained or 'nothing known'} nats per token")
    for name in ("p10", "median", "p90"):
        if (metric := done.report.metrics.get(f"gain over base, {name}")) is not None:
            print(f"gain over base, {name}: {metric.value:.3f} {metric.unit} (all {metric.n}, the liar too)")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--rule", default="krum")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="sms-spam")
    parser.add_argument("--join", default="", help=argparse.SUPPRESS)
    parser.add_argument("--number", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.join:
        join(asked.folder, asked.join, asked.number, asked.data, asked.model)
        return
    done = serve(asked.folder, asked.model, asked.data, asked.rule)
    records = told(asked.folder)
    show(done, records)
    bundle = export(asked.folder, records[0]["user"])
    for path in sorted(bundle.rglob("*.gguf")):
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    print(f"the page: {asked.folder / 'server' / 'report.html'}")


if __name__ == "__main__":
    main()
