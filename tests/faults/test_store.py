"""Files are the old ones or the new ones: every system call fails in turn, and processes race for a folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm_sdk import store
from edgellm_sdk.errors import ModelError, StorageError
from edgellm_sdk.federate.ledger import Ledger, Line

CALLS = ("open", "fsync")
ERRNOS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


def save(folder: Path, value: int) -> None:
    store.save_arrays(folder / "a.safetensors", {"x": np.full(1000, value)}, {"value": value})


def write(folder: Path, value: int) -> None:
    store.write_json(folder / "a.json", {"value": value, "pad": "x" * 5000})


def publish(folder: Path, value: int) -> None:
    store.write_bytes(folder / "part", bytes([value]) * 100)
    store.publish(folder, ["part"], {"value": value})


def observed(folder: Path) -> list[Any]:
    found: list[Any] = []
    if (folder / "a.safetensors").exists():
        found.append(store.load_arrays(folder / "a.safetensors")[1]["value"])
    if (folder / "a.json").exists():
        found.append(store.read_json(folder / "a.json")["value"])
    about = store.published(folder)
    if about is not None:
        found.append(about["value"])
    return found


@pytest.mark.parametrize("writer", [save, write, publish])
@pytest.mark.parametrize("code", ERRNOS)
def test_every_failing_call_leaves_old_or_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: Callable[[Path, int], None], code: int
) -> None:
    faults = 0
    for k in range(1, 60):
        folder = tmp_path / str(k)
        folder.mkdir()
        writer(folder, 1)
        count = 0

        def failing(real: Callable[..., Any], k: int = k) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal count
                count += 1
                if count == k:
                    raise OSError(code, os.strerror(code))
                return real(*arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, failing(getattr(os, name)))
            patch.setattr(Path, "replace", failing(Path.replace))
            patch.setattr(Path, "chmod", failing(Path.chmod))
            try:
                writer(folder, 2)
            except StorageError as error:
                faults += 1
                assert error.exit_code == 10 and str(folder) in str(error) and "\n" not in str(error)
                assert errno.errorcode[code] in str(error)
        torn = observed(folder)
        assert all(value in (1, 2) for value in torn)
        assert writer is publish or len(torn) == 1
        assert not list(folder.glob(".*.tmp")), "litter"
        if count < k:
            assert torn[-1] == 2
            break
    else:
        pytest.fail("never ran out of calls")
    assert faults >= 4


def test_a_damaged_or_missing_part_is_not_published(tmp_path: Path) -> None:
    publish(tmp_path, 7)
    assert store.published(tmp_path) == {"value": 7}
    (tmp_path / "part").write_bytes(b"changed")
    assert store.published(tmp_path) is None
    (tmp_path / "part").unlink()
    assert store.published(tmp_path) is None


def test_second_owner_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom edgellm_sdk import store\n"
        "from edgellm_sdk.errors import StorageError\n"
        "try:\n    with store.run_folder(Path(sys.argv[1])): print('owned')\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)\n"
    )
    with store.run_folder(tmp_path):
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 10 and f"in use by process {os.getpid()}" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "owned\n"


def test_temporary_files_of_the_killed_are_swept(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".state.123.abcd.tmp").write_bytes(b"half")
    with store.run_folder(tmp_path):
        assert not list(tmp_path.rglob(".*.tmp"))


def test_disk_full_for_real(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\nfrom edgellm_sdk import store\n"
        "from edgellm_sdk.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: store.write_bytes(Path(sys.argv[1]), b'y' * 5000)\n"
        "except StorageError as error: print(error); sys.exit(error.exit_code)\n"
    )
    target = tmp_path / "file"
    target.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 10 and "EFBIG" in done.stdout
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_malformed_json_is_a_model_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ModelError):
        store.read_json(tmp_path / "x.json")


def test_ledger_forgets_rounds_whose_state_was_lost(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for round in (1, 2, 3):
        ledger.add(round, 0, [Line("a", 10, 8, 5, 4), Line("b", 10, 8, 0, 0, "did not answer")], 0.1)
    with ledger.path.open("ab") as file:
        file.write(b'{"half a li')
    ledger.keep_until(2)
    assert [row["round"] for row in ledger.rows()] == [1, 1, 2, 2]
    assert ledger.totals()["b"] == {
        "down": 20, "up": 0, "down_payload": 16, "up_payload": 0, "rounds": 2, "rejected": 2,
    }  # fmt: skip
