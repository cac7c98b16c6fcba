"""The half of the conformance suite that runs methods, on a tiny model and a handful of messages made here."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgellm_sdk import config, registry, wire
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DeviceError, FederationError, Interrupted, ModelError
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.types import Artifact, Assignment, Dataset, ModelHandle, Session, State, Update

CLIENTS = ("a", "b", "c")
ROUNDS = 4
FROZEN = ", A frozen"  # ends a kind of update that holds B alone
AROUND = ("lora", {"optimizer": "sgd", "clip": 0.0, "steps": 2})  # what is tested with a plugin that works around one
TEXTS = (
    ("win a free prize now, call this number today", "spam"),
    ("are you coming home for dinner tonight, mum asks", "ham"),
    ("claim 1000 pounds, reply with your address", "spam"),
    ("the train is late, see you at eight", "ham"),
)


def require(true: object, otherwise: str) -> None:
    """AssertionError(`otherwise`) unless `true`; unlike `assert` it stays under python -O."""
    if not true:
        raise AssertionError(otherwise)


class _MadeUp:
    """A method without a model, for a plain aggregator: theta is a pair of factors (or B alone) and a bias, and what a
    client sends as `kind` is theta with a change that is drawn, or that change."""

    def __init__(self, kind: str) -> None:
        self.kind, self.frozen = kind.removesuffix(FROZEN), kind.endswith(FROZEN)

    @hookimpl
    def edgellm_initialise(self, model: ModelHandle, ctx: Context) -> State:
        stream = ctx.stream("made up")
        factors = {"m.lora_A": stream.normal(8).reshape(2, 4), "m.lora_B": stream.normal(12).reshape(6, 2)}
        if self.frozen:
            del factors["m.lora_A"]
        return State(model.digest, 0, {**factors, "b": stream.normal(4)}, {"scale": 2.0})

    @hookimpl
    def edgellm_finetune(self, data: Dataset, assignment: Assignment, ctx: Context) -> Update:
        from edgellm_sdk.kit.averaging import theta

        stream, arrays = ctx.stream(f"made up/{assignment.client}", assignment.round), {}
        for name, array in sorted(theta(assignment.arrays).items()):
            change = stream.normal(array.size).reshape(array.shape)
            arrays[name] = array + change if self.kind == "weights" else change
        return Update(assignment.base, assignment.round, assignment.client, self.kind, arrays, len(data))


@dataclass(frozen=True)
class Subject:
    """The plugin under test with the options it is tested at."""

    loaded: registry.Loaded
    options: Mapping[str, Any]

    def relay(self, kind: str = "delta") -> Any:
        """The plugin, with one that aggregates if it only trains; with made-up clients that send `kind` if it only
        aggregates; with LoRA by plain SGD if it works around a method."""
        from edgellm_sdk.relay import Relay

        plugins, method = [self.loaded], {}
        if self.loaded.stages == ("around",):
            plugins.insert(0, registry.get(AROUND[0], "finetune"))
            method = {AROUND[0]: AROUND[1]}
        hooks = set(self.loaded.hooks)
        if "edgellm_finetune" in hooks and "edgellm_aggregate" not in hooks:
            plugins.append(registry.get("fedavg", "aggregate"))
        if "edgellm_aggregate" in hooks and "edgellm_finetune" not in hooks:
            made_up: Any = _MadeUp(kind)
            about = registry.Plugin("made-up", "clients of the conformance suite", "1")
            trains = ("edgellm_finetune", "edgellm_initialise")
            plugins.insert(0, registry.Loaded(about, made_up, registry.Source("made-up", __name__, "built-in"), trains))
        configs: dict[str, Any] = {
            p.plugin.name: config.build(p.plugin.config, method.get(p.plugin.name, {}), p.plugin.name) for p in plugins
        }
        own: Any = config.build(self.loaded.plugin.config, self.options, self.loaded.plugin.name)
        return Relay(plugins, configs | {self.loaded.plugin.name: own})

    @property
    def trains(self) -> bool:
        """Whether its clients train: a method's own, or those that a plugin is put around."""
        return "edgellm_finetune" in self.loaded.hooks or self.loaded.stages == ("around",)

    @property
    def clients(self) -> tuple[str, ...]:
        """Rules that withstand hostile clients refuse small rounds, and made-up clients cost nothing."""
        return CLIENTS if self.trains else (*CLIENTS, "d", "e")

    @functools.cached_property
    def model(self) -> ModelHandle:
        """What a method is tested on: the tiny model, in blocks when it refuses the plain one."""
        relay = self.relay()
        with _context(relay) as ctx:
            try:
                relay.initialise(tiny_model(), ctx)
            except ModelError:
                return tiny_blocks()
        return tiny_model()


