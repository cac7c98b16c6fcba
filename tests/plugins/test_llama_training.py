"""Training over a GGUF file in llama.cpp: torch's losses, the same bits twice, adapters that run elsewhere."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgellm_hardware import cpu, llama_cpp
from edgellm_plugins.export import gguf, gguf_container
from edgellm_plugins.zeroth_order import estimator

import edgellm_sdk as edgellm
from edgellm_sdk import gate, gguf_file, models, store
from edgellm_sdk.cli.main import main
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, DataError, DeviceError, ModelError
from edgellm_sdk.kit import adapters, prompts
from edgellm_sdk.kit.frozen import Frozen
from edgellm_sdk.kit.objective import Objective, objective
from edgellm_sdk.steps.delivery import open_session
from edgellm_sdk.types import Array, Arrays, Artifact, Dataset, Example, ModelHandle

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.llama

from edgellm_hardware.llama_cpp import training  # noqa: E402
from edgellm_hardware.llama_cpp.engine import set_adapters  # noqa: E402
from edgellm_hardware.llama_cpp.training import Perturbed  # noqa: E402

SPEC = adapters.Spec("lora-fa", 0, 4, 8.0, ("q_proj", "k_proj", "down_proj"))
H = 0.05
Values = dict[str, np.ndarray]


def dataset(n: int = 24) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [
        Example(({"role": "user", "content": f"{words[i % 4]} {i}"},), ("spam", "ham")[i % 2], ("spam", "ham")[i % 2])
        for i in range(n)
    ]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"))


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny.gguf in F32 and small.gguf in Q8_0, both of `tiny_llama`."""
    folder = tmp_path_factory.mktemp("llama training")
    handle = models.resolve(str(tiny_llama))
    for name, kind in (("tiny", "f32"), ("small", "q8_0")):
        config = gguf.Config(type=kind, modelfile=False)
        gguf.edgellm_export(handle, folder / f"{name}.gguf", config, Context(folder, threads=1))
    return folder


def as_file(path: Path) -> ModelHandle:
    return dataclasses.replace(models.resolve(str(path)), path=path, format="gguf")


def context(folder: Path, device: str = "llama_cpp", **options: Any) -> Context:
    made = llama_cpp.Config(**{"threads": 1, **options})
    return Context(folder, seed=7, device=device, threads=1, configs={"llama_cpp": made})


def opened(path: Path, folder: Path, spec: adapters.Spec = SPEC, **options: Any) -> Perturbed:
    found = objective(as_file(path), spec, context(folder, **options), max_length=64)
    assert isinstance(found, Perturbed)
    return found


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Perturbed]:
    found = opened(folder / "tiny.gguf", folder)
    yield found
    found.close()


@pytest.fixture(scope="module")
def torch_one(folder: Path) -> Frozen:
    stream = context(folder).stream("adapter")
    return Frozen(models.resolve(str(folder / "tiny.gguf")), SPEC, stream, "float32", max_length=64)


def somewhere(start: Arrays, seed: int = 1, size: float = 0.05) -> Values:
    """A theta away from zero, of the shapes of `start`."""
    drawn = estimator.direction(estimator.shapes_of(start), seed, 0)
    return {name: value * np.float32(size) for name, value in drawn.items()}


def directions(start: Arrays, count: int = 3) -> list[Values]:
    return [estimator.direction(estimator.shapes_of(start), 3, k) for k in range(count)]


def both_sides(subject: Objective, theta: Arrays, vs: Sequence[Arrays], h: float = H) -> np.ndarray:
    pairs = [v for v in vs for _ in range(2)]
    return subject.evaluate("batch", lambda: dataset(8), theta, pairs, [h, -h] * len(vs))


