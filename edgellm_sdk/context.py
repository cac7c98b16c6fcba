"""What a hook may touch besides its arguments: everything stateful passes through here."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgellm_sdk.random import Stream

if TYPE_CHECKING:
    from edgellm_sdk.types import Arrays, Assignment, ModelHandle, Profile

Kept = TypeVar("Kept")


@dataclass
class Drift:
    """What a client's every gradient gets added: `proximal` * (theta - theta_0) + `arrays`, theta_0 being what it was
    sent. A method that does so sets `applied`, and `rates` to the learning rates of its steps as they are taken."""

    proximal: float = 0.0
    arrays: Arrays = field(default_factory=dict)
    applied: bool = False
    rates: Sequence[float] = ()


@dataclass(frozen=True)
class Cost:
    """Of one client's turn: peak resident bytes and seconds, measured or foretold; 0 where unknown."""

    peak: int = 0
    seconds: float = 0.0


class Progress:
    """One progress bar. Without a terminal nothing is drawn."""

    def __init__(self, advance: Callable[[float, str], None]) -> None:
        self._advance = advance

    def advance(self, amount: float = 1, text: str = "") -> None:
        self._advance(amount, text)


@dataclass(frozen=True)
class Rounds:
    """The view of a federation at work. `answered(clients so far, clients asked, round)`; `ended(cells, headline)` with
    the cells of a finished round: number, took part, left out, bytes up, bytes down, seconds."""

    answered: Callable[[int, int, int], None]
    ended: Callable[[tuple[Any, ...], str], None]


@dataclass
class Context:
    """`folder` is where this step writes, `memory` a budget in bytes, `deadline` a `time.monotonic()` value, `rounds`
    the number planned, `hidden` a folder for hidden states that later runs may take up. A hook is given its own
    plugin's config; a wrapper finds its own under its name in `configs`. On the server `assigned` is what each client
    of the round was sent, `starts` what it trains from where that is not what it was sent (`edgellm_assign` sets it),
    `profiles` what clients say they have, `foretold` what whoever assigned work expects it to cost; on a client `drift`
    changes the gradients of the turn at hand, `spent` is what turns did cost, and `highest` the most resident bytes
    before the last of them.
    """

    folder: Path
    seed: int = 0
    device: str = "cpu"
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    memory: int | None = None
    deadline: float | None = None
    quiet: bool = True
    rounds: int = 1
    hidden: Path | None = None
    configs: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    assigned: Mapping[str, Assignment] = field(default_factory=dict)
    starts: Mapping[str, Arrays] = field(default_factory=dict)
    drift: Drift | None = None
    model: ModelHandle | None = None
    profiles: Mapping[str, Profile] = field(default_factory=dict)
    foretold: dict[str, Cost] = field(default_factory=dict)
    spent: dict[str, Cost] = field(default_factory=dict)
    highest: int = 0
    started: float = field(default_factory=time.monotonic)
    _kept: dict[str, Any] = field(default_factory=dict)

    def stream(self, name: str, index: int = 0) -> Stream:
        """The random stream `name`, `index` of this run: a pure function of the run's seed."""
        return Stream(self.seed, name, index)

    def keep(self, name: str, make: Callable[[], Kept]) -> Kept:
        """`make()` once per process, then the same object: for loaded models and caches that can be rebuilt."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]  # type: ignore[no-any-return]

    def drop(self, name: str) -> None:
        """Forget what `keep` holds under `name`."""
        self._kept.pop(name, None)

    def kept(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """What `keep` holds under names with this prefix."""
        yield from ((name, value) for name, value in self._kept.items() if name.startswith(prefix))

    def curve(self, name: str, x: float, y: float) -> None:
        """One point of a curve for the report's page. Names read `y over x`, e.g. `loss over forwards`."""
        self.curves.setdefault(name, []).append((x, y))

    def trained(self, round: int, forwards: int, loss: float) -> None:
        """The training loss of a round, over rounds, over all forwards so far and over seconds."""
        for x, place in (("rounds", round), ("forwards", forwards), ("seconds", self.elapsed)):
            self.curve(f"training loss over {x}", place, loss)

    def note(self, text: str) -> None:
        """A line for the report and, when not quiet, for the terminal."""
        self.notes.append(text)
        if not self.quiet:
            from edgellm_sdk.cli.screen import console

            console().print(text, markup=False, highlight=False)

    @property
    def elapsed(self) -> float:
        """Seconds since this step began."""
        return time.monotonic() - self.started

    @contextmanager
    def progress(self, title: str, total: float | None) -> Iterator[Progress]:
        """A progress bar around a block of work of `total` units."""
        if self.quiet:
            yield Progress(lambda amount, text: None)
            return
        from edgellm_sdk.cli.screen import progress_bar

        with progress_bar(title, total) as advance:
            yield Progress(advance)

    @contextmanager
    def rounds_view(self, total: int, done: int) -> Iterator[Rounds]:
        """A table of the last rounds, who has answered in this one, and a bar; nothing when quiet."""
        if self.quiet:
            yield Rounds(lambda answered, asked, number: None, lambda cells, text: None)
            return
        from edgellm_sdk.cli.screen import rounds_view

        with rounds_view(total, done) as view:
            yield Rounds(*view)

    def checkpoint(self, name: str, arrays: Arrays, scalars: Mapping[str, Any]) -> None:
        """Save resumable work atomically under `folder / "checkpoint"`; replaces the last one of that name."""
        from edgellm_sdk.store import save_arrays

        save_arrays(self.folder / "checkpoint" / f"{name}.safetensors", arrays, scalars)

    def remember(self, client: str, name: str, round: int, arrays: Arrays, scalars: Mapping[str, Any]) -> None:
        """Keep what `client` alone knows after `round`, and what it knew one turn before, on the client's own disk."""
        from edgellm_sdk.store import save_arrays, storage_error

        folder = self._memory_of(client)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, folder) from error
        save_arrays(folder / f"{name}-{round:08d}.safetensors", arrays, scalars)
        for old in sorted(folder.glob(f"{name}-*.safetensors"))[:-2]:
            old.unlink(missing_ok=True)

    def recall(self, client: str, name: str, round: int) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(arrays, scalars) of the newest `remember` from before `round`, so that a round done again starts alike."""
        from edgellm_sdk.store import load_arrays

        before = [
            path
            for path in sorted(self._memory_of(client).glob(f"{name}-*.safetensors"))
            if int(path.stem.rpartition("-")[2]) < round
        ]
        return load_arrays(before[-1]) if before else None

    def _memory_of(self, client: str) -> Path:
        return self.folder / "clients" / hashlib.sha256(client.encode()).hexdigest()[:32]

    def resume(self, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(arrays, scalars) of the last checkpoint of that name, or None when there is none that is whole."""
        from edgellm_sdk.store import try_load_arrays

        return try_load_arrays(self.folder / "checkpoint" / f"{name}.safetensors")
