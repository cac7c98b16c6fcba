"""Whatever a file or a signal does to the llama.cpp worker, the parent lives and says one line."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama

from edgellm_hardware.llama_cpp import Config  # noqa: E402
from edgellm_hardware.llama_cpp.child import Child  # noqa: E402
from edgellm_hardware.llama_cpp.method import LlamaSession  # noqa: E402

from edgellm_sdk.context import Context  # noqa: E402
from edgellm_sdk.errors import DataError, DeviceError, EdgeLLMError, ModelError  # noqa: E402

FAST = Config(context=64, batch=32, threads=1, patience=20.0)


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgellm_plugins.export import gguf

    from edgellm_sdk.models import resolve

    folder = tmp_path_factory.mktemp("tiny-gguf")
    target = folder / "tiny.gguf"
    gguf.edgellm_export(resolve(str(tiny_llama)), target, gguf.Config(type="f32", modelfile=False), Context(folder))
    return target


@pytest.fixture
def session(tiny_gguf: Path, tmp_path: Path) -> Iterator[LlamaSession]:
    live = LlamaSession(tiny_gguf, FAST, Context(tmp_path))
    yield live
    live.close()


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie counts)."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


def one_line(error: EdgeLLMError, path: Path) -> None:
    assert "\n" not in str(error) and len(str(error)) <= 400
    assert str(path) in str(error)
    assert error.exit_code in (6, 7)


def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the strict reader off, so that a bad file reaches llama.cpp."""
    monkeypatch.setattr("edgellm_sdk.gguf_file.read", lambda path: SimpleNamespace(metadata={}))