def test_tokens_are_those_of_the_hf_tokenizer(live: Perturbed, torch_one: Frozen) -> None:
    chat = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "naïve 😀 prices: 1000 pounds " * 9},
    )
    rows = [
        *dataset(4).examples,
        Example("win a free", " prize"),
        Example("", "the quick brown fox"),
        Example(chat, "no"),
        Example("<|im_start|>user", "x"),
    ]
    for length in (12, 48, 400):
        data = Dataset(tuple(rows), f"rows-{length}")
        live._max_length = length
        found = live.encode(f"rows-{length}", lambda data=data: data)
        live._max_length = 64
        assert found == prompts.encode(torch_one.tokenizer, rows, length)


@pytest.mark.parametrize("kind", ["lora", "lora-fa"])
@pytest.mark.parametrize("layers", [0, 1])
def test_starts_where_torch_starts(kind: str, layers: int, folder: Path) -> None:
    spec = adapters.Spec(kind, layers, 4, 8.0, ("proj",))
    ours = opened(folder / "tiny.gguf", folder, spec)
    handle = models.resolve(str(folder / "tiny.gguf"))
    theirs = Frozen(handle, spec, context(folder).stream("adapter"), "float32").trainables
    for mine, other in ((ours.initial, theirs.initial), (ours._frozen, theirs.frozen)):
        assert list(mine) == list(other)
        assert all((mine[name] == other[name]).all() and mine[name].dtype == np.float32 for name in other)
    assert len(ours.initial) == (14 if kind == "lora" else 7) * (layers or 2)
    ours.close()


def test_two_adapters_are_the_one_with_both_sums(folder: Path) -> None:
    """Sheet check 6: theta and v at (1, h) against a file that holds B + h v, float32 and quantised weights."""
    for name, tolerance in (("tiny", 5e-7), ("small", 2e-3)):  # a rounding that flips is a jump
        subject = opened(folder / f"{name}.gguf", folder)
        theta, (v,) = somewhere(subject.initial), directions(subject.initial, 1)
        pair = both_sides(subject, theta, [v])
        batch = {"sequences": [list(e.tokens) for e in subject.encode("batch", lambda: dataset(8))]}
        batch |= {"starts": [e.start for e in subject.encode("batch", lambda: dataset(8))]}
        for value, h in zip(pair, (H, -H), strict=True):
            subject._hold("whole", {key: b + np.float32(h) * v[key] for key, b in theta.items()})
            one = subject.session.ask({"do": "losses", **batch, "mixes": [[("whole", 1.0)]]})["losses"][0]
            assert value == pytest.approx(one, abs=tolerance)
        assert abs(pair[0] - pair[1]) > 10 * tolerance  # the two sides differ by far more
        subject.close()


def test_without_adapters_it_is_the_base(live: Perturbed, folder: Path) -> None:
    """Sheet check 6: detached, the loss has the bits it had before any adapter was attached."""
    fresh = opened(folder / "tiny.gguf", folder)
    rows = fresh.encode("batch", lambda: dataset(8))
    question = {"do": "losses", "sequences": [e.tokens for e in rows], "starts": [e.start for e in rows], "mixes": [[]]}
    before = fresh.session.ask(question)
    theta = somewhere(fresh.initial)
    assert both_sides(fresh, theta, directions(theta, 1))[0] != before["losses"][0]
    assert fresh.session.ask(question) == before
    at_zero = {name: np.zeros_like(value) for name, value in theta.items()}
    assert fresh.evaluate("batch", lambda: dataset(8), at_zero, [at_zero], [0.0])[0] == before["losses"][0]
    fresh.close()


def test_twice_the_same_question_gives_the_same_bits(live: Perturbed) -> None:
    """Also after larger batches, which make the contexts anew, and after numbers that are not finite."""
    theta, vs = somewhere(live.initial), directions(live.initial)
    first = both_sides(live, theta, vs)
    assert (both_sides(live, theta, vs) == first).all()
    assert len(set(first)) == len(first)
    other = somewhere(live.initial, seed=2)
    live.evaluate("large", lambda: dataset(40), other, vs[:1], [H])
    assert (both_sides(live, theta, vs) == first).all()
    broken = {name: np.full_like(value, np.inf) for name, value in theta.items()}
    assert not np.isfinite(live.evaluate("batch", lambda: dataset(8), broken, vs[:1], [H])).any()
    assert (both_sides(live, theta, vs) == first).all()


