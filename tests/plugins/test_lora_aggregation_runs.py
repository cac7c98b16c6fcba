"""Rules for LoRA factors on a model: whole runs, adapters carried by hand, unlike ranks at equal bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.aggregation import factors, halves
from edgellm_plugins.training.lora import Config, method

import edgellm_sdk as edgellm
from edgellm_sdk import models, store, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, FederationError, Interrupted
from edgellm_sdk.federate import rounds
from edgellm_sdk.kit import adapters, prompts
from edgellm_sdk.report import Report
from edgellm_sdk.steps.examples import training_data
from edgellm_sdk.types import Dataset, Example, State, Update

SMALL: dict[str, Any] = {
    "rank": 4, "alpha": 8.0, "layers": 1, "targets": "q_proj,v_proj,up_proj", "steps": 3, "batch_size": 4,
    "learning_rate": 2e-2, "precision": "float32",
}  # fmt: skip
RULES = ("ffa-lora", "rolora", "fedsa-lora", "fedex-lora", "flora", "flexlora", "hetlora", "fedavg")


@pytest.fixture(scope="module")
def base(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "my.jsonl"
    texts = [
        ("win a prize now", "spam"),
        ("mum is home", "ham"),
        ("call this number", "spam"),
        ("see you later", "ham"),
    ]
    rows = [{"text": f"{text} {n}", "label": label} for n in range(12) for text, label in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tuned(
    base: Path,
    data: Path,
    output: Path,
    rule: str,
    count: int = 3,
    given: dict[str, Any] | None = None,
    resume: bool = False,
) -> Report:
    done = edgellm.finetune(
        "lora", str(base), str(data), output, clients=3, rounds=count, aggregate=rule, watch=1, resume=resume,
        options=SMALL | {rule: given or {}},
    )  # fmt: skip
    return done.report


def loss_of(folder: Path, data: Dataset, merge: bool) -> float:
    """Mean cross-entropy a scored token, through peft's layers or merged weights, one example at a time."""
    loaded = models.resolve(str(folder)).load(merge=merge)
    total, count = 0.0, 0
    for row in prompts.encode(loaded.tokenizer, data.examples, 128):
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([row.tokens])).logits[0].double()
        total -= sum(float(torch.log_softmax(logits[at - 1], 0)[row.tokens[at]]) for at in row.scored)
        count += len(row.scored)
    return total / count


@pytest.mark.parametrize("rule", RULES)
def test_a_run_learns_and_writes_the_servers_model(rule: str, base: Path, data: Path, tmp_path: Path) -> None:
    """Held-out loss falls, the adapter that is written has the loss of the last state, in peft and merged, and exact
    rules draw an error of nothing."""
    report = tuned(base, data, tmp_path / "out", rule)
    curve = report.curves["validation loss over rounds"]
    assert [x for x, _ in curve] == [0, 1, 2, 3] and curve[-1][1] < 0.9 * curve[0][1]
    _, valid = training_data(str(data), "", False, 0)
    assert valid is not None
    written = [tmp_path / "out/model"]
    if rule == "fedsa-lora":  # one model for each client, the curve is their mean, the run's is the first one's
        written = [tmp_path / "out/personal" / f"client-00{k}" for k in range(3)]
        first, *others = (adapters.arrays(folder) for folder in (tmp_path / "out/model", *written))
        assert [all(np.array_equal(first[name], one[name]) for name in first) for one in others] == [True, False, False]
        assert "aggregation error over rounds" not in report.curves
    else:
        errors = [y for _, y in report.curves["aggregation error over rounds"]]
        assert len(errors) == 3 and (max(errors) <= 1e-5 or rule in ("flexlora", "hetlora", "fedavg"))
    for merge in (False, True):
        losses = [loss_of(folder, valid, merge) for folder in written]
        assert np.mean(losses) == pytest.approx(curve[-1][1], rel=2e-4)
    ranks = {len(a) for name, a in adapters.arrays(tmp_path / "out/model").items() if name.endswith("lora_A")}
    assert ranks == {{"fedex-lora": 4 + 3 * 8, "flora": 4 + 3 * 12}.get(rule, 4)}


