"""One typed function per hook: calls the plugins of a run, checks what comes back, names who misbehaved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from edgellm_sdk import config as options
from edgellm_sdk import registry
from edgellm_sdk.context import Context
from edgellm_sdk.errors import EdgeLLMError, PluginError, printable
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.types import (
    Artifact,
    Assignment,
    Dataset,
    Metric,
    ModelHandle,
    Session,
    State,
    Update,
)

if TYPE_CHECKING:
    from edgellm_sdk.federate.rounds import Engine, Failure
    from edgellm_sdk.kit.adapters import Spec
    from edgellm_sdk.kit.objective import Objective

Result = TypeVar("Result")


class _Defaults:
    """What happens at hooks that no plugin of the run answers; it is asked last."""

    @hookimpl
    def edgellm_initialise(self, model: ModelHandle) -> State:
        return State(model.digest, 0, {})

    @hookimpl
    def edgellm_assign(self, state: State, clients: Sequence[str]) -> Mapping[str, Assignment]:
        return {c: Assignment(state.base, state.round + 1, c, state.sent, state.scalars) for c in clients}

    @hookimpl
    def edgellm_exchange(self, messages: Mapping[str, bytes], engine: Engine) -> Iterable[tuple[str, bytes | Failure]]:
        return engine(messages)


class Relay:
    """The plugins of one step with their configs. For every hook, `config` is that of the plugin that answers; the
    last plugin is asked first, and a wrapper is outside of those before it."""

    def __init__(self, plugins: Sequence[registry.Loaded], configs: Mapping[str, Any]) -> None:
        self.plugins = {loaded.plugin.name: loaded for loaded in plugins}
        self.configs = dict(configs)
        self._manager = registry.new_manager()
        self._manager.register(_Defaults(), "default")
        for loaded in self.plugins.values():
            self._manager.register(loaded.module, loaded.plugin.name)

    def _implementations(self, hook: str) -> list[Any]:
        """In the order of the plugins."""
        return [i for i in getattr(self._manager.hook, hook).get_hookimpls() if not i.wrapper]

    def answers(self, hook: str) -> str | None:
        """The plugin that is asked first for `hook`, or None when nobody implements it."""
        found = [i.plugin_name for i in self._implementations(hook) if i.plugin_name in self.plugins]
        return found[-1] if found else None

    def _call(
        self, hook: str, expected: Any, call: Callable[[Any, Any], Any], asked: Mapping[str, Any] | None = None
    ) -> Any:
        """The first plugin's answer, an instance of `expected`, or None. `asked` are options of it that this call
        changes."""
        owner = self.answers(hook) or "default"
        settings = self.configs.get(owner)
        if asked:
            settings = options.overridden(settings, asked, owner)
        return self._checked(owner, hook, expected, lambda: call(getattr(self._manager.hook, hook), settings))

    def _checked(self, owner: str, hook: str, expected: Any, call: Callable[[], Any]) -> Any:
        try:
            result = call()
        except (EdgeLLMError, KeyboardInterrupt):
            raise
        except Exception as error:
            if owner not in self.plugins or self.plugins[owner].source.origin == "built-in":
                raise
            reason = printable(f"{type(error).__name__}: {error}")[:160]
            raise PluginError(f"plugin {owner!r} failed: {reason}", hook) from error
        if result is not None and not isinstance(result, expected):
            raise PluginError(
                f"plugin {owner!r} returned {type(result).__name__}, not {expected.__name__}", hook, "tell its author"
            )
        return result

    def _chain(self, hook: str, expected: Any, name: str, value: Result, given: Mapping[str, Any]) -> Result:
        """`value`, passed as the argument `name` from plugin to plugin; one that returns None leaves it."""
        for i in self._implementations(hook):
            said = {**given, name: value, "config": self.configs.get(i.plugin_name)}

            def call(i: Any = i, said: Mapping[str, Any] = said) -> Any:
                return i.function(*(said[argument] for argument in i.argnames))

            changed: Result | None = self._checked(i.plugin_name, hook, expected, call)
            value = value if changed is None else changed
        return value

    def _need(self, hook: str, result: Result | None) -> Result:
        if result is None:
            raise PluginError(f"none of the plugins {', '.join(self.plugins)} handles this", hook)
        return result

    def initialise(self, model: ModelHandle, ctx: Context) -> State:
        hook = "edgellm_initialise"
        state: State | None = self._call(hook, State, lambda call, config: call(model=model, config=config, ctx=ctx))
        return self._need(hook, state)

    def cohort(self, clients: Sequence[str], count: int, cohort: int, attempt: int, ctx: Context) -> list[str] | None:
        hook = "edgellm_cohort"
        found: Sequence[str] | None = self._call(
            hook,
            Sequence,
            lambda call, config: call(
                clients=clients, count=count, cohort=cohort, attempt=attempt, config=config, ctx=ctx
            ),
        )
        if found is None:
            return None
        if not found or len(set(found)) != len(found) or not set(found) <= set(clients):
            raise PluginError(f"plugin {self.answers(hook)!r} did not choose among the clients enrolled", hook)
        return sorted(found)

    def exchange(
        self, messages: Mapping[str, bytes], engine: Engine, state: State, ctx: Context
    ) -> Iterable[tuple[str, bytes | Failure]]:
        hook = "edgellm_exchange"
        replies: Iterable[tuple[str, bytes | Failure]] = self._call(
            hook,
            Iterable,
            lambda call, config: call(messages=messages, engine=engine, state=state, config=config, ctx=ctx),
        )
        return replies

    def assign(
        self, state: State, clients: Sequence[str], data: Mapping[str, int], ctx: Context
    ) -> dict[str, Assignment]:
        hook = "edgellm_assign"
        found: Mapping[str, Assignment] | None = self._call(
            hook, Mapping, lambda call, config: call(state=state, clients=clients, data=data, config=config, ctx=ctx)
        )
        given = self._need(hook, found)
        if set(given) != set(clients) or not all(isinstance(a, Assignment) for a in given.values()):
            raise PluginError(f"plugin {self.answers(hook)!r} did not assign work to exactly the clients asked", hook)
        return {client: given[client] for client in clients}

    def prepare(self, data: Dataset, assignment: Assignment, ctx: Context) -> Assignment:
        given = {"data": data, "ctx": ctx}
        return self._chain("edgellm_prepare", Assignment, "assignment", assignment, given)

    def finetune(self, model: ModelHandle, data: Dataset, assignment: Assignment, ctx: Context) -> Update:
        """The client's whole turn: answered, or prepared and worked on under options that the assignment changes."""
        hook = "edgellm_answer"
        answer: Update | None = self._call(
            hook, Update, lambda call, config: call(data=data, assignment=assignment, config=config, ctx=ctx)
        )
        if answer is not None:
            return answer
        hook = "edgellm_finetune"
        try:
            prepared = self.prepare(data, assignment, ctx)
            update: Update | None = self._call(
                hook,
                Update,
                lambda call, config: call(model=model, data=data, assignment=prepared, config=config, ctx=ctx),
                prepared.options,
            )
        finally:
            ctx.drift = None
        return self._need(hook, update)

    def incoming(self, state: State, updates: Sequence[Update], ctx: Context) -> list[Update]:
        given = {"state": state, "ctx": ctx}
        return list(self._chain("edgellm_incoming", Sequence, "updates", updates, given))

    def screen(self, updates: Sequence[Update], state: State, ctx: Context) -> dict[str, str]:
        """Reasons to reject, by client; of several plugins' reasons the first is kept."""
        rejected: dict[str, str] = {}
        for reasons in self._manager.hook.edgellm_screen(updates=updates, state=state, ctx=ctx):
            for client, reason in reasons.items():
                rejected.setdefault(client, reason)
        return rejected

    def aggregate(self, state: State, updates: Sequence[Update], ctx: Context) -> State:
        hook = "edgellm_aggregate"
        new: State | None = self._call(
            hook, State, lambda call, config: call(state=state, updates=updates, config=config, ctx=ctx)
        )
        return self._need(hook, new)

    def personalise(self, model: ModelHandle, state: State, folder: Path, ctx: Context) -> ModelHandle:
        hook = "edgellm_personalise"
        handle: ModelHandle | None = self._call(
            hook,
            ModelHandle,
            lambda call, config: call(model=model, state=state, folder=folder, config=config, ctx=ctx),
        )
        return self._need(hook, handle)

    def compress(self, model: ModelHandle, data: Dataset | None, ctx: Context) -> ModelHandle:
        hook = "edgellm_compress"
        handle: ModelHandle | None = self._call(
            hook, ModelHandle, lambda call, config: call(model=model, data=data, config=config, ctx=ctx)
        )
        return self._need(hook, handle)

    def export(self, model: ModelHandle, target: Path, ctx: Context) -> Artifact:
        hook = "edgellm_export"
        artifact: Artifact | None = self._call(
            hook, Artifact, lambda call, config: call(model=model, target=target, config=config, ctx=ctx)
        )
        return self._need(hook, artifact)

    def deploy(self, subject: ModelHandle | Artifact, device: str, ctx: Context) -> Session:
        hook = "edgellm_deploy"
        session: Session | None = self._call(
            hook, Session, lambda call, config: call(subject=subject, device=device, config=config, ctx=ctx)
        )
        return self._need(hook, session)

    def objective(self, model: ModelHandle, spec: Spec, max_length: int, ctx: Context) -> Objective:
        hook = "edgellm_objective"
        found: Objective | None = self._call(
            hook,
            object,
            lambda call, config: call(model=model, spec=spec, max_length=max_length, config=config, ctx=ctx),
        )
        return self._need(hook, found)

    def measure(self, subject: Session | State, data: Dataset, ctx: Context) -> dict[str, Metric]:
        united: dict[str, Metric] = {}
        for metrics in self._manager.hook.edgellm_measure(subject=subject, data=data, ctx=ctx):
            united.update(metrics)
        return united

    def report(self, report: Any, ctx: Context) -> None:
        self._manager.hook.edgellm_report(report=report, ctx=ctx)
