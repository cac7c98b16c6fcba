"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgellm_sdk import registry

ROOT = Path(__file__).parents[2]
CODE = sorted(p for part in ("edgellm_sdk", "plugins", "hardware") for p in (ROOT / part).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec"}


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_long_and_none_runs_code_from_data(path: Path) -> None:
    text = path.read_text()
    limit = 300 if path.name == "method.py" else 400
    assert text.count("\n") <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not UNSAFE_MODULES & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in UNSAFE_CALLS and called not in ("torch.load", "yaml.load", "os.system")
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg in ("shell", "trust_remote_code") and on)


def test_a_method_is_two_files_and_adding_one_edits_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder dropped into a family is listed and works; nothing that exists was touched."""
    folder = tmp_path / "more_plugins" / "aggregation" / "first_one"
    folder.mkdir(parents=True)
    for parent in (folder.parent.parent, folder.parent):
        (parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text(
        "from edgellm_sdk.hookspecs import hookimpl\nfrom edgellm_sdk.registry import Plugin\n"
        'PLUGIN = Plugin(name="first-one", summary="takes the first update", version="1")\n'
        "@hookimpl\ndef edgellm_aggregate(state, updates, config, ctx):\n"
        "    from more_plugins.aggregation.first_one.method import first\n    return first(state, updates)\n"
    )
    (folder / "method.py").write_text("def first(state, updates):\n    return updates[0]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "BUILT_IN", (*registry.BUILT_IN, "more_plugins"))
    row = next(row for row in registry.rows() if row.name == "first-one")
    assert (row.state, row.stages, row.origin) == ("ok", ("aggregate",), "built-in")
    assert registry.get("first-one", "aggregate").hooks == ("edgellm_aggregate",)


def test_the_wheel_holds_the_three_packages_and_their_files(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        capture_output=True, text=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1000:]
    import zipfile

    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for needed in (
        "edgellm_sdk/py.typed",
        "edgellm_sdk/assets/normal16.f32",
        "edgellm_sdk/assets/sweeps.c",
        "edgellm_sdk/assets/sms_spam.csv.gz",
        "edgellm_sdk/assets/demo.toml",
        "edgellm_sdk/assets/report.schema.json",
        "edgellm_plugins/zeroth_order/fwdllm/method.py",
        "edgellm_hardware/llama_cpp/worker.py",
    ):
        assert needed in names
    assert any(name.startswith("edgellm_sdk/assets/plugin_template/") for name in names)
    assert not any(name.startswith(("tests/", "plugins/", "hardware/")) for name in names)
