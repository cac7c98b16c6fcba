"""FedProx and SCAFFOLD: against independent loops, bit for bit without a correction, bytes, refusals, resume."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.federated.scaffold import method as scaffold
from edgellm_plugins.training import backprop
from edgellm_plugins.training.options import Options

import edgellm_sdk as edgellm
from edgellm_sdk import config as options
from edgellm_sdk import models, registry, store, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.federate.engine import in_process
from edgellm_sdk.federate.ledger import Ledger
from edgellm_sdk.federate.rounds import Failure, Plan, resumed, run_rounds
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Assignment, Dataset, Example, ModelHandle, State, Update

SGD = {"optimizer": "sgd", "clip": 0.0, "weight_decay": 0.0}
TINY = {"rank": 2, "layers": 1, "targets": "q_proj,v_proj", "steps": 2, "batch_size": 2, "precision": "float32"}


def dataset(n: int = 12) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [Example(f"{words[i % 4]} {i}", ("spam", "ham")[i % 2], ("spam", "ham")[i % 2]) for i in range(n)]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"))


@pytest.fixture(scope="module")
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


# A method with a loss that can be worked by hand

TARGETS = {"a": (1.0, 0.0), "b": (4.0, 3.0), "c": (0.5, -6.0)}  # client: curvature h and minimum m of h/2 (x - m)^2


@dataclass(frozen=True)
class Quadratics(Options):
    """The family's options, for steps down h (x - m)."""


class Quadratic:
    """Every client takes the family's steps down its own parabola from the theta it was sent."""

    @hookimpl
    def edgellm_initialise(self) -> State:
        return State("base", 0, {"x": np.full(1, 2, np.float32)})

    @hookimpl
    def edgellm_finetune(self, data: Dataset, assignment: Assignment, config: Any, ctx: Context) -> Update:
        h, m = TARGETS[assignment.client]

        def slope(step: int, name: str, make: Any, leaves: Any) -> float:
            leaves["x"].grad = h * (leaves["x"].detach() - m)
            return float(h / 2 * (leaves["x"].detach() - m) ** 2)

        return backprop.work(slope, 3, data, assignment, config, ctx)


def quadratics(around: Sequence[str], ctx_folder: Path, rounds: int, given: Mapping[str, Any], own: Any = None) -> Any:
    method: Any = Quadratic()
    about = registry.Plugin("quadratic", "", "1", config=Quadratics)
    first = registry.Loaded(about, method, registry.Source("quadratic", "", ""), ("edgellm_finetune",))
    others = [registry.get("fedavg", "aggregate"), *(registry.get(name, "around") for name in around)]
    configs = {
        p.plugin.name: options.build(p.plugin.config, (own or {}).get(p.plugin.name, {}), "test") for p in others
    }
    settings = {**SGD, "warmup": 0.0, "batch_size": 1, **given}
    configs |= {
        "quadratic": options.build(Quadratics, settings, "test"),
        "fedavg": replace(configs["fedavg"], weighting="equal"),
    }
    relay = Relay([first, *others], configs)
    return relay, Context(ctx_folder, seed=1, rounds=rounds, configs=relay.configs)


def run(relay: Relay, ctx: Context, rounds: int, per_round: int = 3) -> State:
    shards = {client: dataset(4) for client in TARGETS}
    plan = Plan(dict.fromkeys(TARGETS, 4), per_round, rounds, quorum=0.1)
    engine = in_process(relay, None, shards, ctx)  # type: ignore[arg-type]
    return run_rounds(relay, relay.initialise(None, ctx), plan, engine, ctx, Ledger(ctx.folder / "l.jsonl"))  # type: ignore[arg-type]


def rates(number: int, rounds: int, steps: int, rate: float) -> list[float]:
    """Linear decay to 0 over all steps of the run."""
    total = rounds * steps
    return [rate * (total - k) / total for k in range(number * steps, number * steps + steps)]


def reference(rounds: int, steps: int, rate: float, cohorts: Sequence[Sequence[str]], corrected: bool) -> list[float]:
    """SCAFFOLD's Algorithm 1, option II, with sum_k eta_k for K eta; without `corrected`, FedAvg."""
    x, c, own, path = 2.0, 0.0, dict.fromkeys(TARGETS, 0.0), []
    for number in range(rounds):
        ends, changes = [], []
        for client in cohorts[number]:
            h, m = TARGETS[client]
            y = x
            for eta in rates(number, rounds, steps, rate):
                y -= eta * (h * (y - m) + (c - own[client] if corrected else 0.0))
            new = own[client] - c + (x - y) / sum(rates(number, rounds, steps, rate))
            changes.append(new - own[client])
            own[client] = new
            ends.append(y)
        x = sum(ends) / len(ends)
        c += sum(changes) / len(TARGETS)
        path.append(x)
    return path