@pytest.mark.parametrize("contexts", [2, 3])
def test_more_contexts_change_no_bit(contexts: int, live: Perturbed, folder: Path) -> None:
    """Sheet check 7."""
    theta, vs = somewhere(live.initial), directions(live.initial, 4)
    several = opened(folder / "tiny.gguf", folder, contexts=contexts, threads=2)
    assert (both_sides(several, theta, vs) == both_sides(live, theta, vs)).all()
    steps = [H, H, 0.0, H]
    found = [o.evaluate("batch", lambda: dataset(8), theta, vs, steps) for o in (several, live)]
    assert (found[0] == found[1]).all()
    several.close()


def test_jvp_is_that_of_torch(live: Perturbed, torch_one: Frozen) -> None:
    """Float32 weights, the same directions: derivatives agree to 1e-4 of their size."""
    theta, vs = somewhere(live.initial), directions(live.initial, 6)
    for difference in ("central", "forward"):
        ours, theirs = (
            estimator.probe(partial(o.evaluate, "batch", lambda: dataset(8)), theta, vs, H, difference)
            for o in (live, torch_one)
        )
        scale = float(np.abs(theirs.jvp).mean())
        np.testing.assert_allclose(ours.jvp, theirs.jvp, atol=1e-4 * scale)
        np.testing.assert_allclose(ours.loss, theirs.loss, atol=2e-6)
        assert ours.forwards == theirs.forwards and scale > 0.05


def test_jvp_on_quantised_weights_is_near(folder: Path) -> None:
    """Q8_0 rounds activations too: the derivatives stay those of the model, though not to the last digit."""
    ours = opened(folder / "small.gguf", folder)
    handle = models.resolve(str(folder / "small.gguf"))
    theirs = Frozen(handle, SPEC, context(folder).stream("adapter"), "float32", max_length=64)
    theta, vs = somewhere(ours.initial), directions(ours.initial, 12)
    mine, other = (
        estimator.probe(partial(o.evaluate, "batch", lambda: dataset(8)), theta, vs, H) for o in (ours, theirs)
    )
    assert np.corrcoef(mine.jvp, other.jvp)[0, 1] > 0.99
    ours.close()


def test_where_a_trains_too(folder: Path) -> None:
    """Kind `lora` is not linear in theta: every point is a file of its own, and agrees with torch."""
    spec = dataclasses.replace(SPEC, kind="lora")
    handle = models.resolve(str(folder / "tiny.gguf"))
    theirs = Frozen(handle, spec, context(folder).stream("adapter"), "float32", max_length=64)
    ours = opened(folder / "tiny.gguf", folder, spec, contexts=2)
    theta = {name: value + somewhere(ours.initial)[name] for name, value in ours.initial.items()}
    vs = directions(theta)
    np.testing.assert_allclose(both_sides(ours, theta, vs), both_sides(theirs, theta, vs), atol=2e-6)
    ours.close()


