"""Plugins that are broken, hostile or clash hurt nothing but their own row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOOD = """
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.registry import Plugin
PLUGIN = Plugin(name="{name}", summary="does nothing", version="1.0")
@hookimpl
def edgellm_aggregate(state, updates):
    return None
"""
BAD_OPTIONS = """
from dataclasses import dataclass
@dataclass(frozen=True)
class C:
    x: list = ()
"""
HOSTILE = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "exits": ("import sys; sys.exit(0)", "SystemExit"),
    "syntax": ("def (", "SyntaxError"),
    "missing": ("import surely_no_such_module", "surely_no_such_module"),
    "nothing": ("x = 1", "has no PLUGIN"),
    "future": (GOOD.format(name="future").replace('version="1.0"', 'version="1.0", api=99'), "wants API 99"),
    "renamed": (GOOD.format(name="other"), "calls itself 'other'"),
    "misspelt": (GOOD.format(name="misspelt").replace("aggregate", "agregate"), "agregate"),
    "hookless": (GOOD.format(name="hookless").split("@hookimpl")[0], "implements no hook"),
    "badoptions": (BAD_OPTIONS + GOOD.format(name="badoptions").replace('"1.0"', '"1.0", config=C'), "options"),
}  # fmt: skip
Install = Callable[..., None]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def install(site: Path) -> Install:
    """Write a distribution as pip would leave it: a module and a dist-info folder with the entry point."""

    def write(name: str, source: str, distribution: str = "", version: str = "1.0") -> None:
        distribution = distribution or name
        module = distribution.replace("-", "_")
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[edgellm.plugins]\n{name} = {module}\n")

    return write


def edgellm(site: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site), **variables}
    command = [sys.executable, "-m", "edgellm_sdk.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


def rows(site: Path, **variables: str) -> dict[str, Any]:
    done = edgellm(site, "plugins", "list", "--json", **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return {row["name"]: row for row in json.loads(done.stdout)}


def test_hostile_plugins_are_rows(site: Path, install: Install) -> None:
    for name, (source, _) in HOSTILE.items():
        install(name, source)
    install("good", GOOD.format(name="good"))
    install("noisy", "print('hello from import')\n" + GOOD.format(name="noisy"))
    found = rows(site)
    for name, (_, reason) in HOSTILE.items():
        assert found[name]["state"] == "broken", name
        assert reason in found[name]["reason"], found[name]
        assert found[name]["origin"] == f"{name} 1.0"
    assert found["good"]["state"] == found["noisy"]["state"] == found["fwdllm"]["state"] == "ok"
    assert found["good"]["stages"] == ["aggregate"]
    text = edgellm(site, "plugins").stdout
    assert "broken: " in text
    assert "hello from import" not in text


def test_help_imports_no_stranger(site: Path, install: Install) -> None:
    install("bomb", "import os\nos._exit(77)")
    done = edgellm(site, "--help")
    assert done.returncode == 0
    assert "finetune" in done.stdout


def test_using_a_broken_plugin_is_exit_4(site: Path, install: Install) -> None:
    install("raises", HOSTILE["raises"][0])
    done = edgellm(site, "plugins", "info", "raises")
    assert done.returncode == 4
    assert done.stderr.startswith("edgellm: ")
    assert done.stderr.count("\n") == 1
    assert "RuntimeError: boom" in done.stderr
    done = edgellm(site, "aggregate", "--plugin", "raises", "--output", "x", "y")
    assert done.returncode == 4
    assert "Traceback" not in done.stderr


def test_two_plugins_of_one_name_name_both_distributions(site: Path, install: Install) -> None:
    install("twin", GOOD.format(name="twin"), "dist-one")
    install("twin", GOOD.format(name="twin"), "dist-two", "2.0")
    found = [row for row in json.loads(edgellm(site, "plugins", "list", "--json").stdout) if row["name"] == "twin"]
    assert [row["state"] for row in found] == ["broken", "broken"]
    assert all("dist-one 1.0" in row["reason"] and "dist-two 2.0" in row["reason"] for row in found)
    done = edgellm(site, "plugins", "info", "twin")
    assert done.returncode == 4
    assert "dist-one 1.0" in done.stderr
    assert "dist-two 2.0" in done.stderr


def test_a_stranger_cannot_take_a_built_in_name(site: Path, install: Install) -> None:
    install("fwdllm", GOOD.format(name="fwdllm"), "evil")
    done = edgellm(site, "plugins", "info", "fwdllm")
    assert done.returncode == 4
    assert "built-in" in done.stderr
    assert "evil 1.0" in done.stderr


def test_allow_list(site: Path, install: Install) -> None:
    install("good", GOOD.format(name="good"))
    install("bad", "raise RuntimeError")
    assert {"good", "bad"} <= set(rows(site))
    only = rows(site, EDGELLM_PLUGINS="good")
    assert "good" in only
    assert "bad" not in only
    assert not {"good", "bad"} & set(rows(site, EDGELLM_PLUGINS=""))


def test_doctor_says_which_plugin_is_broken(site: Path, install: Install) -> None:
    install("raises", HOSTILE["raises"][0])
    install("good", GOOD.format(name="good"))
    done = edgellm(site, "plugins", "doctor", "--json")
    assert done.returncode == 4
    found = {row["name"]: row for row in json.loads(done.stdout)}
    assert found["raises"]["state"] == "broken"
    assert found["good"]["problems"] == []
    assert found["fwdllm"]["problems"] == []