@pytest.mark.parametrize("rule", ["rolora", "fedsa-lora", "fedex-lora", "flora"])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    rule: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(base, data, tmp_path / "whole", rule)
    one_round = rounds._one_round

    def stopping(relay: Any, state: State, *rest: Any) -> State:
        if state.round == 2:
            raise Interrupted(2)
        return one_round(relay, state, *rest)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(rounds, "_one_round", stopping)
        tuned(base, data, tmp_path / "again", rule)
    tuned(base, data, tmp_path / "again", rule, resume=True)
    whole, again = ((tmp_path / name / "model" / adapters.WEIGHTS).read_bytes() for name in ("whole", "again"))
    assert whole == again


def test_unlike_ranks_in_a_run(base: Path, data: Path, tmp_path: Path) -> None:
    for rule in ("flora", "flexlora"):
        report = tuned(base, data, tmp_path / rule, rule, given={"ranks": "1,2,4"})
        curve = report.curves["validation loss over rounds"]
        assert not report.rejected and curve[-1][1] < 0.9 * curve[0][1]
        _, valid = training_data(str(data), "", False, 0)
        assert valid is not None
        assert loss_of(tmp_path / rule / "model", valid, False) == pytest.approx(curve[-1][1], rel=2e-4)
    with pytest.raises(ConfigError, match="ranks from 1 to 4"):
        tuned(base, data, tmp_path / "bad", "flora", given={"ranks": "8"})


def test_whose_model_fedsa_writes(base: Path, data: Path, tmp_path: Path) -> None:
    tuned(base, data, tmp_path / "out", "fedsa-lora", 2, {"client": "client-002"})
    own, chosen = (adapters.arrays(tmp_path / "out" / part) for part in ("personal/client-002", "model"))
    assert all(np.array_equal(own[name], chosen[name]) for name in own)
    with pytest.raises(ConfigError, match="'nobody' took no part - client; one of client-000, client-001"):
        tuned(base, data, tmp_path / "bad", "fedsa-lora", 1, {"client": "nobody"})


def test_rolora_with_a_first_wastes_its_first_round(base: Path, tmp_path: Path) -> None:
    """At B = 0 the gradient of A is zero: trained first, A stays where it was to the last bit, B does not."""
    handle = models.resolve(str(base))
    settings = Config(**{**SMALL, "weight_decay": 0.0})
    ctx = Context(tmp_path, seed=1, rounds=4, configs={"lora": settings})
    state = method.initialise(handle, settings, ctx)
    rows = Dataset(tuple(Example("mum is", f" home {k}") for k in range(6)), "rows")
    for side, moves in (("lora_A", False), ("lora_B", True)):
        sent = halves.assign(state, ["a"], lambda number, side=side: side, ctx)["a"]  # type: ignore[misc]
        update = method.finetune(handle, rows, halves.prepare(sent, ctx), settings, ctx)
        assert {name.rpartition(".")[2] for name in update.arrays} == {side}
        assert any(change.any() for change in update.arrays.values()) == moves


# Carried by hand


def adapter(base: Path, folder: Path, rank: int, alpha: float, seed: int, same_a: bool = False) -> Path:
    rng, handle = np.random.default_rng(seed), models.resolve(str(base))
    arrays = {}
    for part, (m, n) in {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "mlp.up_proj": (128, 64)}.items():
        name, shared = f"model.layers.1.{part}", np.random.default_rng(99)
        arrays[f"{name}.lora_A"] = (shared if same_a else rng).normal(size=(rank, n)).astype(np.float32) * 0.1
        arrays[f"{name}.lora_B"] = rng.normal(size=(m, rank)).astype(np.float32) * 0.1
    spec = adapters.Spec("lora", 1, rank, alpha, ("q_proj", "v_proj", "up_proj"))
    adapters.write_arrays(folder, spec, arrays, {"path": str(base), "digest": handle.digest, "name": ""})
    return folder


