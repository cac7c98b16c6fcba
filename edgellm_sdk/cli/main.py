"""The `edgellm` command: finds the verb, runs it, and turns whatever happens into one line and an exit code."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import typer

from edgellm_sdk import __version__, registry
from edgellm_sdk.cli import audit, bench, federation, files, machine, plugins, train
from edgellm_sdk.cli.verb import HELP, Answer, Request, Verb, add, take_apart
from edgellm_sdk.config import nearest
from edgellm_sdk.errors import EdgeLLMError, Interrupted, StorageError, UsageError, printable
from edgellm_sdk.store import storage_error

STDOUT_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
SUMMARY = "Personalise a language model on private data, shrink it, export it, prove the export, run it."
GROUPS = {
    "audit": "What left this machine: wire.",
    "bench": "Measurements: compare, device.",
    "federation": "Clients over a network: keys, serve, join.",
    "plugins": "The methods: list, info, new, doctor.",
    "models": "What a model is: info.",
    "data": "What a data set holds: info.",
    "help": "Topics: exit-codes.",
}
_FAMILIES = (train, files, federation, audit, bench, plugins, machine)
VERBS: dict[str, Verb] = {verb.path: verb for family in _FAMILIES for verb in family.VERBS}


@dataclass
class Call:
    """One command line on its way: what is known of it when something goes wrong."""

    args: list[str]
    verb: Verb | None = None
    output: str = ""
    code: int = 0

    @property
    def verbose(self) -> bool:
        return bool({"-v", "-vv", "--verbose"} & set(_options_part(self.args)))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; always ends in SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    _catch_signals()
    sys.exit(_guarded(Call(list(sys.argv[1:] if argv is None else argv))))


def _guarded(call: Call) -> int:
    """The exit code of a command line; every error has been told on stderr in one line."""
    try:
        _run(call)
        sys.stdout.flush()
        return call.code
    except BrokenPipeError:
        _drop_stdout()
        return 0
    except EdgeLLMError as error:
        return _tell(error, call)
    except typer.Abort:
        return _tell(Interrupted(signal.SIGINT), call)
    except OSError as error:
        if error.filename is not None:
            return _tell(storage_error(error, Path(os.fsdecode(error.filename))), call)
        if error.errno not in STDOUT_FAILS:
            return _crash(error, call)
        _drop_stdout()  # of all files only this one is written to without a name
        return _tell(StorageError(f"cannot write the result: {error.strerror}", "standard output"), call)
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's, wherever typer keeps it
            return _tell(UsageError(error.format_message().rstrip("."), "", "see --help"), call)
        return _crash(error, call)


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(call: Call) -> None:
    if "--version" in call.args[:1]:
        print(f"edgellm {__version__}")
        return
    verb, rest = _choose([a for a in call.args if a != "-vv"])
    if verb is None:
        _help_page(call.args)
        return
    call.verb = verb
    typed = take_apart(verb, rest)
    loaded = registry.get(typed.plugin, verb.stage) if typed.plugin and verb.plugin else None
    wants_help = bool(set(_options_part(rest)) & set(HELP))
    others = verb.company(typed.said)
    if loaded is not None or others:
        typed = take_apart(verb, rest, loaded, others)
    if loaded is None and "plugin" in verb.required and not wants_help:
        names = ", ".join(row.name for row in registry.for_stage(verb.stage)) or "none is installed"
        raise UsageError("needs --plugin NAME", f"edgellm {verb.path}", f"there is {names}")

    answers: list[str] = []

    def answer(request: Request) -> None:
        call.output = str(getattr(request.settings, "output", ""))
        answers.append(_told(call, verb.run(request), request.json))

    app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    epilog = (verb.more() if loaded is None else _about(loaded)) if wants_help else ""
    add(app, verb, loaded, typed, answer, epilog, others)
    command = typer.main.get_command(app)
    command.main(args=typed.args, prog_name=f"edgellm {verb.path}", standalone_mode=False)
    if answers and answers[0]:  # here and not within typer, which has its own mind about closed pipes
        print(answers[0])


def _options_part(args: Sequence[str]) -> Sequence[str]:
    return args[: args.index("--")] if "--" in args else args


def _about(loaded: registry.Loaded) -> str:
    plugin = loaded.plugin
    return f"{plugin.name}: {plugin.summary}" + (f" ({plugin.paper})" if plugin.paper else "")


def _told(call: Call, answer: Answer | None, as_json: bool) -> str:
    """What goes to standard output; the exit code is noted in `call`."""
    if answer is None:
        return ""
    call.code = answer.code
    return json.dumps(answer.value, indent=2, allow_nan=False) if as_json else answer.text


def _choose(args: Sequence[str]) -> tuple[Verb | None, list[str]]:
    """(the verb, what follows it); None means that a help page is wanted. UsageError for an unknown verb."""
    rest = list(args)
    while rest and rest[0] in ("-v", "--verbose", "-q", "--quiet", "--json"):
        rest.append(rest.pop(0)) if "--" not in rest else rest.pop(0)
    if not rest or rest[0] in HELP:
        return None, []
    first = rest.pop(0)
    if first.startswith("-"):
        raise UsageError(f"there is no option {first}", "edgellm", "see edgellm --help")
    if first == "help" and rest and rest[0] in VERBS:
        return VERBS[rest[0]], ["--help"]
    if first in VERBS:
        return VERBS[first], rest
    if first not in GROUPS:
        names = [*GROUPS, *(path for path in VERBS if " " not in path)]
        raise UsageError(f"there is no command {first!r}{nearest(first, names)}", "edgellm", "see edgellm --help")
    second = next((word for word in rest if not word.startswith("-")), "")
    if not second and first == "plugins" and not set(rest) & set(HELP):
        return VERBS["plugins list"], rest
    if not second or set(rest[: rest.index(second)]) & set(HELP):
        return None, []
    if f"{first} {second}" not in VERBS:
        close = nearest(second, [path.split()[1] for path in VERBS if path.startswith(f"{first} ")])
        raise UsageError(f"there is no command '{first} {second}'{close}", "edgellm", f"see edgellm {first} --help")
    rest.remove(second)
    return VERBS[f"{first} {second}"], rest


def _help_page(args: Sequence[str]) -> None:
    """The top page or a group's. Plain text: rich alone would take half of the time this may take."""
    group = next((word for word in args if word in GROUPS and word != "help"), "")
    app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=False)
    children = [verb for path, verb in VERBS.items() if path.startswith(f"{group} ")] if group else []

    @app.callback(invoke_without_command=True, help=GROUPS[group] if group else SUMMARY)
    def nothing(
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
    ) -> None: ...

    for verb in children or [verb for path, verb in VERBS.items() if " " not in path]:
        app.command(verb.path.split()[-1], help=verb.summary)(lambda: None)
    for name, summary in GROUPS.items() if not group else ():
        app.command(name, help=summary)(lambda: None)
    prog = f"edgellm {group}".rstrip()
    typer.main.get_command(app).main(args=["--help"], prog_name=prog, standalone_mode=False)


