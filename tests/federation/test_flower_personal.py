"""An adapter for each user over the network: made where the user is, the same bytes as in process, gains alone told."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import edgellm_sdk as edgellm
from edgellm_sdk import models, store
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, Interrupted, ModelError
from edgellm_sdk.federate import told
from edgellm_sdk.random import Stream
from edgellm_sdk.steps import Outcome, federation
from edgellm_sdk.steps.audit import wire_of
from edgellm_sdk.steps.federation import join, keys, serve
from edgellm_sdk.steps.fleet import Elsewhere, Fleet

if importlib.util.find_spec("flwr") is None:
    pytest.skip("Flower is not installed", allow_module_level=True)

from loopback import Aside, free_port  # noqa: E402

WORDS = {"client-000": "love rose moon sigh", "client-001": "sword blood king crown", "client-002": "code bug loop"}
QUIET = "client-002"  # has two lines: too few to keep any aside
OPTIONS = {"precision": "float32", "learning_rate": 0.01, "rank": 2, "max_length": 48, "steps": 2}
ROUNDS, STEPS = 2, 12
RECIPE = """seed = 3
[[step]]
verb = "finetune"
plugin = "lora"
model = {model}
clients = 3
rounds = {rounds}
personalise = {steps}
around = {around}
watch = 0
options = {options}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`all` for the process, and a folder of its own for each client."""
    folder = tmp_path_factory.mktemp("own texts")
    rows: dict[str, list[str]] = {}
    for user, text in WORDS.items():
        stream, own = Stream(0, f"lines/{user}"), text.split()
        lines = [
            " ".join(own[int(bit) % len(own)] for bit in stream.bits(7)) for _ in range(2 if user == QUIET else 24)
        ]
        rows[user] = [json.dumps({"text": line, "user": user}) + "\n" for line in lines]
        (folder / user).mkdir()
        (folder / user / "train.jsonl").write_text("".join(rows[user]))
    (folder / "all").mkdir()
    (folder / "all" / "train.jsonl").write_text("".join(line for own in rows.values() for line in own))
    (folder / "all" / "valid.jsonl").write_text(json.dumps({"text": "love king code"}) + "\n")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys of three")
    keys(folder, clients=3)
    return folder


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients of these tests are threads of one process, and transformers loads models through global state."""
    lock = threading.Lock()

    def alone(real: Any) -> Any:
        def call(*args: Any) -> Any:
            with lock:
                return real(*args)

        return call

    monkeypatch.setattr(federation, "work", alone(federation.work))
    monkeypatch.setattr(Fleet, "personalised", alone(Fleet.personalised))


def recipe(folder: Path, model: Path, around: str = "", **more: Any) -> Path:
    table = (
        "{ "
        + ", ".join(f"{name} = {json.dumps(value)}" for name, value in OPTIONS.items())
        + "".join(f", {name} = {value}" for name, value in more.items())
        + " }"
    )
    path = folder / "recipe.toml"
    path.write_text(
        RECIPE.format(
            model=json.dumps(str(model)), rounds=ROUNDS, steps=STEPS, around=json.dumps(around), options=table
        )
    )
    return path


def joined(port: int, user: str, folder: Path, data: Path, made: Path, model: Path, **more: Any) -> Aside:
    return Aside(
        join, f"127.0.0.1:{port}", str(data / user), folder / user, model=str(model), patience=60.0,
        keys=made / "clients" / user, **more,
    )  # fmt: skip


def over_loopback(folder: Path, path: Path, data: Path, made: Path, model: Path) -> tuple[Outcome, dict[str, Outcome]]:
    port = free_port()
    server = Aside(serve, path, folder / "server", address=f"127.0.0.1:{port}", keys=made / "server", wait=60.0)
    guests = {user: joined(port, user, folder, data, made, model) for user in WORDS}
    return server.result(), {user: guest.result() for user, guest in guests.items()}


