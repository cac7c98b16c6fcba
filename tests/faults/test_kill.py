"""kill -9 at random moments of a federated run, then resume: the same bytes as if nothing had happened.

Children are forked from this process with torch imported and one thread, so that most of a child's life is the run.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

from edgellm_sdk import store
from edgellm_sdk.random import Stream
from edgellm_sdk.steps import finetune

KILLS = 20
MEASURED = ("seconds", "peak", "took")  # of the ledger: no two runs agree on them
OPTIONS = {"layers": 1, "rank": 2, "precision": "float32", "batch_size": 4, "max_length": 64, "perturbations": 2}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "messages.csv"
    rows = [
        f"message number {i} {'win a prize' if i % 2 else 'see you'},{'spam' if i % 2 else 'ham'}" for i in range(40)
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


def child(model: Path, data: Path, output: Path) -> int:
    """Fork a process that starts or resumes the run; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        finetune(
            "fwdllm", str(model), str(data), output, clients=3, rounds=25, partition="dirichlet:1", seed=5, watch=5,
            resume=True, options=OPTIONS,
        )  # fmt: skip
    except BaseException as error:  # noqa: B036 - whatever happens, this process must end here
        os.write(2, f"{error!r}\n".encode())
        os._exit(9)
    os._exit(0)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def result(output: Path) -> dict[str, str]:
    assert store.published(output) is not None
    names = ["model/adapter_model.safetensors", "model/adapter_config.json", "model/base.json"]
    digests = {name: hashlib.sha256((output / name).read_bytes()).hexdigest() for name in names}
    lines = [
        {key: value for key, value in row.items() if key not in MEASURED}
        for row in map(__import__("json").loads, (output / "ledger.jsonl").read_text().splitlines())
    ]
    return digests | {"ledger": str(lines)}


def test_killed_anywhere_it_resumes_to_the_same_bytes(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(1)
    assert wait(child(tiny_llama, data, tmp_path / "warm")) == 0  # resolves and caches the model's digest
    began = time.monotonic()
    assert wait(child(tiny_llama, data, tmp_path / "calm")) == 0
    whole = time.monotonic() - began
    expected = result(tmp_path / "calm")

    moments = Stream(1, "kill").uniform(KILLS) * whole
    killed = 0
    for number, moment in enumerate(moments):
        output = tmp_path / f"killed-{number}"
        pid = child(tiny_llama, data, output)
        time.sleep(float(moment))
        os.kill(pid, signal.SIGKILL)
        killed += wait(pid) == -signal.SIGKILL
        assert wait(child(tiny_llama, data, output)) == 0
        assert result(output) == expected, f"kill {number} after {moment:.3f} s"
        assert not list(output.rglob(".*.tmp"))
    assert killed >= KILLS // 2
