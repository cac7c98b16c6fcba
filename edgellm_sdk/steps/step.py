"""What every verb has in common: a plugin with its settings, a folder it owns, a report, a result published last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgellm_sdk import config, models, registry, store
from edgellm_sdk.errors import ConfigError, StorageError
from edgellm_sdk.report import Report
from edgellm_sdk.types import Artifact, ModelHandle


@dataclass(frozen=True)
class Outcome:
    """What a verb leaves behind: its report, the folder it lies in, and the model or file it made."""

    report: Report
    folder: Path
    model: ModelHandle | None = None
    artifact: Artifact | None = None


@dataclass(frozen=True)
class Step:
    """One plugin with its settings, about to do one verb. `asked` is all that decides the result."""

    verb: str
    loaded: registry.Loaded
    settings: Any
    asked: Mapping[str, Any]
    folder: Path
    seed: int

    def report(self) -> Report:
        plugin = self.loaded.plugin
        return Report.begin(
            self.verb, plugin.name, plugin.version, self.loaded.source.origin, config.as_dict(self.settings),
            dict(self.asked), self.seed,
        )  # fmt: skip

    def plan(self) -> Outcome:
        """The outcome of a dry run."""
        report = self.report()
        report.notes.append("dry run: nothing was computed or written")
        return Outcome(report, self.folder)

    @contextmanager
    def own(self, resume: bool) -> Iterator[Outcome | None]:
        """Own the folder; yields the outcome if this very step was finished there before."""
        with store.run_folder(self.folder):
            recipe = self.folder / "recipe.json"
            asked = {"verb": self.verb, "config": config.as_dict(self.settings), **self.asked}
            before = store.read_json(recipe) if recipe.is_file() else None
            if before is not None and before != asked:
                changed = sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key))
                what = f"the folder holds another run (differs in {', '.join(changed)})"
                raise ConfigError(what, str(self.folder), "use another --output")
            if before is not None and not resume:
                what = "the folder already holds this run"
                raise StorageError(what, str(self.folder), "add --resume or use another --output")
            if before is None:
                store.write_json(recipe, asked)
            done = None
            if store.published(self.folder) is not None and (self.folder / "report.json").is_file():
                done = Outcome(Report.read(self.folder), self.folder, models.resolve(str(self.folder)))
            yield done

    def publish(self, model: ModelHandle, report: Report, more: Sequence[str] = ()) -> Outcome:
        """Write the report, then the manifest that makes the folder, `model` and what `more` names, a result."""
        report.write(self.folder)
        parts = [self.folder / name for name in ("model", *more)]
        found = [path for part in parts for path in (part, *part.rglob("*")) if path.is_file()]
        files = [path.relative_to(self.folder).as_posix() for path in found]
        store.publish(self.folder, files, {"model": "model", "verb": self.verb})
        return Outcome(report, self.folder, model)


def prepare(
    verb: str, plugin: str, stage: str, asked: Mapping[str, Any], folder: Path, seed: int, options: Mapping[str, Any]
) -> Step:
    """Load the plugin and check its options before anything else happens."""
    loaded = registry.get(plugin, stage)
    settings: Any = config.build(loaded.plugin.config, options, loaded.plugin.name)
    return Step(verb, loaded, settings, {"plugin": loaded.plugin.name, **asked}, folder, seed)


def size_of(model: ModelHandle) -> int:
    """Bytes of the weights on disk, adapters included."""
    folders = (model.path, *model.adapters)
    files = [p for folder in folders for p in (folder.glob("*.safetensors") if folder.is_dir() else [folder])]
    return sum(path.stat().st_size for path in files)
