"""The exceptions a user can meet, one exit code each.

    EdgeLLMError                1   our bug, when raised as itself
     +- UsageError              2   the command line makes no sense
     +- ConfigError             3   an option or a recipe is wrong (carries every problem at once)
     +- PluginError             4   a plugin is missing, broken or misbehaved
     +- DataError               5   the user's data
     +- ModelError              6   a model, adapter or GGUF file
     |   +- GateError           6   an exported file does not behave like its model
     +- DeviceError             7   hardware, backend or memory
     +- FederationError         8   quorum, deadline, peers
     +- PrivacyError            9   a privacy budget is exhausted or a claim is unprovable
     +- StorageError           10   disk full, locked, not permitted
     +- Interrupted       130/143   stopped by a signal; `--resume` continues

A message is one line: what - where; what to do.
"""

from __future__ import annotations

MAX_MESSAGE = 400


def printable(text: str) -> str:
    """`text` on one line with control characters escaped, so a file cannot drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class EdgeLLMError(Exception):
    """`what` happened, `where` (file:line, client, step), and the `fix` the user can apply."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        text = what
        if where:
            text += f" - {where}"
        if fix:
            text += f"; {fix}"
        super().__init__(printable(text)[:MAX_MESSAGE])


class UsageError(EdgeLLMError):
    exit_code = 2


class ConfigError(EdgeLLMError):
    """Wrong options; `problems` lists all of them, the message joins them."""

    exit_code = 3

    def __init__(self, what: str, where: str = "", fix: str = "", problems: tuple[str, ...] = ()) -> None:
        self.problems = problems or (what,)
        super().__init__(what, where, fix)


class PluginError(EdgeLLMError):
    exit_code = 4


class DataError(EdgeLLMError):
    exit_code = 5


class ModelError(EdgeLLMError):
    exit_code = 6


class GateError(ModelError):
    """An exported file drifted from its model beyond the stated tolerance."""


class DeviceError(EdgeLLMError):
    exit_code = 7


class FederationError(EdgeLLMError):
    exit_code = 8


class PrivacyError(EdgeLLMError):
    exit_code = 9


class StorageError(EdgeLLMError):
    exit_code = 10


class Interrupted(EdgeLLMError):
    """A signal asked to stop. `signal` 2 gives exit code 130, 15 gives 143."""

    def __init__(self, signal: int, where: str = "") -> None:
        self.exit_code = 128 + signal
        super().__init__("interrupted", where, "run the same command with --resume to continue")