@pytest.mark.parametrize("per_round", [3, 2])
def test_scaffold_against_the_algorithm(tmp_path: Path, per_round: int) -> None:
    """Six rounds, all or two of three clients in each, at falling rates."""
    relay, ctx = quadratics(["scaffold"], tmp_path, 6, {"steps": 5, "learning_rate": 0.1})
    final = run(relay, ctx, 6, per_round)
    rows = Ledger(tmp_path / "l.jsonl").rows()
    cohorts = [sorted(row["client"] for row in rows if row["round"] == number) for number in range(1, 7)]
    assert {len(cohort) for cohort in cohorts} == {per_round}
    wanted = reference(6, 5, 0.1, cohorts, corrected=True)
    assert float(final.arrays["x"][0]) == pytest.approx(wanted[-1], rel=1e-5)
    assert abs(wanted[-1] - reference(6, 5, 0.1, cohorts, corrected=False)[-1]) > 0.05
    assert set(final.sent) == {"x"} and final.arrays["server/scaffold/x"].dtype == np.float64
    kept = [ctx.recall(client, "scaffold", 99) for client in TARGETS]
    mean = sum(float(row[0]["x"][0]) for row in kept if row) / 3
    assert float(final.arrays["server/scaffold/x"][0]) == pytest.approx(mean, rel=1e-5, abs=1e-6)


def test_scaffold_takes_clients_to_the_minimum_of_their_sum(tmp_path: Path) -> None:
    """The sum of the parabolas has its minimum at (0 + 12 - 3) / 5.5; FedAvg stops elsewhere."""
    right = (0 + 12 - 3) / 5.5
    given = {"steps": 20, "learning_rate": 0.1}
    relay, ctx = quadratics(["scaffold"], tmp_path / "scaffold", 60, given)
    corrected = float(run(relay, ctx, 60).arrays["x"][0])
    relay, ctx = quadratics([], tmp_path / "plain", 60, given)
    plain = float(run(relay, ctx, 30).arrays["x"][0])
    assert abs(corrected - right) < 1e-3 and abs(plain - right) > 0.1


def test_fedprox_against_a_loop(tmp_path: Path) -> None:
    """Two rounds; and a strong pull keeps clients near where they started."""
    moved = []
    for mu in (0.5, 3.0):
        given = {"steps": 3, "learning_rate": 0.1}
        relay, ctx = quadratics(["fedprox"], tmp_path / f"{mu}", 2, given, {"fedprox": {"mu": mu}})
        final = run(relay, ctx, 2)
        x = 2.0
        for number in range(2):
            ends = []
            for h, m in TARGETS.values():
                y = x
                for eta in rates(number, 2, 3, 0.1):
                    y -= eta * (h * (y - m) + mu * (y - x))
                ends.append(y)
            x = sum(ends) / 3
        assert float(final.arrays["x"][0]) == pytest.approx(x, rel=1e-5)
        moved.append(abs(x - 2))
    assert moved[1] < moved[0]


def test_both_corrections_add_up(tmp_path: Path) -> None:
    relay, ctx = quadratics(["fedprox", "scaffold"], tmp_path, 1, {"steps": 2}, {"fedprox": {"mu": 0.5}})
    assigned = relay.assign(relay.initialise(None, ctx), ["a"], {"a": 4}, ctx)["a"]  # type: ignore[arg-type]
    ctx.remember("a", "scaffold", 0, {"x": np.full(1, 3, np.float32)}, {})
    relay.prepare(dataset(4), assigned, ctx)
    assert ctx.drift is not None and ctx.drift.proximal == 0.5 and ctx.drift.arrays["x"].tolist() == [-3]


# Around a method that trains a model


