"""What teaches a pruned model best: the data, the teacher's distributions on it, or those on the student's own text.

    python cookbook/benchmarks/gkd.py --work runs/gkd

The teacher is SmolLM2-135M after a supervised fine-tune on short Alpaca pairs. The student is SmolLM2-135M without
every fifth of its 30 layers, after a short supervised fine-tune, so that what it writes can be judged; all arms start
there. Each arm takes the same number of steps on the same minibatches with a LoRA on all layers:

    sft          likelihood of the data              seqkd        likelihood of what the teacher writes
    kd           forward KL on the data              reverse-kl   reverse KL on what the student writes
    off-policy   reverse KL on the data              jsd          JSD(0.5), every second step on what it writes

and its learning rate is the one of --rates that ends at the lowest loss on validation pairs, under a seed of its own.
Measured on pairs that nobody trained on: loss a token, Rouge-L of greedy answers, and KL(teacher | student) a token on
what the student writes at temperature 1. `against` holds each arm's differences to sft and kd: the mean over seeds of
every held-out pair's difference, with a 95 % interval over pairs. Rows are kept in --work: what is there is not done
again, and a run that was stopped goes on. To try the script: `--model tiny --steps 2 --teacher-steps 2 --start-steps 2
--held-out 8 --seeds 1 --rates 0.001`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from archives import alpaca
from edgellm_plugins.compression.gkd.writing import continuations
from safetensors.torch import save_file

import edgellm_sdk as edgellm
from edgellm_sdk import checkpoint, models, store
from edgellm_sdk.data import read
from edgellm_sdk.kit import answers, prompts, scoring
from edgellm_sdk.kit.conformance_runs import tiny_model
from edgellm_sdk.random import Stream
from edgellm_sdk.report import Report, environment
from edgellm_sdk.types import Array, Dataset

ARMS: dict[str, dict[str, Any]] = {
    "sft": {"divergence": "likelihood", "on_policy": 0.0},
    "kd": {"divergence": "forward-kl", "on_policy": 0.0},
    "seqkd": {"divergence": "likelihood", "on_policy": 0.0, "source": "teacher"},
    "off-policy": {"divergence": "reverse-kl", "on_policy": 0.0},
    "reverse-kl": {"divergence": "reverse-kl", "on_policy": 1.0},
    "jsd": {"divergence": "jsd", "beta": 0.5, "on_policy": 0.5},
}
PLAIN, OURS = ("sft", "kd"), ("reverse-kl", "jsd")
SET = {"batch_size": 4, "max_length": 96, "new_tokens": 24, "rank": 16, "alpha": 32.0}
ANSWER_WORDS, PROMPT_WORDS = 24, 60
TUNING_SEED = 100
PART = 8  # pairs measured at once
SCORES = {"loss": "nats/token", "Rouge-L": "", "KL on own text": "nats/token"}


def write_data(folder: Path, held_out: int) -> Path:
    """train, valid and test files of pairs with a short prompt and answer; `held_out` for each of the last two."""
    rows = [
        row
        for row in alpaca()
        if len(f"{row['instruction']} {row['input']}".split()) <= PROMPT_WORDS
        and 1 <= len(row["output"].split()) <= ANSWER_WORDS
    ]
    rows = [rows[i] for i in Stream(0, "gkd pairs").permutation(len(rows)).tolist()]
    parts = {"test": rows[:held_out], "valid": rows[held_out : 2 * held_out], "train": rows[2 * held_out :]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        store.write_bytes(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part).encode())
    return folder


def fewer_layers(source: str, folder: Path, every: int) -> Path:
    """A copy of a model without each `every`-th of its layers, the last one always kept."""
    base = models.resolve(source)
    if (folder / checkpoint.CONFIG).is_file():
        return folder
    settings = store.read_json(base.path / checkpoint.CONFIG)
    count = settings["num_hidden_layers"]
    kept = [i for i in range(count) if (i + 1) % every or i == count - 1]
    place = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    tensors = {}
    for name, array in base.tensors():
        layer = next((prefix for prefix in place if name.startswith(prefix)), None)
        if layer is not None or not name.startswith("model.layers."):
            tensors[name if layer is None else place[layer] + name.removeprefix(layer)] = torch.tensor(array)
    settings["num_hidden_layers"] = len(kept)
    if isinstance(settings.get("layer_types"), list):
        settings["layer_types"] = [settings["layer_types"][i] for i in kept]
    with store.replacing(folder) as temp:
        for name in checkpoint.SIDE_FILES:
            if name != checkpoint.CONFIG and (base.path / name).is_file():
                shutil.copyfile(base.path / name, temp / name)
        save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})
        store.write_json(temp / checkpoint.CONFIG, settings)
    return folder


def trained(folder: Path, model: str | Path, data: Path, seed: int, **options: Any) -> Path:
    """The run of `gkd` in `folder`, done now, gone on with, or done before."""
    edgellm.compress(
        "gkd", str(model), folder, data=str(data), seed=seed, resume=folder.is_dir(), options=SET | options, quiet=False
    )
    return folder


class Judge:
    """Measures students beside their teacher on held-out pairs; every pair keeps its figures."""

    def __init__(self, teacher: str | Path, data: Path) -> None:
        self.teacher = models.resolve(str(teacher)).load()
        self.parts = {name: read(str(data), name) for name in ("valid", "test")}

    def loss(self, model: Any, part: str) -> tuple[Array, Array]:
        """(sum of losses, tokens) of every pair: nats, float64."""
        sums, counts = [], []
        for rows in self._encoded(self.parts[part]):
            log_s = self._log_probabilities(model, rows)
            for row, own in zip(rows, log_s, strict=True):
                wanted = torch.tensor(row.tokens[row.scored.start :])[:, None]
                sums.append(-float(own.gather(1, wanted).double().sum()))
                counts.append(len(wanted))
        return np.array(sums), np.array(counts)

    def valid(self, student: Path) -> dict[str, Any]:
        """The loss a token of a student on the validation pairs."""
        sums, counts = self.loss(models.resolve(str(student)).load().model, "valid")
        return {"loss": float(sums.sum() / counts.sum())}

    def row(self, student: Path) -> dict[str, Any]:
        """All figures of a student on the test pairs."""
        model, data = models.resolve(str(student)).load().model, self.parts["test"]
        sums, counts = self.loss(model, "test")
        stops = answers.stop_ids(model, self.teacher.tokenizer)
        rouge, sums_kl, counts_kl = [], [], []
        goal = scoring.Goal("rouge", int(SET["new_tokens"]))
        for number, rows in enumerate(self._encoded(data)):
            given = answers.prompts_of(rows)
            greedy = continuations(model, given, stops, goal.new_tokens, 0.0, Stream(0, "none"))
            texts = answers.decoded(self.teacher.tokenizer, [[i for i in y if i not in stops] for y in greedy])
            rouge += scoring.text_scores(goal, texts, [data.examples[r.index].completion for r in rows]).tolist()
            drawn = continuations(model, given, stops, goal.new_tokens, 1.0, Stream(0, "own text", number))
            own = [prompts.Encoded((*x, *y), len(x), 0) for x, y in zip(given, drawn, strict=True)]
            pairs = zip(
                self._log_probabilities(self.teacher.model, own), self._log_probabilities(model, own), strict=True
            )
            for log_p, log_s in pairs:
                sums_kl.append(float((log_p.exp() * (log_p - log_s)).double().sum()))
                counts_kl.append(len(log_p))
        each = {"loss": [sums.tolist(), counts.tolist()], "KL on own text": [sums_kl, counts_kl]}
        each["Rouge-L"] = [rouge, [1] * len(rouge)]
        return {name: {"value": float(np.sum(a) / np.sum(n)), "sums": a, "counts": n} for name, (a, n) in each.items()}

    def _encoded(self, data: Dataset) -> list[list[prompts.Encoded]]:
        found = prompts.encode(self.teacher.tokenizer, data.examples, int(SET["max_length"]))
        return [found[i : i + PART] for i in range(0, len(found), PART)]

    @torch.no_grad()
    def _log_probabilities(self, model: Any, rows: Sequence[prompts.Encoded]) -> list[torch.Tensor]:
        """Of the next token at every scored position of each row: (n, V) float32."""
        hidden = model.model(input_ids=answers.padded([row.tokens for row in rows]), use_cache=False).last_hidden_state
        places = [[at - 1 for at in row.scored] for row in rows]
        return [model.lm_head(hidden[i, at]).float().log_softmax(1) for i, at in enumerate(places)]


def measured(work: Path, name: str, train: Callable[[Path], Path], measure: Callable[[Path], Any]) -> Any:
    """What is measured of the run `name`, from its row in `work` or now. A student's weights go when it is measured."""
    row = work / "rows" / f"{name}.json"
    if not row.is_file():
        folder = train(work / name)
        report = Report.read(folder)
        told = {"seconds": report.wall_seconds, "peak_rss_bytes": report.peak_rss_bytes}
        store.write_json(row, told | measure(folder))
        if name not in ("teacher", "start"):
            shutil.rmtree(folder / "model")
        print(f"{name}: {told['seconds']:.0f} s", flush=True)
    return store.read_json(row)


