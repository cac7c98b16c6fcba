"""One adapter for each user: names, what is kept aside, who gets what, and a stop in the middle."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm_sdk import registry, store
from edgellm_sdk.config import opt
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DeviceError, FederationError
from edgellm_sdk.federate import personal
from edgellm_sdk.federate.personal import BASE, GLOBAL, OWN, Parts, Personaliser, parted, safe_name
from edgellm_sdk.hookspecs import hookimpl
from edgellm_sdk.page import render
from edgellm_sdk.relay import Relay
from edgellm_sdk.report import Report
from edgellm_sdk.steps.fleet import describe
from edgellm_sdk.types import Assignment, Dataset, Example, Metric, ModelHandle, State, Update

NAMES = (
    "hamlet", "Hamlet", "HAMLET", "../../etc/passwd", "/abs", "..", ".", "-rf", "con", "nul", "com1", "a" * 255,
    "\u00e9mile", "e\u0301mile", "\U0001f469\u200d\U0001f4bb", "\u202egnp.exe", "name with  spaces", "a\\b", "x:y", "~",
    "$HOME", "*", "", "tab\there", "client-000",
)  # fmt: skip
MODEL = ModelHandle(Path("nowhere"), "base", "hf", "Llama", "float32", 1)


def examples(texts: Sequence[str]) -> Dataset:
    return Dataset(tuple(Example("", text) for text in texts), "", "")


# Names


def test_names_of_users_never_become_paths_unchecked() -> None:
    found = {name: safe_name(name) for name in NAMES}
    assert len({safe.lower() for safe in found.values()}) == len(NAMES)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,56}", safe) for safe in found.values())
    assert found["hamlet"] == "hamlet" and found["client-000"] == "client-000"
    assert found["con"] != "con" and found["nul"] != "nul"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_gives_a_safe_name_of_its_own(user: str) -> None:
    safe = safe_name(user)
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,56}", safe)
    if safe != user:  # whoever calls himself by another's file name gets another file
        assert safe_name(safe) != safe


# What is kept aside


def test_parts_are_disjoint_and_complete_and_follow_the_seed(tmp_path: Path) -> None:
    data = examples([f"line {i}" for i in range(50)])
    parts = parted(data, 0.2, Context(tmp_path, 3), "ann")
    assert (len(parts.deciding), len(parts.reporting), len(parts.training)) == (5, 5, 40)
    assert sorted((*parts.training, *parts.deciding, *parts.reporting)) == list(range(50))
    assert parts == parted(data, 0.2, Context(tmp_path, 3), "ann")
    assert parts != parted(data, 0.2, Context(tmp_path, 4), "ann") != parted(data, 0.2, Context(tmp_path, 4), "bob")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=40), st.floats(0.01, 0.9), st.integers(0, 5))
def test_no_example_kept_aside_has_a_copy_in_training(kinds: list[int], share: float, seed: int) -> None:
    data = examples([f"line {kind}" for kind in kinds])
    parts = parted(data, share, Context(Path(), seed), "ann")
    sides = [{kinds[i] for i in rows} for rows in (parts.training, parts.deciding, parts.reporting)]
    assert sorted((*parts.training, *parts.deciding, *parts.reporting)) == list(range(len(kinds)))
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert bool(parts.deciding) == bool(parts.reporting)
    assert parts.training or not kinds


@pytest.mark.parametrize("texts", [["one"], ["one", "two"], ["same"] * 9])
def test_with_too_few_examples_nothing_is_kept_aside(texts: list[str], tmp_path: Path) -> None:
    assert parted(examples(texts), 0.5, Context(tmp_path), "ann") == Parts(tuple(range(len(texts))))


# Who gets what: a method whose losses are written down


@dataclass(frozen=True)
class Config:
    steps: int = opt(4, "steps")


@dataclass(frozen=True)
class Stepless:
    rate: float = opt(1.0, "rate")


class Trainer:
    """theta counts steps; nobody aggregates or measures."""

    def __init__(self, losses: Mapping[tuple[str, int], float], error: Exception | None = None) -> None:
        self.losses, self.error = losses, error
        self.trained: list[tuple[str, int, int, list[str]]] = []

    @hookimpl
    def edgellm_initialise(self, model: ModelHandle) -> State:
        return State(model.digest, 0, {"theta": np.zeros(1)})

    @hookimpl
    def edgellm_finetune(self, data: Dataset, assignment: Assignment, config: Any, ctx: Context) -> Update:
        if self.error:
            raise self.error
        steps = getattr(config, "steps", 1)
        self.trained.append((assignment.client, steps, ctx.rounds, [e.completion for e in data.examples]))
        delta = {"theta": np.full(1, float(steps))}
        return Update(assignment.base, assignment.round, assignment.client, "delta", delta, len(data))

    @hookimpl
    def edgellm_personalise(self, model: ModelHandle, state: State, folder: Path) -> ModelHandle:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter.json").write_text(json.dumps(float(state.arrays["theta"][0])))
        return model


class Measured(Trainer):
    """Its loss on a data set is looked up by (the first example's text, theta)."""

    @hookimpl
    def edgellm_measure(self, subject: State, data: Dataset) -> dict[str, Metric]:
        loss = self.losses[data.examples[0].completion, int(subject.arrays["theta"][0])]
        return {"validation loss": Metric(loss, "nats/token", 7)}


class Method(Measured):
    @hookimpl
    def edgellm_aggregate(self, state: State, updates: Sequence[Update]) -> State:
        (update,) = updates
        theta = state.arrays["theta"] + update.arrays["theta"]
        return State(state.base, state.round + 1, {"theta": theta}, state.scalars, state.cohort + 1)


def relay_of(method: Any, config: type = Config) -> Relay:
    plugin = registry.Plugin(name="toy", summary="", version="1", config=config)
    hooks = tuple(name for name in dir(method) if name.startswith("edgellm_"))
    source = registry.Source("toy", "toy", "built-in")
    return Relay([registry.Loaded(plugin, method, source, hooks)], {"toy": config()})


GLOBAL_STATE = State("base", 9, {"theta": np.full(1, 2.0)}, {}, 5)


def losses_of(deciding: Sequence[float], reporting: Sequence[float]) -> dict[tuple[str, int], float]:
    """By candidate: base (theta 0), global (2), own (2 + 3 steps)."""
    parts = (("decide", deciding), ("report", reporting))
    return {(name, theta): loss for name, row in parts for theta, loss in zip((0, 2, 5), row, strict=True)}


def told(method: Method, tmp_path: Path) -> personal.Personal:
    found = Personaliser(relay_of(method), MODEL, GLOBAL_STATE, 3, Context(tmp_path))
    return found.personal("ann", examples(["mine"]), examples(["decide"]), examples(["report"]))


@pytest.mark.parametrize(
    ("deciding", "chosen"),
    [
        ((3.0, 2.0, 1.0), OWN),
        ((3.0, 1.0, 2.0), GLOBAL),
        ((1.0, 2.0, 3.0), BASE),
        ((1.0, 1.0, 1.0), BASE),
        ((2.0, 1.0, 1.0), GLOBAL),
        ((2.0, 1.0, math.nan), GLOBAL),
        ((2.0, math.inf, math.nan), BASE),
    ],
)
def test_the_deciding_part_chooses_and_a_tie_goes_to_the_more_general(
    deciding: tuple[float, ...], chosen: str, tmp_path: Path
) -> None:
    method = Method(losses_of(deciding, (1.5, 2.5, 9.0)))
    found = told(method, tmp_path)
    assert found.chosen == chosen and (found.own is not None) == (chosen == OWN)
    assert found.reporting == {BASE: 1.5, GLOBAL: 2.5, OWN: 9.0} and found.tokens == 7  # told as it is, also when bad
    assert method.trained == [("ann/own", 3, 1, ["mine"])]


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ((1.0, -1.0, 1.0, -1.0, 0.5), BASE),  # 0.1 with a standard error of 0.46
        ((0.1, 0.2, 0.15, 0.1, 0.1), OWN),  # 0.13 with 0.02
        ((0.1, 0.1), OWN),
        ((0.3, -0.1), BASE),  # 0.1 with 0.2
        ((-0.1, -0.1, -0.1), BASE),
    ],
)
def test_a_doubt_goes_to_the_more_general(gains: tuple[float, ...], chosen: str, tmp_path: Path) -> None:
    texts = [f"decide {i}" for i in range(len(gains))]
    losses = {(text, theta): 3.0 for text in texts for theta in (0, 2)}
    losses |= {(text, 5): 3.0 - gain for text, gain in zip(texts, gains, strict=True)}
    method = Method(losses | {("report", theta): 1.0 for theta in (0, 2, 5)})
    found = Personaliser(relay_of(method), MODEL, GLOBAL_STATE, 3, Context(tmp_path))
    told = found.personal("ann", examples(["mine"]), examples(texts), examples(["report"]))
    assert told.chosen == chosen and told.deciding[OWN] == pytest.approx(3.0 - np.mean(gains))