def _tell(error: EdgeLLMError, call: Call) -> int:
    """One line on stderr; with --verbose the chain of causes below it."""
    resumable = call.verb is not None and hasattr(call.verb.settings, "resume")
    lines = ["edgellm: interrupted" if isinstance(error, Interrupted) and not resumable else f"edgellm: {error}"]
    cause: BaseException | None = error.__cause__ or error.__context__
    while call.verbose and cause is not None:
        lines.append(f"  because of {type(cause).__name__}: {printable(str(cause))[:300]}")
        cause = cause.__cause__ or cause.__context__
    _say("\n".join(lines))
    return error.exit_code


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def _crash(error: Exception, call: Call) -> int:
    """Our bug: a traceback in a file, without the message (it may quote the user's data) unless --verbose."""
    import tempfile
    import traceback

    kind = type(error).__name__
    trace = "".join(traceback.format_tb(error.__traceback__))
    text = f"edgellm {__version__}, Python {sys.version.split()[0]}\n{trace}{kind}"
    text += f": {error}\n" if call.verbose else "\n"
    folder = Path(call.output) if call.output and Path(call.output).is_dir() else None
    try:
        descriptor, name = tempfile.mkstemp(prefix="edgellm-crash-", suffix=".txt", dir=folder)
        with os.fdopen(descriptor, "w", errors="backslashreplace") as file:
            file.write(text)
        where = f"details in {name}"
    except OSError:
        where = "no place for a crash file"
    _say(f"edgellm: internal error {kind} - {printable(where)}; please report it with that file")
    return EdgeLLMError.exit_code


def _catch_signals() -> None:
    def stop(number: int, frame: FrameType | None) -> Any:
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)


if __name__ == "__main__":
    main()
