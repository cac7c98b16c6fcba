"""`edgellm plugins new`: every stage's package installs, is listed, and passes its own tests untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = ("finetune", "aggregate", "compress", "export")
TESTS = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def run(*words: str, site: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"PYTHONPATH": str(site)} if site else {})}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, cwd=cwd, timeout=300, check=False
    )


def edgellm(*words: str, site: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return run("-m", "edgellm_sdk.cli.main", *words, site=site, cwd=cwd)


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_plugin_installs_and_passes_untouched(stage: str, tmp_path: Path) -> None:
    name, folder, site = f"my-{stage}", tmp_path / "a folder", tmp_path / "site"
    made = edgellm("plugins", "new", name, "--stage", stage, "--output", str(folder))
    assert made.returncode == 0, made.stderr
    pip = ("pip", "install", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    installed = run("-m", *pip, "--target", str(site), str(folder))
    assert installed.returncode == 0, installed.stderr

    rows = {row["name"]: row for row in json.loads(edgellm("plugins", "list", "--json", site=site).stdout)}
    assert rows[name]["state"] == "ok"
    assert rows[name]["origin"] == f"{name} 0.1.0"
    assert stage in rows[name]["stages"]
    helped = edgellm(stage, "--plugin", name, "--help", site=site)
    assert f"Options of {name}" in helped.stdout

    tested = run("-c", TESTS, "-q", "-p", "no:cacheprovider", str(folder), site=site, cwd=folder)
    assert tested.returncode == 0, tested.stdout[-3000:]


def test_templates_name_everything(tmp_path: Path) -> None:
    for stage in STAGES:
        folder = tmp_path / stage
        done = edgellm("plugins", "new", "abc-def", "--stage", stage, "--output", str(folder), "--json")
        about = json.loads(done.stdout)
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        assert files == about["files"]
        for path in files:
            text = (folder / path).read_text(encoding="utf-8")
            assert "@" not in text.replace("@hookimpl", "").replace("@dataclass", "").replace("@pytest", ""), path
            assert all(len(line) <= 120 for line in text.splitlines()), path


@pytest.mark.parametrize(
    ("name", "code"),
    [("My-Method", 2), ("1st", 2), ("a_b", 2), ("../x", 2), ("a--b", 2), ("class", 2), ("json", 2), ("fwdllm", 3),
     ("x" * 61, 2), ("é", 2)],
)  # fmt: skip
def test_names_that_cannot_be(name: str, code: int, tmp_path: Path) -> None:
    done = edgellm("plugins", "new", "--output", str(tmp_path / "out"), "--", name)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    done = edgellm("plugins", "new", "my-method", "--output", str(tmp_path))
    assert done.returncode == 10
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