def test_losses_are_means_over_tokens_in_at_most_five_parts(tmp_path: Path) -> None:
    class Uneven(Method):
        @hookimpl
        def edgellm_measure(self, subject: State, data: Dataset) -> dict[str, Metric]:
            numbers = [int(example.completion) for example in data.examples]
            seen.append(numbers)
            return {"validation loss": Metric(sum(n * n for n in numbers) / sum(numbers), "nats/token", sum(numbers))}

    seen: list[list[int]] = []
    found = Personaliser(relay_of(Uneven({})), MODEL, GLOBAL_STATE, 3, Context(tmp_path))
    measured = found._measured(GLOBAL_STATE, examples([str(n) for n in range(1, 13)]))
    assert seen == [[1, 2], [3, 4], [5, 6, 7], [8, 9], [10, 11, 12]]
    assert measured.loss == pytest.approx(sum(n * n for n in range(1, 13)) / 78) and measured.tokens == 78
    assert measured.folds[0] == pytest.approx(5 / 3)


def test_training_that_fails_falls_back_and_says_why(tmp_path: Path) -> None:
    losses = losses_of((2.0, 1.0, 0.0), (2.0, 1.0, 0.0))
    found = told(Method(losses, FederationError("the training loss is not finite", "ann")), tmp_path)
    assert found.chosen == GLOBAL and found.why == "the training loss is not finite" and OWN not in found.reporting
    with pytest.raises(DeviceError):
        told(Method(losses, DeviceError("no memory")), tmp_path)