def added(folder: Path) -> dict[str, np.ndarray]:
    """alpha / r B A of every module of an adapter folder, as its own configuration says."""
    return {
        name: adapters.lora_scale(folder, name) * product.dense()
        for name, product in factors.factors(adapters.arrays(folder)).items()
    }


def worst(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    assert found.keys() == wanted.keys()
    return max(float(np.linalg.norm(found[name] - wanted[name]) / np.linalg.norm(wanted[name])) for name in wanted)


@pytest.mark.parametrize("rule", ["flora", "fedex-lora", "ffa-lora", "rolora", "flexlora"])
def test_folders_carried_by_hand_give_the_mean_of_products(rule: str, base: Path, tmp_path: Path) -> None:
    """Unlike alphas, for FLoRA and FlexLoRA unlike ranks too: within 1e-5 of the mean of the full matrices, as peft
    applies it and as it merges."""
    ranks = (2, 8, 5) if rule in ("flora", "flexlora") else (3, 3, 3)
    same = rule in ("ffa-lora", "rolora")
    folders = [
        adapter(base, tmp_path / f"a{k}", rank, alpha, k, same)
        for k, (rank, alpha) in enumerate(zip(ranks, (2 * ranks[0], 3.0, 16.0), strict=True))
    ]
    wanted = {name: np.mean([added(folder)[name] for folder in folders], axis=0) for name in added(folders[0])}
    settings = {"rank": 15} if rule == "flexlora" else {}
    edgellm.aggregate(rule, folders, tmp_path / "merged", options=settings)
    merged = tmp_path / "merged/model"
    assert worst(added(merged), wanted) <= 1e-5
    assert store.read_json(merged / "adapter_config.json")["r"] == {"flora": 15, "fedex-lora": 9, "flexlora": 15}.get(
        rule, 3
    )
    plain = dict(models.resolve(str(base)).load().model.named_parameters())
    whole = dict(models.resolve(str(tmp_path / "merged")).load(merge=True).model.named_parameters())
    for name, change in wanted.items():
        moved = (whole[f"{name}.weight"] - plain[f"{name}.weight"]).double().numpy()
        assert np.linalg.norm(moved - change) <= 1e-4 * np.linalg.norm(change)
    _, valid = ("", Dataset((Example("win a", " prize now"),), "one"))
    assert loss_of(tmp_path / "merged", valid, False) == pytest.approx(
        loss_of(tmp_path / "merged", valid, True), rel=1e-4
    )


def test_a_plain_peft_folder_and_loose_files(base: Path, tmp_path: Path) -> None:
    """Folders that only peft wrote, rslora and alpha patterns included; files without a folder, of one scale."""
    folders = [adapter(base, tmp_path / f"a{k}", 4, 8.0, k) for k in range(2)]
    for folder in folders:
        for name in ("base.json", adapters.MARK):
            (folder / name).unlink()
    config = store.read_json(folders[1] / "adapter_config.json")
    store.write_json(
        folders[1] / "adapter_config.json", {**config, "use_rslora": True, "alpha_pattern": {"v_proj": 3.0}}
    )
    scales = {round(adapters.lora_scale(folders[1], name), 6) for name in added(folders[1])}
    assert scales == {4.0, 1.5}
    wanted = {name: np.mean([added(folder)[name] for folder in folders], axis=0) for name in added(folders[0])}
    edgellm.aggregate("flora", folders, tmp_path / "merged")
    assert worst(added(tmp_path / "merged/model"), wanted) <= 1e-5
    assert not (tmp_path / "merged/model/base.json").exists()

    loose = [folder / adapters.WEIGHTS for folder in folders]
    files = [loose[k].rename(tmp_path / f"{k}.safetensors") for k in range(2)]
    for rule, rank in (("flora", 8), ("fedex-lora", 8), ("flexlora", 4)):
        edgellm.aggregate(rule, files, tmp_path / rule)
        result = store.load_arrays(tmp_path / rule / "model" / adapters.WEIGHTS)[0]
        assert all(name.startswith("base_model.model.") and name.endswith(".weight") for name in result)
        several = [store.load_arrays(path)[0] for path in (*files, tmp_path / rule / "model" / adapters.WEIGHTS)]
        full = [{n: a[n.replace("_A.", "_B.")].astype(float) @ a[n] for n in a if "lora_A" in n} for a in several]
        mean = {name: (full[0][name] + full[1][name]) / 2 for name in full[0]}
        assert {len(a) for n, a in result.items() if "lora_A" in n} == {rank}
        if rule != "flexlora":
            assert worst(full[2], mean) <= 1e-5
        else:
            name = next(iter(mean))
            tail = np.linalg.svd(mean[name], compute_uv=False)[4:]
            assert np.linalg.norm(full[2][name] - mean[name]) == pytest.approx(float(np.linalg.norm(tail)), rel=1e-3)


def test_averaging_by_hand_stays_what_it_was(base: Path, tmp_path: Path) -> None:
    """fedavg of two folders of one scale: the mean of the stored factors, the same configuration of the scale."""
    folders = [adapter(base, tmp_path / f"a{k}", 4, 8.0, k) for k in range(2)]
    report = edgellm.aggregate("fedavg", folders, tmp_path / "merged").report
    one, two, mean = (adapters.arrays(folder) for folder in (*folders, tmp_path / "merged/model"))
    for name, array in mean.items():
        np.testing.assert_allclose(array, (one[name].astype(float) + two[name]) / 2, atol=1e-7)
    config = store.read_json(tmp_path / "merged/model/adapter_config.json")
    assert (config["r"], config["lora_alpha"]) == (4, 8.0)
    assert report.curves["aggregation error over rounds"][0][1] > 0.1


def test_what_has_no_exact_mean_by_hand_is_one_line(base: Path, tmp_path: Path) -> None:
    folders = [adapter(base, tmp_path / f"a{k}", 3 + k, 8.0, k) for k in range(2)]
    same = [adapter(base, tmp_path / f"s{k}", 3, 8.0, k) for k in range(2)]
    for rule, paths, told in (
        ("ffa-lora", same, "not A is the same in all files - aggregate; use flora"),
        ("rolora", same, "neither A nor B is the same in all files"),
        ("fedsa-lora", same, "every client keeps its own B"),
        ("fedex-lora", folders, "which have no mean - aggregate; use flexlora or flora"),
    ):
        with pytest.raises(FederationError, match=told):
            edgellm.aggregate(rule, paths, tmp_path / "out")
    told = edgellm.aggregate("fedavg", folders, tmp_path / "one").report.rejected
    assert [row["client"] for row in told] == [str(folders[1])] and "float32[4, 64], not float32[3, 64]" in told[0][
        "reason"
    ]
    config = store.read_json(same[0] / "adapter_config.json")
    for folder in same:
        store.write_json(folder / "adapter_config.json", {**config, "use_dora": True})
    with pytest.raises(FederationError, match=r"lora_A\.weight: more than a product B A - aggregate; use fedavg"):
        edgellm.aggregate("flora", same, tmp_path / "out")
    edgellm.aggregate("fedavg", same, tmp_path / "averaged")
    changes = []
    for k in range(2):
        update = Update("base", 1, f"c{k}", "delta", {"x.lora_A": np.ones((2, 3)), "x.lora_B": np.ones((4, 2))}, 1)
        changes.append(tmp_path / f"{k}.update")
        changes[-1].write_bytes(wire.update_to_bytes(update))
    with pytest.raises(FederationError, match="carries a change of factors, which has no product"):
        edgellm.aggregate("flora", changes, tmp_path / "out")