def told_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of a user's record leaves it."""
    losses = record["reporting"]
    gains = {over: losses[over] - losses[record["chosen"]] for over in ("base", "global") if losses}
    return {"chosen": record["chosen"], "gains": gains, "tokens": record["tokens"]}


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_each_user_has_the_adapter_of_the_process_and_tells_its_gain_alone(
    data: Path, made: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    expected = edgellm.finetune(
        "lora", str(tiny_llama), str(data / "all"), tmp_path / "process", rounds=ROUNDS, partition="user",
        personalise=STEPS, seed=3, watch=0, options=OPTIONS,
    )  # fmt: skip
    records = {record["user"]: record for record in store.read_json(tmp_path / "process" / "users.json")["users"]}
    assert {record["chosen"] for record in records.values()} == {"own", "base"}

    done, users = over_loopback(tmp_path, recipe(tmp_path, tiny_llama), data, made, tiny_llama)
    assert weights(tmp_path / "server" / "model") == weights(tmp_path / "process" / "model")
    for user, outcome in users.items():
        record = store.read_json(outcome.folder / "users.json")["users"]
        assert record == [records[user]]
        if records[user]["adapter"]:
            there = tmp_path / "process" / records[user]["adapter"]
            assert weights(outcome.folder / records[user]["adapter"]) == weights(there)
            assert models.resolve(str(outcome.folder / records[user]["adapter"])).adapters
        assert outcome.report.metrics["users worse off than with base"].value == 0 if user != QUIET else True
        messages = wire_of(outcome.folder)["messages"]
        assert [message["kind"] for message in messages] == ["enrolled", *["cost", "update"] * ROUNDS, "gains"]
        assert messages[0]["says"]["examples"] == records[user]["examples"]["training"]
        assert messages[-1]["says"] == told_of(records[user])
        counted = [message["bytes"] for message in messages if message["kind"] in ("update", "gains")]
        assert sum(counted) == done.report.bytes[user]["up"]

    names = [name for name in expected.report.metrics if name.startswith(("users ", "gain over"))]
    assert len(names) == 11
    assert {n: done.report.metrics[n] for n in names} == {n: expected.report.metrics[n] for n in names}
    table = next(table for table in done.report.tables if table["title"].startswith("Users"))
    assert {row[0] for row in table["rows"]} == set(WORDS)
    assert not (tmp_path / "server" / "users").exists()
    with pytest.raises(ConfigError, match="the users keep their adapters themselves"):
        edgellm.export("gguf", str(tmp_path / "server"), tmp_path / "out", users=True)


def test_a_server_stopped_while_users_train_hears_them_all_when_it_is_back(
    data: Path, made: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops with one user's gains on its disk and another's read, but not there yet."""
    path, port = recipe(tmp_path, tiny_llama), free_port()
    given: dict[str, Any] = {"address": f"127.0.0.1:{port}", "keys": made / "server", "wait": 60.0}
    add, heard = Elsewhere.add, []

    def stopped(self: Elsewhere, user: str, raw: bytes) -> None:
        heard.append(user)
        if len(heard) == 2:
            raise Interrupted(2)
        add(self, user, raw)

    monkeypatch.setattr(Elsewhere, "add", stopped)
    server = Aside(serve, path, tmp_path / "server", **given)
    guests = {user: joined(port, user, tmp_path, data, made, tiny_llama) for user in WORDS}
    server.join(60)
    assert isinstance(server.outcome, Interrupted)
    kept = {p.stem for p in (tmp_path / "server" / "checkpoint" / "users").glob("*.json")}
    assert kept == {heard[0]}
    done = Aside(serve, path, tmp_path / "server", resume=True, **given).result()
    assert done.report.metrics["users on the base"].n == 3
    assert sorted(heard[2:]) == sorted(set(WORDS) - kept)
    own = {user: store.read_json(guest.result().folder / "users.json")["users"][0] for user, guest in guests.items()}
    index = {record["user"]: record for record in store.read_json(tmp_path / "server" / "users.json")["users"]}
    assert index == {user: {"user": user, **told_of(own[user])} for user in WORDS}


def test_a_server_stopped_at_the_very_end_needs_nobody_when_it_is_back(
    data: Path, made: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody has told and gone; what they told and the bytes of it are on the disk."""
    path, port = recipe(tmp_path, tiny_llama), free_port()
    given: dict[str, Any] = {"address": f"127.0.0.1:{port}", "keys": made / "server", "wait": 60.0}
    with monkeypatch.context() as patch:

        def stopped(*given: Any) -> None:
            raise Interrupted(2)

        patch.setattr(Elsewhere, "personalised", stopped)
        server = Aside(serve, path, tmp_path / "server", **given)
        guests = {user: joined(port, user, tmp_path, data, made, tiny_llama) for user in WORDS}
        server.join(60)
        assert isinstance(server.outcome, Interrupted)
    folders = [guest.result().folder for guest in guests.values()]
    ledger = tmp_path / "server" / "ledger.jsonl"
    before = sorted(json.loads(line)["up"] for line in ledger.read_text().splitlines() if '"final"' in line)
    began = time.monotonic()
    done = serve(path, tmp_path / "server", resume=True, **given)
    assert time.monotonic() - began < 20 and done.report.metrics["users on the base"].n == len(folders) == 3
    after = sorted(json.loads(line)["up"] for line in ledger.read_text().splitlines() if '"final"' in line)
    assert before == after and min(after) > 0


def test_who_fails_or_goes_is_noted_and_the_others_are_told_of(
    data: Path, made: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Fleet.personalised

    def personalised(self: Fleet, *args: Any) -> Any:
        if "client-001" in self.training:
            raise ConfigError("no room", "personalise")
        return honest(self, *args)

    monkeypatch.setattr(Fleet, "personalised", personalised)
    port = free_port()
    server = Aside(serve, recipe(tmp_path, tiny_llama), tmp_path / "server", address=f"127.0.0.1:{port}",
                   keys=made / "server", wait=60.0)  # fmt: skip
    guests = {user: joined(port, user, tmp_path, data, made, tiny_llama) for user in WORDS}
    report = server.result().report
    assert report.metrics["users on the base"].n == 2
    assert any("client-001 did not tell what personalising gained: ConfigError" in note for note in report.notes)
    guests["client-001"].join(60)
    assert isinstance(guests["client-001"].outcome, ConfigError)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (b"", "malformed|Expecting"),
        (b"[1]", "what is asked"),
        (b'{"chosen":"own","gains":{"base":1.0,"global":NaN},"tokens":4}', "not JSON"),
        (b'{"chosen":"own","gains":{"base":1.0,"global":1e999},"tokens":4}', "too large"),
        (b'{"chosen":"best","gains":{"base":1.0,"global":0.5},"tokens":4}', "no candidate"),
        (b'{"chosen":"own","gains":{"base":1.0,"global":0.5},"tokens":true}', "no number of tokens"),
        (b'{"chosen":"own","gains":{"base":1.0},"tokens":4}', "other gains"),
        (b'{"chosen":"own","gains":{"base":"1","global":0.5},"tokens":4}', "no number"),
        (b'{"chosen":"base","gains":{"base":3.0,"global":0.5},"tokens":4}', "over what it ships"),
        (b'{"chosen":["own"],"gains":{"base":1.0,"global":0.5},"tokens":4}', "no candidate"),
        (b'{"chosen":"own","gains":{"base":1.0,"global":0.5},"tokens":4,"adapter":"x"}', "what is asked"),
        (b" " * (told.MOST + 1), "too long"),
        (b"\xff", "utf-8"),
    ],
)
def test_what_no_user_can_have_gained_is_not_believed(said: bytes, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=problem):
        told.gains_from_bytes(said, "anna")
    ctx = Context(tmp_path)
    elsewhere = Elsewhere(ctx)
    elsewhere.add("anna", said)
    assert len(ctx.notes) == 1 and ctx.notes[0].startswith("anna told no gains") and not elsewhere.told(["anna"])


def test_gains_survive_the_way(tmp_path: Path) -> None:
    record: Mapping[str, Any] = {
        "user": "anna", "chosen": "global", "reporting": {"base": 0.1 + 0.2, "global": 0.1}, "tokens": 7,
    }  # fmt: skip
    raw = told.gains_to_bytes(dict(record))
    assert told.gains_from_bytes(raw, "anna") == {"user": "anna", **told_of(record)}


def test_under_privacy_nothing_is_told(data: Path, made: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """The users have their adapters; neither gains nor anything but updates leaves them."""
    path = recipe(tmp_path, tiny_llama, "dp", dp="{ noise_multiplier = 4.0 }")
    done, users = over_loopback(tmp_path, path, data, made, tiny_llama)
    for outcome in users.values():
        kinds = [message["kind"] for message in wire_of(outcome.folder)["messages"]]
        assert kinds == ["enrolled", *["update"] * ROUNDS]
        assert (outcome.folder / "users.json").is_file()
    assert not any(name.startswith("gain") for name in done.report.metrics)
    assert any("stays with them" in note for note in done.report.notes)