def test_a_method_without_steps_takes_as_many_rounds_and_one_that_measures_nothing_is_refused(tmp_path: Path) -> None:
    method = Method({(name, theta): 1.0 for name in ("decide", "report") for theta in (0, 2, 5)})
    found = Personaliser(relay_of(method, Stepless), MODEL, GLOBAL_STATE, 3, Context(tmp_path))
    found.personal("ann", examples(["mine"]), examples(["decide"]), examples(["report"]))
    assert [(steps, rounds) for _, steps, rounds, _ in method.trained] == [(1, 3)] * 3
    with pytest.raises(ConfigError, match="'toy' does not measure"):
        personal.alone(relay_of(Trainer({})), 3)


def test_what_works_around_the_method_has_no_part_and_fedavg_stands_in_for_its_rule() -> None:
    lora, fedavg = registry.get("lora", "finetune"), registry.get("fedavg", "aggregate")
    configs = {plugin.plugin.name: plugin.plugin.config() for plugin in (lora, fedavg)}
    by_itself, rounds = personal.alone(Relay([lora, fedavg], configs), 7)
    assert list(by_itself.plugins) == ["lora"] and rounds == 1 and by_itself.configs["lora"].steps == 7
    assert list(personal.alone(relay_of(Measured({})), 1)[0].plugins) == ["toy", "fedavg"]


# Everyone


def fleet(tmp_path: Path) -> tuple[Method, Personaliser, dict[str, tuple[Dataset, Parts]]]:
    method = Method(losses_of((3.0, 2.0, 1.0), (3.0, 2.0, 1.0)))
    found = Personaliser(relay_of(method), MODEL, GLOBAL_STATE, 3, Context(tmp_path))
    data = examples(["mine", "decide", "report"])
    shards = {name: (data, Parts((0,), (1,), (2,))) for name in ("../bob", "Ann", "Zoe")}
    return method, found, shards | {"few": (examples(["mine"]), Parts((0,)))}


