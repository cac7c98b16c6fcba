"""The verbs after training: export with the gate, load on a device, measure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgellm_sdk import config, models, registry, settings, store
from edgellm_sdk.context import Context
from edgellm_sdk.data import has_split, read
from edgellm_sdk.errors import ConfigError, ModelError, StorageError
from edgellm_sdk.gate import enforce, verify_export
from edgellm_sdk.random import Stream
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import Meter, Report
from edgellm_sdk.steps.examples import held_out, inherited_data
from edgellm_sdk.steps.step import Outcome, prepare, size_of
from edgellm_sdk.types import Artifact, Metric, ModelHandle, Prompt, Session
from edgellm_sdk.users import UserSession, is_folder_of_users
from edgellm_sdk.users import read as read_users

GATE_PROMPTS = 8
SHOWN = 3
SHOWN_TOKENS = 24
PROMPTS: tuple[Prompt, ...] = tuple(
    ({"role": "user", "content": text},)
    for text in (
        "What is the capital of France?",
        "Write one sentence about the sea.",
        "List three things to take on a walk in the rain.",
        "Is 17 a prime number? Answer yes or no.",
        "Translate 'good morning' into Spanish.",
        "Explain in simple words why the sky is blue.",
        "Rewrite politely: send me the file now.",
        "My order #4821 hasn't arrived. What should I do?",
    )
)


def report_folder(output: Path) -> Path:
    """Where the report of an exported file lies: `filter.gguf` -> `filter.report/`."""
    return output.with_name(output.stem + ".report")


def export(
    plugin: str,
    model: str,
    output: str | Path,
    *,
    data: str = "",
    task_prompt: str = "",
    gate: bool = True,
    users: bool = False,
    gate_users: int = 0,
    seed: int = 0,
    dry_run: bool = False,
    options: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Outcome:
    """Write the file a device runs at `output`, then run it there and compare it with the model it came from.

    The comparison uses prompts of `data` (else of the data the model was tuned on, else a few of our own). GateError
    when the file drifts: it is then kept as `STEM.rejected.SUFFIX` and never under the name asked for.
    With `users`, `model` is a run that personalised its users and `output` a folder (see `edgellm_sdk.users`).
    """
    target = Path(output)
    if target.exists():
        raise StorageError("the file exists", str(target), "remove it or choose another --output")
    data, task_prompt = inherited_data(model, data, task_prompt)
    asked = {"model": model, "output": target.name, "data": data, "gate": gate, "seed": seed}
    asked |= {"users": users, "gate_users": gate_users}
    config.build(settings.Export, asked, "export")
    step = prepare("export", plugin, "export", asked, report_folder(target), seed, options or {})
    prompts = gate_prompts(data, task_prompt, seed)
    if dry_run:
        return step.plan()
    if users:
        from edgellm_sdk.steps.users import export_users

        return export_users(step, Path(model), target, prompts, gate, gate_users, quiet)
    handle = models.resolve(model)
    with store.run_folder(step.folder):
        store.write_json(step.folder / "recipe.json", {"verb": "export", **step.asked})
        report = step.report()
        with Meter() as meter:
            relay = Relay([step.loaded], {step.loaded.plugin.name: step.settings})
            ctx = Context(step.folder, seed, quiet=quiet, configs=relay.configs)
            artifact = relay.export(handle, target, ctx)
            # A training program generates nothing to compare; its exporter has run it against the model.
            training = artifact.verified.get("kind") == "training"
            result = verify_export(handle, artifact, ctx, prompts) if gate and not training else None
        report.finish(meter, ctx)
        report.metrics["size"] = Metric(artifact.path.stat().st_size, "bytes")
        report.artifacts = [
            {"name": path.name, "sha256": digest, "bytes": path.stat().st_size}
            for path, digest in zip(artifact.files, artifact.digests, strict=True)
        ]
        if training:
            report.notes.append(
                "a training program gives no text for the gate: its exporter compared it with the model"
            )
        elif result is None:
            report.notes.append("the gate was switched off: nothing is known about the file's behaviour")
        else:
            report.verified = result.as_dict()
        relay.report(report, ctx)
        report.write(step.folder)
        if result is not None:
            enforce(result, artifact)
    return Outcome(report, step.folder, handle, artifact)


def gate_prompts(data: str, task_prompt: str, seed: int) -> tuple[Prompt, ...]:
    """Real prompts to compare on: held-out ones of `data` if it has them."""
    if not data:
        return PROMPTS
    held_out = next((name for name in ("test", "valid") if has_split(data, name)), "train")
    examples = read(data, held_out, task_prompt or None).examples
    chosen = Stream(seed, "gate").sample(examples, GATE_PROMPTS)
    return tuple(example.prompt or example.completion for example in chosen)


def default_device(subject: ModelHandle | Artifact) -> str:
    """`llama_cpp` for a GGUF file, else `cpu`."""
    is_file = isinstance(subject, Artifact) or subject.format == "gguf"
    return "llama_cpp" if is_file else "cpu"


def open_session(
    subject: ModelHandle | Artifact, ctx: Context, device: str = "", options: Mapping[str, Any] | None = None
) -> Session:
    """Load a model or file on a device (by default the one it is for). The caller closes the session."""
    device = device or default_device(subject)
    loaded = registry.get(device, "deploy")
    name = loaded.plugin.name
    relay = Relay([loaded], {name: config.build(loaded.plugin.config, options or {}, name)})
    return relay.deploy(subject, device, ctx)


def subject_of(typed: str) -> ModelHandle | Artifact:
    """What the user typed as something a device can load: a GGUF file runs as it is, all else is a model."""
    path = Path(typed)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError("no such file", typed, "run `edgellm export` first")
        return Artifact((path,), (), "gguf", "llama_cpp", typed)
    return models.resolve(typed)


@contextmanager
def deploy(
    subject: str,
    *,
    user: str = "",
    device: str = "",
    options: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Iterator[Session]:
    """A live session on a file or model, closed when the block ends.

    On a folder that `export(users=True)` wrote it is a `edgellm_sdk.users.UserSession`: it begins as `user`, and
    `switch(NAME)` changes whose adapter it has without loading the base again.
    """
    shared = read_users(subject) if is_folder_of_users(subject) else None
    if user and shared is None:
        raise ConfigError("--user needs a folder that `edgellm export --users` wrote", subject, "leave it out")
    if shared is not None:  # before anything is loaded
        shared.checked_base()
        if user:
            shared.checked_adapter(user)
    what = shared.artifact() if shared is not None else subject_of(subject)
    session = open_session(what, Context(Path(), quiet=quiet), device, options)
    try:
        yield session if shared is None else UserSession(session, shared, user)
    finally:
        session.close()


def evaluate(
    subject: str,
    data: str,
    output: str | Path = "",
    *,
    device: str = "",
    split: str = "test",
    limit: int = 0,
    balance: bool = False,
    task_prompt: str = "",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    quiet: bool = True,
) -> Outcome:
    """Measure a model or an exported file on held-out data: balanced accuracy, or loss and perplexity; with speed."""
    from edgellm_sdk.kit import scoring

    asked = {"data": data, "split": split, "limit": limit, "balance": balance, "device": device, "seed": seed}
    config.build(settings.Evaluate, asked, "eval")
    what = subject_of(subject)
    device = device or default_device(what)
    loaded = registry.get(device, "deploy")
    chosen: Any = config.build(loaded.plugin.config, options or {}, loaded.plugin.name)
    dataset = held_out(data, split, task_prompt, balance, limit, seed)
    asked |= {"subject": subject, "device": device}
    origin, version = loaded.source.origin, loaded.plugin.version
    report = Report.begin("eval", loaded.plugin.name, version, origin, config.as_dict(chosen), asked, seed)
    ctx = Context(Path(output) if output else Path(), seed, device, quiet=quiet)
    with Meter() as meter:
        relay = Relay([loaded], {loaded.plugin.name: chosen})
        session = relay.deploy(what, device, ctx)
        try:
            with ctx.progress(f"measuring on {device}", len(dataset)) as progress:
                report.metrics |= scoring.of_session(session, dataset, progress.advance)
            report.metrics |= relay.measure(session, dataset, ctx)
            for example in Stream(seed, "shown").sample(dataset.examples, min(SHOWN, len(dataset))):
                answer = session.generate(session.prompt_ids(example.prompt), SHOWN_TOKENS)
                shown = {"prompt": text_of(example.prompt), "expected": example.completion, "after": answer.text}
                report.examples.append(shown)
            stats = session.stats()
        finally:
            session.close()
    report.finish(meter, ctx)
    report.metrics |= {
        "size": Metric(what.path.stat().st_size if isinstance(what, Artifact) else size_of(what), "bytes"),
        "load time": Metric(stats.load_seconds, "s"),
        "prompt speed": Metric(stats.prompt_tokens / max(stats.prompt_seconds, 1e-9), "tokens/s", stats.prompt_tokens),
        "generation speed": Metric(
            stats.generated_tokens / max(stats.generate_seconds, 1e-9), "tokens/s", stats.generated_tokens
        ),
        "peak memory": Metric(stats.peak_rss, "bytes"),
    }
    if output:
        with store.run_folder(Path(output)):
            report.write(Path(output))
    return Outcome(report, Path(output) if output else Path())


def text_of(prompt: Prompt) -> str:
    """A prompt as a person would read it: its last message."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
