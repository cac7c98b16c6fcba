"""One recipe in process, in Flower's simulator and over loopback with TLS: the bytes of the model, and of the wire.

    python cookbook/benchmarks/federation_wire.py --output runs/wire

Two clients share sms-spam and train LoRA on SmolLM2-135M for two rounds, a step each: messages of real size, little
work. Every party of the network is a process of its own, started with the commands that a user types. Needs the extras
`demo` and `flower`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

RECIPE = """seed = 5
[[step]]
verb = "finetune"
plugin = "lora"
model = "smollm2-135m"
clients = 2
rounds = 2
aggregate = "fedavg"
options = { batch_size = 2, steps = 1 }
"""
EDGELLM = (sys.executable, "-m", "edgellm_sdk.cli.main")
ADDRESS = "127.0.0.1:19095"


def start(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*EDGELLM, *words, "--quiet"], stdout=subprocess.DEVNULL)


def must(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        sys.exit(f"{' '.join(map(str, process.args))} ended with {process.returncode}")  # type: ignore[arg-type]


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/wire"))
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "federation_wire.json")
    asked = parser.parse_args()
    folder: Path = asked.output
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE)
    same = ("--model", "smollm2-135m", "--data", "sms-spam", "--clients", "2", "--rounds", "2", "--seed", "5")
    method = ("--plugin", "lora", "--aggregate", "fedavg", "--batch-size", "2", "--steps", "1", "--watch", "0")
    for engine in ("process", "simulation"):
        must(start("finetune", *same, *method, "--engine", engine, "--output", str(folder / engine)))
    must(start("federation", "keys", str(folder / "keys"), "--clients", "2"))
    parties = [
        start("federation", "serve", str(recipe), "--keys", str(folder / "keys" / "server"), "--address", ADDRESS,
              "--output", str(folder / "network")),
        *(
            start("federation", "join", ADDRESS, "--keys", str(folder / "keys" / "clients" / f"client-00{i}"),
                  "--data", "sms-spam", "--shard", f"{i}/2", "--output", str(folder / f"client-{i}"))
            for i in range(2)
        ),
    ]  # fmt: skip
    for party in parties:
        must(party)
    report = json.loads((folder / "network" / "report.json").read_text())
    rows = {row[0]: row[1:] for row in report["tables"][0]["rows"]}
    wire = {}
    for client, ledger in report["bytes"].items():
        up, down = rows[client]
        wire[client] = {
            "ledger_up": ledger["up"], "socket_up": up, "up_over": up / ledger["up"] - 1,
            "ledger_down": ledger["down"], "socket_down": down, "down_over": down / ledger["down"] - 1,
        }  # fmt: skip
    names = ("process", "simulation", "network", "client-0", "client-1")
    result = {
        "sha256": {name: digest(folder / name) for name in names},
        "wire": wire,
        "insecure_notes": [note for note in report["notes"] if "insecure" in note],
        "environment": report["environment"],
    }
    asked.result.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
