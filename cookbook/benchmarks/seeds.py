"""How many candidate seeds FedKSeed needs: Rouge-L, loss, bytes and catch-up time against K.

    python cookbook/benchmarks/seeds.py            # over an hour on one core; stop it and start it again as you like
    python cookbook/benchmarks/seeds.py --small    # minutes: three values of K, one seed, few rounds

SmolLM2-135M without its chat template, LoRA-FA on `down_proj` of the last layer, one example a step; short Alpaca pairs
in nine categories by the first word of the instruction. `rewrite` is held out for zero-shot evaluation, the rest is
dealt to 20 clients by Dirichlet(0.5) over categories, 4 of which work in a round. All methods train the same tensors on
the same clients in the same rounds. FedZO is MeZO with a new seed for every step, FedAvg is `lora-fa` by
back-propagation.

For every method and K the learning rate is chosen among 0.3, 1 and 3 times a base by validation loss after a fifth of
the rounds, with a seed that is not used again. A cell is one run with one seed; its row is written when it is done, and
a cell that has a row is not run again. Generation is greedy, up to 48 tokens. Test pairs are the same for all seeds, so
the spread over seeds is that of training: the adapter's start, the dealing, the schedule, the directions.

Hidden states below the trained tensors depend on the examples alone, so they are kept from one cell to the next (the
same bits as computed again), and so are the key/value caches of the prompts that are answered. Memory is measured
apart, in a process that does one round and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import instructions
from instructions import short_pairs, without_template, write_data
from judge import NEW_TOKENS, Judge

import edgellm_sdk as edgellm
from edgellm_sdk import store
from edgellm_sdk.kit.adapters import Spec
from edgellm_sdk.random import Stream
from edgellm_sdk.report import environment

MODEL = "smollm2-135m"
RANK = 32
SHARED = {"layers": 1, "rank": RANK, "alpha": 2.0 * RANK, "targets": "down_proj", "batch_size": 1, "max_length": 160}
CLIENTS, PER_ROUND, STEPS, ROUNDS = 20, 4, 20, 30
STEP = 0.01
KS = (1, 4, 16, 64, 256, 1024, 4096)
PRO_KS = (16, 64, 256)
SMALL_KS = (4, 64, 1024)
SEEDS = (0, 1, 2)
METHODS = ("fedkseed", "fedkseed-pro", "fedzo", "fedavg")
TUNING_SEED = 100
FACTORS = (0.3, 1.0, 3.0)
BASE = {"zeroth": 0.015, "first": 2e-3}


@dataclass(frozen=True)
class Cell:
    """`seeds` is K; 0 where a method has no such number."""

    method: str
    seeds: int
    seed: int

    @property
    def base_rate(self) -> float:
        return BASE["first" if self.method == "fedavg" else "zeroth"]


def cells_of(seed: int, small: bool, methods: Sequence[str] = METHODS) -> list[Cell]:
    ks, pro = (SMALL_KS, SMALL_KS[1:2]) if small else (KS, PRO_KS)
    found = [
        *(Cell("fedkseed", k, seed) for k in ks),
        *(Cell("fedkseed-pro", k, seed) for k in pro),
        Cell("fedzo", 0, seed),
        Cell("fedavg", 0, seed),
    ]
    return [cell for cell in found if cell.method in methods]


# Training


def options_of(cell: Cell, rate: float) -> tuple[str, dict[str, Any]]:
    """Plugin and its options."""
    if cell.method == "fedavg":
        return "lora-fa", SHARED | {"steps": STEPS, "learning_rate": rate}
    shared = SHARED | {"train": "lora-fa", "steps": STEPS, "step": STEP, "learning_rate": rate}
    if cell.method == "fedzo":
        return "mezo", shared | {"probes": 1}
    return cell.method, shared | {"seeds": cell.seeds}


def train(
    cell: Cell, rate: float, rounds: int, model: Path, data: Path, folder: Path, watch: int = 5
) -> edgellm.Outcome:
    plugin, options = options_of(cell, rate)
    return edgellm.finetune(
        plugin, model=str(model), data=str(data), output=folder, partition="user", clients=CLIENTS,
        clients_per_round=PER_ROUND, rounds=rounds, seed=cell.seed, watch=watch, options=options,
    )  # fmt: skip


def keep_hidden_states() -> None:
    """Let every `Frozen` of this process share the hidden states of equal batches."""
    from edgellm_sdk.kit.frozen import Frozen

    compute, kept = Frozen.prepare, {}

    def prepare(self: Frozen, examples: Sequence[Any]) -> Any:
        if not self.rows_only:
            return compute(self, examples)
        name = tuple((e.tokens, e.start) for e in examples)
        if name not in kept:
            kept[name] = compute(self, examples)
        return kept[name]

    Frozen.prepare = prepare  # type: ignore[method-assign]


@contextmanager
def catch_ups() -> Iterator[list[float]]:
    """Seconds of every client's way from what it had to what it was sent, in the order of the clients."""
    from edgellm_plugins.zeroth_order.space import Follower

    real, found = Follower.goto, []

    def goto(self: Follower, moves: Sequence[Any], come_back: bool) -> None:
        began = time.perf_counter()
        real(self, moves, come_back)
        if come_back:
            found.append(time.perf_counter() - began)

    Follower.goto = goto  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Follower.goto = real  # type: ignore[method-assign]