def difference(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The mean over pairs of what `one` has more of than `other`, each pair's value a mean over seeds. For KL every
    model wrote its own text, of its own length."""
    values = [
        np.mean([np.array(row[name]["sums"]) / np.array(row[name]["counts"]) for row in rows], axis=0)
        for rows in (one, other)
    ]
    told = scoring.mean(values[0] - values[1], SCORES[name])
    return {"value": told.value, "ci95": told.ci95, "n": told.n}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, deviation and values over the seeds; the interval is over held-out pairs, at the mean over seeds."""
    found = {}
    for name, unit in SCORES.items():
        values = [row[name]["value"] for row in rows]
        each = np.mean([np.array(row[name]["sums"]) / np.array(row[name]["counts"]) for row in rows], axis=0)
        over_pairs = scoring.mean(each, unit)
        found[name] = {
            "mean": statistics.mean(values), "seeds": values, "unit": unit,
            "deviation over seeds": statistics.stdev(values) if len(values) > 1 else None,
            "mean over pairs": over_pairs.value, "ci95 over pairs": over_pairs.ci95, "pairs": over_pairs.n,
        }  # fmt: skip
    return found


def checks(rows: dict[str, list[dict[str, Any]]], start: dict[str, Any]) -> dict[str, bool]:
    """What the method is expected to show."""

    def mean(arm: str, name: str) -> float:
        return statistics.mean(row[name]["value"] for row in rows[arm])

    own, found = "KL on own text", {}
    for arm in OURS:
        for plain in PLAIN:
            higher = difference(rows[arm], rows[plain], "loss")["ci95"]
            found[f"{arm}: lower held-out loss than {plain}"] = mean(arm, "loss") < mean(plain, "loss")
            found[f"{arm}: so over all of the interval, {plain}"] = higher is not None and higher[1] < 0
            found[f"{arm}: higher Rouge-L than {plain}"] = mean(arm, "Rouge-L") > mean(plain, "Rouge-L")
    found["reverse-kl: KL on own text at least 30 % below the start"] = (
        mean("reverse-kl", own) <= 0.7 * start[own]["value"]
    )
    for other in ("kd", "off-policy"):
        found[f"reverse-kl: KL on own text below that of {other}"] = mean("reverse-kl", own) < mean(other, own)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m", help="or tiny, to try the script")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--teacher-steps", type=int, default=60)
    parser.add_argument("--start-steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=5, help="one layer in so many is dropped")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=48, help="pairs to choose rates on, and to report on")
    parser.add_argument("--rates", default="0.0003,0.001", help="learning rates tried for each arm; one tunes nothing")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gkd.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    work, rates = asked.work, [float(rate) for rate in asked.rates.split(",")]
    source = asked.model
    if source == "tiny":
        source = str(work / "tiny")
        shutil.copytree(tiny_model().path, source, dirs_exist_ok=True)
    data = work / "data"
    if not (data / "train.jsonl").is_file():
        write_data(data, asked.held_out)
    sft = ARMS["sft"] | {"learning_rate": 5e-4}
    teacher = trained(work / "teacher", source, data, 0, steps=asked.teacher_steps, **sft)
    pruned = fewer_layers(source, work / "pruned", asked.every if asked.model != "tiny" else 2)
    start = trained(work / "start", pruned, data, 0, steps=asked.start_steps, **sft)
    judge = Judge(teacher, data)
    told = {name: measured(work, name, lambda folder: folder, judge.row) for name in ("teacher", "start")}
    print({name: {s: row[s]["value"] for s in SCORES} for name, row in told.items()}, flush=True)

    def run(arm: str, rate: float, seed: int, measure: Callable[[Path], Any]) -> Any:
        options = ARMS[arm] | {"teacher": str(teacher), "learning_rate": rate, "steps": asked.steps}
        name = f"{arm}-{rate:g}-{seed}"
        return measured(work, name, lambda folder: trained(folder, start, data, seed, **options), measure)

    rows: dict[str, list[dict[str, Any]]] = {}
    arms: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        tried = {rate: run(arm, rate, TUNING_SEED, judge.valid)["loss"] for rate in rates if len(rates) > 1}
        rate = min(tried, key=lambda rate: tried[rate]) if tried else rates[0]
        rows[arm] = [run(arm, rate, seed, judge.row) for seed in range(asked.seeds)]
        arms[arm] = {
            "learning_rate": rate, "validation losses": {f"{r:g}": loss for r, loss in tried.items()},
            **summary(rows[arm]), "seconds": [row["seconds"] for row in rows[arm]],
            "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows[arm]),
        }  # fmt: skip
        print(arm, rate, {s: arms[arm][s]["mean"] for s in SCORES}, arms[arm]["seconds"], flush=True)
    against = {
        f"{arm} - {plain}": {name: difference(rows[arm], rows[plain], name) for name in SCORES}
        for plain in PLAIN
        for arm in ARMS
        if arm != plain
    }
    result = {
        "command": "python cookbook/benchmarks/gkd.py --work runs/gkd", "environment": environment(),
        "model": asked.model, "options": SET, "arms": arms, "against": against,
        "asked": {key: getattr(asked, key) for key in ("steps", "teacher_steps", "start_steps", "every", "seeds",
                                                       "held_out", "rates", "threads")},
        "held-out": {name: {s: row[s]["value"] for s in SCORES} for name, row in told.items()},
        "checks": checks(rows, told["start"]),
    }  # fmt: skip
    store.write_json(asked.output, result)
    print(json.dumps({"against": against, "checks": result["checks"]}, indent=2))


if __name__ == "__main__":
    main()
