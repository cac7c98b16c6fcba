"""Which plugins there are, and loading exactly the ones a run names.

Built-ins are found by walking the folders of `edgellm_plugins` and `edgellm_hardware`; a folder with an `__init__.py`
and a `method.py` is a plugin. Strangers announce themselves with an entry point in the group `edgellm.plugins`.
Nothing is imported to list names. A plugin that cannot be imported is a row with state `broken` and its reason.
`EDGELLM_PLUGINS=a,b` admits only those strangers; set but empty, it admits none.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from edgellm_sdk import __version__, hookspecs
from edgellm_sdk.config import nearest, options
from edgellm_sdk.errors import PluginError, printable

GROUP = "edgellm.plugins"
BUILT_IN = ("edgellm_plugins", "edgellm_hardware")
STAGES = {  # the hook that makes a plugin selectable for a stage
    "finetune": "edgellm_finetune",
    "aggregate": "edgellm_aggregate",
    "compress": "edgellm_compress",
    "export": "edgellm_export",
    "deploy": "edgellm_deploy",
}
AROUND = ("edgellm_prepare", "edgellm_incoming", "edgellm_cohort", "edgellm_exchange")
"""Hooks that make a plugin one for `--around`, as every wrapper does."""


@dataclass(frozen=True)
class NoOptions:
    """The config of a plugin without options."""


@dataclass(frozen=True)
class Plugin:
    """What a plugin module says about itself in `PLUGIN`.

    `name` as typed by the user; `config` a frozen dataclass of options; `paper` with its arXiv id; `aliases` other
    names; `api` the hook API it was written for; `requires` import names of optional packages it needs to work.
    `linear(config)`, of a plugin that aggregates, says why the mean of the clients' updates does not serve its rule as
    the updates do, "" when it does; without it no such thing is taken for granted, and privacy refuses the rule. A
    plugin that makes runs differ by design, as noise for privacy does, `repeats` not. With one that `hides` what
    clients have, they send nothing but their updates: neither gains nor costs.
    """

    name: str
    summary: str
    version: str
    config: type = NoOptions
    paper: str = ""
    aliases: tuple[str, ...] = ()
    api: int = hookspecs.API
    requires: tuple[str, ...] = ()
    linear: Callable[[Any], str] | None = None
    repeats: bool = True
    hides: bool = False


@dataclass(frozen=True)
class Source:
    """Where a plugin would be imported from; nothing is imported yet."""

    name: str
    module: str
    origin: str


@dataclass(frozen=True)
class Loaded:
    """An imported, verified plugin; `wraps` are the hooks that it implements as a wrapper."""

    plugin: Plugin
    module: ModuleType
    source: Source
    hooks: tuple[str, ...]
    wraps: tuple[str, ...] = ()

    @property
    def stages(self) -> tuple[str, ...]:
        found = tuple(stage for stage, hook in STAGES.items() if hook in self.hooks)
        return found or (("around",) if self.wraps or set(AROUND) & set(self.hooks) else ())


@dataclass(frozen=True)
class Row:
    """One line of `edgellm plugins list`."""

    name: str
    version: str
    stages: tuple[str, ...]
    hooks: tuple[str, ...]
    origin: str
    state: str
    reason: str = ""
    summary: str = ""
    paper: str = ""
    aliases: tuple[str, ...] = ()


def _walk(package: str) -> Iterator[Source]:
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for method in sorted(Path(root).rglob("method.py")):
            folder = method.parent
            if (folder / "__init__.py").is_file():
                module = ".".join([package, *folder.relative_to(root).parts])
                yield Source(folder.name.replace("_", "-"), module, "built-in")


def sources() -> tuple[Source, ...]:
    """Every plugin by name, built-ins first, then installed strangers. Imports none of them."""
    found = [source for package in BUILT_IN for source in _walk(package)]
    allowed = os.environ.get("EDGELLM_PLUGINS")
    names = None if allowed is None else {name.strip() for name in allowed.split(",") if name.strip()}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: p.name):
        if names is None or point.name in names:
            distribution = point.dist
            origin = f"{distribution.name} {distribution.version}" if distribution else "unknown"
            found.append(Source(point.name.replace("_", "-"), point.value, origin))
    return tuple(found)


def find(name: str) -> Source:
    """The one plugin called `name` or, failing that, with that alias. PluginError for none or several."""
    known, name = sources(), name.replace("_", "-")
    matches = [source for source in known if source.name == name]
    if not matches:
        matches = [s for s in known if (row := describe(s)).state == "ok" and name in row.aliases]
    if len(matches) > 1:
        raise PluginError(
            f"plugin {name!r} is provided by {' and by '.join(s.origin for s in matches)}", fix="uninstall one"
        )
    if not matches:
        close = nearest(name, [s.name for s in known]) or "; see `edgellm plugins list`"
        raise PluginError(f"no plugin {printable(name)!r}{close}")
    return matches[0]


def load(source: Source) -> Loaded:
    """Import a plugin and verify it. PluginError with the reason for everything that can be wrong with it."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            module = importlib.import_module(source.module)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PluginError(
            f"plugin {source.name!r} cannot be imported: {reason}", source.origin, "reinstall or remove it"
        ) from error
    plugin = getattr(module, "PLUGIN", None)
    if not isinstance(plugin, Plugin):
        raise PluginError(f"plugin {source.name!r} has no PLUGIN", source.module)
    if plugin.api > hookspecs.API:
        raise PluginError(
            f"plugin {plugin.name!r} wants API {plugin.api}, this is API {hookspecs.API}", fix="upgrade edgellm-sdk"
        )
    if plugin.name.replace("_", "-") != source.name:
        raise PluginError(f"{source.module} calls itself {plugin.name!r} but is registered as {source.name!r}")
    try:
        options(plugin.config)
    except (TypeError, NameError) as error:
        raise PluginError(f"the options of {plugin.name!r} are not usable: {error}", source.module) from error
    manager = new_manager()
    try:
        manager.register(module, plugin.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"plugin {plugin.name!r}: {str(error).splitlines()[-1].strip()}", source.module) from error
    callers = manager.get_hookcallers(module) or ()
    wraps = {caller.name for caller in callers for i in caller.get_hookimpls() if i.wrapper or i.hookwrapper}
    if not callers:
        raise PluginError(f"plugin {plugin.name!r} implements no hook", source.module)
    hooks = sorted(caller.name for caller in callers if caller.name not in wraps)
    return Loaded(plugin, module, source, tuple(hooks), tuple(sorted(wraps)))


