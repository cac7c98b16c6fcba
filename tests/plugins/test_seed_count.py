"""How many seeds: what theory says of K on a quadratic, the test for equality, and cells that repeat bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.zeroth_order import candidates, fedkseed
from edgellm_plugins.zeroth_order.fedkseed.method import METHOD

import edgellm_sdk as edgellm
from edgellm_sdk import models, store
from edgellm_sdk.context import Context
from edgellm_sdk.kit import noise
from edgellm_sdk.random import Stream

sys.path.insert(0, str(Path(__file__).parents[2] / "cookbook"))
from benchmarks import equivalence  # noqa: E402
from benchmarks.equivalence import Comparison, compare, pooled, t_quantile  # noqa: E402
from benchmarks.seeds_statement import Study, about_rouge, plateau_start  # noqa: E402

# A quadratic: f = sum_i i^-1.5 x_i^2 / 2 in 2 000 dimensions, started at ones, exact slopes

CURVATURE = np.arange(1, 2001) ** -1.5
RATES = (0.1, 0.2, 0.3)
KS = (4, 16, 64, 256, 1024)


def final_loss(directions: np.ndarray, draws: np.ndarray, rate: float) -> float:
    """f at the end over f at the start, after a step along directions[j] for each j of `draws`."""
    x = np.ones(len(CURVATURE))
    for j in draws:
        z = directions[j]
        x -= rate * (z @ (CURVATURE * x)) * z
    return float((CURVATURE * x * x).sum() / CURVATURE.sum())


@pytest.fixture(scope="module")
def losses() -> dict[int, dict[int, float]]:
    """T -> K -> final loss at the best rate, mean of two runs; seeds of smaller K are a part of those of larger K."""
    found: dict[int, dict[int, float]] = {500: {}, 4000: {}}
    for total, by_k in found.items():
        for count in KS:
            runs = np.zeros(len(RATES))
            for run in range(2):
                seeds = candidates.candidate_seeds(run, count)
                directions = np.stack([noise.take("gaussian", seed, "x", len(CURVATURE)) for seed in seeds])
                draws = candidates.draw(np.ones(count), Stream(run, "draws").uniform(total))
                with np.errstate(all="ignore"):
                    runs += [final_loss(directions.astype(np.float64), draws, rate) / 2 for rate in RATES]
            by_k[count] = float(np.nanmin(runs))
    return found


def test_few_seeds_end_at_the_floor_of_their_subspace(losses: dict[int, dict[int, float]]) -> None:
    """K = 4 and 16 gain nothing from eight times as many draws, and no method could: the minimum over their span is
    known in closed form."""
    for count in (4, 16):
        assert losses[500][count] == pytest.approx(losses[4000][count], rel=0.02)
        floors = []
        for run in range(2):
            seeds = candidates.candidate_seeds(run, count)
            z = np.stack([noise.take("gaussian", seed, "x", len(CURVATURE)) for seed in seeds]).astype(np.float64)
            slopes, hessian = z @ CURVATURE, (z * CURVATURE) @ z.T
            floors.append(1 - slopes @ np.linalg.solve(hessian, slopes) / CURVATURE.sum())
        assert losses[4000][count] == pytest.approx(np.mean(floors), rel=0.02)


def test_more_draws_want_more_seeds(losses: dict[int, dict[int, float]]) -> None:
    """The plateau, within a tenth of the best loss, begins at a larger K for a larger T; before it K matters."""

    def start(by_k: dict[int, float]) -> int:
        return min(k for k, loss in by_k.items() if loss <= 1.1 * min(by_k.values()))

    assert start(losses[500]) < start(losses[4000])
    assert losses[4000][64] < 0.9 * losses[500][64]
    for by_k in losses.values():
        assert by_k[4] > 1.5 * by_k[16] > 1.5 * by_k[64]


# Equality


def test_equality_by_hand() -> None:
    """30, 31, 32 against 30.5, 31.5, 32.5: s = 1 with 4 degrees, error sqrt(2/3), t = 2.1318, so 0.5 +- 1.7406."""
    a, b = [30.0, 31.0, 32.0], [30.5, 31.5, 32.5]
    deviation, degrees = pooled([a, b])
    assert (deviation, degrees) == (pytest.approx(1.0), 4)
    found = compare(b, a, deviation, degrees)
    assert found.difference == pytest.approx(0.5)
    assert found.half == pytest.approx(2.131847 * (2 / 3) ** 0.5, abs=1e-5)
    assert found.verdict(2.25) == "equal" and found.verdict(2.2) == "open"
    assert Comparison(-3.0, 1.5).verdict(1.0) == "apart" and Comparison(-3.0, 2.5).verdict(1.0) == "open"
    assert equivalence.exceeds(b, 27.0, 3.0, deviation, degrees)  # 31.5 - 2.1318 / sqrt(3) = 30.27
    assert not equivalence.exceeds(b, 27.0, 3.5, deviation, degrees)


def test_runs_needed() -> None:
    """Seven groups, std equal to the margin: t sqrt(2 / n) falls below 1 between 5 (1.701 * 0.632) and 6 (1.690 *
    0.577) runs."""
    assert equivalence.runs_needed(7, 1.0, 1.0) == 6


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 6.313752), (2, 2.919986), (4, 2.131847), (14, 1.761310), (120, 1.657651)]
)
def test_quantiles_of_t(degrees: int, quantile: float) -> None:
    """Against a printed table, 95 %."""
    assert t_quantile(0.95, degrees) == pytest.approx(quantile, abs=2e-5)


def study(scores: dict[int, list[float]], untrained: float) -> Study:
    """Rows with these Rouge-L, and losses that reach FedZO's at K = 64."""
    rows = [
        {"method": "fedkseed", "seeds": k, "rouge_l_unseen": score, "loss_unseen": (2.5 if k < 64 else 2.0) + 0.01 * i}
        for k, values in scores.items()
        for i, score in enumerate(values)
    ]
    rows += [{"method": "fedzo", "seeds": 0, "rouge_l_unseen": 30.0, "loss_unseen": 2.0 + 0.01 * i} for i in range(3)]
    rows.append({"method": "none", "seeds": 0, "rouge_l_unseen": untrained, "loss_unseen": 3.0})
    return Study({"rows": rows, "rebuild": []})


