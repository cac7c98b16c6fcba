"""Work cut to what clients have: batch by memory, steps by time, the same theta for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.federated.fit import Config, method
from edgellm_plugins.training import backprop
from edgellm_plugins.training.lora import Config as LoraConfig
from edgellm_plugins.training.lora import method as lora
from edgellm_plugins.training.options import LINEARS
from hypothesis import given, settings
from hypothesis import strategies as st

import edgellm_sdk as edgellm
from edgellm_sdk import models, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, FederationError
from edgellm_sdk.kit import adapters, averaging, footprint
from edgellm_sdk.kit.footprint import Shape, Turn
from edgellm_sdk.random import Stream
from edgellm_sdk.store import load_arrays
from edgellm_sdk.types import FROZEN, Assignment, Dataset, Example, Profile

SMALL = Shape(134_515_008, 30, 576, 1536, 9, 49_152, 2)
TURN = Turn(30, 2_442_240, 8, 16, 128)


@given(
    memory=st.integers(0, 4_000_000_000), up=st.floats(0, 1e8), cores=st.integers(0, 8), seconds=st.floats(0.0, 500),
    batch=st.integers(1, 64), steps=st.integers(1, 50),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_it_fits_or_is_the_least(memory: int, up: float, cores: int, seconds: float, batch: int, steps: int) -> None:
    profile, asked = Profile("", memory, cores, up, up), replace(TURN, batch=batch, steps=steps)
    turn, cost = method.fit(asked, SMALL, profile, Config(seconds=seconds), 2e10, 1_000_000)
    assert 1 <= turn.batch <= batch and 1 <= turn.steps <= steps
    assert not memory or cost.peak <= memory or turn.batch == 1
    assert not seconds or cost.seconds <= seconds or turn.steps == 1
    if not memory:
        assert turn.batch == batch
    elif turn.batch < batch:  # twice as many would not have been borne
        twice = replace(asked, batch=2 * turn.batch)
        assert footprint.memory(SMALL, twice, 330_000_000) > memory
    if seconds and turn.steps < steps:
        speed = 2e10 * (cores or footprint.cores_here())
        more = replace(turn, steps=turn.steps + 1)
        assert footprint.seconds(SMALL, more, speed, profile, 1_000_000, 1_000_000) > seconds


def test_a_poor_client_does_less(tiny_llama: Path, tmp_path: Path) -> None:
    """In a run: the poor client's forwards are fewer, its batch smaller, and nobody is rejected for it."""
    rows = [{"text": f"see you at {k}", "label": ("a", "b")[k % 2]} for k in range(48)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fleet.toml").write_text("[client.client-001]\nmemory = 1\nup = 0.1\n")
    done = edgellm.finetune(
        "lora", str(tiny_llama), str(tmp_path / "data.jsonl"), tmp_path / "run", clients=3, rounds=2,
        around="fit", profiles=tmp_path / "fleet.toml",
        options={"steps": 6, "batch_size": 8, "max_length": 32, "fit": {"seconds": 3.0, "layers": False}},
    )  # fmt: skip
    assert done.report.rejected == []
    sent = done.report.bytes["client-001"]["up_payload"] / 2
    assert 8 * sent / 1e5 > 3.0  # its uplink alone takes longer than a turn may
    assert done.report.metrics["forwards"].value == 2 * 3 * (6 + 6 + 1)
    assert any("client-001 has 1 MB, one example takes" in note for note in done.report.notes)
    rows = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert all(row["foretold_peak"] > 330_000_000 for row in rows)


def test_other_methods_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": f"see you {k}"}) + "\n" for k in range(8)))
    with pytest.raises(ConfigError, match="methods that back-propagate"):
        edgellm.finetune(
            "mezo", str(tiny_llama), str(tmp_path / "data.jsonl"), tmp_path / "run", rounds=1, around="fit", watch=0
        )


# Layers

SIZES = tuple(80_000 + 100 * k for k in range(30))  # the last layer first


@given(memory=st.integers(300_000_000, 800_000_000), batch=st.integers(1, 16), layers=st.integers(1, 30))
@settings(max_examples=200, deadline=None)
def test_it_trains_as_many_layers_as_it_bears(memory: int, batch: int, layers: int) -> None:
    asked = Turn(layers, sum(SIZES[:layers]), 4, batch, 128)
    turn, cost = method.fit(asked, SMALL, Profile("", memory), Config(), 2e10, 0, SIZES)
    assert 1 <= turn.trained <= layers and turn.scalars == sum(SIZES[: turn.trained])
    assert turn.scalars + turn.held == asked.scalars
    assert cost.peak <= memory or (turn.batch, turn.trained) == (1, 1)
    if turn.trained < layers:  # one example and a layer more would not have been borne
        more = turn.trained + 1
        wider = replace(turn, trained=more, scalars=sum(SIZES[:more]), held=asked.scalars - sum(SIZES[:more]))
        assert turn.batch == 1 and footprint.memory(SMALL, wider, 330_000_000) > memory
    kept, _ = method.fit(asked, SMALL, Profile("", memory), Config(), 2e10, 0)
    assert kept.trained == layers and (kept.batch == turn.batch)


def test_a_mean_is_over_those_who_have_it() -> None:
    """By hand: (2 * 1 + 6 * 3) / 8 for what both of two train, the one's own value for what one trains."""
    several = [{"a": np.array([1.0]), "low": np.array([5.0])}, {"a": np.array([3.0])}, {"a": np.array([3.0])}]
    found = averaging.mean(several, [0.25, 0.5, 0.25])
    assert found["a"][0] == (1 + 6 + 3) / 4 and found["low"][0] == 5.0
    several[1]["low"] = np.array([8.0])
    assert averaging.mean(several, [0.25, 0.5, 0.25])["low"][0] == pytest.approx((5 + 2 * 8) / 3, rel=1e-15)


def _texts(count: int) -> Dataset:
    return Dataset(tuple(Example("", f"see you at {k} or at {k * 7 % 5}") for k in range(count)), "texts")


def test_below_the_lowest_layer_nothing_trains_and_all_of_theta_counts(
    make_tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """The gradient of the layers that train is that of a client that trains them all, with what lies below as sent."""
    model = models.resolve(str(make_tiny_llama(tmp_path / "model", seed=1, layers=4)))
    config = LoraConfig(rank=2, steps=1, batch_size=4, max_length=32, precision="float32", clip=0.0, optimizer="sgd",
                        learning_rate=0.1, warmup=0.0)  # fmt: skip
    ctx = Context(tmp_path, configs={"lora": config}, rounds=1000)
    state = lora.initialise(model, config, ctx)
    theta = {n: Stream(0, n).normal(a.size).reshape(a.shape) * np.float32(0.1) for n, a in state.arrays.items()}
    whole = Assignment(state.base, 1, "a", theta)
    given_ = method.prepare(replace(whole, scalars={method.LOWEST: 2}))
    assert given_ is not None
    low = {n for n in theta if ".layers.0." in n or ".layers.1." in n}
    assert {n.removeprefix(FROZEN) for n in given_.arrays if n.startswith(FROZEN)} == low and len(low) * 2 == len(theta)
    every = lora.finetune(model, _texts(4), whole, config, ctx)
    some = lora.finetune(model, _texts(4), given_, config, ctx)
    assert some.arrays.keys() == theta.keys() - low
    for name, change in some.arrays.items():
        assert np.abs(change).max() > 0
        np.testing.assert_array_equal(change, every.arrays[name])
    assert some.scalars == every.scalars
    bare = {**whole.arrays, **{n: np.zeros_like(theta[n]) for n in low}}
    other = lora.finetune(model, _texts(4), replace(given_, arrays=method.prepare(
        replace(whole, arrays=bare, scalars={method.LOWEST: 2})).arrays), config, ctx)  # type: ignore[union-attr]  # fmt: skip
    assert other.scalars["loss"] != some.scalars["loss"]  # what lies below takes part


def test_nothing_is_kept_of_layers_that_do_not_train(
    make_tiny_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.resolve(str(make_tiny_llama(tmp_path / "model", seed=1, layers=4)))
    config = LoraConfig(rank=2, steps=1, batch_size=2, max_length=32, precision="float32")
    ctx = Context(tmp_path, configs={"lora": config})
    state = lora.initialise(model, config, ctx)
    with_graph: list[bool] = []
    real = backprop._output

    def output(layer: Any, hidden: Any, keywords: Any) -> Any:
        with_graph.append(torch.is_grad_enabled())
        return real(layer, hidden, keywords)

    monkeypatch.setattr(backprop, "_output", output)
    for lowest, graphs, plain in ((None, 3, 3), (1, 2, 3), (2, 1, 3), (3, 0, 3)):
        with_graph.clear()
        told = {} if lowest is None else {method.LOWEST: lowest}
        assignment = Assignment(state.base, 1, "a", state.arrays, told)
        lora.finetune(model, _texts(2), method.prepare(assignment) or assignment, config, ctx)
        assert (with_graph.count(True), with_graph.count(False)) == (graphs, plain)


Start = Callable[..., Any]
FEW = {"rank": 2, "steps": 2, "batch_size": 2, "max_length": 32, "precision": "float32"}


@pytest.fixture
def start(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> Start:
    """A run of three clients on a model of three layers, of which client-001 bears one example in two of the layers."""
    path = make_tiny_llama(tmp_path / "model", seed=2, layers=3)
    rows = [{"text": f"see you at {k}", "label": ("a", "b")[k % 2]} for k in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(plugin: str = "lora", name: str = "run", around: str = "fit", half: bool = False, **more: Any) -> Any:
        options = {**FEW, **more.pop("options", {}), "fit": {"floor": 0, **more.pop("fit", {})}}
        config = LoraConfig(**{n: v for n, v in options.items() if n in LoraConfig.__dataclass_fields__})
        shape = footprint.shape_of(models.resolve(str(path)), "float32")
        ctx = Context(tmp_path / "sizes", configs={"lora": config})
        theta = lora.initialise(models.resolve(str(path)), config, ctx).arrays
        if half or plugin == "lora-fa":  # one factor of every pair trains, both are of one size here
            theta = {n: a for n, a in theta.items() if n.endswith("B")}
        sizes = method.sizes_of(theta, shape)
        two = Turn(2, sum(sizes[:2]), 2, 1, 32, held=sizes[2])
        bytes_ = footprint.memory(shape, two, 0)
        (tmp_path / "fleet.toml").write_text(f"[client.client-001]\nmemory = {(bytes_ + 1000) / 1e6}\n")
        return edgellm.finetune(
            plugin, str(path), str(tmp_path / "data.jsonl"), tmp_path / name, clients=3, seed=4, around=around,
            profiles=tmp_path / "fleet.toml", watch=0, keep_wire=True, options=options, **{"rounds": 2, **more},
        )  # fmt: skip

    return run


def updates(folder: Path) -> dict[tuple[int, str], Any]:
    found = [wire.update_from_bytes(path.read_bytes(), "x") for path in sorted((folder / "wire").glob("*.bin"))]
    return {(update.round, update.client): update for update in found}


def test_a_client_that_bears_two_layers_trains_two_and_the_mean_is_over_those_who_trained(start: Start) -> None:
    done = start(rounds=1)
    assert done.report.rejected == []
    sent = updates(done.folder)
    names = set(sent[1, "client-000"].arrays)
    low = {name for name in names if ".layers.0." in name}
    assert low and set(sent[1, "client-001"].arrays) == names - low
    after, _ = load_arrays(done.folder / "checkpoint" / "state.safetensors")
    before = start(name="none", rounds=1, options={"learning_rate": 0.0})
    theta, _ = load_arrays(before.folder / "checkpoint" / "state.safetensors")
    for name in names:
        rows = [update for update in sent.values() if name in update.arrays]
        assert len(rows) == (2 if name in low else 3)
        count = sum(row.examples for row in rows)
        mean = sum(row.arrays[name].astype(np.float64) * row.examples for row in rows) / count
        np.testing.assert_allclose(after[name], theta[name] + mean, rtol=1e-6, atol=1e-9)
    rows = [json.loads(line) for line in (done.folder / "ledger.jsonl").read_text().splitlines()]
    peaks = {row["client"]: row["foretold_peak"] for row in rows}
    assert peaks["client-001"] < peaks["client-000"]
    up = {row["client"]: row["up_payload"] for row in rows}
    assert up["client-001"] < up["client-000"] and not any("one example takes" in note for note in done.report.notes)


@pytest.mark.parametrize(
    ("rule", "exact"),
    [
        ("fedavg", False), ("fedadam", False), ("ffa-lora", True), ("rolora", True), ("fedsa-lora", False),
        ("fedex-lora", True), ("flora", True), ("flexlora", False), ("hetlora", False),
    ],
)  # fmt: skip
def test_rules_that_average_take_unlike_layers(start: Start, rule: str, exact: bool) -> None:
    """Rounds go on, the lowest layer moves by those who train it, and exact rules stay exact."""
    done = start(aggregate=rule, rounds=3, half=rule in ("ffa-lora", "rolora", "fedsa-lora"))
    assert done.report.rejected == [] and done.report.metrics["rounds"].value == 3
    sent = updates(done.folder)
    for number in (1, 2, 3):
        assert not any(".layers.0." in name for name in sent[number, "client-001"].arrays)
        assert any(".layers.0." in name for name in sent[number, "client-002"].arrays)
    if exact:
        assert all(error <= 1e-5 for _, error in done.report.curves["aggregation error over rounds"])


@pytest.mark.parametrize(("plugin", "rule"), [("lora", "krum"), ("lora", "norm-clip"), ("lora-fa", "median")])
def test_rules_that_compare_refuse_them_and_take_fewer_examples(start: Start, plugin: str, rule: str) -> None:
    options = {"krum": {"byzantine": 0}} if rule == "krum" else {}
    with pytest.raises(FederationError, match="unlike sets of layers"):
        start(plugin, aggregate=rule, rounds=1, options=options)
    done = start(plugin, "alike", aggregate=rule, rounds=1, fit={"layers": False}, options=options)
    assert done.report.rejected == [] and any("one example takes" in note for note in done.report.notes)


def test_under_privacy_and_without_gradients_layers_stay(start: Start) -> None:
    for name, plugin, more in (
        ("dp", "lora", {"around": "dp,fit", "options": {"dp": {"noise_multiplier": 4.0}}}),
        ("secagg", "lora", {"around": "secagg,fit"}),
        ("zeroth", "lora-fa", {"options": {"gradient": "zeroth", "probes": 1}}),
    ):
        done = start(plugin, name, rounds=1, **more)
        assert done.report.rejected == [] and any("one example takes" in note for note in done.report.notes)


@pytest.mark.parametrize("plugin", ["fedit", "lora-fa"])
def test_other_methods_train_fewer_layers_too(start: Start, plugin: str) -> None:
    done = start(plugin, rounds=2, options={"layers": 3, "targets": LINEARS})
    sent = updates(done.folder)
    found = {client: {adapters.layer_of(name) for name in sent[2, client].arrays} for _, client in sent}
    assert done.report.rejected == [] and found["client-000"] == {0, 1, 2} and 0 not in found["client-001"]
    assert max(found["client-001"]) == 2  # type: ignore[type-var]


def test_states_know_their_sizes() -> None:
    theta = {"model.layers.2.q.lora_A": np.zeros((2, 3)), "model.layers.1.q.lora_A": np.zeros(5), "head": np.zeros(9)}
    shape = Shape(1000, 3, 4, 8, 1, 10, 4)
    assert method.sizes_of(theta, shape) == (6, 5, 0) and method.sizes_of({"head": np.zeros(3)}, shape) == ()
    assert method.prepare(Assignment("b", 1, "a", theta)) is None