def test_a_user_that_is_done_is_not_done_again(tmp_path: Path) -> None:
    method, found, shards = fleet(tmp_path)
    everyone: Callable[[], list[dict[str, Any]]] = lambda: list(personal.everyone(found, shards, tmp_path))  # noqa: E731
    first = everyone()
    assert [record["user"] for record in first] == ["../bob", "Ann", "Zoe", "few"]
    assert [client for client, *_ in method.trained] == ["../bob/own", "Ann/own", "Zoe/own"]
    assert first[3]["chosen"] == BASE and "too few" in first[3]["why"] and not first[3]["reporting"]
    own = tmp_path / first[0]["adapter"]
    assert own.parent == tmp_path / "users" and json.loads((own / "adapter.json").read_text()) == 5.0

    assert everyone() == first and len(method.trained) == 3
    (own / "adapter.json").write_text("6")  # no longer what was written
    assert everyone() == first and [client for client, *_ in method.trained[3:]] == ["../bob/own"]
    record = tmp_path / "checkpoint" / "users" / f"{safe_name('Ann')}.json"
    record.write_text(record.read_text()[:-20])
    assert everyone() == first and [client for client, *_ in method.trained[4:]] == ["Ann/own"]
    stolen = store.read_json(tmp_path / "checkpoint" / "users" / f"{safe_name('Zoe')}.json")
    store.write_json(record, stolen)  # another's record under this name counts for nothing
    assert everyone() == first and [client for client, *_ in method.trained[5:]] == ["Ann/own"]
    outside = [path for path in tmp_path.iterdir() if path.name not in ("users", "checkpoint")]
    assert not outside and not (tmp_path.parent / "bob").exists()


def test_the_report_tells_gains_of_what_is_shipped_and_counts_who_lost() -> None:
    def record(user: str, chosen: str, base: float, shared: float, own: float | None) -> dict[str, Any]:
        losses = {BASE: base, GLOBAL: shared, OWN: own}
        return {"user": user, "chosen": chosen, "reporting": losses, "tokens": 5}

    records = [record(f"u{i}", OWN, 3.0, 2.0, 3.0 - 0.1 * i) for i in range(11)]
    records += [record("harmed", OWN, 1.0, 1.0, 1.5), {**record("few", BASE, 0, 0, 0), "reporting": {}}]
    report = Report.begin("finetune")
    describe(report, records)
    gains = sorted([0.1 * i for i in range(11)] + [-0.5])
    for name, share in (("p10", 0.1), ("median", 0.5), ("p90", 0.9)):
        metric = report.metrics[f"gain over base, {name}"]
        assert metric.value == pytest.approx(np.quantile(gains, share)) and metric.n == 12
    assert report.metrics["users worse off than with base"].value == 1
    assert report.metrics["users worse off than with global"].value == 11
    assert report.metrics["users with an adapter of their own"].value == 12
    (curve,) = (points for name, points in report.curves.items() if name.endswith("to base"))
    assert [y for _, y in curve] == pytest.approx(gains)
    (table,) = report.tables
    assert table["rows"][0][:2] == ["harmed", OWN] and len(table["rows"]) == 13
    describe(report, [record(f"u{i}", OWN, 3.0, 2.0, 1.0) for i in range(1000)])
    assert len(report.tables[1]["rows"]) == 30 and "1000" in report.tables[1]["title"]
    assert all(len(points) <= 400 for points in report.curves.values())


def test_the_page_draws_every_user_on_a_line_of_its_own() -> None:
    records = [
        {"user": name, "chosen": chosen, "reporting": {BASE: 3.0, GLOBAL: 2.0, **own}, "tokens": 5}
        for name, chosen, own in (("<b>ann</b>", OWN, {OWN: 1.0}), ("bob", GLOBAL, {OWN: None}), ("a" * 40, BASE, {}))
    ]
    report = Report.begin("finetune")
    describe(report, [*records, {"user": "few", "chosen": BASE, "reporting": {}, "tokens": 0}])
    page = render([report])
    drawn = page[page.index("Loss of each user") :]
    drawn = drawn[: drawn.index("</figure>")]
    assert drawn.count("<circle") == 3 + 2 + 2 and drawn.count('r="6"') == 3
    assert "<b>ann</b>" not in page and "&lt;b&gt;ann&lt;/b&gt;, own: 1" in drawn and "few" not in drawn