@functools.lru_cache(maxsize=1)
def _workshop() -> tempfile.TemporaryDirectory[str]:
    """One folder for this process; Python removes it at exit."""
    return tempfile.TemporaryDirectory(prefix="edgellm-conformance-")


@functools.lru_cache(maxsize=1)
def tiny_model() -> ModelHandle:
    """A seeded random Llama of four layers, hidden 64, with a byte-level tokenizer and a chat template."""
    from edgellm_sdk.kit.tiny import write_model
    from edgellm_sdk.models import resolve

    root = Path(_workshop().name)
    write_model(root / "model", [text for text, _ in TEXTS])
    return resolve(str(root / "model"), cache=root / "cache")


@functools.lru_cache(maxsize=1)
def tiny_blocks() -> ModelHandle:
    """The same model with its linear layers in q4_0 blocks, as `edgellm compress` writes it, plainly rounded."""
    from safetensors.numpy import save_file

    from edgellm_sdk import checkpoint, store
    from edgellm_sdk.kit.blocks import nearest
    from edgellm_sdk.models import resolve

    root, source = Path(_workshop().name), checkpoint.inspect(tiny_model().path)
    tensors = {name: source.array(name) for name in source.tensors}
    linear = {name: nearest(tensors.pop(name), "q4_0") for name in source.tensors if name.endswith("_proj.weight")}
    folder = root / "blocks"
    folder.mkdir(exist_ok=True)
    for name in checkpoint.SIDE_FILES:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, folder / name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    store.save_arrays(folder / checkpoint.QUANTIZED, linear, {"format": dict.fromkeys(linear, "q4_0")})
    return resolve(str(folder), cache=root / "cache")


@functools.lru_cache(maxsize=1)
def tiny_made() -> ModelHandle:
    """Another model of the same tokenizer, in a run that tells that it was compressed from the tiny one."""
    from edgellm_sdk.kit.tiny import write_model
    from edgellm_sdk.models import resolve

    made = write_model(Path(_workshop().name) / "made" / "model", [text for text, _ in TEXTS], seed=1)
    (made.parent / "recipe.json").write_text(json.dumps({"verb": "compress", "model": str(tiny_model().path)}))
    return resolve(str(made), cache=Path(_workshop().name) / "cache")