def describe(source: Source) -> Row:
    """The row of one plugin; never raises."""
    try:
        loaded = load(source)
    except PluginError as error:
        return Row(source.name, "", (), (), source.origin, "broken", error.what)
    plugin = loaded.plugin
    missing = [name for name in plugin.requires if importlib.util.find_spec(name) is None]
    return Row(
        plugin.name,
        plugin.version if source.origin != "built-in" else __version__,
        loaded.stages,
        tuple(sorted((*loaded.hooks, *loaded.wraps))),
        source.origin,
        "needs install" if missing else "ok",
        f"needs {', '.join(missing)}" if missing else "",
        plugin.summary,
        plugin.paper,
        plugin.aliases,
    )


def rows() -> tuple[Row, ...]:
    """All plugins for `edgellm plugins list`; two with one name are both shown as broken."""
    known = sources()
    names = [source.name for source in known]
    result = []
    for source in known:
        row = describe(source)
        if names.count(source.name) > 1:
            origins = " and ".join(s.origin for s in known if s.name == source.name)
            row = Row(source.name, "", (), (), source.origin, "broken", f"the name is taken twice: {origins}")
        result.append(row)
    return tuple(result)


def get(name: str, stage: str | None = None) -> Loaded:
    """The loaded plugin `name`; with `stage`, PluginError unless it can do that stage."""
    loaded = load(find(name))
    if stage is not None and stage not in loaded.stages:
        can = ", ".join(loaded.stages) or ", ".join(loaded.hooks)
        what = "work around a method" if stage == "around" else stage
        raise PluginError(f"plugin {loaded.plugin.name!r} does not {what}", f"it does: {can}")
    return loaded


def for_stage(stage: str) -> tuple[Row, ...]:
    """Working plugins that can do `stage`."""
    return tuple(row for row in rows() if stage in row.stages)


def new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager("edgellm")
    manager.add_hookspecs(hookspecs)
    return manager