def traffic(folder: Path) -> dict[str, Any]:
    """Bytes of a client in a round: array payloads down and up, and whole messages both ways."""
    rows = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    last = max(row["round"] for row in rows)
    return {
        "bytes_down": statistics.mean(row["down_payload"] for row in rows),
        "bytes_down_first": statistics.mean(row["down_payload"] for row in rows if row["round"] == 1),
        "bytes_down_last": statistics.mean(row["down_payload"] for row in rows if row["round"] == last),
        "bytes_up": statistics.mean(row["up_payload"] for row in rows),
        "message_bytes": statistics.mean(row["down"] + row["up"] for row in rows),
    }


# What a run costs a client


def rebuild_seconds(judge: Judge, cell: Cell, times: int = 9) -> float:
    """The fastest of `times` rebuilds from theta_0 of a model in which every seed has been used."""
    import numpy as np
    from edgellm_plugins.zeroth_order import fedkseed, mezo
    from edgellm_plugins.zeroth_order.fedkseed.method import METHOD as FEDKSEED
    from edgellm_plugins.zeroth_order.mezo.method import METHOD as MEZO
    from edgellm_plugins.zeroth_order.space import Follower, Small
    from edgellm_plugins.zeroth_order.trajectory import Log

    from edgellm_sdk.context import Context

    ctx, theta = Context(Path()), dict(judge.frozen.initial)
    if cell.method == "fedzo":
        log = Log()
        for number in range(ROUNDS):
            log.append(Stream(number, "rebuild").seeds(PER_ROUND * STEPS).tolist(), [0.01] * (PER_ROUND * STEPS), 1.0)
        options = mezo.Config(probes=1)
        moves, sampler = MEZO.moves(log.arrays(), {}, options), MEZO.sampler(theta, options, ctx, "cpu")
    else:
        chosen = fedkseed.Config(seeds=cell.seeds)
        moves = FEDKSEED.moves({"sums": np.full(cell.seeds, 0.01, np.float32)}, {"master": 1}, chosen)
        sampler = FEDKSEED.sampler(theta, chosen, ctx, "cpu")
    found = []
    for _ in range(times):
        follower = Follower(Small(judge.frozen, sampler))
        began = time.perf_counter()
        follower.goto(moves, come_back=False)
        found.append(time.perf_counter() - began)
    return min(found)


def memory(cell: Cell, rate: float) -> int:
    """Peak resident bytes of a process that does one round of `cell`."""
    wanted = json.dumps([asdict(cell), rate])
    command = [sys.executable, __file__, "--one-round", wanted]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def one_round(wanted: str) -> None:
    cell, rate = json.loads(wanted)
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        model = without_template(MODEL, folder / "base")
        data = write_data(folder / "data", CLIENTS, cell["seed"])
        done = train(Cell(**cell), rate, 1, model, data, folder / "run", watch=0)
    print(done.report.peak_rss_bytes)


# The grid


@dataclass
class Book:
    """The result file, written whenever something is added to it."""

    path: Path
    content: dict[str, Any]

    def find(self, part: str, **wanted: Any) -> dict[str, Any] | None:
        return next((r for r in self.content[part] if all(r[name] == value for name, value in wanted.items())), None)

    def add(self, part: str, row: dict[str, Any]) -> None:
        self.content[part].append(row)
        store.write_json(self.path, self.content)
        print(part, json.dumps({k: v for k, v in row.items() if not k.startswith("shown")}), flush=True)


