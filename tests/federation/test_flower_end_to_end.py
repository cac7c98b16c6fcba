"""The same bytes in process, in Flower's simulation and over loopback with TLS; killed servers, wrong keys, audits."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgellm_sdk as edgellm
from edgellm_sdk.errors import ConfigError, EdgeLLMError, FederationError
from edgellm_sdk.random import Stream
from edgellm_sdk.steps.audit import wire_of
from edgellm_sdk.steps.federation import join, keys, serve

if importlib.util.find_spec("flwr") is None:
    pytest.skip("Flower is not installed", allow_module_level=True)

from loopback import Aside, free_port  # noqa: E402

OPTIONS = {"rank": 4, "batch_size": 4, "steps": 2}
ROUNDS = 3
RECIPE = """seed = 5
[[step]]
verb = "finetune"
plugin = "lora"
aggregate = "fedavg"
model = {model}
clients = 2
rounds = {rounds}
options = {{ rank = 4, batch_size = 4, steps = 2 }}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "labelled.jsonl"
    texts = [("win a prize now", "spam"), ("mum is home", "ham"), ("call this number", "spam"), ("at six", "ham")]
    rows = [{"text": f"{text} {i}", "label": label} for i in range(12) for text, label in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def recipe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(RECIPE.format(model=json.dumps(str(tiny_llama)), rounds=ROUNDS))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("keys")
    assert keys(place, clients=2) == ["client-000", "client-001"]
    return place


def digest(run: Path) -> str:
    return hashlib.sha256((run / "model" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("process") / "run"
    edgellm.finetune(
        "lora", str(tiny_llama), str(data), output, clients=2, rounds=ROUNDS, aggregate="fedavg", seed=5,
        options=OPTIONS,
    )  # fmt: skip
    return digest(output)


def joining(port: int, number: int, tmp_path: Path, data: Path, model: Path, **more: Any) -> Aside:
    given = {"shard": f"{number}/2", "model": str(model), "patience": 60.0, **more}
    return Aside(join, f"127.0.0.1:{port}", str(data), tmp_path / f"client-{number}", **given)


def test_over_loopback_with_tls_the_bytes_are_those_of_the_process(
    tiny_llama: Path, recipe: Path, data: Path, folder: Path, expected: str, tmp_path: Path
) -> None:
    port = free_port()
    server = Aside(serve, recipe, tmp_path / "server", address=f"127.0.0.1:{port}", keys=folder / "server", wait=60.0)
    guests = [joining(port, i, tmp_path, data, tiny_llama, keys=folder / "clients" / f"client-00{i}") for i in range(2)]
    done = server.result()
    reports = [guest.result().report for guest in guests]
    assert digest(tmp_path / "server") == expected
    assert [digest(tmp_path / f"client-{i}") for i in range(2)] == [expected, expected]
    assert not any("insecure" in note for note in done.report.notes)
    assert {row[0] for row in done.report.tables[0]["rows"]} >= {"client-000", "client-001"}
    table = json.loads((tmp_path / "server" / "clients.json").read_text())
    assert table["client-000"]["machine"]["cores"] >= 1

    for number, report in enumerate(reports):
        found = wire_of(tmp_path / f"client-{number}")
        kinds = [message["kind"] for message in found["messages"]]
        assert kinds == ["enrolled", *["cost", "update"] * ROUNDS] and found["bytes"] == report.metrics["sent"].value
        said = found["messages"][0]["says"]
        assert set(said) == {"client", "examples", "digest", "machine"} and said["client"] == f"client-00{number}"
        updates = [message for message in found["messages"] if message["kind"] == "update"]
        ledger = done.report.bytes[f"client-00{number}"]
        assert sum(message["bytes"] for message in updates) == ledger["up"] and ledger["rounds"] == ROUNDS
        assert ledger["down"] > ledger["up"]  # the final state as well
        assert [message["scalars"]["round"] for message in updates] == [1, 2, 3]
        assert all(array["norm"] > 0 for message in updates for array in message["arrays"])
    assert "ledger" in wire_of(tmp_path / "server")["source"]


def test_insecure_is_for_loopback_and_the_report_says_so(
    tiny_llama: Path, recipe: Path, data: Path, expected: str, tmp_path: Path
) -> None:
    port = free_port()
    with pytest.raises(ConfigError, match="loopback only"):
        serve(recipe, tmp_path / "open", address=f"0.0.0.0:{port}", insecure=True)
    with pytest.raises(ConfigError, match="needs --keys"):
        serve(recipe, tmp_path / "open", address=f"127.0.0.1:{port}")
    server = Aside(serve, recipe, tmp_path / "server", address=f"127.0.0.1:{port}", insecure=True, wait=60.0)
    guests = [joining(port, i, tmp_path, data, tiny_llama, insecure=True, name=f"client-00{i}") for i in range(2)]
    report = server.result().report
    assert digest(tmp_path / "server") == expected
    assert any("no TLS and no authentication" in note for note in report.notes)
    assert all(any("insecure" in note for note in guest.result().report.notes) for guest in guests)


def test_wrong_keys_wrong_models_and_absent_clients(
    tiny_llama: Path, tiny_llama_tied: Path, recipe: Path, data: Path, folder: Path, tmp_path: Path
) -> None:
    """Another federation's key, a model that is not the server's; the server ends with exit code 8 for lack of both."""
    keys(tmp_path / "other", clients=1)
    port = free_port()
    server = Aside(serve, recipe, tmp_path / "server", address=f"127.0.0.1:{port}", keys=folder / "server", wait=8.0)
    stranger = joining(port, 0, tmp_path / "a", data, tiny_llama, keys=tmp_path / "other" / "clients" / "client-000")
    other = joining(port, 1, tmp_path / "b", data, tiny_llama_tied, keys=folder / "clients" / "client-001")
    for aside in (stranger, other, server):
        aside.join(60)
    assert isinstance(stranger.outcome, FederationError) and stranger.outcome.exit_code == 8
    assert "not the server of this federation" in str(stranger.outcome)
    assert isinstance(other.outcome, ConfigError) and "not the server's" in str(other.outcome)
    assert isinstance(server.outcome, FederationError) and "0 of 2 clients came" in str(server.outcome)
    assert not (tmp_path / "b" / "client-1" / "wire").exists()


@contextlib.contextmanager
def served(recipe: Path, output: Path, port: int, folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable, "-m", "edgellm_sdk.cli.main", "federation", "serve", str(recipe), "--output", str(output),
        "--address", f"127.0.0.1:{port}", "--keys", str(folder / "server"), "--wait", "60", *more,
    ]  # fmt: skip
    path = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def killed_and_back(
    tiny_llama: Path, recipe: Path, data: Path, folder: Path, tmp_path: Path, moment: Callable[[Path], bool]
) -> str:
    """Kill -9 the server at `moment(run folder)`, start it again; the digest of what it ends with."""
    port, output = free_port(), tmp_path / "server"
    guests = [joining(port, i, tmp_path, data, tiny_llama, keys=folder / "clients" / f"client-00{i}") for i in range(2)]
    with served(recipe, output, port, folder) as process:
        until = time.monotonic() + 60
        while not moment(output):
            assert process.poll() is None, process.stdout.read() if process.stdout else ""
            assert time.monotonic() < until
            time.sleep(0.002)
    assert not (output / "model").exists(), "it was killed too late"
    with served(recipe, output, port, folder, "--resume") as process:
        said, _ = process.communicate(timeout=90)
        assert process.returncode == 0, said
    for guest in guests:
        assert digest(guest.result().folder) == digest(output)
    rows = [json.loads(line) for line in (output / "ledger.jsonl").read_text().splitlines()]
    assert sorted((row["round"], row["client"]) for row in rows if "kind" not in row) == [
        (number, f"client-00{i}") for number in range(1, ROUNDS + 1) for i in range(2)
    ]
    return digest(output)


def in_round_two(output: Path) -> bool:
    path = output / "ledger.jsonl"
    return path.is_file() and path.read_bytes().count(b"\n") >= 2


def test_a_server_killed_in_mid_round_resumes_to_the_same_bytes(
    tiny_llama: Path, recipe: Path, data: Path, folder: Path, expected: str, tmp_path: Path
) -> None:
    assert killed_and_back(tiny_llama, recipe, data, folder, tmp_path, in_round_two) == expected


def test_the_simulation_engine_gives_the_same_bytes(
    tiny_llama: Path, data: Path, expected: str, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    done = edgellm.finetune(
        "lora", str(tiny_llama), str(data), tmp_path / "run", clients=2, rounds=ROUNDS, aggregate="fedavg", seed=5,
        engine="simulation", keep_wire=True, options=OPTIONS,
    )  # fmt: skip
    assert digest(tmp_path / "run") == expected
    found = wire_of(tmp_path / "run")
    assert found["bytes"] == sum(entry["up"] for entry in done.report.bytes.values()) > 0
    assert found["source"] == "the messages themselves"
    rows = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert all(row["peak"] > 50_000_000 and row["took"] > 0 for row in rows)  # told by the workers


def test_a_shard_is_a_part_and_an_address_is_one(data: Path, tmp_path: Path) -> None:
    for shard in ("2/2", "0", "a/b", "-1/2", "0/0"):
        with pytest.raises(ConfigError, match="is no part"):
            join("127.0.0.1:1", str(data), tmp_path / "run", insecure=True, name="a", shard=shard)
    for address in ("nowhere", "127.0.0.1:", "127.0.0.1:99999", ":80"):
        with pytest.raises(EdgeLLMError, match="no address"):
            join(address, str(data), tmp_path / "run", insecure=True, name="a")
    with pytest.raises(FederationError, match="nobody listens|no server"):
        join(f"127.0.0.1:{free_port()}", str(data), tmp_path / "run", insecure=True, name="a", patience=0.5)


@pytest.mark.bar("B5")
@pytest.mark.parametrize("number", range(100))
def test_a_server_killed_at_any_moment_resumes_to_the_same_bytes(
    tiny_llama: Path, recipe: Path, data: Path, folder: Path, expected: str, tmp_path: Path, number: int,
) -> None:  # fmt: skip
    """From the first enrolment on: in a round, between rounds, while a state is written."""
    wait = float(Stream(number, "kill").uniform(1)[0]) * 1.5
    seen: list[float] = []

    def moment(output: Path) -> bool:
        if (output / "clients.json").is_file():
            seen.append(time.monotonic())
        finished = output / "ledger.jsonl"
        late = finished.is_file() and finished.read_bytes().count(b"\n") >= 2 * ROUNDS - 1
        return bool(seen) and (late or time.monotonic() - seen[0] > wait)

    assert killed_and_back(tiny_llama, recipe, data, folder, tmp_path, moment) == expected
