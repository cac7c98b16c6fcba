"""`bench device`: several exported files side by side where they run: bytes, speed, memory and quality.

Speed is taken in turns, every file once in each turn, so that what else a machine does falls on all of them; what is
told is the median. A file is alone in memory while it is timed, in a process of its own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_sdk import config, settings, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import read
from edgellm_sdk.errors import ConfigError, DataError, ModelError
from edgellm_sdk.report import JSON, Meter, Report
from edgellm_sdk.steps.delivery import open_session, subject_of, text_of
from edgellm_sdk.steps.examples import held_out
from edgellm_sdk.steps.step import Outcome, prepare
from edgellm_sdk.types import Artifact, Dataset, Metric, Session

FOUND = "found.json"
OPENING = 16
COLUMNS = {
    "size": "size, MB", "load time": "load, s", "prompt speed": "prompt tokens/s",
    "generation speed": "generated tokens/s", "peak memory": "peak MB", "perplexity": "perplexity",
    "KL": "KL, nats", "KL, 99th percentile": "99th percentile", "same top token": "same top token",
}  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Of one file in one turn: seconds, tokens per second, bytes."""

    load: float
    prompt: float
    generation: float
    peak: int


def bench(
    files: Sequence[str],
    output: str | Path,
    *,
    data: str = "",
    text: str = "",
    against: str = "",
    device: str = "llama_cpp",
    chunk: int = 512,
    chunks: int = 16,
    tokens: int = 64,
    turns: int = 3,
    limit: int = 0,
    task_prompt: str = "",
    seed: int = 0,
    resume: bool = False,
    options: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Outcome:
    """Measure exported `files` on `device`, and draw their size and speed against their quality.

    Perplexity, and the divergence from `against` (a model or an unquantised file), are llama.cpp's own: of the second
    half of each of `chunks` chunks of `chunk` tokens of the file `text`, else of the held-out part of `data`. The score
    of that part is measured as well. What has been measured is kept when a run is taken up again, speeds are not.
    """
    asked = {
        "data": data, "text": text, "against": against, "device": device, "chunk": chunk, "chunks": chunks,
        "tokens": tokens, "turns": turns, "limit": limit, "task_prompt": task_prompt, "seed": seed,
    }  # fmt: skip
    config.build(settings.BenchDevice, asked | {"output": str(output), "resume": resume}, "bench device")
    if len({Path(file).name for file in files}) < len(files):
        raise ConfigError("two files have one name", "bench device", "the report tells files by their names")
    if not data and not text:
        raise ConfigError("needs something to measure on", "bench device", "give --data or --text")
    prose = written(Path(text)) if text else prose_of(data, task_prompt)
    subjects = [exported(file) for file in files]
    digests = {subject.path.name: store.digest_file(subject.path) for subject in subjects}
    step = prepare("bench device", device, "deploy", asked | {"files": digests}, Path(output), seed, options or {})
    dataset = held_out(data, "test", task_prompt, False, limit, seed) if data else None
    ctx = Context(step.folder, seed, device, quiet=quiet)
    with step.own(resume):
        if (step.folder / JSON).is_file():
            return Outcome(Report.read(step.folder), step.folder)
        with Meter() as meter:
            bought = _Measured(step.folder, ctx, device, options or {})
            for subject in subjects:
                bought.quality(subject, prose, against, chunk, chunks, dataset)
            timings = bought.speeds(subjects, prose, chunk, tokens, turns)
        report = step.report()
        report.finish(meter, ctx)
        report.artifacts = [
            {"name": s.path.name, "sha256": digests[s.path.name], "bytes": s.path.stat().st_size} for s in subjects
        ]
        rows = {s.path.name: _row(s, bought.found[s.path.name], timings[s.path.name]) for s in subjects}
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        table = [[file, *(_shown(row.get(name)) for name in names)] for file, row in rows.items()]
        columns = ["file", *(COLUMNS.get(name, name) for name in names)]
        report.tables = [{"title": f"{len(files)} files on {device}", "columns": columns, "rows": table}]
        if not against:
            report.notes.append("no --against: nothing is known about the divergence from the unquantised model")
        report.write(step.folder)
    return Outcome(report, step.folder)


def exported(file: str) -> Artifact:
    """A file as `deploy` takes it. ModelError for what is no exported file."""
    subject = subject_of(file)
    if not isinstance(subject, Artifact):
        raise ModelError("is no exported file", file, "`edgellm export` makes one")
    return subject


def written(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", str(path)) from None


def prose_of(data: str, task_prompt: str) -> str:
    """The held-out examples in a row, as text."""
    examples = read(data, "test", task_prompt or None).examples
    return "\n\n".join(f"{text_of(e.prompt) if e.prompt else ''} {e.completion}".strip() for e in examples)


class _Measured:
    """What is found of each file, written down as it is."""

    def __init__(self, folder: Path, ctx: Context, device: str, options: Mapping[str, Any]) -> None:
        self._path, self._ctx, self._device, self._options = folder / FOUND, ctx, device, options
        self.found: dict[str, dict[str, Metric]] = {}
        if self._path.is_file():
            kept = store.read_json(self._path)
            self.found = {f: {n: _metric(m) for n, m in row.items()} for f, row in kept.items()}

    def _open(self, subject: Artifact) -> Session:
        return open_session(subject, self._ctx, self._device, self._options)

    def quality(
        self, subject: Artifact, prose: str, against: str, length: int, most: int, dataset: Dataset | None
    ) -> None:
        from edgellm_sdk.kit import perplexity, scoring

        if subject.path.name in self.found:
            return
        session = self._open(subject)
        reference: Session | None = None
        try:
            given = perplexity.chunks(session, prose, length, most)
            if against:
                reference = open_session(subject_of(against), self._ctx)
                if reference.encode(prose[: perplexity.PROBE]) != session.encode(prose[: perplexity.PROBE]):
                    raise ModelError(f"makes other tokens than {against}", str(subject.path))
            with self._ctx.progress(f"quality of {subject.path.name}", len(given)) as progress:
                row = perplexity.quality(session, given, reference, progress.advance).metrics()
            if dataset is not None:
                with self._ctx.progress(f"score of {subject.path.name}", len(dataset)) as progress:
                    scores = scoring.of_session(session, dataset, progress.advance)
                row |= {f"{name} of the task" if name in row else name: metric for name, metric in scores.items()}
        finally:
            for one in (session, reference):
                if one is not None:
                    one.close()
        self.found[subject.path.name] = row
        kept = {f: {n: [m.value, m.unit, m.n, m.ci95] for n, m in r.items()} for f, r in self.found.items()}
        store.write_json(self._path, kept)

    def speeds(
        self, subjects: Sequence[Artifact], prose: str, length: int, tokens: int, turns: int
    ) -> dict[str, list[Timing]]:
        """Every file once in each turn."""
        found: dict[str, list[Timing]] = {subject.path.name: [] for subject in subjects}
        with self._ctx.progress("speed", turns * len(subjects)) as progress:
            for _ in range(turns):
                for subject in subjects:
                    session = self._open(subject)
                    try:
                        ids = session.encode(prose[: 64 * length])[:length]
                        found[subject.path.name].append(timed(session, ids, tokens))
                    finally:
                        session.close()
                    progress.advance(1, subject.path.name)
        return found


def timed(session: Session, ids: Sequence[int], tokens: int) -> Timing:
    """One pass over `ids` and up to `tokens` new ones after the first few of them, each after one that is not timed."""
    session.logits([ids])
    start = session.stats()
    session.logits([ids])
    read_ = session.stats()
    session.generate(ids[:OPENING], tokens)
    end = session.stats()
    prompt = (read_.prompt_tokens - start.prompt_tokens) / (read_.prompt_seconds - start.prompt_seconds)
    new, took = end.generated_tokens - read_.generated_tokens, end.generate_seconds - read_.generate_seconds
    return Timing(end.load_seconds, prompt, new / took if new else math.nan, end.peak_rss)


def _row(subject: Artifact, found: Mapping[str, Metric], timings: Sequence[Timing]) -> dict[str, Metric]:
    def middle(name: str, unit: str) -> Metric:
        values = [float(getattr(timing, name)) for timing in timings]
        return Metric(statistics.median(values), unit, len(values))

    return {
        "size": Metric(subject.path.stat().st_size, "bytes"),
        "load time": middle("load", "s"),
        "prompt speed": middle("prompt", "tokens/s"),
        "generation speed": middle("generation", "tokens/s"),
        "peak memory": middle("peak", "bytes"),
        **found,
    }


def _shown(metric: Metric | None) -> Any:
    """The value, bytes in MB, and its interval where it has one."""
    if metric is None or not math.isfinite(metric.value):
        return "-"
    if metric.ci95 and all(map(math.isfinite, metric.ci95)):
        return f"{metric.value:.4g} [{metric.ci95[0]:.4g}, {metric.ci95[1]:.4g}]"
    return float(f"{metric.value / 1e6 if metric.unit == 'bytes' else metric.value:.4g}")


def _metric(kept: Sequence[Any]) -> Metric:
    value, unit, n, ci95 = kept
    return Metric(value, unit, n, tuple(ci95) if ci95 else None)