def tuned(cell: Cell, rounds: int, model: Path, folder: Path, book: Book) -> float:
    """The rate with the lowest validation loss after a fifth of the rounds, with the seed kept for that."""
    trial = Cell(cell.method, cell.seeds, TUNING_SEED)
    wanted = {"method": cell.method, "seeds": cell.seeds}
    for factor in FACTORS:
        rate = factor * cell.base_rate
        if book.find("tuning", **wanted, learning_rate=rate) is None:
            with tempfile.TemporaryDirectory(dir=folder) as temp:
                done = train(
                    trial, rate, max(1, rounds // 5), model, data_of(folder, TUNING_SEED), Path(temp) / "run", 0
                )
            loss = done.report.metrics["validation loss"].value
            book.add("tuning", {**wanted, "learning_rate": rate, "validation_loss": loss})
    found = [row for row in book.content["tuning"] if all(row[k] == v for k, v in wanted.items())]
    return float(min(found, key=lambda row: row["validation_loss"])["learning_rate"])


def data_of(folder: Path, seed: int) -> Path:
    path = folder / f"data-{seed}"
    return path if (path / "train.jsonl").is_file() else write_data(path, CLIENTS, seed)


def run(cell: Cell, rate: float, rounds: int, model: Path, folder: Path, judge: Judge) -> dict[str, Any]:
    """The row of one cell."""
    with tempfile.TemporaryDirectory(dir=folder) as temp:
        out = Path(temp) / "run"
        with catch_ups() as seconds:
            done = train(cell, rate, rounds, model, data_of(folder, cell.seed), out)
        per_round = seconds[::PER_ROUND]  # the first client of a round rebuilds, the others start from its copy
        third = max(1, len(per_round) // 3)
        report = done.report
        weights = out / "model" / "adapter_model.safetensors"
        return {
            **place_of(cell), "learning_rate": rate, "rounds": rounds, "draws": rounds * PER_ROUND * STEPS,
            **judge.score(out / "model"),
            "validation_loss": report.metrics["validation loss"].value,
            "validation_over_rounds": report.curves["validation loss over rounds"],
            **traffic(out),
            "catch_up_first_third": statistics.mean(per_round[:third]) if per_round else None,
            "catch_up_last_third": statistics.mean(per_round[-third:]) if per_round else None,
            "forwards": report.metrics["forwards"].value, "seconds": report.wall_seconds,
            "cpu_seconds": report.cpu_seconds, "adapter_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        }  # fmt: skip


def place_of(cell: Cell) -> dict[str, Any]:
    return {
        "model": f"{MODEL}, no chat template", "data": "alpaca, short", "split": "dirichlet:0.5", "eps": STEP,
        "tau": STEPS, "method": cell.method, "seeds": cell.seeds, "seed": cell.seed,
    }  # fmt: skip


def protocol(rounds: int) -> dict[str, Any]:
    made = {
        "options": SHARED, "clients": CLIENTS, "clients_per_round": PER_ROUND, "steps": STEPS, "rounds": rounds,
        "draws": rounds * PER_ROUND * STEPS, "eps": STEP, "base_rates": BASE, "factors": FACTORS,
        "tuning_seed": TUNING_SEED, "tuning_rounds": max(1, rounds // 5), "answer_words": instructions.ANSWER_WORDS,
        "prompt_words": instructions.PROMPT_WORDS, "new_tokens": NEW_TOKENS, "unseen": instructions.UNSEEN,
        "pairs": {name: len(rows) for name, rows in short_pairs().items()},
        "test_seen": instructions.SEEN_TEST, "test_unseen": instructions.UNSEEN_TEST, "valid": instructions.VALID,
        "trained_scalars": RANK * 576,
    }  # fmt: skip
    return dict(json.loads(json.dumps(made)))  # as in the file, to compare with it


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="a few minutes: three values of K, one seed, 6 rounds")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--output", type=Path, help="the result file; an unfinished one is taken up again")
    parser.add_argument("--one-round", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one_round:
        one_round(asked.one_round)
        return
    output = asked.output or here / "results" / ("seeds_small.json" if asked.small else "seeds.json")
    grid(output, asked.seeds[:1] if asked.small else asked.seeds, asked.methods, asked.small)


def grid(output: Path, seeds: Sequence[int], methods: Sequence[str], small: bool) -> None:
    """All cells of `seeds` and `methods`, added to the result file `output`."""
    rounds = 6 if small else ROUNDS
    empty = {"command": f"python cookbook/benchmarks/seeds.py{' --small' if small else ''}",
             "environment": environment(), "protocol": protocol(rounds),
             "tuning": [], "memory": [], "rebuild": [], "rows": []}  # fmt: skip
    book = Book(output, store.read_json(output) if output.is_file() else empty)
    if book.content["protocol"] != protocol(rounds):
        raise SystemExit(f"{output} was made with other settings; name another --output")
    keep_hidden_states()
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        model, data = without_template(MODEL, folder / "base"), data_of(folder, seeds[0])
        spec = Spec("lora-fa", SHARED["layers"], RANK, SHARED["alpha"], (SHARED["targets"],))
        sets = {"seen": data / "test.jsonl", "unseen": data / "unseen.jsonl"}
        judge = Judge(model, spec, sets, SHARED["max_length"])
        if book.find("rows", method="none") is None:
            book.add("rows", {**place_of(Cell("none", 0, 0)), **judge.score(None)})
        for seed in seeds:
            for cell in cells_of(seed, small, methods):
                if book.find("rows", **asdict(cell)) is None:
                    book.add("rows", run(cell, tuned(cell, rounds, model, folder, book), rounds, model, folder, judge))
        for cell in cells_of(seeds[0], small, methods):
            wanted = {"method": cell.method, "seeds": cell.seeds}
            if cell.method in ("fedkseed", "fedzo") and book.find("rebuild", **wanted) is None:
                book.add("rebuild", {**wanted, "seconds": rebuild_seconds(judge, cell)})
            if book.find("memory", **wanted) is None:
                book.add("memory", {**wanted, "peak_rss_bytes": memory(cell, cell.base_rate)})


if __name__ == "__main__":
    main()
