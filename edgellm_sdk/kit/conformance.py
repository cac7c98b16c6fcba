"""The conformance suite: what every plugin must keep to, ours and strangers' alike.

    @pytest.mark.parametrize("check", checks("my-method"), ids=lambda check: check.__name__)
    def test_conformance(check):
        check()

A check is a callable without arguments that raises AssertionError with what is wrong. Models and data are tiny, seeded
and made here. `options` are the plugin's own, for a method whose defaults do not fit a model of four small layers.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm_sdk import config, registry
from edgellm_sdk.errors import ConfigError
from edgellm_sdk.kit import conformance_runs as runs
from edgellm_sdk.kit.conformance_runs import require

Check = Callable[[], None]

HEAVY = ("torch", "transformers", "peft", "tokenizers", "llama_cpp", "flwr", "scipy", "pandas")
REPEATED = ("order_of_arrival_is_nothing", "nan_changes_nothing", "rounds_resume")
ALONE = ("finetune_repeats", "finetune_keeps_its_inputs", "nan_changes_nothing")
SCRIPT = (
    "import importlib, sys; importlib.import_module(sys.argv[1]); print(*(m for m in sys.argv[2:] if m in sys.modules))"
)


def check_plugin(name: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """Run every check on the plugin `name`; the problems found, one line each."""
    return _problems(checks(name, options))


def quick_checks(name: str) -> list[str]:
    """The problems found by the checks that need no model."""
    return _problems(_common(registry.get(name)))


def checks(name: str, options: Mapping[str, Any] | None = None) -> list[Check]:
    """The checks that apply to the plugin `name`, by the hooks it has. PluginError when it cannot be loaded."""
    loaded = registry.get(name)
    found = _common(loaded)
    if registry.describe(loaded.source).state != "ok":
        return found  # an optional package is missing: nothing but its options can be looked at
    subject = runs.Subject(loaded, dict(options or {}))
    stages: list[tuple[str, Sequence[Callable[[runs.Subject], None]]]] = [
        ("edgellm_finetune", (runs.finetune_repeats, runs.finetune_keeps_its_inputs)),
        ("edgellm_compress", (runs.compress_repeats,)),
        ("edgellm_export", (runs.export_repeats,)),
        ("edgellm_deploy", (runs.deploy_answers,)),
        ("edgellm_probe", (runs.probe_is_quiet,)),
    ]
    federated: Sequence[Callable[[runs.Subject], None]] = (
        runs.order_of_arrival_is_nothing, runs.nan_changes_nothing, runs.rounds_resume,
    )  # fmt: skip
    around = loaded.stages == ("around",)
    if around:
        stages.append(("", (runs.finetune_repeats, runs.finetune_keeps_its_inputs)))
    if around or {"edgellm_finetune", "edgellm_aggregate"} & set(loaded.hooks):
        stages.append(("", federated))
    for hook, functions in stages:
        if not hook or hook in loaded.hooks:
            found += [_named(function.__name__, functools.partial(function, subject)) for function in functions]
    skipped: tuple[str, ...] = () if loaded.plugin.repeats else REPEATED
    if "edgellm_exchange" in loaded.hooks:  # its clients answer nothing but their server's own messages
        skipped += ALONE
    return [check for check in found if check.__name__ not in skipped]


def _common(loaded: registry.Loaded) -> list[Check]:
    functions = (options_round_trip, bounds_are_kept, import_is_light, help_is_shown)
    return [_named(function.__name__, functools.partial(function, loaded)) for function in functions]


def _named(name: str, function: Check) -> Check:
    function.__name__ = name
    return function


def _problems(functions: Sequence[Check]) -> list[str]:
    problems = []
    for check in functions:
        try:
            check()
        except Exception as error:  # whatever a plugin does wrong is a line of the result
            text = str(error).splitlines()[0] if str(error) else ""
            problems.append(
                f"{check.__name__}: {'' if isinstance(error, AssertionError) else type(error).__name__} {text}"
            )
    return problems


def refused(action: Callable[[], object]) -> bool:
    """Whether `action` raises ConfigError."""
    try:
        action()
    except ConfigError:
        return True
    return False


# Options, import, help


def options_round_trip(loaded: registry.Loaded) -> None:
    """Defaults keep their own bounds and survive JSON, TOML and text."""
    wanted, name = loaded.plugin.config, loaded.plugin.name
    defaults: Any = config.build(wanted, {}, name)
    values = config.as_dict(defaults)
    require(config.build(wanted, values, name) == defaults, "the defaults are not accepted as given values")
    require(config.build(wanted, json.loads(json.dumps(values)), name) == defaults, "options do not survive JSON")
    given = {key: value for key, value in values.items() if value is not None}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in given.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "options.toml"
        path.write_text(text, encoding="utf-8")
        require(config.build(wanted, config.read_toml(path), name) == defaults, "options do not survive TOML")
    as_text = {key: json.dumps(v) if isinstance(v, bool) else str(v) for key, v in given.items()}
    require(config.build(wanted, as_text, name) == defaults, "options do not survive the command line")
    require(wanted.__dataclass_params__.frozen, "the config is not frozen")  # type: ignore[attr-defined]
    missing = [option.name for option in config.options(wanted) if not option.help]
    require(not missing, f"no help text: {', '.join(missing)}")


def bounds_are_kept(loaded: registry.Loaded) -> None:
    """Values outside the bounds, of the wrong type, not finite, or unknown are refused."""
    wanted, name = loaded.plugin.config, loaded.plugin.name
    for option in config.options(wanted):
        bad: list[Any] = [["a list"], {"a": "table"}]
        if option.type in (int, float):
            bad += ["nan", "inf", math.nan, math.inf, "", "ten", "٣", True]
            bad += [option.ge - 1] if option.ge is not None else []
            bad += [option.le + 1] if option.le is not None else []
        bad += ["no such choice"] if option.choices else []
        bad += ["perhaps", 2] if option.type is bool else []
        for value in bad:
            told = refused(lambda key=option.name, value=value: config.build(wanted, {key: value}, name))  # type: ignore[misc]
            require(told, f"{option.name} = {value!r} is accepted")
    require(refused(lambda: config.build(wanted, {"no_such_option": 1}, name)), "unknown options are accepted")


def import_is_light(loaded: registry.Loaded) -> None:
    """Importing the plugin's package loads no framework."""
    done = _python("-c", SCRIPT, loaded.module.__name__, *HEAVY)
    require(done.returncode == 0, f"cannot be imported alone: {done.stderr.strip().splitlines()[-1:]}")
    require(not done.stdout.strip(), f"importing it loads {done.stdout.strip()}")


def help_is_shown(loaded: registry.Loaded) -> None:
    """`edgellm VERB --plugin NAME --help` lists every option; those of what works around a method are in that one's."""
    stage = (*loaded.stages, "")[0]
    selector = "--device" if stage == "deploy" else "--plugin"
    name = loaded.plugin.name
    words = [stage, selector, name, "--help"] if stage else ["plugins", "info", name]
    if stage == "around":
        words = ["finetune", "--plugin", runs.AROUND[0], "--around", name, "--help"]
    done = _python("-m", "edgellm_sdk.cli.main", *words)
    require(done.returncode == 0, f"--help fails: {done.stderr.strip()[:200]}")
    prefix = f"{name}-" if stage == "around" else ""
    flags = [f"{prefix}{o.flag[2:]}" for o in config.options(loaded.plugin.config)]
    absent = [flag for flag in flags if flag not in done.stdout]
    require(not absent, f"--help does not show {', '.join(absent)}")


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "PYTHONUTF8": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
