"""Unlike clients: the mean of what they changed is exact, the server walks where a client walked, kinds by profile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_plugins.federated.mixed import Config, method
from edgellm_plugins.training import backprop
from edgellm_plugins.training.lora_fa import Config as FAConfig
from edgellm_plugins.training.lora_fa import method as lora_fa
from hypothesis import given, settings
from hypothesis import strategies as st

import edgellm_sdk as edgellm
from edgellm_sdk import models, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.federate import profiles
from edgellm_sdk.kit import footprint
from edgellm_sdk.types import Assignment, Dataset, Example, ModelHandle, Profile, State, Update

WORDS = ("win a prize now", "mum is home", "call this number", "see you at dinner")
DATA = Dataset(
    tuple(Example(f"{WORDS[k % 4]} {k}", (" spam", " ham")[k % 2], ("spam", "ham")[k % 2]) for k in range(16)),
    "fingerprint",
)
OPTIONS: dict[str, Any] = {
    "rank": 4, "alpha": 8.0, "kinds": "backprop:4,backprop:2,scalars", "steps": 3, "batch_size": 4, "max_length": 32,
    "layers": 1, "targets": "q_proj,down_proj", "probes": 2, "precision": "float32",
}  # fmt: skip
CONFIG = Config(**OPTIONS)


@pytest.fixture
def handle(tiny_llama: Path) -> ModelHandle:
    return models.resolve(str(tiny_llama))


def context(folder: Path, config: Config = CONFIG, **more: Any) -> Context:
    return Context(folder, seed=5, threads=1, rounds=4, configs={"mixed": config}, **more)


def round_of(handle: ModelHandle, ctx: Context, clients: int = 3) -> tuple[State, list[Update]]:
    """A round from a theta that is not zero."""
    start = method.initialise(handle, CONFIG, ctx)
    noise = np.random.default_rng(1)
    arrays = {name: noise.normal(size=a.shape).astype(np.float32) * 0.05 for name, a in start.arrays.items()}
    state, names = replace(start, arrays=arrays), [f"c{k}" for k in range(clients)]
    ctx.assigned = method.assign(state, names, dict.fromkeys(names, 16), CONFIG, ctx)
    return state, [method.finetune(handle, DATA, ctx.assigned[name], CONFIG, ctx) for name in names]


def test_the_mean_is_that_of_the_full_matrices(handle: ModelHandle, tmp_path: Path) -> None:
    """s dB A of the aggregate against sum_i p_i s dB_i A_i of full matrices, each kind with the A it trained on."""
    ctx = context(tmp_path)
    state, updates = round_of(handle, ctx)
    updates = [replace(update, examples=k + 1) for k, update in enumerate(updates)]
    assert [update.kind for update in updates] == ["delta", "delta", "scalars"]
    assert method.screen(updates, state, ctx) == {}
    new = method.aggregate(state, updates, CONFIG, ctx)
    frozen: Any = method._objective(handle, CONFIG, ctx)
    for name, array in state.arrays.items():
        a = frozen.trainables.frozen[name.replace("lora_B", "lora_A")].astype(np.float64)
        end = method.walked(state.arrays, updates[2].arrays["jvp"], "c2", 1, CONFIG, ctx)[name]
        ideal = (
            (1 / 6) * 2 * updates[0].arrays[name] @ a
            + (2 / 6) * 2 * updates[1].arrays[name] @ a[:2]
            + (3 / 6) * 2 * (end.astype(np.float64) - array) @ a
        )
        ours = 2 * (new.arrays[name].astype(np.float64) - array) @ a
        assert np.linalg.norm(ours - ideal) <= 1e-5 * np.linalg.norm(ideal)
    assert new.scalars == {"forwards": 2 * 9 + 12, "steps": 3} and new.round == 1
    again = method.aggregate(state, updates[::-1], CONFIG, context(tmp_path))
    assert all(np.array_equal(again.arrays[name], new.arrays[name]) for name in new.arrays)


def test_the_server_walks_where_the_client_walked(
    handle: ModelHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, seen = context(tmp_path), []
    moved = method._moved
    monkeypatch.setattr(method, "_moved", lambda *given: seen.append(moved(*given)) or seen[-1])
    state, updates = round_of(handle, ctx)
    client, sent = seen[2], wire.update_from_bytes(wire.update_to_bytes(updates[2]), "c2")
    server = method.walked(state.arrays, sent.arrays["jvp"], "c2", 1, CONFIG, context(tmp_path / "server"))
    for name, value in client.items():
        assert value.tobytes() == server[name].tobytes() and not np.array_equal(value, state.arrays[name])


def test_the_widest_kind_is_lora_fa(handle: ModelHandle, tmp_path: Path) -> None:
    """backprop:R does what `lora-fa` does, bit for bit; a narrower one leaves the rest of theta in the forward pass."""
    ctx = context(tmp_path)
    state, updates = round_of(handle, ctx)
    shared = {name: getattr(CONFIG, name) for name in backprop.Options.__dataclass_fields__}
    other = Context(tmp_path, seed=5, threads=1, rounds=4)
    plain = lora_fa.finetune(handle, DATA, ctx.assigned["c0"], FAConfig(**shared, rank=4, alpha=8.0), other)
    assert all(np.array_equal(plain.arrays[name], array) for name, array in updates[0].arrays.items())
    narrow = ctx.assigned["c1"]
    emptied = {name: np.where(np.arange(4) < 2, array, 0).astype(np.float32) for name, array in narrow.arrays.items()}
    without = method.finetune(handle, DATA, replace(narrow, arrays=emptied), CONFIG, context(tmp_path))
    assert any(not np.array_equal(without.arrays[n], array) for n, array in updates[1].arrays.items())
    assert {array.shape[1] for array in updates[1].arrays.values()} == {2}


def test_bytes_are_those_of_the_formulas(handle: ModelHandle, tmp_path: Path) -> None:
    state, updates = round_of(handle, context(tmp_path))
    outs = sum(len(array) for array in state.arrays.values())
    assert [wire.payload_bytes(update.arrays) for update in updates] == [4 * 4 * outs, 4 * 2 * outs, 4 * 3 * 2]


def test_lies_are_screened(handle: ModelHandle, tmp_path: Path) -> None:
    ctx = context(tmp_path)
    state, (wide, narrow, scalars) = round_of(handle, ctx)
    first = sorted(wide.arrays)[0]
    bad = [
        replace(scalars, arrays={"jvp": np.zeros((3, 3), np.float32)}),
        replace(scalars, arrays={"jvp": np.full((3, 2), np.nan, np.float32)}),
        replace(scalars, rng="other"),
        replace(scalars, kind="delta"),
        replace(scalars, scalars={**scalars.scalars, "forwards": 1}),
        replace(narrow, arrays=wide.arrays),
        replace(narrow, scalars={**narrow.scalars, "loss": float("inf")}),
        replace(wide, arrays={**wide.arrays, first: wide.arrays[first].astype(np.float64)}),
        replace(wide, round=7),
    ]
    for update in bad:
        assert update.client in method.screen([update], state, ctx), update


@pytest.mark.parametrize(
    "kinds", ["backprop", "backprop:0", "backprop:9", "scalars:2", "lora", "", "backprop:2,,scalars", "backprop:x"]
)
def test_kinds_are_checked(kinds: str) -> None:
    with pytest.raises(ConfigError, match="kinds"):
        edgellm.finetune("mixed", "smollm2-135m", "sms-spam", "nowhere", options={"kinds": kinds}, dry_run=True)


def test_a_kind_by_profile(handle: ModelHandle, tmp_path: Path) -> None:
    """By memory, by uplink, by neither, and nobody is given more than it has if there is a smaller kind."""
    ctx = context(tmp_path, model=handle)
    state = method.initialise(handle, CONFIG, ctx)
    kinds = CONFIG.chosen_kinds()
    costs = [method.foretold(kind, "x", state.arrays, CONFIG, ctx) for kind in kinds]
    assert costs[0].peak == costs[1].peak > costs[2].peak > CONFIG.floor * 1_000_000
    slow = 8 * method.sent_bytes(kinds[1], state.arrays, CONFIG) / CONFIG.upload_seconds
    ctx.profiles = {
        "rich": Profile(), "full": Profile(memory=costs[0].peak), "poor": Profile(memory=costs[0].peak - 1),
        "slow": Profile(up=slow), "slower": Profile(up=slow * 0.99), "none": Profile(memory=1),
    }  # fmt: skip
    given = method.assign(state, [*ctx.profiles, "unknown"], dict.fromkeys([*ctx.profiles, "unknown"], 1), CONFIG, ctx)
    work = {client: (a.scalars["work"], a.scalars["rank"]) for client, a in given.items()}
    assert work == {
        "rich": ("backprop", 4), "full": ("backprop", 4), "poor": ("scalars", 4), "slow": ("backprop", 2),
        "slower": ("scalars", 4), "none": ("scalars", 4), "unknown": ("backprop", 4),
    }  # fmt: skip
    assert set(ctx.foretold) == set(given) and ctx.foretold["slow"].seconds > CONFIG.upload_seconds


def test_profiles_are_read(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[[kind]]\nname = "phone"\nshare = 3\nmemory = 700\nup = 10\n[[kind]]\nname = "board"\ncores = 4\n'
        "[client.c4]\nmemory = 1\n"
    )
    found = profiles.read(path, [f"c{k}" for k in range(8)])
    assert [found[f"c{k}"].kind for k in range(8)] == ["phone"] * 4 + [""] + ["phone"] + ["board"] * 2
    assert found["c0"] == Profile("phone", 700_000_000, 0, 10e6, 0.0) and found["c4"].memory == 1_000_000
    for text, said in (
        ("[client.c9]\nup = 1", "client.c9: takes no part"),
        ("[[kind]]\nmemroy = 1", "did you mean 'memory'"),
        ("[kind]\nup = 1", "kind: is not a table"),
        ("[[kind]]\nup = -1", "up"),
        ("kinds = 3", "unknown key 'kinds', did you mean 'kind'?"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            profiles.read(path, ["c0", "c1"])


@given(st.lists(st.floats(0.01, 5), min_size=1, max_size=4), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_kinds_are_dealt_by_share(shares: list[float], clients: int) -> None:
    dealt = profiles._dealt([profiles.Kind(str(k), share=share) for k, share in enumerate(shares)], clients)
    assert len(dealt) == clients
    for k, share in enumerate(shares):
        count = sum(profile.kind == str(k) for profile in dealt)
        assert abs(count - clients * share / sum(shares)) < 1.001


def test_flops_are_those_that_torch_counts(handle: ModelHandle) -> None:
    """A forward pass of the tiny model; attention over the texts, which is left out, is little here."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    shape, model = footprint.shape_of(handle), handle.load().model
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.zeros((2, 8), dtype=torch.long))
    embedding = 0 if model.config.tie_word_embeddings else shape.vocabulary * shape.hidden
    assert shape.per_layer * shape.layers == pytest.approx(shape.parameters - shape.vocabulary * shape.hidden, rel=0.01)
    body, head = (shape.parameters - embedding) * 16 * 2, 2 * shape.vocabulary * shape.hidden * 16
    assert body == pytest.approx(counter.get_total_flops(), rel=0.1)
    per_layer = 2 * shape.per_layer * 16
    for turn, wanted in (
        (footprint.Turn(0, 0, 1, 2, 8, probes=1, scored=8), 2 * per_layer + 2 * head),
        (footprint.Turn(2, 0, 1, 2, 8, probes=3, scored=8), 6 * (2 * per_layer + head)),
        (footprint.Turn(1, 0, 5, 2, 8, scored=8), 5 * (per_layer + 3 * (per_layer + head))),
    ):
        assert footprint.flops(shape, turn) == wanted


