"""What the federation itself costs: against the bare training calls, and with thousands of clients.

    python cookbook/benchmarks/fleet.py [--part overhead|scale]

overhead  64 clients, 10 rounds, all clients in every round, LoRA on the last layer of SmolLM2-135M, 4 steps of 4 short
          messages. Of one run of `edgellm.finetune`: the time from the first assignment to the last state on disk,
          over the time spent inside the method's own function, in the same seconds of the same process. What is
          between is assignments and updates as bytes and back, checks, aggregation, ledger, checkpoints.
scale     a random Llama of two small layers; 100 clients a round of 100, 1 000 and 10 000 registered, then 10, 100 and
          1 000 of 10 000: seconds a round (median, the first left out), those of them in which clients work, and peak
          memory of the process. Nothing is kept from a client's one turn to its next.

Beside the result lies a page with its figures; `--part page` only draws that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from html import escape
from pathlib import Path
from typing import Any

import edgellm_sdk as edgellm
from edgellm_sdk import charts, store
from edgellm_sdk.page import document, table
from edgellm_sdk.report import environment, peak_rss

CLIENTS, ROUNDS, TURNS = 64, 10, 2
OPTIONS: dict[str, Any] = {
    "layers": 1, "targets": "q_proj,v_proj", "steps": 4, "batch_size": 4, "max_length": 48, "warmup": 0.0,
}  # fmt: skip
SCALES = ((100, 100), (100, 1_000), (100, 10_000), (10, 10_000), (1_000, 10_000))
SCALE_ROUNDS = 6


def overhead(folder: Path) -> dict[str, float]:
    """Seconds of all rounds, and of the training calls in them."""
    from edgellm_plugins.training.lora import method

    bare, spent = method.finetune, []

    def timed(*given: Any) -> Any:
        began = time.monotonic()
        update = bare(*given)
        spent.append((began, time.monotonic()))
        return update

    method.finetune = timed
    edgellm.finetune(
        "lora", "smollm2-135m", "sms-spam", folder / "run", clients=CLIENTS, rounds=ROUNDS, watch=0, options=OPTIONS
    )
    ended = (folder / "run" / "checkpoint" / "state.safetensors").stat().st_mtime - time.time() + time.monotonic()
    assert len(spent) == CLIENTS * ROUNDS
    return {"engine": ended - spent[0][0], "bare": sum(end - began for began, end in spent)}


def scale(per_round: int, registered: int, folder: Path) -> dict[str, Any]:
    """One run, in this process."""
    from edgellm_sdk.kit.tiny import write_model

    texts = ["are you home for dinner", "win a free prize now", "call this number today", "the train is late"]
    write_model(folder / "model", texts)
    rows = (json.dumps({"text": f"{texts[n % 4]} {n}", "label": "ab"[n % 2]}) for n in range(2 * registered))
    (folder / "data.jsonl").write_text("\n".join(rows))
    edgellm.finetune(
        "lora", str(folder / "model"), str(folder / "data.jsonl"), folder / "run", clients=registered,
        clients_per_round=per_round, rounds=SCALE_ROUNDS, watch=0, options={**OPTIONS, "steps": 1, "hidden_memory": 0},
    )  # fmt: skip
    seconds: dict[int, float] = {}
    for line in (folder / "run" / "ledger.jsonl").read_text().splitlines():
        row = json.loads(line)
        seconds[row["round"]] = row["seconds"]
    ends = [x for x, _ in store.read_json(folder / "run" / "report.json")["curves"]["training loss over seconds"]]
    rounds = [later - earlier for earlier, later in zip(ends, ends[1:], strict=False)]
    return {
        "per_round": per_round, "registered": registered, "seconds_a_round": statistics.median(rounds),
        "of_them_clients_at_work": statistics.median(list(seconds.values())[1:]), "peak_rss_mb": peak_rss() / 2**20,
    }  # fmt: skip


def page(result: dict[str, Any]) -> str:
    """Time and memory of a round against those sampled, and against those registered."""
    rows = result["scale"]
    most, usual = max(row["registered"] for row in rows), SCALES[0][0]
    sampled = [row for row in rows if row["registered"] == most]
    registered = [row for row in rows if row["per_round"] == usual]
    names = {"a round": "seconds_a_round", "of them clients at work": "of_them_clients_at_work"}

    def seconds(chosen: list[dict[str, Any]], across: str) -> dict[str, list[tuple[float, float]]]:
        return {name: [(row[across], row[key]) for row in chosen] for name, key in names.items()}

    memory = {"peak memory": [(row["registered"], row["peak_rss_mb"]) for row in registered]}
    figures = [
        charts.lines(f"Seconds, {most} registered", "clients in a round", seconds(sampled, "per_round"), counts=True),
        charts.lines(
            f"Seconds, {usual} in a round", "clients registered", seconds(registered, "registered"), counts=True
        ),
        charts.lines(f"MB of the process, {usual} in a round", "clients registered", memory, counts=True),
    ]
    columns = ("clients in a round", "registered", "seconds a round", "of them clients at work", "peak MB")
    keys = ("per_round", "registered", "seconds_a_round", "of_them_clients_at_work", "peak_rss_mb")
    ratio = result["overhead"]["engine_over_bare"]
    body = (
        f"<header><h1>What a federation itself costs</h1><p>{CLIENTS} clients, {ROUNDS} rounds: the engine takes "
        f"{ratio:.3f} times the bare training calls.</p></header>"
        f'<section><div class="charts">{"".join(figures)}</div></section>'
        f"<section><h2>Runs</h2>{table(columns, [[row[key] for key in keys] for row in rows])}</section>"
    )
    return document("edgellm: what a federation costs", body, f"Drawn from the result of {escape(result['command'])}.")


def apart(*words: str) -> Any:
    """The answer of a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", choices=("overhead", "scale", "page"), action="append")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fleet.json")
    asked = parser.parse_args()
    if asked.case:
        with tempfile.TemporaryDirectory() as temp:
            kind, *rest = asked.case
            found = overhead(Path(temp)) if kind == "overhead" else scale(int(rest[0]), int(rest[1]), Path(temp))
            print(json.dumps(found))
        return
    result = store.read_json(asked.output) if asked.output.is_file() else {}
    parts = asked.part or ["overhead", "scale", "page"]
    if parts != ["page"]:
        result |= {"command": "python cookbook/benchmarks/fleet.py", "environment": environment()}
    for part in parts:
        if part == "page":
            asked.output.with_suffix(".html").write_text(page(result), encoding="utf-8")
            continue
        if part == "overhead":
            turns = [apart("--case", "overhead") for _ in range(TURNS)]
            result["overhead"] = {
                "clients": CLIENTS, "rounds": ROUNDS, "options": OPTIONS, "turns": turns,
                "engine_over_bare": statistics.median(turn["engine"] / turn["bare"] for turn in turns),
            }  # fmt: skip
        else:
            result["scale"] = [apart("--case", "scale", str(per), str(every)) for per, every in SCALES]
        store.write_json(asked.output, result)
        print(json.dumps(result[part], indent=2), flush=True)


if __name__ == "__main__":
    main()
