"""Nothing heavy until asked: what the quick commands import, and how long they take."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "transformers", "numpy", "peft", "tokenizers", "llama_cpp", "rich.console", "rich.table", "psutil")
SCRIPT = """
import sys
from edgellm_sdk.cli.main import main
try:
    main(sys.argv[1].split())
except SystemExit as end:
    assert not end.code, end.code
print(*(name for name in sys.argv[2:] if name in sys.modules), file=sys.stderr)
"""


def run(command: str, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, command, *HEAVY], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command", ["--help", "--version", "plugins list", "plugins info fwdllm", "help exit-codes", "plugins --help"]
)
def test_quick_commands_import_nothing_heavy(command: str) -> None:
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""


def test_help_of_a_method_imports_no_framework() -> None:
    done = run("finetune --plugin fwdllm --help")
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "transformers"} & set(done.stderr.split())


@pytest.mark.parametrize(("command", "limit"), [("--help", 0.2), ("plugins list", 0.3)])
def test_start_time(command: str, limit: float) -> None:
    """The best of several tries: a neighbour on the machine may slow one down, not all."""
    times = []
    for _ in range(8):
        began = time.perf_counter()
        run(command)
        times.append(time.perf_counter() - began)
        if times[-1] <= limit:
            break
    assert min(times) <= limit
