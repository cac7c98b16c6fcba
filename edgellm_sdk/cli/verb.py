"""A verb of the command line: declared once, turned into a typer command, its values checked by `config.build`.

Every value reaches the validator as the text that was typed, so the command line, a TOML file and Python refuse the
same things in the same words.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from edgellm_sdk import companions, config, registry
from edgellm_sdk.config import Option
from edgellm_sdk.errors import ConfigError, UsageError

HELP = ("--help", "-h")
SHORT = {"plugin": "-p", "model": "-m", "data": "-d", "output": "-o"}
KINDS: Mapping[type, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
SWITCHES = {
    "--json": ("json", "print the result as JSON on standard output, nothing else"),
    "--quiet": ("quiet", "no progress, no notes"),
    "--verbose": ("verbose", "with an error, say what caused it"),
}
SWITCH_SHORT = {"--quiet": "-q", "--verbose": "-v"}


@dataclass(frozen=True)
class Answer:
    """What a verb says: `value` for --json, `text` for people. `code` is the exit code."""

    value: Any
    text: str
    code: int = 0


@dataclass(frozen=True)
class Request:
    """What was asked of a verb, checked."""

    settings: Any
    options: Mapping[str, Any]
    words: tuple[str, ...]
    json: bool
    quiet: bool


@dataclass(frozen=True)
class Verb:
    """`path` is typed (`plugins list`). `words` describes bare words (`FILE`), `least`..`most` of them (-1: any).

    `plugin` is the setting that names a plugin able to do `stage`, whose options join this verb's own; so do those of
    `company(settings as typed)`, as `--PLUGIN-NAME`. `required` settings have no sensible default. `more` adds lines to
    the help page; it is called only when that is shown.
    """

    path: str
    summary: str
    run: Callable[[Request], Answer | None]
    settings: type = registry.NoOptions
    words: str = ""
    least: int = 0
    most: int = 0
    required: tuple[str, ...] = ()
    plugin: str = ""
    stage: str = ""
    company: Callable[[Mapping[str, str]], Sequence[registry.Loaded]] = lambda typed: ()
    more: Callable[[], str] = field(default=lambda: "")


@dataclass(frozen=True)
class Flag:
    """One option on the command line: whose it is (`""`: the verb's own) and what the help page says."""

    name: str
    flag: str
    option: Option
    owner: str = ""
    parameter: str = ""


def flags_of(verb: Verb, loaded: registry.Loaded | None, others: Sequence[registry.Loaded] = ()) -> list[Flag]:
    """The verb's settings, then the plugin's options, then those of `others`. A plugin's option of a taken name, and
    every option of `others`, is `--PLUGIN-NAME`."""
    flags = [Flag(o.name, o.flag, o, "", f"setting_{o.name}") for o in config.options(verb.settings)]
    taken = {flag.flag for flag in flags} | {"--config", "--help", *SWITCHES}
    if loaded is not None:
        for option in config.options(loaded.plugin.config):
            flag = _longer(loaded, option) if option.flag in taken else option.flag
            flags.append(Flag(option.name, flag, option, loaded.plugin.name, f"option_{option.name}"))
    for number, other in enumerate(others):
        flags += [
            Flag(o.name, _longer(other, o), o, other.plugin.name, f"option{number}_{o.name}")
            for o in config.options(other.plugin.config)
        ]
    return flags


def _longer(loaded: registry.Loaded, option: Option) -> str:
    return f"--{loaded.plugin.name}-{option.name}".replace("_", "-")


def help_text(option: Option) -> str:
    """`rank of the update (1..256, default 8)`."""
    facts = [" ".join(part for part in (option.bounds.replace("|", ", "), option.unit) if part)]
    if option.type is not bool and option.default not in ("", None):
        facts.append(f"default {option.default:g}" if option.type is float else f"default {option.default}")
    if option.type is bool:
        facts.append(f"default {'yes' if option.default else 'no'}")
    told = "; ".join(fact for fact in facts if fact)
    return f"{option.help} ({told})" if told else option.help


@dataclass(frozen=True)
class Typed:
    """A command line taken apart before typer sees it."""

    args: list[str]
    unknown: dict[str, Any]
    plugin: str
    said: dict[str, str]
    file: dict[str, Any]
    where: str


def take_apart(
    verb: Verb, args: Sequence[str], loaded: registry.Loaded | None = None, others: Sequence[registry.Loaded] = ()
) -> Typed:
    """Set unknown `--options` aside, note what the settings say, read the `--config` file (ConfigError for that)."""
    flags = flags_of(verb, loaded, others)
    valued = {flag.flag for flag in flags if flag.option.type is not bool} | {"--config"}
    valued |= {short for name, short in SHORT.items() if f"--{name}" in valued} | {"-c"}
    bare = {f for flag in flags if flag.option.type is bool for f in (flag.flag, f"--no-{flag.flag[2:]}")}
    bare |= {*SWITCHES, *SWITCH_SHORT.values(), *HELP}
    kept: list[str] = []
    unknown: dict[str, Any] = {}
    found: dict[str, str] = {}
    rest = list(args)
    while rest:
        token = rest.pop(0)
        if token == "--":
            kept += ["--", *rest]
            break
        name, joined, value = token.partition("=")
        if token in valued or (joined and name in valued):
            kept.append(token)
            if not joined and rest:
                value = rest.pop(0)
                kept.append(value)
            found[name] = value
        elif token.startswith("--") and len(token) > 2 and name not in bare:
            if not joined and rest and not rest[0].startswith("-"):
                value, joined = rest.pop(0), "="
            unknown[name[2:]] = value if joined else True
        else:
            kept.append(token)
    path = found.get("--config", found.get("-c", ""))
    file = config.read_toml(Path(path)) if path and not set(kept) & set(HELP) else {}
    said = {}
    for flag in flags:
        text: Any = found.get(flag.flag, found.get(SHORT.get(flag.name, ""), file.get(flag.name)))
        if not flag.owner and isinstance(text, str):
            said[flag.name] = text
    return Typed(kept, unknown, said.get(verb.plugin, ""), said, file, path)


def build(
    verb: Verb,
    loaded: registry.Loaded | None,
    given: Mapping[str, Any],
    typed: Typed,
    others: Sequence[registry.Loaded] = (),
) -> tuple[Any, Any]:
    """(settings, the plugins' options that were given, as values). ConfigError with all problems of all at once."""
    flags = flags_of(verb, loaded, others)
    file = dict(typed.file)
    table = file.pop("options", {})
    problems: list[str] = []
    if not isinstance(table, dict):
        problems.append("options: is not a table")
        table = {}
    own = dict(file)
    plugins, theirs = companions.separated(table, others)
    for flag in flags:
        value = given.get(flag.parameter)
        if value is not None:
            table = theirs.get(flag.owner, plugins if flag.owner else own)
            table[flag.name] = value
    names = [flag.name for flag in flags if not flag.owner]
    known = [flag.name for flag in flags if flag.owner and flag.owner not in theirs]
    for name, value in typed.unknown.items():
        plain = name.replace("-", "_")
        owner = next((other for other in theirs if plain.startswith(other.replace("-", "_") + "_")), "")
        longer = next((flag.flag for flag in flags if flag.owner in theirs and flag.name == plain), "")
        likely_own = config.nearest(plain, names) and not config.nearest(plain, known)
        if owner:
            theirs[owner][plain[len(owner) + 1 :]] = value
        elif longer:
            problems.append(f"unknown option {name!r}, did you mean {longer[2:]!r}?")
        else:
            (own if loaded is None or likely_own else plugins)[name] = value
    if loaded is None:
        own |= plugins
    settings: Any = None
    try:
        settings = config.build(verb.settings, own, verb.path)
    except ConfigError as error:
        problems += error.problems
    errors: list[ConfigError] = []
    options: dict[str, Any] = {}
    for plugin in (*([loaded] if loaded is not None else ()), *others):
        name = plugin.plugin.name
        try:
            options |= {name: _given(plugin, theirs[name])} if name in theirs else _given(plugin, plugins)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1 and not problems:
        raise errors[0]
    problems += [problem for error in errors for problem in error.problems]
    if problems:
        raise ConfigError("; ".join(problems), verb.path, "see --help", problems=tuple(problems))
    missing = [f"--{name.replace('_', '-')}" for name in verb.required if not getattr(settings, name)]
    if missing:
        raise UsageError(f"needs {', '.join(missing)}", f"edgellm {verb.path}", f"see edgellm {verb.path} --help")
    return settings, {name: value for name, value in options.items() if value != {}}


def _given(loaded: registry.Loaded, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as values. ConfigError."""
    built = config.as_dict(config.build(loaded.plugin.config, options, loaded.plugin.name))
    return {name.replace("-", "_"): built[name.replace("-", "_")] for name in options}


def add(
    app: typer.Typer,
    verb: Verb,
    loaded: registry.Loaded | None,
    typed: Typed,
    answer: Callable[[Request], None],
    epilog: str,
    others: Sequence[registry.Loaded] = (),
) -> None:
    """Make `verb` a command of `app` that hands a checked request to `answer`."""
    parameters = list(_parameters(verb, flags_of(verb, loaded, others)))
    plain = {f.parameter for f in flags_of(verb, loaded) if f.option.default is False and not f.owner}

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            for parameter in self.params:  # `--no-resume` works, but only tells readers what they know
                if parameter.name in plain:
                    parameter.secondary_opts = []
            super().format_help(ctx, formatter)

        def invoke(self, ctx: Any) -> None:
            answer(_request(verb, loaded, ctx.params, typed, others))

    def declared() -> None:
        """Carries the signature that typer reads."""

    declared.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    declared.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    name = verb.path.split()[-1]
    app.command(name, cls=Command, help=verb.summary, epilog=epilog or None)(declared)


def _request(
    verb: Verb,
    loaded: registry.Loaded | None,
    given: Mapping[str, Any],
    typed: Typed,
    others: Sequence[registry.Loaded],
) -> Request:
    settings, options = build(verb, loaded, given, typed, others)
    words = tuple(given.get("words") or ())
    if len(words) < verb.least:
        raise UsageError(f"needs {verb.words}", f"edgellm {verb.path}", f"see edgellm {verb.path} --help")
    if len(words) > verb.most >= 0:
        raise UsageError(f"does not understand {words[verb.most]!r}", f"edgellm {verb.path}")
    quiet = bool(given["quiet"]) or not sys.stderr.isatty()
    return Request(settings, options, words, bool(given["json"]), quiet)


def _parameters(verb: Verb, flags: Sequence[Flag]) -> Iterable[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    if verb.words:
        argument = typer.Argument(None, metavar=verb.words, show_default=False)
        yield inspect.Parameter("words", keyword, default=argument, annotation=list[str] | None)
    for flag in flags:
        option, declared = flag.option, [flag.flag]
        if option.type is bool:
            declared = [f"{flag.flag}/--no-{flag.flag[2:]}"]
        elif not flag.owner and option.name in SHORT:
            declared.append(SHORT[option.name])
        panel = f"Options of {flag.owner}" if flag.owner else "Options"
        info = typer.Option(
            None,
            *declared,
            help=help_text(option).replace("[", r"\["),
            metavar=KINDS.get(option.type),
            show_default=False,
            rich_help_panel=panel,
        )
        kind: Any = bool | None if option.type is bool else str | None
        yield inspect.Parameter(flag.parameter, keyword, default=info, annotation=kind)
    if verb.plugin:
        help = (
            "TOML file with these options by name; the plugin's go under [options], those of a further one under "
            "[options.NAME]; the command line wins"
        )
        info = typer.Option(
            None, "--config", "-c", help=help.replace("[", r"\["), metavar="FILE", rich_help_panel="General"
        )
        yield inspect.Parameter("config", keyword, default=info, annotation=str | None)
    for flag_name, (name, help) in SWITCHES.items():
        names = [flag_name, *([SWITCH_SHORT[flag_name]] if flag_name in SWITCH_SHORT else [])]
        info = typer.Option(False, *names, help=help, show_default=False, rich_help_panel="General")
        yield inspect.Parameter(name, keyword, default=info, annotation=bool)