def test_a_federation_of_three_kinds(handle: ModelHandle, tmp_path: Path) -> None:
    """End to end: the ledger tells measured and foretold cost, and the run ends in an adapter that loads."""
    rows = [{"text": f"{WORDS[k % 4]} {k}", "label": ("spam", "ham")[k % 2]} for k in range(36)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "fleet.toml").write_text("[[kind]]\nname = 'phone'\nmemory = 10000\n[client.client-002]\nmemory = 1\n")
    done = edgellm.finetune(
        "mixed", str(handle.path), str(tmp_path / "data.jsonl"), tmp_path / "run", clients=3, rounds=2,
        profiles=tmp_path / "fleet.toml", options=OPTIONS,
    )  # fmt: skip
    ledger = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert all(row["peak"] > 50_000_000 and row["foretold_peak"] > 300_000_000 for row in ledger)
    ups = {row["client"]: row["up_payload"] for row in ledger}
    assert ups["client-000"] == ups["client-001"] > ups["client-002"] == 4 * 3 * 2
    assert done.report.metrics["rounds"].value == 2 and done.model is not None
    assert models.resolve(str(tmp_path / "run")).load(merge=True).model is not None


def test_an_assignment_names_its_work(handle: ModelHandle, tmp_path: Path) -> None:
    asked = Assignment(handle.digest, 1, "c", {}, {"work": "scalars", "rank": 4})
    with pytest.raises(Exception, match="has no examples"):
        method.finetune(handle, DATA.select([]), asked, CONFIG, context(tmp_path))
