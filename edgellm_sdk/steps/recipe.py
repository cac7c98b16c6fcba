"""A recipe: steps in order, each working on what the one before it made.

    seed = 0

    [[step]]
    verb = "finetune"
    plugin = "fwdllm"
    model = "smollm2-135m"
    data = "sms-spam"

    [[step]]
    verb = "compress"
    plugin = "gptq"
    options = { format = "q4_0" }

A step's keys are the keyword arguments of its verb. `name` is its folder under the output, by default its place and
verb. Without `model` (for eval: `subject`) a step takes the result of the last step that made one; `@name` takes that
of a named step. The recipe's `seed` is used by every step that has none.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from edgellm_sdk import companions, config, registry, settings
from edgellm_sdk.config import nearest
from edgellm_sdk.errors import ConfigError, EdgeLLMError
from edgellm_sdk.report import Report
from edgellm_sdk.steps.delivery import evaluate, export, report_folder
from edgellm_sdk.steps.step import Outcome
from edgellm_sdk.steps.training import compress, finetune
from edgellm_sdk.store import MANIFEST, run_folder, write_bytes

VERBS: Mapping[str, Callable[..., Outcome]] = {
    "finetune": finetune,
    "compress": compress,
    "export": export,
    "eval": evaluate,
}
SUBJECT = {"finetune": "model", "compress": "model", "export": "model", "eval": "subject"}
OURS = {"verb", "name"}


def read(path: Path, optional: Collection[str] = ()) -> list[dict[str, Any]]:
    """The steps of a recipe, every problem found before any of them runs (ConfigError).

    `optional` are keys that a step may lack although its verb needs them: whoever reads it has another way.
    """
    tree = config.read_toml(path)
    problems = [f"unknown key {key!r}{nearest(key, ('seed', 'step'))}" for key in tree if key not in ("seed", "step")]
    seed, steps = tree.get("seed", 0), tree.get("step", [])
    if type(seed) is not int:
        problems.append("seed: is not a whole number")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        problems.append("there is no [[step]]")
        steps = []
    names: list[str] = []
    for number, step in enumerate(steps, 1):
        step.setdefault("seed", seed)
        name = step.setdefault("name", f"{number}-{step.get('verb', '')}")
        if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum() or name in names:
            problems.append(f"step {number}: its name must be new, of letters, digits, - and _")
        problems += [f"step {number}: {problem}" for problem in _check(step, names, optional)]
        names.append(str(name))
    if problems:
        raise ConfigError("; ".join(problems), str(path), problems=tuple(problems))
    return steps


def _check(step: Mapping[str, Any], earlier: list[str], optional: Collection[str]) -> list[str]:
    verb = str(step.get("verb", ""))
    if verb not in VERBS:
        return [f"verb {verb!r} is not one of {', '.join(VERBS)}{nearest(verb, VERBS)}"]
    declared = settings.IN_RECIPES[verb]
    required = [name for name, p in inspect.signature(VERBS[verb]).parameters.items() if p.default is p.empty]
    hidden = {"quiet", "resume", "dry_run"} | ({"output"} if verb != "export" else set())
    known = {field.name for field in dataclasses.fields(declared)} - hidden | {"options", SUBJECT[verb]}
    problems = [f"unknown key {key!r}{nearest(key, known)}" for key in step if key not in known | OURS]
    values = {key: value for key, value in step.items() if key in known - {"options", "subject"}}
    problems += _problems(lambda: config.build(declared, values, verb))
    options, plugin = step.get("options", {}), step.get("plugin", "")
    if not isinstance(options, dict):
        problems.append("options is not a table")
    elif isinstance(plugin, str) and plugin:
        problems += _problems(lambda: companions.configs(registry.get(plugin, verb), _others(verb, step), options))
    subject = step.get(SUBJECT[verb], "")
    if isinstance(subject, str) and subject.startswith("@") and subject[1:] not in earlier:
        problems.append(f"{subject!r} names no earlier step{nearest(subject[1:], earlier)}")
    if not subject and not earlier:
        problems.append(f"the first step needs {SUBJECT[verb]}")
    needed = [name for name in required if name not in (SUBJECT[verb], "output", *step, *optional)]
    return problems + [f"needs {name}" for name in needed]


def _others(verb: str, step: Mapping[str, Any]) -> tuple[registry.Loaded, ...]:
    """The plugins that a training step names beside its method."""
    defaults = (("device", "cpu"), ("aggregate", ""), ("around", ""))
    named = [str(step.get(name) or default) for name, default in defaults]
    return companions.of_training(*named) if verb == "finetune" else ()


def _problems(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except ConfigError as error:
        return list(error.problems) or [error.what]
    except EdgeLLMError as error:
        return [error.what]
    return []


def run(recipe: str | Path, output: str | Path, *, resume: bool = False, quiet: bool = True) -> list[Outcome]:
    """Do the steps of `recipe` under `output`; `output/report.html` shows them all. `resume` keeps finished steps."""
    steps = read(Path(recipe))
    folder = Path(output)
    outcomes: dict[str, Outcome] = {}
    results: dict[str, str] = {}
    with run_folder(folder):
        for step in steps:
            verb, name = step["verb"], step["name"]
            arguments = {key: value for key, value in step.items() if key not in OURS}
            subject = arguments.get(SUBJECT[verb], "")
            latest = next(reversed(results.values()), "")
            arguments[SUBJECT[verb]] = results[subject[1:]] if subject.startswith("@") else subject or latest
            where = (
                folder / arguments.get("output", name if step.get("users") else f"{name}.gguf")
                if verb == "export"
                else folder / name
            )
            arguments["output"] = where
            outcomes[name] = _do(verb, arguments, where, resume, quiet)
            if verb != "eval":
                results[name] = str(where)
        page([outcome.report for outcome in outcomes.values()], folder)
    return list(outcomes.values())


def _do(verb: str, arguments: dict[str, Any], where: Path, resume: bool, quiet: bool) -> Outcome:
    if verb in ("finetune", "compress"):
        return VERBS[verb](**arguments, resume=resume, quiet=quiet)
    reports = report_folder(where) if verb == "export" else where
    if (
        resume
        and (reports / "report.json").is_file()
        and (verb == "eval" or where.is_file() or (where / MANIFEST).is_file())
    ):
        return Outcome(Report.read(reports), reports)
    return VERBS[verb](**arguments, quiet=quiet)


def page(reports: list[Report], folder: Path) -> Path:
    """One page over all steps."""
    from edgellm_sdk.page import render

    write_bytes(folder / "report.html", render(reports).encode())
    return folder / "report.html"