@functools.lru_cache(maxsize=1)
def tiny_data() -> Dataset:
    """Forty-eight labelled messages."""
    from edgellm_sdk.data import read

    path = Path(_workshop().name) / "data.jsonl"
    rows = [{"text": f"{text} {n}", "label": label} for n in range(12) for text, label in TEXTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read(str(path))


@contextmanager
def _context(relay: Any) -> Iterator[Context]:
    """A folder and a Context on one thread: tiny models lose more time to threads than they gain."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=_workshop().name) as folder:
            configs = dict(relay.configs)
            yield Context(Path(folder), seed=7, threads=1, rounds=ROUNDS, configs=configs, model=tiny_model())
    finally:
        torch.set_num_threads(threads)


def shards_of(clients: Sequence[str] = CLIENTS) -> dict[str, Dataset]:
    data = tiny_data()
    return {client: data.select(range(k, len(data), len(clients))) for k, client in enumerate(clients)}


def _contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _first_updates(subject: Subject) -> tuple[State, list[Assignment], list[Update]]:
    relay = subject.relay()
    with _context(relay) as ctx:
        ctx.model = subject.model
        start = relay.initialise(subject.model, ctx)
        shards = shards_of()
        assigned = relay.assign(start, CLIENTS, {c: len(s) for c, s in shards.items()}, ctx)
        sent = [wire.assignment_from_bytes(wire.assignment_to_bytes(assigned[c]), c) for c in CLIENTS]
        return start, sent, [relay.finetune(subject.model, shards[a.client], a, ctx) for a in sent]


def finetune_repeats(subject: Subject) -> None:
    """The same inputs give the same bytes, and the update survives the wire and the server's checks."""
    (start, _, once), (_, _, again) = _first_updates(subject), _first_updates(subject)
    for update, other in zip(once, again, strict=True):
        raw = wire.update_to_bytes(update)
        require(raw == wire.update_to_bytes(other), f"client {update.client}: two runs differ")
        require(wire.update_to_bytes(wire.update_from_bytes(raw, "update")) == raw, "the update changes on the wire")
        problem = wire.check_update(update, start, update.client)
        require(problem is None, f"client {update.client}: the update {problem}")


def finetune_keeps_its_inputs(subject: Subject) -> None:
    """Neither the assignment, nor the data, nor the model's files change."""
    before = _contents(subject.model.path)
    relay = subject.relay()
    with _context(relay) as ctx:
        ctx.model = subject.model
        start = relay.initialise(subject.model, ctx)
        shard = shards_of()["a"]
        given = relay.assign(start, ["a"], {"a": len(shard)}, ctx)["a"]
        given = replace(given, arrays={name: array.copy() for name, array in given.arrays.items()})
        raw, examples, state = wire.assignment_to_bytes(given), shard.examples, wire.state_to_bytes(start)
        relay.finetune(subject.model, shard, given, ctx)
        require(wire.assignment_to_bytes(given) == raw, "the assignment was changed")
        require(wire.state_to_bytes(start) == state, "the server's state was changed")
        require(shard.examples == examples, "the data was changed")
    require(_contents(subject.model.path) == before, "the model's files were changed")


def _run(
    subject: Subject, change: Callable[[Any], Any] = lambda engine: engine, kind: str = "delta", stop: int = 0
) -> bytes:
    """The state after all rounds, as bytes. `change` wraps the engine; `stop` interrupts that round, then resumes."""
    from edgellm_sdk.federate.engine import in_process
    from edgellm_sdk.federate.ledger import Ledger
    from edgellm_sdk.federate.rounds import Plan, resumed, run_rounds

    shards = shards_of(subject.clients)
    plan = Plan({client: len(shard) for client, shard in shards.items()}, len(shards), ROUNDS)
    relay = subject.relay(kind)

    def interrupting(engine: Any) -> Any:
        calls = iter(range(1, ROUNDS + 2))

        def exchange(messages: Mapping[str, bytes]) -> Iterator[Any]:
            if next(calls) == stop:
                raise Interrupted(2)
            yield from change(engine)(messages)

        return exchange

    with _context(relay) as ctx:
        ledger = Ledger(ctx.folder / "ledger.jsonl")
        ctx.model = subject.model
        start = relay.initialise(subject.model, ctx)
        if stop:
            try:
                run_rounds(relay, start, plan, interrupting(in_process(relay, subject.model, shards, ctx)), ctx, ledger)
            except Interrupted:
                relay = subject.relay(kind)
                ctx = Context(ctx.folder, 7, threads=1, rounds=ROUNDS, configs=dict(relay.configs), model=subject.model)
                start = resumed(ctx, subject.model.digest) or start
                ledger.keep_until(start.round)
        final = run_rounds(relay, start, plan, change(in_process(relay, subject.model, shards, ctx)), ctx, ledger)
        return wire.state_to_bytes(final)


def _kind(subject: Subject) -> str:
    """A kind of update that a plain aggregator accepts."""
    if subject.trains:
        return ""
    for kind in ("delta", "weights", "lora", f"delta{FROZEN}", f"weights{FROZEN}"):
        try:
            _run(subject, kind=kind)
        except (ConfigError, FederationError):
            continue
        return kind
    raise AssertionError("it aggregates none of the kinds delta, weights, lora")


def order_of_arrival_is_nothing(subject: Subject) -> None:
    """Replies in reverse order, each sent twice, end in the same bytes."""

    def reversed_twice(engine: Any) -> Any:
        def exchange(messages: Mapping[str, bytes]) -> Iterator[Any]:
            replies = [*engine(messages)]
            yield from (reply for reply in reversed(replies) for _ in range(2))

        return exchange

    kind = _kind(subject)
    require(_run(subject, kind=kind) == _run(subject, reversed_twice, kind), "the order of arrival changes the state")


def nan_changes_nothing(subject: Subject) -> None:
    """A client that sends NaN is left out, exactly as if it had not answered."""
    import numpy as np

    def without(engine: Any, reply: Callable[[bytes], list[Any]]) -> Any:
        def exchange(messages: Mapping[str, bytes]) -> Iterator[Any]:
            for client, raw in engine(messages):
                yield from reply(raw) if client == "b" else [(client, raw)]

        return exchange

    def poison(raw: bytes) -> list[Any]:
        update = wire.update_from_bytes(raw, "b")
        floats = sorted(name for name, array in update.arrays.items() if array.dtype.kind == "f")
        require(floats, "an update carries no floating-point array")
        array = np.array(update.arrays[floats[0]])
        array.reshape(-1)[:1] = np.nan
        poisoned = replace(update, arrays={**update.arrays, floats[0]: array})
        return [("b", wire.update_to_bytes(poisoned))]

    kind = _kind(subject)
    silent = _run(subject, lambda engine: without(engine, lambda raw: []), kind)
    require(_run(subject, lambda engine: without(engine, poison), kind) == silent, "a NaN reached the state")


def rounds_resume(subject: Subject) -> None:
    """A run stopped in round 3 and resumed in a new process's place ends in the same bytes."""
    kind = _kind(subject)
    whole = _run(subject, kind=kind)
    require(_run(subject, kind=kind) == whole, "two undisturbed runs differ")
    require(_run(subject, kind=kind, stop=3) == whole, "a resumed run ends in other bytes")


def compress_repeats(subject: Subject) -> None:
    """Two runs write the same files, a third in the first one's folder too; the model given stays as it is."""
    from edgellm_sdk.models import resolve

    model, before = tiny_made(), _contents(tiny_made().path)
    trains = any(option.name == "steps" for option in config.options(subject.loaded.plugin.config))
    relay = replace(subject, options=({"steps": 8} if trains else {}) | dict(subject.options)).relay()
    with _context(relay) as ctx, _context(relay) as other:
        made = [relay.compress(model, tiny_data(), c) for c in (ctx, other)]
        one, two = (_contents(c.folder / "model") for c in (ctx, other))
        require(one, "nothing was written into ctx.folder / 'model'")
        require(one == two, "two runs write different files")
        relay.compress(model, tiny_data(), replace(ctx, _kept={}))
        require(_contents(ctx.folder / "model") == one, "taking the run up again changes the files")
        found = resolve(str(made[0].path), cache=Path(_workshop().name) / "cache")
        require(found.digest == made[0].digest, "the model it returns is not the one it wrote")
    require(_contents(model.path) == before, "the model's files were changed")


def export_repeats(subject: Subject) -> None:
    """Two exports are equal byte for byte, and the digests are those of the files."""
    from edgellm_sdk.store import digest_file

    before = _contents(tiny_model().path)
    relay = subject.relay()
    written = []
    for _ in range(2):
        with _context(relay) as ctx:
            target = ctx.folder / "exported.file"
            artifact: Artifact = relay.export(tiny_model(), target, ctx)
            require(artifact.path.is_file(), "the file it names does not exist")
            require(len(artifact.digests) == len(artifact.files), "not every file has a digest")
            for path, digest in zip(artifact.files, artifact.digests, strict=True):
                require(digest_file(path) == digest, f"the digest of {path.name} is wrong")
            written.append(artifact.digests[0])
    require(written[0] == written[1], "two exports differ")
    require(_contents(tiny_model().path) == before, "the model's files were changed")


def deploy_answers(subject: Subject) -> None:
    """On a model it can run, a session repeats itself and its logits have the promised shape."""
    relay = subject.relay()
    with _context(relay) as ctx:
        try:
            session: Session = relay.deploy(tiny_model(), subject.loaded.plugin.name, ctx)
        except (DeviceError, ModelError):
            return  # not on this machine, or not this format; both are said in one line
        try:
            tokens = session.encode("win a free prize")
            once, again = session.generate(tokens, 8), session.generate(tokens, 8)
            require(once.tokens == again.tokens, "greedy generation does not repeat")
            logits = session.logits([tokens], [0])[0]
            require(logits.shape == (len(tokens), session.vocabulary), f"logits have the shape {logits.shape}")
        finally:
            session.close()


def probe_is_quiet(subject: Subject) -> None:
    """The probe answers twice alike in kind, without raising."""
    info = subject.loaded.module.edgellm_probe()
    require(info is None or info.available or info.reason, "it is not available and does not say why")