FLAT = {4: [30.0, 30.1, 30.2], 64: [30.1, 30.2, 30.3], 256: [30.0, 30.2, 30.1]}
NOISY = {4: [30.0, 32.0, 34.0], 64: [30.1, 32.2, 34.3], 256: [30.0, 32.2, 34.1]}
SHORT = {**FLAT, 4: [25.0, 25.1, 25.2]}


@pytest.mark.parametrize(
    ("scores", "untrained", "curve", "plateau", "small"),
    [
        (FLAT, 20.0, "flat", "flat", "K_small = 4:"),
        (SHORT, 20.0, "not flat", "flat", "K_small = 64:"),
        (NOISY, 20.0, "inconclusive", "inconclusive", "K_small: none"),
        (FLAT, 30.0, "flat", "flat", "K_small: none"),
    ],
)
def test_statement(scores: dict[int, list[float]], untrained: float, curve: str, plateau: str, small: str) -> None:
    """Flat, flat from 64 on, too noisy to tell, and flat because nothing was learnt."""
    made = study(scores, untrained)
    assert plateau_start(made, "unseen") == 64
    said = about_rouge(made, "unseen")
    assert f"the curve is {curve}: of 3 pairs" in said[1]
    assert "From K* = 64 on" in said[3] and f": {plateau}: of 1 pairs" in said[3]
    assert small in said[-1]


def test_no_plateau_when_the_largest_k_is_away_from_fedzo() -> None:
    made = study({4: [30.0, 30.1], 16: [30.0, 30.2]}, 20.0)
    assert plateau_start(made, "unseen") is None


# Cells


def cell(folder: Path, model: Path, plugin: str, seeds: int) -> dict[str, Any]:
    """The accumulators of a small federated run, as bytes, and what the clients were sent."""
    data = folder.parent / "data.jsonl"
    rows = [
        {"prompt": f"say number {i}", "completion": f"number {i} it is", "user": f"user-{i % 5}"} for i in range(40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = edgellm.finetune(
        plugin, model=str(model), data=str(data), output=folder, partition="user", clients_per_round=2, rounds=3,
        watch=0, seed=3,
        options={"seeds": seeds, "layers": 1, "rank": 4, "steps": 4, "batch_size": 2, "learning_rate": 0.01,
                 "precision": "float32"},
    )  # fmt: skip
    arrays, _ = store.load_arrays(done.folder / "checkpoint" / "state.safetensors")
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    weights = (folder / "model" / "adapter_model.safetensors").read_bytes()
    return {
        "arrays": {name: array.tobytes() for name, array in arrays.items()},
        "down": [row["down_payload"] for row in ledger],
        "sums": arrays["sums"],
        "weights": weights,
    }


@pytest.mark.parametrize(("plugin", "bytes_a_seed"), [("fedkseed", 4), ("fedkseed-pro", 8)])
def test_a_cell_repeats_bit_for_bit(tiny_llama: Path, tmp_path: Path, plugin: str, bytes_a_seed: int) -> None:
    first, again = (cell(tmp_path / name, tiny_llama, plugin, 16) for name in ("first", "again"))
    assert first["arrays"] == again["arrays"] and first["weights"] == again["weights"]
    assert np.count_nonzero(first["sums"]) > 8
    assert first["down"] == [16 * bytes_a_seed] * 6, "every round costs the same"


def test_grids_over_k_are_nested(tiny_llama: Path, tmp_path: Path) -> None:
    """One master seed for every K, so a smaller K has the first seeds of a larger one."""
    handle, found = models.resolve(str(tiny_llama)), []
    for count in (4, 64):
        made = fedkseed.Config(seeds=count, layers=1, rank=4, precision="float32")
        ctx = Context(tmp_path / str(count), seed=7, rounds=2, configs={METHOD.name: made})
        master = METHOD.initialise(handle, made, ctx).scalars["master"]
        found.append(candidates.candidate_seeds(master, count))
    assert found[0] == found[1][:4]
