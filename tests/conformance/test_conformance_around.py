"""The conformance suite sees what works around a method: it runs it around LoRA, and catches one that keeps no rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm_sdk import registry
from edgellm_sdk.kit import conformance_runs as runs
from edgellm_sdk.kit.conformance import checks

HEAD = (
    "from edgellm_sdk.hookspecs import hookimpl\nfrom edgellm_sdk.registry import Plugin\n"
    'PLUGIN = Plugin(name="{name}", summary="a test", version="1")\n@hookimpl\n'
)
PLUGINS = {
    "silent": "def edgellm_incoming(updates):\n    return list(updates)\n",
    "unseeded": (  # a drift that no run can repeat
        "def edgellm_prepare(assignment, ctx):\n    import os, numpy\n    from edgellm_sdk.context import Drift\n"
        "    noise = numpy.float32(os.urandom(1)[0] + 1)\n"
        "    ctx.drift = Drift(0.0, {n: a * 0 + noise for n, a in assignment.arrays.items()})\n"
    ),
    "meddler": (  # changes what it was given
        "def edgellm_prepare(assignment):\n    for array in assignment.arrays.values():\n        array += 1\n"
    ),
}


@pytest.fixture
def subject(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> runs.Subject:
    name: str = request.param
    package = f"around_{name}"
    folder = tmp_path / package / "federated" / name
    folder.mkdir(parents=True)
    for parent in (folder.parent.parent, folder.parent):
        (parent / "__init__.py").write_text("")
    (folder / "__init__.py").write_text(HEAD.format(name=name) + PLUGINS[name])
    (folder / "method.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "BUILT_IN", (*registry.BUILT_IN, package))
    return runs.Subject(registry.get(name, "around"), {})


FEDERATED = ("finetune_repeats", "finetune_keeps_its_inputs", "order_of_arrival_is_nothing", "nan_changes_nothing",
             "rounds_resume")  # fmt: skip


@pytest.mark.parametrize("subject", ["silent"], indirect=True)
def test_one_that_keeps_the_rules_passes(subject: runs.Subject) -> None:
    found = {check.__name__: check for check in checks("silent")}
    assert set(FEDERATED) <= set(found)
    for name in FEDERATED:
        found[name]()
    assert list(subject.relay().plugins) == ["lora", "silent"]


@pytest.mark.parametrize("subject", ["unseeded"], indirect=True)
def test_one_that_cannot_be_repeated_is_caught(subject: runs.Subject) -> None:
    with pytest.raises(AssertionError, match="two runs differ"):
        runs.finetune_repeats(subject)
    with pytest.raises(AssertionError, match="two undisturbed runs differ"):
        runs.rounds_resume(subject)


@pytest.mark.parametrize("subject", ["meddler"], indirect=True)
def test_one_that_changes_its_assignment_is_caught(subject: runs.Subject) -> None:
    with pytest.raises(AssertionError, match="the assignment was changed"):
        runs.finetune_keeps_its_inputs(subject)