def around(method: str, names: Sequence[str], given: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> Relay:
    plugins = [registry.get(method, "finetune"), *(registry.get(name, "around") for name in names)]
    asked = {method: given, **(own or {})}
    return Relay(
        plugins, {p.plugin.name: options.build(p.plugin.config, asked.get(p.plugin.name, {}), "test") for p in plugins}
    )


def federation(relay: Relay, handle: ModelHandle, folder: Path, rounds: int) -> tuple[State, Ledger]:
    ctx, ledger = Context(folder, seed=7, threads=1, rounds=3, configs=relay.configs), Ledger(folder / "l.jsonl")
    shards = {client: dataset(12).select(range(k, 12, 3)) for k, client in enumerate("abc")}
    plan = Plan({client: len(shard) for client, shard in shards.items()}, 3, rounds)
    start = resumed(ctx, handle.digest) or relay.initialise(handle, ctx)
    return run_rounds(relay, start, plan, in_process(relay, handle, shards, ctx), ctx, ledger), ledger


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fedprox_without_mu_is_the_method_bit_for_bit(handle: ModelHandle, tmp_path: Path, optimizer: str) -> None:
    given = {**TINY, "optimizer": optimizer, "clip": 0.5}
    plain, _ = federation(around("lora", [], given), handle, tmp_path / "plain", 3)
    none, _ = federation(around("lora", ["fedprox"], given, {"fedprox": {"mu": 0.0}}), handle, tmp_path / "0", 3)
    some, _ = federation(around("lora", ["fedprox"], given, {"fedprox": {"mu": 1.0}}), handle, tmp_path / "1", 3)
    assert wire.state_to_bytes(none) == wire.state_to_bytes(plain) != wire.state_to_bytes(some)


@pytest.mark.parametrize("method", ["lora", "lora-fa"])
def test_scaffold_begins_as_the_method_bit_for_bit_and_doubles_the_traffic(
    handle: ModelHandle, tmp_path: Path, method: str
) -> None:
    given = {**TINY, **SGD, "learning_rate": 0.05}
    plain, thin = federation(around(method, [], given), handle, tmp_path / "plain", 1)
    first, thick = federation(around(method, ["scaffold"], given), handle, tmp_path / "scaffold", 1)
    assert {n: a.tobytes() for n, a in first.sent.items()} == {n: a.tobytes() for n, a in plain.arrays.items()}
    names = {f"server/scaffold/{name}" for name in plain.arrays}
    assert set(first.arrays) - set(plain.arrays) == names
    theta = 4 * sum(array.size for array in plain.arrays.values())
    assert {(row["up_payload"], row["down_payload"]) for row in thin.rows()} == {(theta, theta)}
    assert {(row["up_payload"], row["down_payload"]) for row in thick.rows()} == {(2 * theta, 2 * theta)}
    assert not any(row["rejected"] for row in thick.rows())
    more, _ = federation(around(method, ["scaffold"], given), handle, tmp_path / "scaffold", 3)
    longer, _ = federation(around(method, [], given), handle, tmp_path / "plain", 3)
    assert any(more.arrays[name].tobytes() != longer.arrays[name].tobytes() for name in longer.arrays)


def test_scaffold_resumes_to_the_same_bytes(handle: ModelHandle, tmp_path: Path) -> None:
    """c is in the state, c_i with the clients; a round done again starts from the c_i of before it."""
    given = {**TINY, **SGD, "learning_rate": 0.05}
    whole, _ = federation(around("lora", ["scaffold"], given), handle, tmp_path / "whole", 3)
    federation(around("lora", ["scaffold"], given), handle, tmp_path / "cut", 2)
    relay = around("lora", ["scaffold"], given)
    ctx = Context(tmp_path / "cut", seed=7, threads=1, rounds=3, configs=relay.configs)
    state = resumed(ctx, handle.digest)
    assert state is not None and state.round == 2
    sent = relay.assign(state, ["a"], {"a": 4, "b": 4, "c": 4}, ctx)["a"]
    relay.finetune(handle, dataset(12).select(range(0, 12, 3)), sent, ctx)  # a turn whose update is lost in a crash
    again, _ = federation(around("lora", ["scaffold"], given), handle, tmp_path / "cut", 3)
    assert wire.state_to_bytes(again) == wire.state_to_bytes(whole)


# Refusals


@pytest.mark.parametrize("changed", [{"optimizer": "adamw"}, {"clip": 1.0}, {"weight_decay": 0.1}])
def test_scaffold_refuses_what_is_no_plain_sgd(handle: ModelHandle, tmp_path: Path, changed: Mapping[str, Any]) -> None:
    relay = around("lora", ["scaffold"], {**TINY, **SGD, **changed})
    with pytest.raises(ConfigError, match="plain SGD steps.*optimizer=sgd, clip=0 and weight_decay=0") as caught:
        federation(relay, handle, tmp_path, 1)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 200
    relay = around("lora", ["scaffold"], {**TINY, **SGD, "learning_rate": 0.0})
    with pytest.raises(ConfigError, match="sum of the learning rates"):
        federation(relay, handle, tmp_path / "zero", 1)


@pytest.mark.parametrize(
    ("name", "reason"), [("fedprox", "fedprox changes gradients"), ("scaffold", "scaffold needs steps along gradients")]
)
def test_methods_without_gradients_are_refused(handle: ModelHandle, tmp_path: Path, name: str, reason: str) -> None:
    for method in ("mezo", "fwdllm"):
        with pytest.raises(ConfigError, match=f"{reason}.*lora or lora-fa") as caught:
            federation(around(method, [name], {}), handle, tmp_path / method, 1)
        assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_scaffold_refuses_clients_of_another_shape(tmp_path: Path) -> None:
    state = State("base", 0, {"x": np.zeros(2, np.float32)})
    given = {"a": Assignment("base", 1, "a", {"x": np.zeros(1, np.float32)})}
    with pytest.raises(ConfigError, match="a trains another x"):
        scaffold.assigned(given, state, 1, Context(tmp_path, configs={"m": Quadratics(**SGD)}))  # type: ignore[arg-type]


def test_scaffold_refuses_a_change_that_is_none(tmp_path: Path) -> None:
    sent = Assignment("base", 1, "a", {"x": np.zeros(1, np.float32), "scaffold/x": np.zeros(1, np.float32)})
    for update in (
        Update("base", 1, "a", "signs", {"x": np.ones(1, np.float32)}, 1),
        Update("base", 1, "a", "delta", {"packed": np.ones(1, np.float32)}, 1),
    ):
        with pytest.raises(ConfigError, match="changed by another plugin.*name scaffold first"):
            scaffold.reported(update, sent, Context(tmp_path))


def test_a_client_without_its_variate_is_left_out_with_the_reason(tmp_path: Path) -> None:
    relay, ctx = quadratics(["scaffold"], tmp_path, 1, {"steps": 2, "learning_rate": 0.1})
    shards = {client: dataset(4) for client in TARGETS}
    honest = in_process(relay, None, shards, ctx)  # type: ignore[arg-type]

    def engine(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        for client, raw in honest(messages):
            assert isinstance(raw, bytes)
            update = wire.update_from_bytes(raw, client)
            if client == "b":
                raw = wire.update_to_bytes(replace(update, arrays={"x": update.arrays["x"]}))
            if client == "c":
                wide = {**update.arrays, "scaffold/x": np.zeros(2, np.float32)}
                raw = wire.update_to_bytes(replace(update, arrays=wide))
            yield client, raw

    plan, ledger = Plan(dict.fromkeys(TARGETS, 4), 3, 1, quorum=0.1), Ledger(tmp_path / "l.jsonl")
    final = run_rounds(relay, relay.initialise(None, ctx), plan, engine, ctx, ledger)  # type: ignore[arg-type]
    reasons = {row["client"]: row["rejected"] for row in ledger.rows()}
    assert reasons["a"] == "" and "control variate" in reasons["b"]
    assert "control variate" in reasons["c"] or "float32[2]" in reasons["c"]
    kept = ctx.recall("a", "scaffold", 99)
    assert kept is not None and float(final.arrays["server/scaffold/x"][0]) == pytest.approx(float(kept[0]["x"][0]) / 3)


def test_a_whole_run_with_everything_around_it(handle: ModelHandle, tmp_path: Path) -> None:
    """From the options to the report: FedAdam on the server, a proximal term and control variates on the clients."""
    rows = [{"text": f"see you at {k}", "label": ("a", "b")[k % 2]} for k in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = edgellm.finetune(
        "lora-fa", str(handle.path), str(tmp_path / "data.jsonl"), tmp_path / "run", clients=3, rounds=2, watch=0,
        aggregate="fedadam", around="fedprox,scaffold",
        options={**TINY, **SGD, "fedprox": {"mu": 0.1}, "fedadam": {"server_rate": 0.01}},
    )  # fmt: skip
    assert done.report.rejected == [] and done.model is not None
    saved = store.load_arrays(tmp_path / "run" / "model" / "adapter_model.safetensors")[0]
    assert not any("server/" in name or "scaffold" in name for name in saved)
    theta = sum(array.nbytes for name, array in saved.items() if "lora_B" in name)
    assert {row["up_payload"] for row in done.report.bytes.values()} == {2 * 2 * theta}
    state, _ = store.load_arrays(tmp_path / "run" / "checkpoint" / "state.safetensors")
    assert {name.split("/")[1] for name in state if "/" in name} == {"u", "v", "scaffold"}
