"""The plugins that a training run names beside its method: who aggregates, what works around it, the backend.

Their options are tables within the method's, under their names: `[options.llama_cpp]` in a file,
`options={"llama_cpp": {"contexts": 2}}` in Python, `--llama-cpp-contexts 2` on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgellm_sdk import config, registry
from edgellm_sdk.errors import ConfigError, PluginError


def is_torch(device: str) -> bool:
    """Whether training on a device is torch's own, without a backend plugin: `cpu`, `cuda`, `cuda:1`."""
    return device.partition(":")[0] in ("cpu", "cuda")


def names(text: str) -> list[str]:
    """Names written with commas. ConfigError when one comes twice."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise ConfigError(f"around: {twice[0]!r} comes twice", "around")
    return found


def of_training(device: str, aggregate: str = "", around: str = "") -> tuple[registry.Loaded, ...]:
    """The plugins behind `--aggregate`, `--around` and `--device`. PluginError for one that cannot do its part."""
    found = [registry.get(aggregate, "aggregate")] if aggregate else []
    found += [registry.get(name, "around") for name in names(around)]
    if not is_torch(device):
        backend = registry.get(device)
        if "edgellm_objective" not in backend.hooks:
            can = ", ".join(backend.stages) or ", ".join(backend.hooks)
            raise PluginError(f"no method can train on {backend.plugin.name!r}", f"it does: {can}", "use --device cpu")
        found.append(backend)
    return tuple(found)


def separated(
    options: Mapping[str, Any], others: Sequence[registry.Loaded]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the method's own options, those of each of `others` by its name). ConfigError for a table that is none."""
    own, theirs = dict(options), {}
    for loaded in others:
        name = loaded.plugin.name
        table = own.pop(name, own.pop(name.replace("_", "-"), {}))
        if not isinstance(table, Mapping):
            what = f"options.{name}: is not a table"
            raise ConfigError(what, "options", f"write {name} = {{ OPTION = VALUE }}", problems=(what,))
        theirs[name] = dict(table)
    return own, theirs


def configs(method: registry.Loaded, others: Sequence[registry.Loaded], options: Mapping[str, Any]) -> dict[str, Any]:
    """The config of every plugin of the run, by name. ConfigError with all problems of all of them."""
    others = [other for other in others if other.plugin.name != method.plugin.name]
    own, theirs = separated(options, others)
    built: dict[str, Any] = {}
    errors: list[ConfigError] = []
    for loaded, given in ((method, own), *((other, theirs[other.plugin.name]) for other in others)):
        try:
            built[loaded.plugin.name] = config.build(loaded.plugin.config, given, loaded.plugin.name)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = tuple(problem for error in errors for problem in error.problems)
        raise ConfigError("; ".join(problems), method.plugin.name, "see --help", problems=problems)
    return built


def flat(theirs: Mapping[str, Mapping[str, Any]], built: Mapping[str, Any]) -> dict[str, Any]:
    """The options of companions that were given, as the command line spells them: `llama_cpp_contexts`."""
    return {
        f"{name}_{option}".replace("-", "_"): getattr(built[name], option.replace("-", "_"))
        for name, table in theirs.items()
        for option in table
    }
