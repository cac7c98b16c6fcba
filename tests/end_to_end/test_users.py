"""An adapter for each user: made after a federation, exported beside one base, changed without loading it again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgellm_sdk as edgellm
from edgellm_sdk import models, registry, store, users
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DeviceError, GateError, ModelError
from edgellm_sdk.federate.personal import Personaliser, one, parted, safe_name
from edgellm_sdk.random import Stream
from edgellm_sdk.relay import Relay
from edgellm_sdk.steps.examples import training_data
from edgellm_sdk.types import Dataset, State

WORDS = {
    "\u00c4milia/../x": "love rose moon sigh",
    "-rf": "sword blood king crown",
    "hamlet": "doubt ghost night sleep",
    "\U0001f600 \u738b": "code bug loop byte",
}
QUIET = "few"  # has two lines: too few to keep any aside
OPTIONS = {"precision": "float32", "learning_rate": 0.01, "rank": 2, "max_length": 48}
STEPS = 12
KILLS = 8


def write_lines(path: Path, lines: int) -> Path:
    """Everyone draws sentences from a few words of their own."""
    rows = []
    for user, text in sorted(WORDS.items()):
        stream, own = Stream(0, f"lines/{user}"), text.split()
        for _ in range(lines):
            picks = [own[int(bit) % len(own)] for bit in stream.bits(7)]
            rows.append({"text": " ".join(picks), "user": user})
    rows += [{"text": f"line {i}", "user": QUIET} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("user data") / "lines.jsonl", 24)


@pytest.fixture(scope="module")
def run(lines: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of those users with LoRA, as typed."""
    folder = tmp_path_factory.mktemp("users run")
    flags = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = typed(
        "finetune", "--plugin", "lora", "--model", str(tiny_llama), "--data", str(lines), "--partition", "user",
        "--rounds", "3", "--personalise", str(STEPS), "--output", str(folder / "run"), *flags,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def typed(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgellm_sdk.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, input=stdin)


def records(run: Path) -> dict[str, dict[str, Any]]:
    return {record["user"]: record for record in store.read_json(run / "users.json")["users"]}


# Training


def test_everyone_gets_what_serves_them_best_and_it_is_told(run: Path) -> None:
    found = records(run)
    assert set(found) == {*WORDS, QUIET}
    for user in WORDS:
        record = found[user]
        losses = record["reporting"]
        assert record["chosen"] == "own" and losses["own"] < min(losses["global"], losses["base"]) - 0.2
        assert record["adapter"] == f"users/{safe_name(user)}"
        assert models.resolve(str(run / record["adapter"])).adapters
        parts = record["examples"]
        assert parts["deciding"] and parts["reporting"] and record["tokens"] > parts["reporting"]
    assert found[QUIET]["chosen"] == "base" and not found[QUIET]["adapter"] and "too few" in found[QUIET]["why"]
    assert len(list((run / "users").iterdir())) == len(WORDS)
    report = json.loads((run / "report.json").read_text())
    assert report["metrics"]["users worse off than with base"]["value"] == 0
    assert report["metrics"]["gain over global, median"]["value"] > 0.2
    page = (run / "report.html").read_text()
    assert "Gain on kept-aside text over users" in page and "\U0001f600 \u738b" in page
    published = json.loads((run / "MANIFEST.json").read_text())["files"]
    assert {"users.json", "users/hamlet/adapter_model.safetensors", "model/base.json"} <= set(published)


def test_nothing_trains_on_what_was_kept_aside(
    lines: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}
    finetune = Relay.finetune

    def watched(self: Relay, model: Any, data: Dataset, assignment: Any, ctx: Context) -> Any:
        user = assignment.client.removesuffix("/own")
        seen.setdefault(user, set()).update(example.completion for example in data.examples)
        return finetune(self, model, data, assignment, ctx)

    monkeypatch.setattr(Relay, "finetune", watched)
    done = edgellm.finetune(
        "lora", str(tiny_llama), str(lines), tmp_path / "run", rounds=1, partition="user", personalise=2, seed=1,
        kept_aside=0.4, options=OPTIONS,
    )  # fmt: skip
    train, _ = training_data(str(lines), "", False, 1)
    for user in WORDS:
        own = Dataset(tuple(e for e in train.examples if e.user == user), "")
        parts = parted(own, 0.4, Context(tmp_path, 1), user)
        aside = {own.examples[i].completion for i in (*parts.deciding, *parts.reporting)}
        assert len(aside) > 4 and not aside & seen[user]
        assert seen[user] == {own.examples[i].completion for i in parts.training}
    assert done.report.metrics["rounds"].value == 1


def test_a_device_with_no_more_than_the_server_sent_makes_the_same_adapter(
    run: Path, lines: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    arrays, scalars = store.load_arrays(run / "checkpoint" / "state.safetensors")
    model, loaded = models.resolve(str(tiny_llama)), registry.get("lora", "finetune")
    relay = Relay([loaded], {"lora": loaded.plugin.config(**OPTIONS)})
    ctx = Context(tmp_path, 0, configs=relay.configs)
    state = State(scalars["base"], scalars["round"], State("", 0, arrays).sent, scalars["scalars"])
    train, _ = training_data(str(lines), "", False, 0)
    own = Dataset(tuple(e for e in train.examples if e.user == "-rf"), "")
    record = one(Personaliser(relay, model, state, STEPS, ctx), "-rf", own, parted(own, 0.2, ctx, "-rf"), tmp_path)
    assert record == records(run)["-rf"]
    weights = "adapter_model.safetensors"
    assert (tmp_path / record["adapter"] / weights).read_bytes() == (run / record["adapter"] / weights).read_bytes()


@pytest.mark.parametrize("plugin", ["fwdllm", "mezo", "lora-fa", "fedkseed", "decomfl"])
def test_other_methods_personalise_too(plugin: str, lines: Path, tiny_llama: Path, tmp_path: Path) -> None:
    options = {"layers": 1, "precision": "float32", "max_length": 48}
    edgellm.finetune(
        plugin, str(tiny_llama), str(lines), tmp_path, rounds=2, partition="user", personalise=3, watch=0,
        options=options,
    )  # fmt: skip
    measured = [record for record in records(tmp_path).values() if record["reporting"]]
    assert len(measured) == len(WORDS)
    bases = {record["user"]: record["reporting"]["base"] for record in measured}
    assert all(record["reporting"]["own"] not in (None, bases[record["user"]]) for record in measured)
    for record in measured:
        folder = tmp_path / "users" / safe_name(record["user"])
        assert folder.is_dir() == (record["chosen"] == "own")


def test_whole_models_are_refused_before_a_round(lines: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whole models"):
        edgellm.finetune(
            "mezo", str(tiny_llama), str(lines), tmp_path / "run", rounds=1, partition="user", personalise=1,
            options={"train": "full", "precision": "float32"},
        )  # fmt: skip
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


def child(model: Path, data: Path, output: Path) -> int:
    """Fork a process that starts or resumes the run; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        edgellm.finetune(
            "lora", str(model), str(data), output, rounds=1, partition="user", personalise=20, watch=0, resume=True,
            options=OPTIONS,
        )  # fmt: skip
    except BaseException as error:  # noqa: B036 - whatever happens, this process must end here
        os.write(2, f"{error!r}\n".encode())
        os._exit(9)
    os._exit(0)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_anywhere_it_resumes_to_the_same_bytes(lines: Path, tiny_llama: Path, tmp_path: Path) -> None:
    import torch

    def result(output: Path) -> dict[str, str]:
        assert store.published(output) is not None
        kept = [output / "users.json", *(p for part in ("model", "users") for p in (output / part).rglob("*"))]
        return {
            str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in kept
            if path.is_file()
        }

    torch.set_num_threads(1)
    assert wait(child(tiny_llama, lines, tmp_path / "warm")) == 0
    began = time.monotonic()
    assert wait(child(tiny_llama, lines, tmp_path / "calm")) == 0
    whole, expected = time.monotonic() - began, result(tmp_path / "calm")
    killed = 0
    for number, moment in enumerate(Stream(1, "kill").uniform(KILLS)):
        output = tmp_path / f"killed-{number}"
        pid = child(tiny_llama, lines, output)
        time.sleep(float(moment) * whole)
        os.kill(pid, signal.SIGKILL)
        killed += wait(pid) == -signal.SIGKILL
        done = {path.stem: path.stat().st_mtime_ns for path in (output / "checkpoint" / "users").glob("*.json")}
        assert wait(child(tiny_llama, lines, output)) == 0
        assert result(output) == expected, f"kill {number}"
        for stem, when in done.items():
            assert (output / "checkpoint" / "users" / f"{stem}.json").stat().st_mtime_ns == when  # not done again
        assert not list(output.rglob(".*.tmp"))
    assert killed >= KILLS // 2


# Export and deployment


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `export --users` wrote, the gate run on one adapter."""
    pytest.importorskip("llama_cpp")
    folder = tmp_path_factory.mktemp("users, exported") / "out"
    done = typed("export", "--plugin", "gguf", "--model", str(run), "--output", str(folder), "--users",
                 "--gate-users", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "out"))


@pytest.mark.llama
def test_the_export_is_one_base_an_adapter_each_and_a_manifest(exported: Path, run: Path) -> None:
    manifest = json.loads((exported / "MANIFEST.json").read_text())
    about, files = manifest["about"], manifest["files"]
    assert set(files) == {"base.gguf", *(f"users/{safe_name(user)}.gguf" for user in WORDS)}
    assert {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()} == {*files, "MANIFEST.json"}
    assert about["users"][QUIET] == "" and about["users"]["hamlet"] == "users/hamlet.gguf"
    assert about["source"] == json.loads((run / "model" / "base.json").read_text())["digest"]
    for name, digest in files.items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    assert (about["tokenizer"], about["template"]) == users.tokenizer_digests(exported / "base.gguf")
    report = json.loads((exported.parent / "out.report" / "report.json").read_text())
    assert report["verified"]["passed"] and len(report["tables"][0]["rows"]) == 1
    assert report["metrics"]["adapter files"]["value"] == len(WORDS)


@pytest.mark.llama
def test_switching_gives_what_a_fresh_session_gives_and_keeps_the_base(exported: Path, run: Path) -> None:
    order = [*WORDS, QUIET, "hamlet", "", "-rf"]
    fresh: dict[str, Any] = {}
    for user in dict.fromkeys(order):
        with edgellm.deploy(str(exported), user=user) as session:
            ids = session.encode("the sword of love")
            fresh[user] = session.logits([ids])[0]
    assert np.array_equal(fresh[QUIET], fresh[""]) and not np.allclose(fresh["hamlet"], fresh["-rf"], atol=0.1)
    with edgellm.deploy(str(exported)) as session:
        assert isinstance(session, users.UserSession) and set(session.users) == {*WORDS, QUIET}
        loaded, pid = session.stats().load_seconds, session._inner.pid  # type: ignore[attr-defined]
        for user in order:
            session.switch(user)
            assert session.user == user and np.array_equal(session.logits([ids])[0], fresh[user]), user
        session.switch("hamlet")
        session.switch("-rf")  # nothing was computed in between
        session.switch("hamlet")
        assert np.array_equal(session.logits([ids])[0], fresh["hamlet"])
        assert session.stats().load_seconds == loaded and session._inner.pid == pid  # type: ignore[attr-defined]
    with edgellm.deploy(str(run / "users" / "hamlet")) as reference:  # torch
        assert np.allclose(reference.logits([ids])[0], fresh["hamlet"], atol=0.05)


@pytest.mark.llama
def test_a_chat_changes_users_and_forgets_what_the_last_one_said(exported: Path) -> None:
    lines = "hello\n/user hamlet\nhello\n/user\n/user nobody\n/user -rf\nhello\n/user hamlet\nhello\n\n"
    done = typed("deploy", str(exported / "MANIFEST.json"), "chat", "--max-tokens", "6", stdin=lines)
    assert done.returncode == 0, done.stderr
    base, first, other, again = done.stdout.splitlines()
    assert first == again and len({base, first, other}) == 3
    assert "now hamlet, of -rf," in done.stderr and "there is no user 'nobody'" in done.stderr
    alone = typed("deploy", str(exported), "--user", "hamlet", "--prompt", "hello", "--max-tokens", "6")
    assert alone.stdout.strip() == first
    plain = typed("deploy", str(exported / "base.gguf"), "chat", "--max-tokens", "2", stdin="/user hamlet\n\n")
    assert plain.returncode == 0 and "no users here" in plain.stderr


@pytest.mark.llama
@pytest.mark.parametrize("damage", ["adapter", "swapped", "base", "template", "tokenizer"])
def test_a_mismatch_is_refused_in_one_line(damage: str, bundle: Path, tiny_llama_tied: Path) -> None:
    own, base = bundle / "users" / "hamlet.gguf", bundle / "base.gguf"
    if damage == "adapter":
        raw = bytearray(own.read_bytes())
        raw[-1] ^= 1
        own.write_bytes(raw)
        told = "is not the adapter that was exported"
    elif damage == "swapped":
        shutil.copyfile(bundle / "users" / f"{safe_name('-rf')}.gguf", own)
        told = "is not the adapter that was exported"
    elif damage == "base":
        base.unlink()
        edgellm.export("gguf", str(tiny_llama_tied), base, gate=False)
        told = "its content differs"
    else:
        raw = base.read_bytes()
        old, new = (b"<|im_start|>assistant", b"<|im_start|>Assistant") if damage == "template" else (b"win", b"wim")
        assert old in raw
        base.write_bytes(raw.replace(old, new, 1))
        told = f"its {'chat template' if damage == 'template' else 'tokenizer'} differs"
    done = typed("deploy", str(bundle), "--user", "hamlet", "--prompt", "hello")
    assert done.returncode == 6 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1
    with edgellm.deploy(str(bundle), user="-rf") if damage in ("adapter", "swapped") else nothing() as session:
        if session is not None:
            before = session.logits([session.encode("king")])[0]
            with pytest.raises(ModelError, match=told):
                session.switch("hamlet")
            assert session.user == "-rf" and np.array_equal(session.logits([session.encode("king")])[0], before)


class nothing:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


@pytest.mark.llama
def test_an_adapter_that_llama_cpp_refuses_leaves_the_one_before(
    bundle: Path, tmp_path: Path, make_tiny_llama: Any, lines: Path
) -> None:
    other = make_tiny_llama(tmp_path / "deep", seed=3, layers=3)
    edgellm.finetune("lora", str(other), str(lines), tmp_path / "run", rounds=1, watch=0, options=OPTIONS)
    edgellm.export("gguf", str(tmp_path / "run"), tmp_path / "x.gguf", gate=False, options={"adapter": "separate"})
    with edgellm.deploy(str(bundle), user="hamlet") as session:
        assert isinstance(session, users.UserSession) and isinstance(session._inner, users.Adaptable)
        before = session.logits([session.encode("king")])[0]
        with pytest.raises(ModelError, match="cannot load the adapter"):
            session._inner.adapt([(tmp_path / "x.gguf", 1.0)])
        with pytest.raises(ModelError, match="is no LoRA adapter"):
            session._inner.adapt([(bundle / "base.gguf", 1.0)])
        assert np.array_equal(session.logits([session.encode("king")])[0], before)


@pytest.mark.llama
def test_wrong_names_and_places_are_one_line(bundle: Path, lines: Path, tiny_llama: Path, tmp_path: Path) -> None:
    done = typed("deploy", str(bundle), "--user", "hamlett", "--prompt", "x")
    assert done.returncode == 3 and "did you mean 'hamlet'?" in done.stderr
    done = typed("deploy", str(bundle / "base.gguf"), "--user", "hamlet", "--prompt", "x")
    assert done.returncode == 3 and "export --users" in done.stderr
    with pytest.raises(DeviceError, match="cannot change adapters"), edgellm.deploy(str(bundle), device="cpu"):
        pass
    edgellm.finetune("lora", str(tiny_llama), str(lines), tmp_path / "plain",
                     rounds=1, watch=0, options=OPTIONS)  # fmt: skip
    with pytest.raises(ConfigError, match="personalised nobody"):
        edgellm.export("gguf", str(tmp_path / "plain"), tmp_path / "o", users=True)


@pytest.mark.llama
def test_a_device_needs_its_own_adapter_only(bundle: Path) -> None:
    for user in WORDS:
        if user != "hamlet":
            (bundle / "users" / f"{safe_name(user)}.gguf").unlink()
    with edgellm.deploy(str(bundle), user="hamlet") as session:
        assert isinstance(session, users.UserSession) and session.logits([session.encode("king")])
        with pytest.raises(ModelError, match="is missing"):
            session.switch("-rf")
        assert session.user == "hamlet"
    (bundle / "base.gguf").unlink()
    done = typed("deploy", str(bundle), "--user", "hamlet", "--prompt", "hello")
    assert done.returncode == 6 and "base.gguf" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.llama
def test_an_export_of_changed_adapters_is_refused_and_one_that_drifts_is_not_published(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgellm_plugins.export import gguf_lora

    copy = Path(shutil.copytree(run, tmp_path / "run"))
    weights = copy / "users" / "hamlet" / "adapter_model.safetensors"
    shutil.copyfile(copy / "model" / "adapter_model.safetensors", weights)
    with pytest.raises(ModelError, match="differs from what the run published"):
        edgellm.export("gguf", str(copy), tmp_path / "out", users=True)

    honest = gguf_lora.factors

    def mixed_up(folder: Path, family: Any) -> Any:
        return honest(folder.parent / "hamlet" if folder.parent.name == "users" else folder, family)

    monkeypatch.setattr(gguf_lora, "factors", mixed_up)  # everyone would get hamlet's
    with pytest.raises(GateError, match="weights: "):
        edgellm.export("gguf", str(run), tmp_path / "mixed", users=True)
    assert not (tmp_path / "mixed" / "MANIFEST.json").exists()
    assert list((tmp_path / "mixed" / "users").glob("*.rejected.gguf"))