@pytest.mark.parametrize("share", [0, 1])
def test_a_large_adapter_is_not_held_twice(
    share: int, folder: Path, torch_one: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SMALL", share)
    ours, held, most = opened(folder / "tiny.gguf", folder), set[str](), list[int]()
    theta, vs = somewhere(ours.initial), directions(ours.initial)
    ask = ours.session.ask

    def watched(request: dict[str, Any]) -> Any:
        if request["do"] == "hold":
            (held.add if request["path"] else held.discard)(request["name"])
            most.append(len(held))
        return ask(request)

    monkeypatch.setattr(ours.session, "ask", watched)
    ours.measure(theta, dataset(4))
    np.testing.assert_allclose(both_sides(ours, theta, vs), both_sides(torch_one, theta, vs), atol=2e-6)
    assert max(most) == 1 + share
    ours.close()


def test_measures_as_torch_does(live: Perturbed, torch_one: Frozen) -> None:
    theta = somewhere(live.initial, size=0.3)
    ours, theirs = live.measure(theta, dataset()), torch_one.measure(theta, dataset())
    assert ours["balanced accuracy"] == theirs["balanced accuracy"]
    assert ours["validation loss"].value == pytest.approx(theirs["validation loss"].value, abs=2e-6)
    assert ours["validation loss"].ci95 == pytest.approx(theirs["validation loss"].ci95, abs=1e-5)
    unlabelled = Dataset((Example("", "the quick brown fox"), Example("win a", " prize")), "unlabelled")
    assert (
        live.measure(theta, unlabelled)["validation loss"].n
        == torch_one.measure(theta, unlabelled)["validation loss"].n
    )


def test_the_top_ffn_needs_only_the_scored_positions(folder: Path) -> None:
    """The same losses and bits as any other run, from a fraction of the tokens, batches taking turns, two contexts."""
    spec = adapters.Spec("lora-fa", 1, 4, 8.0, ("down_proj", "up_proj"))
    handle = models.resolve(str(folder / "tiny.gguf"))
    theirs = Frozen(handle, spec, context(folder).stream("adapter"), "float32", max_length=64)
    ours, pair = (opened(folder / "tiny.gguf", folder, spec, contexts=n) for n in (1, 2))
    theta, vs = somewhere(ours.initial, size=0.3), directions(ours.initial)
    first = both_sides(ours, theta, vs)
    np.testing.assert_allclose(first, both_sides(theirs, theta, vs), atol=2e-6)
    assert len(set(first)) == len(first)
    rows = ours.encode("batch", lambda: dataset(8))
    whole = sum(len(row.tokens) - 1 for row in rows)
    scored = sum(len(row.tokens) - row.start for row in rows)
    assert ours.session.stats().prompt_tokens == whole - scored + 6 * scored < 2 * whole
    broken = {name: np.full_like(value, np.nan) for name, value in theta.items()}
    for between in (dataset(5), dataset(30)):
        name = between.fingerprint
        ours.evaluate(name, lambda between=between: between, theta, vs[:1], [H])
        assert not np.isfinite(ours.evaluate(name, lambda between=between: between, broken, vs[:1], [H])).any()
        assert (both_sides(ours, theta, vs) == first).all()
        ours.measure(theta, between)
        assert (both_sides(ours, theta, vs) == first).all()
    assert (both_sides(pair, theta, vs) == first).all()
    ours.close()
    pair.close()


def test_a_batch_larger_than_a_call_is_split(live: Perturbed, folder: Path) -> None:
    narrow = opened(folder / "tiny.gguf", folder, context=80)
    theta, vs = somewhere(live.initial), directions(live.initial, 1)
    np.testing.assert_allclose(both_sides(narrow, theta, vs), both_sides(live, theta, vs), atol=2e-6)
    narrow._max_length = 200
    long = Dataset((Example("the quick brown fox " * 40, "x"),), "long")
    with pytest.raises(DataError, match="do not fit 80"):
        narrow.evaluate("long", lambda: long, theta, vs, [H])
    assert both_sides(narrow, theta, vs).shape == (2,)  # the child lives
    narrow.close()


def test_the_engine_process_has_no_torch(live: Perturbed) -> None:
    both_sides(live, somewhere(live.initial), directions(live.initial, 1))
    mapped = Path(f"/proc/{live.session.pid}/maps").read_text()
    assert "libllama" in mapped and "libtorch" not in mapped


def test_nothing_is_left_behind(folder: Path) -> None:
    subject = opened(folder / "tiny.gguf", folder)
    both_sides(subject, somewhere(subject.initial), directions(subject.initial))
    place, pid = Path(subject._folder.name), subject.session.pid
    assert list(place.iterdir()) == [] and place.stat().st_mode & 0o077 == 0
    subject.close()
    assert not place.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


class TestWholeRun:
    """fwdllm over the F32 file in llama.cpp and, converted, in torch: one seed, one data set, one result."""

    OPTIONS = {
        "layers": 1, "rank": 4, "alpha": 8.0, "batch_size": 8, "max_length": 64, "perturbations": 4, "tau": 1e9,
        "learning_rate": 2.0, "precision": "float32", "targets": "q_proj,down_proj",
    }  # fmt: skip

    @pytest.fixture(scope="class")
    def runs(self, folder: Path) -> dict[str, edgellm.Outcome]:
        data = folder / "my.jsonl"
        rows = [{"text": text, "label": label} for text, label in
                (("win a prize now", "spam"), ("mum is home", "ham"), ("call this number", "spam"),
                 ("see you at dinner", "ham"))]  # fmt: skip
        data.write_text(
            "".join(json.dumps({**row, "text": f"{row['text']} {i}"}) + "\n" for i in range(8) for row in rows)
        )
        return {
            device: edgellm.finetune(
                "fwdllm", str(folder / "tiny.gguf"), str(data), folder / f"run-{device}", clients=2, rounds=25, seed=3,
                device=device, watch=5, options=self.OPTIONS,
            )
            for device in ("cpu", "llama_cpp")
        }  # fmt: skip

    def test_updates_agree_and_the_loss_falls(self, runs: dict[str, edgellm.Outcome]) -> None:
        theirs, ours = (adapters.arrays(runs[device].folder / "model") for device in ("cpu", "llama_cpp"))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name.endswith("lora_A"):
                assert (ours[name] == value).all()
            else:
                scale = float(np.abs(value).mean())
                assert scale > 1e-3
                np.testing.assert_allclose(ours[name], value, atol=2e-3 * scale)
        for key in ("training loss over rounds", "validation loss over rounds"):
            curves = {device: np.array(runs[device].report.curves[key]) for device in runs}
            np.testing.assert_allclose(curves["llama_cpp"], curves["cpu"], atol=1e-4)
        training = [y for _, y in runs["llama_cpp"].report.curves["training loss over rounds"]]
        assert np.mean(training[-5:]) < 0.9 * np.mean(training[:2])
        assert runs["llama_cpp"].report.metrics["forwards"] == runs["cpu"].report.metrics["forwards"]

    def test_the_adapter_runs_in_both_worlds(self, runs: dict[str, edgellm.Outcome], folder: Path) -> None:
        """Sheet check 9: merged in torch, and beside the file in llama.cpp, with the same distributions."""
        place = runs["llama_cpp"].folder
        handle = models.resolve(str(place))
        assert handle.format == "hf" and handle.adapters == (place.absolute() / "model",)
        merged = handle.load(merge=True)
        ctx = Context(folder, threads=1)
        reference = cpu.edgellm_deploy(handle, "cpu", cpu.Config(), ctx)
        device = open_session(handle, ctx, "llama_cpp", {"threads": 1})
        base = open_session(as_file(folder / "tiny.gguf"), ctx, "llama_cpp", {"threads": 1})
        assert merged.dtype == next(merged.model.parameters()).dtype
        ids = device.prompt_ids(({"role": "user", "content": "win a prize now"},))
        rows = [session.logits([ids], [0])[0].astype(np.float64) for session in (reference, device, base)]
        import torch

        rows.append(merged.model(torch.tensor([ids])).logits[0].double().numpy())
        logs = [row - np.log(np.exp(row).sum(-1, keepdims=True)) for row in rows]
        kl = [float((np.exp(logs[3]) * (logs[3] - other)).sum(-1).mean()) for other in logs[:3]]
        assert kl[0] < 1e-6 and kl[1] < 1e-6 and kl[2] > 1e-3
        for session in (reference, device, base):
            session.close()

    def test_export_writes_the_same_adapter_file(self, runs: dict[str, edgellm.Outcome], folder: Path) -> None:
        place = runs["llama_cpp"].folder
        target = folder / "exported.gguf"
        config = gguf.Config(adapter="separate", modelfile=False)
        gguf.edgellm_export(models.resolve(str(place)), target, config, Context(folder))
        ours, theirs = gguf_file.read(place / "model" / "adapter.gguf"), gguf_file.read(target)
        assert ours.metadata == {**theirs.metadata, "general.name": "tiny"}
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name in theirs.tensors:
            assert (ours.tensor_bytes(name) == theirs.tensor_bytes(name)).all()

    def test_the_run_names_its_files(self, runs: dict[str, edgellm.Outcome]) -> None:
        place = runs["llama_cpp"].folder
        assert "model/adapter.gguf" in store.read_json(place / "MANIFEST.json")["files"]
        assert Path(store.read_json(place / "model/base.json")["path"]).name == "tiny.gguf"


def toy(path: Path) -> Path:
    """32 labelled texts as a JSONL file."""
    texts = (("win a prize now", "spam"), ("mum is home", "ham"), ("call this number", "spam"), ("see you", "ham"))
    rows = [{"text": f"{text} {i}", "label": label} for i in range(8) for text, label in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclasses.dataclass(frozen=True)
class Personalised:
    """A run over the quantised file `base`; `data` is what it was tuned on."""

    base: Path
    data: Path
    folder: Path

    @property
    def handle(self) -> ModelHandle:
        return models.resolve(str(self.folder))


class TestThePersonalisedModelPassesTheGate:
    """Trained over Q8_0 or Q4_1 blocks in llama.cpp, delivered as an adapter or merged."""

    @pytest.fixture(scope="class", params=["q8_0", "q4_1"])
    def run(
        self, request: pytest.FixtureRequest, folder: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> Personalised:
        place = tmp_path_factory.mktemp(request.param)
        data, base = toy(place / "my.jsonl"), folder / "small.gguf"
        if request.param == "q4_1":
            options = {"format": "q4_1"}
            edgellm.compress("gptq", str(tiny_llama), place / "packed", data=str(data), options=options)
            base = place / "base.gguf"
            edgellm.export("gguf", str(place / "packed"), base, gate=False, options={"modelfile": False})
        kinds = {info.type for info in gguf_file.read(base).tensors.values()}
        assert request.param.upper() in kinds
        options = {
            "layers": 0, "rank": 4, "alpha": 8.0, "max_length": 64, "perturbations": 8, "tau": 1e9, "optimizer": "adam",
            "learning_rate": 0.1, "targets": "q_proj,k_proj,down_proj", "llama_cpp": {"threads": 1, "contexts": 2},
        }  # fmt: skip
        edgellm.finetune(
            "fwdllm", str(base), str(data), place / "run", rounds=20, device="llama_cpp", watch=0, options=options
        )
        return Personalised(base, data, place / "run")

    @pytest.mark.parametrize("adapter", ["separate", "merge"])
    def test_export_with_the_gate_on(self, adapter: str, run: Personalised, tmp_path: Path) -> None:
        done = edgellm.export(
            "gguf", str(run.folder), tmp_path / "out.gguf", data=str(run.data),
            options={"adapter": adapter, "modelfile": False},
        )  # fmt: skip
        assert done.report.verified["passed"] and (tmp_path / "out.gguf").is_file()
        assert {"kl mean", "top-1", "continuation"} <= {check["name"] for check in done.report.verified["checks"]}

    def test_on_the_very_file_it_was_trained_over(self, run: Personalised, tmp_path: Path) -> None:
        """`adapter.gguf` on the quantised base against torch on the decoded one; another adapter is caught."""
        asked = tuple(row.prompt for row in dataset(4).examples)
        for sign, name in ((1.0, "same"), (-1.0, "other")):
            path = tmp_path / f"{name}.gguf"
            file = gguf_file.read(run.folder / "model" / "adapter.gguf")
            arrays: dict[str, Array] = {}
            for key in file.tensors:
                found = file.tensor_bytes(key).view(np.float32).reshape(file.tensors[key].shape[::-1])
                arrays[key] = found * np.float32(sign if key.endswith("lora_b") else 1)
            plan = [gguf_container.Planned(key, array.shape, "F32") for key, array in arrays.items()]
            about = {
                "general.type": gguf_container.Value("string", "adapter"),
                "general.architecture": gguf_container.Value("string", "llama"),
                "adapter.type": gguf_container.Value("string", "lora"),
                "adapter.lora.alpha": gguf_container.Value("f32", 4.0),
            }
            gguf_container.write(path, about, plan, arrays.items())
            artifact = Artifact((path,), ("",), "gguf", "llama_cpp", run.handle.digest, {"kind": "adapter"})
            result = gate.verify_export(
                run.handle, artifact, Context(tmp_path, threads=1), asked, gate.BLOCKS, base=run.base
            )
            assert result.passed == (name == "same"), result.reason
        checks = {check.name: check for check in result.checks}
        assert not checks["kl mean"].passed

    def test_it_loads_in_peft_with_the_same_logits(self, run: Personalised) -> None:
        """Sheet check 9, on the decoded base."""
        import torch
        from peft import PeftModel

        handle = run.handle
        session = cpu.edgellm_deploy(handle, "cpu", cpu.Config(), Context(run.folder, threads=1))
        ids = session.prompt_ids(({"role": "user", "content": "win a prize now"},))
        expected = session.logits([ids], [0])[0]
        plain = dataclasses.replace(handle, adapters=()).load(dtype="float32").model
        with torch.no_grad():
            before = plain(torch.tensor([ids])).logits[0].numpy().copy()
            tuned = PeftModel.from_pretrained(plain, str(run.folder / "model")).eval()
            found = tuned(torch.tensor([ids])).logits[0].numpy()
        session.close()
        assert np.abs(found - expected).max() <= 1e-5 and np.abs(before - expected).max() > 0.1


@pytest.mark.parametrize("method", ["mezo", "fzoo", "lozo", "grzo", "p-rge", "fedkseed", "fedkseed-pro", "decomfl"])
def test_every_seed_method_trains_on_it(method: str, folder: Path, tmp_path: Path) -> None:
    """The same seeds, over the file in llama.cpp and in torch: the same numbers up to rounding."""
    options = {"layers": 1, "rank": 4, "steps": 2, "batch_size": 4, "precision": "float32", "learning_rate": 0.05}
    places = [
        edgellm.finetune(
            method, str(folder / "tiny.gguf"), str(toy(tmp_path / "my.jsonl")), tmp_path / device, rounds=3, seed=3,
            device=device, watch=0, options=options,
        ).folder / "model"
        for device in ("cpu", "llama_cpp")
    ]  # fmt: skip
    theirs, ours = map(adapters.arrays, places)
    moved = [name for name in theirs if name.endswith("lora_B")]
    assert moved and all(np.abs(theirs[name]).max() > 1e-3 for name in moved)
    for name in moved:
        np.testing.assert_allclose(ours[name], theirs[name], atol=5e-3 * float(np.abs(theirs[name]).max()))


def test_options_of_the_device_reach_the_engine(folder: Path, tmp_path: Path) -> None:
    """From the command line: a context too short for the texts is the engine's to refuse; what training fixes, ours."""
    words = ["finetune", "-p", "fwdllm", "-m", str(folder / "tiny.gguf"), "-d", str(toy(tmp_path / "my.jsonl"))]
    words += ["--device", "llama_cpp", "--rounds", "1", "--watch", "0", "--quiet", "--layers", "1"]
    for number, (option, value, code) in enumerate(
        (("context", "16", 8), ("contexts", "2", 0), ("cache", "f32", 3), ("adapters", "x.gguf", 3))
    ):
        flags = [f"--llama-cpp-{option}", value, "--llama-cpp-threads", "1", "--output", str(tmp_path / str(number))]
        with pytest.raises(SystemExit) as left:
            main([*words, *flags])
        assert (left.value.code or 0) == code, option


def test_eval_takes_the_run_on_either_device(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Is '{i}' spam?", "completion": "yes"}) + "\n" for i in range(6)))
    done = edgellm.finetune(
        "fwdllm", str(folder / "tiny.gguf"), str(data), tmp_path / "run", rounds=2, device="llama_cpp", watch=0,
        options={"layers": 1, "rank": 2, "max_length": 48},
    )  # fmt: skip
    losses = [
        edgellm.evaluate(str(done.folder), str(data), device=device, split="train").report.metrics["loss"].value
        for device in ("cpu", "llama_cpp")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-2) and math.isfinite(losses[0])


@pytest.mark.parametrize("kind", ["adapter", "norm", "layers"])
def test_other_kinds_are_refused(kind: str, folder: Path) -> None:
    spec = dataclasses.replace(SPEC, kind=kind)
    with pytest.raises(ConfigError, match=f"not '{kind}'") as caught:
        objective(as_file(folder / "tiny.gguf"), spec, context(folder))
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)


def test_what_a_user_can_get_wrong(folder: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "tiny.gguf"
    for spec, match in (
        (dataclasses.replace(SPEC, layers=9), "the model has 2"),
        (dataclasses.replace(SPEC, targets=("c_attn",)), "no module ends in c_attn"),
    ):
        with pytest.raises(ConfigError, match=match):
            objective(as_file(path), spec, context(folder))
    with pytest.raises(ModelError, match="over GGUF files"):
        objective(models.resolve(str(tiny_llama)), SPEC, context(folder))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install 'edgellm-sdk\[llama\]'"):
        llama_cpp.edgellm_objective(as_file(path), SPEC, 64, llama_cpp.Config(), context(folder))


class OldBinding:
    """What llama-cpp-python offered before 0.3.17: one adapter added at a time, none replaced."""

    def __init__(self) -> None:
        self.attached: list[tuple[int, float]] = []

    def llama_clear_adapter_lora(self, context: object) -> None:
        self.attached.clear()

    def llama_set_adapter_lora(self, context: object, adapter: int, scale: float) -> int:
        self.attached.append((adapter, scale))
        return 0


def test_older_bindings_get_the_whole_set_too() -> None:
    lib = OldBinding()
    for wanted in ([(1, 1.0), (2, 0.05)], [(1, 1.0), (2, -0.05)], []):
        assert set_adapters(lib, None, wanted) == 0
        assert lib.attached == wanted


def test_a_newer_binding_is_never_asked_for_one_adapter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """There `llama_set_adapter_lora` still exists, but replaces the set."""
    import ctypes

    class NewBinding(OldBinding):
        llama_adapter_lora_p_ctypes = ctypes.c_void_p

        def llama_set_adapters_lora(self, context: object, handles: Any, count: int, scales: Any) -> int:
            self.attached = [(handles[k], round(scales[k], 6)) for k in range(count)]
            return 0

    lib = NewBinding()
    monkeypatch.setattr(lib, "llama_set_adapter_lora", None)
    for wanted in ([(1, 1.0), (2, 0.05)], []):
        assert set_adapters(lib, None, wanted) == 0
        assert lib.attached == wanted


def test_a_base_with_adapters_is_refused_early(folder: Path, make_tiny_llama: Callable[..., Path]) -> None:
    handle = dataclasses.replace(as_file(folder / "tiny.gguf"), adapters=(folder,))
    with pytest.raises(ModelError, match="give the .gguf file"):
        objective(handle, SPEC, context(folder))
