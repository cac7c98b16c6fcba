"""`export --users`: one base file, an adapter file for each user it helps, each proven, and their manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellm_sdk import config, models, store, users
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.federate.personal import INDEX, Record, intact
from edgellm_sdk.gate import HALF, GateResult, Tolerance, enforce, verify_export
from edgellm_sdk.random import Stream
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import Meter
from edgellm_sdk.steps.step import Outcome, Step
from edgellm_sdk.types import Artifact, Metric, ModelHandle, Prompt

SHOWN = 30


def records_of(run: Path) -> list[Record]:
    """The users of a finished run. ConfigError when it made no adapters for any, ModelError when files have changed."""
    if not (run / INDEX).is_file():
        raise ConfigError("the run personalised nobody", str(run), "finetune with --personalise STEPS")
    if store.published(run) is None:
        raise ModelError("differs from what the run published, or the run has not finished", str(run), "run it again")
    records: list[Record] = store.read_json(run / INDEX)["users"]
    if not all("adapter" in record for record in records):
        raise ConfigError("the users keep their adapters themselves", str(run), "export the folder of a user's join")
    if not all(intact(run, record) for record in records):
        raise ModelError("a user's adapter differs from what the run published", str(run), "run it again")
    return records


def export_users(
    step: Step, run: Path, target: Path, prompts: Sequence[Prompt], gate: bool, gate_users: int, quiet: bool
) -> Outcome:
    """Write the folder `target`; its manifest last, so that a folder without one is not finished. GateError as `export`
    has it, for the base and every adapter, or `gate_users` adapters drawn at random."""
    records = records_of(run)
    shared = models.resolve(str(run))
    base_model = replace(shared, adapters=shared.adapters[:-1])
    with store.run_folder(step.folder):
        store.write_json(step.folder / "recipe.json", {"verb": "export", **step.asked})
        report = step.report()
        with Meter() as meter:
            ctx = Context(step.folder, step.seed, quiet=quiet)
            writer = _Writer(step, target, prompts if gate else (), ctx)
            base = writer.base(base_model)
            sources = _sources(run, records)
            drawn = Stream(step.seed, "gate users").sample(sorted(sources), min(gate_users, len(sources)))
            with ctx.progress("one adapter file for each user", len(sources)) as progress:
                for name, folder in sources.items():
                    writer.adapter(name, models.resolve(str(folder)), not gate_users or name in drawn)
                    progress.advance()
            files = {record["user"]: _file_of(record) for record in records}
            source = store.read_json(shared.adapters[-1] / models.BASE)["digest"]
            users.publish(target, files, source)
        report.finish(meter, ctx)
        sizes = [(target / name).stat().st_size for name in sources]
        whole = base.path.stat().st_size
        report.metrics |= {
            "size of the base": Metric(whole, "bytes"),
            "users": Metric(len(records), "users"),
            "adapter files": Metric(len(sizes), "files"),
        }
        if sizes:
            report.metrics["largest adapter"] = Metric(max(sizes), "bytes", len(sizes))
            report.metrics["largest adapter to base"] = Metric(max(sizes) / whole, "", len(sizes))
        manifest = store.read_json(target / store.MANIFEST)["files"]
        report.artifacts = [
            {"name": name, "sha256": digest, "bytes": (target / name).stat().st_size}
            for name, digest in list(manifest.items())[:SHOWN]
        ]
        writer.describe(report.notes, report.tables)
        if writer.base_result is not None:
            report.verified = writer.base_result.as_dict()
        report.write(step.folder)
    return Outcome(report, step.folder, shared, replace(base, files=users.read(str(target)).artifact().files))


def _file_of(record: Mapping[str, Any]) -> str:
    adapter: str = record["adapter"]
    return {"": "", "model": users.SHARED_FILE}.get(adapter, f"{adapter}.gguf")


def _sources(run: Path, records: Sequence[Record]) -> dict[str, Path]:
    """Adapter file to write -> the folder of the adapter, in name order."""
    return {_file_of(r): run / r["adapter"] for r in sorted(records, key=_file_of) if r["adapter"]}


class _Writer:
    """Writes and verifies one file after the other; `prompts` empty leaves the gate out."""

    def __init__(self, step: Step, target: Path, prompts: Sequence[Prompt], ctx: Context) -> None:
        self._target, self._prompts, self._ctx = target, prompts, ctx
        self._name = step.loaded.plugin.name
        if not {"adapter", "type", "modelfile"} <= {option.name for option in config.options(type(step.settings))}:
            raise ConfigError(f"{self._name!r} writes no adapter files", "users", "use --plugin gguf")
        self._relay = self._with(step, {"adapter": "merge", "modelfile": False})
        half = {"adapter": "separate", "type": "f32" if step.settings.type == "f32" else "f16"}
        self._adapters = self._with(step, half)
        self._tolerance: Tolerance | None = None
        self.base_result: GateResult | None = None
        self._rows: list[list[Any]] = []

    def _with(self, step: Step, asked: Mapping[str, Any]) -> Relay:
        return Relay([step.loaded], {self._name: config.overridden(step.settings, asked, self._name)})

    def base(self, model: ModelHandle) -> Artifact:
        artifact = self._relay.export(model, self._target / users.BASE_FILE, self._ctx)
        if self._prompts:
            self.base_result = verify_export(model, artifact, self._ctx, self._prompts)
            enforce(self.base_result, artifact)
            self._tolerance = max(self.base_result.tolerance, HALF, key=lambda t: t.kl_mean)
        return artifact

    def adapter(self, name: str, model: ModelHandle, verify: bool) -> None:
        """The last adapter of `model` as the file `name`, held against `model` when it is to be verified."""
        alone = replace(model, adapters=model.adapters[-1:])
        artifact = self._adapters.export(alone, self._target / name, self._ctx)
        row = [name, artifact.path.stat().st_size / (self._target / users.BASE_FILE).stat().st_size]
        if self._prompts and verify:
            result = verify_export(
                model, artifact, self._ctx, self._prompts, self._tolerance, self._target / users.BASE_FILE
            )
            enforce(result, artifact)
            self._rows.append([*row, result.value("kl mean"), result.value("top-1"), result.passed])

    def describe(self, notes: list[str], tables: list[Any]) -> None:
        if not self._prompts:
            notes.append("the gate was switched off: nothing is known about the files' behaviour")
        elif self._rows:
            shown = sorted(self._rows, key=lambda row: -row[2])[:SHOWN]
            title = f"Adapters run on the base file and held against torch: {len(self._rows)}"
            title += f" (the {SHOWN} with the largest divergence)" if len(self._rows) > SHOWN else ""
            columns = ["file", "share of base", "kl mean", "top-1", "passed"]
            tables.append({"title": title, "columns": columns, "rows": shown})