def mutants(raw: bytes, count: int) -> Iterator[bytes]:
    """Truncations, flipped bytes and spliced length fields, most of them in the header; seeded."""
    draw = random.Random(5)
    for number in range(count):
        data = bytearray(raw)
        if number % 4 == 0:
            del data[draw.randrange(len(data)) :]
        elif number % 4 == 1:
            place = draw.randrange(4, min(len(data), 12000))
            data[place : place + 8] = draw.choice((b"\xff" * 8, b"\0" * 8, (1 << 62).to_bytes(8, "little")))
        else:
            for _ in range(draw.randrange(1, 6)):
                data[draw.randrange(len(data) if number % 4 == 2 else 12000)] = draw.randrange(256)
        yield bytes(data)


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.bar("F2"))])
def test_mutants_that_reach_llama_cpp_never_hurt_the_parent(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    blind(monkeypatch)
    raw, target, outcomes = tiny_gguf.read_bytes(), tmp_path / "mutant.gguf", {"ran": 0, "refused": 0}
    for data in mutants(raw, count):
        target.write_bytes(data)
        try:
            live = LlamaSession(target, FAST, Context(tmp_path))
        except EdgeLLMError as error:
            one_line(error, target)
            outcomes["refused"] += 1
            continue
        try:
            live.logits([[1, 2, 3]])
            outcomes["ran"] += 1
        except EdgeLLMError as error:
            one_line(error, target)
            outcomes["refused"] += 1
        finally:
            live.close()
            assert gone(live.pid)
    assert outcomes["refused"] >= count // 3, outcomes


def test_the_strict_reader_comes_first(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "cut.gguf"
    target.write_bytes(tiny_gguf.read_bytes()[:5000])

    def never(*_: Any) -> None:
        raise AssertionError("a child was started for a file the reader refuses")

    monkeypatch.setattr("edgellm_hardware.llama_cpp.method.Child", never)
    with pytest.raises(ModelError) as caught:
        LlamaSession(target, FAST, Context(tmp_path))
    one_line(caught.value, target)


def test_a_file_without_a_needed_tensor(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "renamed.gguf"
    target.write_bytes(tiny_gguf.read_bytes().replace(b"blk.1.attn_v.weight", b"blk.1.attn_x.weight"))
    with pytest.raises(ModelError) as caught:
        LlamaSession(target, FAST, Context(tmp_path))
    one_line(caught.value, target)
    assert "blk.1.attn_" in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_killed_worker(session: LlamaSession, number: signal.Signals) -> None:
    os.kill(session.pid, number)
    assert gone(session.pid)
    with pytest.raises(DeviceError if number == signal.SIGKILL else ModelError, match=number.name) as caught:
        session.logits([[1, 2, 3]])
    one_line(caught.value, session._path)
    with pytest.raises((DeviceError, ModelError)):  # and again, instead of a hang
        session.encode("a")


def test_a_hanging_worker(tiny_gguf: Path, tmp_path: Path) -> None:
    config = Config(context=64, threads=1, patience=1.0)
    live = LlamaSession(tiny_gguf, config, Context(tmp_path))
    os.kill(live.pid, signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(DeviceError, match="no sign of life for 1 s") as caught:
        live.encode("a")
    assert time.monotonic() - begin < 5
    one_line(caught.value, tiny_gguf)
    assert gone(live.pid)
    live.close()


def test_the_deadline_of_the_run(tiny_gguf: Path, tmp_path: Path) -> None:
    live = LlamaSession(tiny_gguf, FAST, Context(tmp_path, deadline=time.monotonic() + 15))
    os.kill(live.pid, signal.SIGSTOP)
    live._child._deadline = time.monotonic() + 0.3
    with pytest.raises(DeviceError, match="deadline"):
        live.encode("a")
    live.close()


def test_too_little_memory(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        LlamaSession(tiny_gguf, Config(memory=64, threads=1, patience=20), Context(tmp_path))
    one_line(caught.value, tiny_gguf)


def test_a_worker_that_talks_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "liar.py").write_text(
        textwrap.dedent(
            """
            import os, sys, time
            os.write(1, b"\\xff" * 64)
            time.sleep(30)
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    child = Child("liar", "x.gguf", 10.0, None)
    with pytest.raises(DeviceError, match="nonsense"):
        child.call({"do": "stats"})
    assert gone(child.pid)
    child.close()


def test_a_worker_that_sends_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flood.py").write_text(
        textwrap.dedent(
            """
            import os, struct
            while True:
                os.write(1, struct.pack("<IQ", 14, 4096) + b'{"sequence":0}' + bytes(4096))
            """
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    child = Child("flood", "x.gguf", 10.0, None)
    parts: list[Any] = []
    with pytest.raises(DeviceError, match="nonsense"):
        child.call({"do": "logits"}, parts, 100_000)
    assert len(parts) <= 25 and gone(child.pid)
    child.close()


def test_ctrl_c_leaves_the_child_to_the_parent(session: LlamaSession) -> None:
    os.kill(session.pid, signal.SIGINT)
    assert session.encode("a")


def test_a_closed_session_says_so(tiny_gguf: Path, tmp_path: Path) -> None:
    live = LlamaSession(tiny_gguf, FAST, Context(tmp_path))
    live.close()
    live.close()
    assert gone(live.pid)
    with pytest.raises(DeviceError, match="closed"):
        live.encode("a")


def test_the_child_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgellm_hardware.llama_cpp.child import environment

    monkeypatch.setenv("HF_TOKEN", "canary-canary")
    assert "canary-canary" not in repr(environment())


def test_the_child_dies_with_its_parent(tiny_gguf: Path, tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from edgellm_hardware.llama_cpp import Config
        from edgellm_hardware.llama_cpp.method import LlamaSession
        from edgellm_sdk.context import Context
        live = LlamaSession(Path(sys.argv[1]), Config(context=64, threads=1), Context(Path(sys.argv[2])))
        print(live.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_gguf), str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    assert gone(int(done.stdout))


def test_misuse_is_refused_before_it_reaches_the_child(session: LlamaSession) -> None:
    for tokens in ([384], [-1], []):
        with pytest.raises(DataError):
            session.logits([tokens])
    with pytest.raises(DataError, match="context"):
        session.logits([[1] * 65])
    with pytest.raises(DataError):
        session.generate([], 4)
    with pytest.raises(DataError, match="no room"):
        session.generate([1] * 64, 4)
    assert session.logits([[1, 2]])[0].shape == (1, 384)


def test_a_hostile_template_is_stopped(tiny_gguf: Path, tmp_path: Path) -> None:
    from edgellm_sdk.templates import Renderer

    live = LlamaSession(tiny_gguf, FAST, Context(tmp_path))
    live._renderer = Renderer("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", {})
    with pytest.raises(ModelError):
        live.prompt_ids(({"role": "user", "content": "hi"},))
    assert live.encode("a")
    live.close()
