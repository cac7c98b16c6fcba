"""QZO: the scales of a block-quantised model train, its codes do not, and the result deploys as it is."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgellm_plugins.export import gguf
from edgellm_plugins.export.gguf import method as gguf_method
from edgellm_plugins.zeroth_order import differences, packed
from edgellm_plugins.zeroth_order.packed import Matrix, Packed, Rows, sources
from edgellm_plugins.zeroth_order.qzo import Config
from edgellm_plugins.zeroth_order.qzo.method import METHOD, estimate
from edgellm_plugins.zeroth_order.scales import Decoding, Scales, _half_above
from edgellm_plugins.zeroth_order.space import Follower
from edgellm_plugins.zeroth_order.trajectory import Log, move
from safetensors.torch import save_file

import edgellm_sdk as edgellm
from edgellm_sdk import checkpoint, gguf_file, models, store
from edgellm_sdk.config import build, options
from edgellm_sdk.context import Context
from edgellm_sdk.errors import ConfigError, ModelError
from edgellm_sdk.kit import blocks, noise, prompts
from edgellm_sdk.kit.noise import Move
from edgellm_sdk.kit.whole import Whole
from edgellm_sdk.types import Dataset, Example, ModelHandle, State

FORMATS = tuple(blocks.FORMATS)
REACH = {"q4_0": 8, "q4_1": 15, "q5_0": 16, "q5_1": 31, "iq4_nl": 127, "q8_0": 128}
HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None


def dataset(n: int = 16) -> Dataset:
    words = ["win a prize now", "mum is home", "call this number", "see you at dinner"]
    rows = [
        Example(({"role": "user", "content": f"{words[i % 4]} {i}"},), ("spam", "ham")[i % 2], ("spam", "ham")[i % 2])
        for i in range(n)
    ]
    return Dataset(tuple(rows), f"fingerprint-{n}", "toy", ("ham", "spam"))


def quantise(source: Path, folder: Path, fmt: str, ends: str = "") -> ModelHandle:
    """`source` as `edgellm compress` writes it, plainly rounded; `ends` is the format of embedding and head, if any."""
    found = checkpoint.inspect(source)
    kinds = {n: fmt if n.endswith("_proj.weight") else ends for n, t in found.tensors.items() if len(t.shape) == 2}
    kinds = {name: kind for name, kind in kinds.items() if kind}
    folder.mkdir(parents=True)
    for name in checkpoint.SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    rest = {name: torch.from_numpy(found.array(name)) for name in found.tensors if name not in kinds}
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    arrays = {name: blocks.nearest(found.array(name), kind) for name, kind in kinds.items()}
    store.save_arrays(folder / checkpoint.QUANTIZED, arrays, {"format": kinds})
    return models.resolve(str(folder))


@pytest.fixture(scope="module")
def quantised(tiny_llama: Path, tiny_llama_tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model in a format, with tied and quantised or with plain ends."""
    made: dict[tuple[str, bool], ModelHandle] = {}

    def of(fmt: str, tied: bool = False) -> ModelHandle:
        if (fmt, tied) not in made:
            folder = tmp_path_factory.mktemp("blocks") / fmt
            made[fmt, tied] = quantise(tiny_llama_tied if tied else tiny_llama, folder, fmt, "q8_0" if tied else "")
        return made[fmt, tied]

    return of


def context(folder: Path, rounds: int = 4) -> Context:
    return Context(folder, seed=7, rounds=rounds)


def config(**changes: Any) -> Config:
    settings = {"steps": 3, "probes": 2, "batch_size": 4, "learning_rate": 1e-3, "precision": "float32"}
    return Config(**settings | changes)


def scales(handle: ModelHandle, folder: Path, **changes: Any) -> Scales:
    space = METHOD.space(handle, config(**changes), context(folder))
    assert isinstance(space, Scales)
    return space


def stored(handle: ModelHandle) -> dict[str, tuple[str, np.ndarray]]:
    """Format and block bytes of every quantised matrix of a folder."""
    tensors = checkpoint.inspect(handle.path).tensors
    return {n: (t.stored, t.parts[0].read()) for n, t in tensors.items() if t.stored in blocks.FORMATS}


def no_data() -> Dataset:
    raise AssertionError("not needed")


# --- decoding


@pytest.mark.parametrize("fmt", FORMATS)
def test_decoding_is_llama_cpps_bit_for_bit(fmt: str) -> None:
    weights = np.random.default_rng(0).normal(size=(300, 96)).astype(np.float32)
    stored = blocks.nearest(weights, fmt)
    matrix = Matrix(Rows(fmt, lambda: stored), torch.device("cpu"))
    want = torch.from_numpy(blocks.decode(stored, fmt))
    assert matrix.largest == REACH[fmt] and matrix.shape == (300, 96)
    assert torch.equal(matrix.decode(matrix.scales.float(), torch.empty(300, 96)), want)
    assert torch.equal(matrix.decode(matrix.scales[7:40].float(), torch.empty(33, 96), 7), want[7:40])
    rows = torch.tensor([5, 0, 299])
    assert torch.equal(matrix.pick(rows, torch.float32), want[rows])
    half = matrix.decode(matrix.scales.float(), torch.empty(300, 96, dtype=torch.bfloat16))
    assert torch.equal(half, want.bfloat16())


def test_many_chunks_decode_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = blocks.nearest(np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32), "q4_1")
    matrix = Matrix(Rows("q4_1", lambda: stored), torch.device("cpu"))
    whole = matrix.decode(matrix.scales.float(), torch.empty(50, 64))
    monkeypatch.setattr(packed, "CHUNK", 64 * 7)
    assert torch.equal(matrix.decode(matrix.scales.float(), torch.empty(50, 64)), whole)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_candidate_is_the_model_with_those_scales(quantised: Any, tmp_path: Path, fmt: str, tied: bool) -> None:
    """Against the decoded model with every weight replaced; at theta itself nothing differs, in no bit."""
    handle = quantised(fmt, tied)
    space, whole = scales(handle, tmp_path), Whole(handle, "float32")
    batch = prompts.encode(whole.tokenizer, dataset(6).examples, 128)
    space._batches["b"] = batch
    assert set(space.theta) == {name for name in whole.parameters if name.endswith("_proj.weight")}
    assert space.losses("b", no_data, [(3, 0.0)])[0] == whole.loss(batch)
    assert space.measure(dataset(6)) == whole.measure(dataset(6))
    before, c = space.losses("b", no_data, [(3, 0.0)])[0], 0.02
    for name, (kind, raw) in stored(handle).items():
        if name in space.theta:
            levels = space.packed.matrices[name].levels.numpy().astype(np.float64)
            z = noise.take("gaussian", 3, name, raw.shape[0] * levels.shape[1]).reshape(levels.shape[:2])
            moved = blocks.decode(raw, kind) + (c / REACH[fmt] * z[:, :, None] * levels).reshape(raw.shape[0], -1)
            whole.parameters[name].data.copy_(torch.from_numpy(moved))
    found = space.losses("b", no_data, [(3, c)])[0]
    assert found == pytest.approx(whole.loss(batch), rel=1e-5) and abs(found - before) > 1e-4


def test_no_float_copy_of_a_matrix_is_kept(quantised: Any, tmp_path: Path) -> None:
    """What stands in for the matrices in blocks is one number; what is kept for a weight is one byte and its share of
    the scales."""
    space = scales(quantised("q4_1", True), tmp_path)
    for name, parameter in space.packed.parameters.items():
        if name in space.packed.matrices:
            assert parameter.untyped_storage().nbytes() == 4
    for name, matrix in space.packed.matrices.items():
        held = [matrix.levels, matrix.scales, *([matrix.mins] if matrix.mins is not None else [])]
        held += [space.theta[name]] if name in space.theta else []
        assert sum(t.untyped_storage().nbytes() for t in held) <= matrix.levels.numel() * (1 + 8 / 32)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_evaluations_leave_no_trace(quantised: Any, tmp_path: Path, precision: str) -> None:
    space = scales(quantised("q4_1", True), tmp_path, precision=precision)
    before, levels = space.digest(), {n: m.levels.clone() for n, m in space.packed.matrices.items()}
    generator = torch.get_rng_state()
    for seed in range(3):
        assert np.isfinite(space.losses("b", lambda: dataset(4), [(seed, 0.01), (seed, -0.01), (0, 0.0)])).all()
    space.measure(dataset(4))
    assert space.digest() == before and torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(levels[n], m.levels) for n, m in space.packed.matrices.items())


# --- the estimate


def gradient(handle: ModelHandle, space: Scales, batch: list[prompts.Encoded]) -> dict[str, np.ndarray]:
    """By autograd, of the mean loss with respect to d * K of every block: sum of level / K * dL/dw."""
    model = handle.load(dtype="float32").model.requires_grad_(True)
    losses = []
    for row in batch:
        logits = model(torch.tensor([row.tokens])).logits[0].log_softmax(-1)
        losses += [-logits[at - 1, row.tokens[at]] for at in range(row.start, len(row.tokens))]
    torch.stack(losses).mean().backward()
    found, parameters = {}, dict(model.named_parameters())
    for name in space.theta:
        matrix = space.packed.matrices[name]
        by_weight = parameters[name].grad.view(matrix.levels.shape) * matrix.levels
        found[name] = (by_weight.sum(2) / matrix.largest).numpy().astype(np.float64)
    return found


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_slope_is_autograds_along_its_direction(quantised: Any, tmp_path: Path, fmt: str) -> None:
    handle = quantised(fmt)
    space = scales(handle, tmp_path)
    space._batches["b"] = batch = prompts.encode(space.packed.tokenizer, dataset(2).examples, 128)
    exact = gradient(handle, space, batch)
    size = sum(float((part**2).sum()) for part in exact.values()) ** 0.5
    one = estimate(config(clip=0.0, step=1e-3))
    for seed in range(5):
        wanted = sum(float((exact[n] * space.sampler.draw(n, t.numpy(), seed)).sum()) for n, t in space.theta.items())
        assert float(one(space, "b", no_data, [seed]).scalars[0]) == pytest.approx(wanted, rel=0.02, abs=0.02 * size)


def test_the_estimate_is_the_gradient_in_the_mean(quantised: Any, tmp_path: Path) -> None:
    """E[g z] = v within four standard errors: the part along v, v + sqrt(2 / draws) |v|; the distance from v,
    sqrt((d + 1) / draws) |v|, itself known to a share of sqrt(1 / (2 draws))."""
    handle = quantised("q4_0")
    space = scales(handle, tmp_path)
    space._batches["b"] = batch = prompts.encode(space.packed.tokenizer, dataset(2).examples, 128)
    exact = gradient(handle, space, batch)
    v = np.concatenate([part.ravel() for part in exact.values()])
    draws, total = 200, np.zeros_like(v)
    one = estimate(config(clip=0.0, step=1e-3))
    for seed in range(draws):
        z = np.concatenate([space.sampler.draw(n, t.numpy(), seed).ravel() for n, t in space.theta.items()])
        total += float(one(space, "b", no_data, [seed]).scalars[0]) * z
    mean, size = total / draws, np.linalg.norm(v)
    assert abs(mean @ v / size**2 - 1) < 4 * (2 / draws) ** 0.5
    far = ((len(v) + 1) / draws) ** 0.5
    assert np.linalg.norm(mean - v) / size == pytest.approx(far, rel=4 * (1 / (2 * draws)) ** 0.5)


class Line:
    """A space whose loss rises by slope * c along every direction."""

    def __init__(self, slopes: Sequence[float]) -> None:
        self.slopes = slopes

    def losses(self, name: str, make: Callable[[], Dataset], points: Sequence[tuple[int, float]]) -> np.ndarray:
        return np.array([1 + self.slopes[seed] * c for seed, c in points])


def test_every_directional_derivative_is_clipped_before_the_mean() -> None:
    line: Any = Line([3.0, -50.0, 0.5, np.nan])
    plain = differences.central(0.1)(line, "b", no_data, [0, 1, 2])
    np.testing.assert_allclose(plain.scalars, np.array([3, -50, 0.5]) / 3, rtol=1e-5)
    found = estimate(config(step=0.1, clip=2.0))(line, "b", no_data, [0, 1, 2])
    np.testing.assert_allclose(found.scalars, np.array([2, -2, 0.5]) / 3, rtol=1e-5)
    assert (found.loss, found.forwards) == (plain.loss, 6)
    dropped = estimate(config(step=0.1, clip=2.0))(line, "b", no_data, [0, 3, 1])
    np.testing.assert_allclose(dropped.scalars, [1, 0, -1], rtol=1e-5)
    assert dropped.dropped == 1
    np.testing.assert_array_equal(estimate(config(step=0.1, clip=0.0))(line, "b", no_data, [1]).scalars, [-50.0])


# --- moves


def test_a_move_is_plain_arithmetic_and_keeps_sign_and_floor(quantised: Any, tmp_path: Path) -> None:
    """Against numpy: d - c z / K, then |d| >= floor with the sign d began with; smaller starts are kept, zeros too."""
    handle, floor = quantised("q4_0"), 1e-3
    space = scales(handle, tmp_path, floor=floor)
    name = "model.layers.0.mlp.up_proj.weight"
    matrix = space.packed.matrices[name]
    matrix.scales[0, 0], matrix.scales[0, 1] = 0.0, -0.0
    matrix.scales[1, 0], matrix.scales[1, 1] = 2e-4, -2e-4
    space.restart()
    began = {n: t.numpy().astype(np.float64) for n, t in space.theta.items()}
    assert {-1.0, 1.0} <= set(np.sign(began[name]).ravel())
    made = Move((5, 6), (0.3, -0.2))
    space.step(made)
    least, hit = np.float64(space.floor), 0
    for n, start in began.items():
        z = [noise.take("gaussian", s, n, start.size).reshape(start.shape) for s in made.seeds]
        free = start + (0.3 * z[0] - 0.2 * z[1]) / 8
        want = np.sign(start) * np.maximum(free * np.sign(start), np.minimum(np.abs(start), least))
        np.testing.assert_allclose(space.theta[n].numpy(), want, atol=1e-6)
        hit += int((want != free).sum())
    assert hit > 100
    assert not space.theta[name][0, :2].any() and torch.signbit(space.theta[name][0, :2]).tolist() == [False, True]
    for n, value in space.theta.items():
        sign = np.sign(began[n])
        assert (np.sign(value.numpy()) == sign).all()
        assert (value.abs().numpy() >= np.minimum(least, np.abs(began[n]))).all()
        assert (value.abs().half().numpy() >= np.minimum(np.float16(least), np.abs(began[n]))).all()


def test_the_floor_survives_storage() -> None:
    for value in (0.0, 1e-9, 1e-6, 3e-5, 1e-3, 0.1234, 1.0):
        found = _half_above(value)
        assert found > 0 and found >= value and float(np.float16(found)) == found
        below = float(np.nextafter(np.float16(found), np.float16(0)))
        assert below < value or below == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bfloat16"},
        {"share": 0.5},
        {"rule": "momentum"},
        {"rule": "adam", "probes": 1, "learning_rate": 0.01},
        {"learning_rate": 0.5, "clip": 0.0, "floor": 1e-3},
    ],
    ids=str,
)
def test_the_log_rebuilds_theta_bit_for_bit_from_anywhere(quantised: Any, tmp_path: Path, changes: Any) -> None:
    handle, settings = quantised("q4_1", True), config(**changes)
    ctx = context(tmp_path)
    state = METHOD.initialise(handle, settings, ctx)
    digests = [METHOD.follower(handle, settings, ctx).space.digest()]
    for _ in range(2):
        given = METHOD.assign(state, ["a"], settings)
        update = METHOD.finetune(handle, dataset(), given["a"], settings, ctx)
        assert METHOD.screen([update], state, settings) == {}
        assert update.arrays["scalar"].shape == (3, settings.probes)
        state = METHOD.aggregate(state, [update], settings, ctx)
        digests.append(METHOD.follower(handle, settings, ctx).space.digest())
    assert len(set(digests)) == 3
    log = Log.of(state.arrays)
    moves = [move(log, t, settings) for t in range(len(log))]
    other = Follower(METHOD.space(handle, settings, context(tmp_path)))
    for done in (6, 3, 0, 3, 6, 0, 6):
        other.goto(moves[:done], come_back=done == 3)
        assert other.space.digest() == digests[done // 3], done
    log.scalars[0] = -log.scalars[0]
    other.goto([move(log, t, settings) for t in range(len(log))], come_back=False)
    assert other.space.digest() != digests[-1]


def test_numpy_alone_rebuilds_the_scales(quantised: Any, tmp_path: Path) -> None:
    handle, settings, ctx = quantised("q4_0"), config(learning_rate=0.1, floor=1e-3), context(tmp_path)
    state = METHOD.initialise(handle, settings, ctx)
    update = METHOD.finetune(handle, dataset(), METHOD.assign(state, ["a"], settings)["a"], settings, ctx)
    log = Log.of(METHOD.aggregate(state, [update], settings, ctx).arrays)
    space: Any = METHOD.follower(handle, settings, ctx).space
    for name, (fmt, raw) in stored(handle).items():
        began = blocks.unpack(raw, fmt)[1].astype(np.float32)
        theta = began.copy()
        for t in range(len(log)):
            made = move(log, t, settings)
            noise.move("gaussian", theta, name, dataclasses.replace(made, first=tuple(c / 8 for c in made.first)))
            least = np.minimum(np.abs(began), np.float32(space.floor))
            theta = np.copysign(np.maximum(theta * np.sign(began), least), began)
        assert np.array_equal(theta, space.theta[name].numpy()), name


def test_a_round_is_the_mean_of_its_clients_scales(quantised: Any, tmp_path: Path) -> None:
    handle, settings, ctx = quantised("q4_1"), config(learning_rate=1e-4), context(tmp_path)
    shards = {"a": dataset(12), "b": dataset(4)}
    state = METHOD.initialise(handle, settings, ctx)
    given = METHOD.assign(state, sorted(shards), settings)
    ends, updates = [], []
    for client, shard in sorted(shards.items()):
        updates.append(METHOD.finetune(handle, shard, given[client], settings, ctx))
        space: Any = METHOD.follower(handle, settings, ctx).space
        ends.append({name: value.numpy().copy() for name, value in space.theta.items()})
    state = METHOD.aggregate(state, updates, settings, ctx)
    METHOD.follower(handle, settings, ctx).goto(METHOD.moves(state.arrays, {}, settings), come_back=False)
    for name, value in space.theta.items():
        np.testing.assert_allclose(value.numpy(), 0.75 * ends[0][name] + 0.25 * ends[1][name], atol=1e-7)


# --- learning, and what comes out


def trained(handle: ModelHandle, folder: Path, settings: Config) -> tuple[State, Scales, Context]:
    ctx = context(folder, rounds=1)
    state = METHOD.initialise(handle, settings, ctx)
    update = METHOD.finetune(handle, dataset(), METHOD.assign(state, ["a"], settings)["a"], settings, ctx)
    state = METHOD.aggregate(state, [update], settings, ctx)
    space: Any = METHOD.follower(handle, settings, ctx).space
    return state, space, ctx


@pytest.mark.parametrize("fmt", ["q4_0", "q4_1", "iq4_nl"])
def test_it_learns_and_what_is_written_is_what_was_measured(quantised: Any, tmp_path: Path, fmt: str) -> None:
    """The loss falls, codes and minima are the same bytes, scales are the trained ones in fp16, logits are equal."""
    handle = quantised(fmt, True)
    settings = config(steps=200, probes=2, batch_size=16, learning_rate=2e-3)
    before = scales(handle, tmp_path).measure(dataset())["validation loss"].value
    state, space, ctx = trained(handle, tmp_path / "run", settings)
    measured = METHOD.measure(state, dataset(), settings, ctx)
    assert measured is not None
    after = measured["validation loss"].value
    assert after < before - 0.5
    tuned = METHOD.personalise(handle, state, tmp_path / "model", settings, ctx)
    assert Whole(tuned, "float32").measure(dataset()) == measured
    old, new = stored(handle), stored(tuned)
    assert old.keys() == new.keys()
    for name, (kind, raw) in old.items():
        assert new[name][0] == kind
        was, now = blocks.unpack(raw, kind), blocks.unpack(new[name][1], kind)
        assert np.array_equal(was[0], now[0])
        assert (was[2] is None) == (now[2] is None) and (was[2] is None or np.array_equal(was[2], now[2]))
        if name in space.theta:
            assert np.array_equal(now[1], space.theta[name].numpy().astype(np.float16))
            assert (np.sign(now[1]) == np.sign(was[1])).all() and (was[1] != now[1]).mean() > 0.5
        else:
            assert np.array_equal(raw, new[name][1])
    tokens = torch.tensor([[1, 5, 9, 40]])
    with torch.no_grad():
        logits = tuned.load().model(tokens).logits
        for name, parameter in (whole := Whole(handle, "float32")).parameters.items():
            if name in space.theta:
                space.packed.matrices[name].decode(space.theta[name].half().float(), parameter.data)
        assert torch.equal(whole.model(tokens).logits, logits)


def test_what_is_measured_is_theta_as_it_is_stored(quantised: Any, tmp_path: Path) -> None:
    space = scales(quantised("q4_1"), tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    space.theta[name].mul_(1 + 2**-13)  # below the spacing of fp16
    assert torch.equal(Decoding(space, stored=True)._scales(name), space.packed.matrices[name].scales.float())
    assert not torch.equal(Decoding(space)._scales(name), space.packed.matrices[name].scales.float())


def test_the_blocks_file_is_the_one_that_save_arrays_writes(quantised: Any, tmp_path: Path) -> None:
    handle = quantised("q4_1", True)
    raw = {name: array for name, (_, array) in stored(handle).items()}
    shapes = {name: (kind, array.shape) for name, (kind, array) in stored(handle).items()}
    packed.write(tmp_path / "blocks", shapes, raw.__getitem__)
    assert (tmp_path / "blocks").read_bytes() == (handle.path / checkpoint.QUANTIZED).read_bytes()


def test_scales_beyond_fp16_are_not_written(quantised: Any, tmp_path: Path) -> None:
    handle = quantised("q4_0")
    space = scales(handle, tmp_path)
    space.theta["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    with pytest.raises(ModelError, match="grew beyond fp16 - model.layers.0.mlp.up_proj"):
        space.write(tmp_path / "model", handle)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("objective", ["accuracy", "f1"])
def test_scores_without_a_gradient_can_be_trained(quantised: Any, tmp_path: Path, objective: str) -> None:
    handle = quantised("q4_0")
    settings = config(objective=objective, new_tokens=3, steps=2, step=0.05)
    _, space, _ = trained(handle, tmp_path, settings)
    assert -1 <= space.losses("b", lambda: dataset(4), [(1, 0.0)])[0] <= 0


# --- refusals


def test_what_has_no_trainable_scales_is_refused(
    tiny_llama: Path, tiny_llama_tied: Path, quantised: Any, tmp_path: Path
) -> None:
    plain = models.resolve(str(tiny_llama))
    with pytest.raises(ModelError, match="holds no weights in blocks .*compress --plugin gptq"):
        METHOD.initialise(plain, config(), context(tmp_path))
    adapted = dataclasses.replace(quantised("q4_0"), adapters=(tmp_path,))
    with pytest.raises(ModelError, match="has an adapter"):
        METHOD.initialise(adapted, config(), context(tmp_path))
    ends = quantise(tiny_llama_tied, tmp_path / "ends", "", "q8_0")
    with pytest.raises(ModelError, match="only its embedding or output head"):
        METHOD.initialise(ends, config(), context(tmp_path))
    odd = quantise(tiny_llama, tmp_path / "odd", "q8_0")
    raw = np.zeros((64, 144), np.uint8)
    name = "model.layers.0.self_attn.q_proj.weight"
    arrays = {n: a for n, (_, a) in stored(odd).items()} | {name: raw}
    store.save_arrays(
        odd.path / checkpoint.QUANTIZED, arrays, {"format": dict.fromkeys(arrays, "q8_0") | {name: "q4_k"}}
    )
    with pytest.raises(ModelError, match="q_proj.weight is q4_k, whose scales cannot train"):
        METHOD.initialise(models.resolve(str(odd.path)), config(), context(tmp_path))


def test_a_scale_that_is_no_number_is_refused() -> None:
    stored = blocks.nearest(np.ones((2, 32), np.float32), "q4_0")
    stored[0, :2] = np.array([np.nan], "<f2").view(np.uint8)
    with pytest.raises(ModelError, match="not finite"):
        Matrix(Rows("q4_0", lambda: stored), torch.device("cpu"))


def test_options_that_mean_nothing_here_do_not_exist() -> None:
    names = {option.name for option in options(Config)}
    assert {"clip", "floor", "step", "learning_rate", "probes", "rule", "objective"} <= names
    for name in ("train", "layers", "rank", "alpha", "targets", "hidden_memory", "weight_decay"):
        assert name not in names
        with pytest.raises(ConfigError, match="unknown option"):
            build(Config, {name: "1"}, "qzo")


# --- GGUF files


def exported(handle: ModelHandle, target: Path) -> gguf_file.GGUFFile:
    gguf_method.export(handle, target, gguf.Config(modelfile=False), context(target.parent))
    return gguf_file.read(target)


def same_codes(old: gguf_file.GGUFFile, new: gguf_file.GGUFFile) -> int:
    """Assert that two files differ in scales of decoder matrices alone; the number of scales that changed."""
    changed = 0
    assert {n: (t.type, t.shape) for n, t in old.tensors.items()} == {
        n: (t.type, t.shape) for n, t in new.tensors.items()
    }
    for name, info in old.tensors.items():
        was, now = old.tensor_bytes(name), new.tensor_bytes(name)
        if info.type.lower() not in blocks.FORMATS or not name.startswith("blk."):
            assert np.array_equal(was, now), name
            continue
        size = blocks.block_format(info.type.lower()).bytes
        was, now = was.reshape(-1, size), now.reshape(-1, size)
        assert np.array_equal(was[:, 2:], now[:, 2:]), name
        changed += int((was[:, :2] != now[:, :2]).any(1).sum())
    return changed


@pytest.mark.parametrize("fmt", ["q4_1", "q8_0"])
def test_a_gguf_file_is_read_as_the_folder_it_was_made_from(quantised: Any, tmp_path: Path, fmt: str) -> None:
    """The same blocks, rows of q and k in transformers' order again, however the file is given."""
    handle = quantised(fmt, True)
    exported(handle, tmp_path / "model.gguf")
    folder = models.resolve(str(tmp_path / "model.gguf"))
    run = tmp_path / "run"
    store.write_json(run / "recipe.json", {"model": str(tmp_path / "model.gguf")})
    for given, ctx in (
        (models.as_file(folder, str(tmp_path / "model.gguf")), context(tmp_path)),
        (folder, context(run)),
    ):
        base, found = sources(given, ctx)
        assert base.path == folder.path
        want = stored(handle)
        assert found.keys() == want.keys()
        for name, (kind, raw) in want.items():
            assert found[name].format == kind and np.array_equal(found[name].read(), raw), name
    assert scales(handle, tmp_path).measure(dataset()) == Packed(folder, context(run)).measure(
        dataset(),
        Decoding(METHOD.space(folder, config(), context(run)), stored=True),  # type: ignore[arg-type]
    )
    with pytest.raises(ModelError, match=r"the file 'model.gguf' that it was made from is not at hand"):
        sources(folder, context(tmp_path))
    store.write_json(run / "recipe.json", {"model": str(tmp_path / "other.gguf")})
    exported(quantised("q4_0"), tmp_path / "other.gguf")
    with pytest.raises(ModelError, match="not at hand"):
        sources(folder, context(run))


def test_a_gguf_file_without_blocks_of_ours_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    exported(models.resolve(str(tiny_llama)), tmp_path / "f16.gguf")
    handle = models.as_file(models.resolve(str(tmp_path / "f16.gguf")), str(tmp_path / "f16.gguf"))
    with pytest.raises(ModelError, match="holds no weights in blocks"):
        METHOD.initialise(handle, config(), context(tmp_path))
    file = gguf_file.read(tmp_path / "f16.gguf")
    info = dataclasses.replace(file.tensors["blk.0.attn_q.weight"], type="Q4_K")
    odd = dataclasses.replace(file, tensors={**file.tensors, "blk.0.attn_q.weight": info})
    with pytest.raises(ModelError, match="blk.0.attn_q.weight is Q4_K, whose scales cannot train"):
        packed._of_file(odd, ["model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(ModelError, match="is no Llama"):
        packed._of_file(dataclasses.replace(file, metadata={"general.architecture": "qwen2"}), [])


@pytest.mark.llama
@pytest.mark.skipif(not HAS_LLAMA, reason="needs llama-cpp-python")
@pytest.mark.parametrize("start", ["folder", "gguf"])
def test_the_way_from_a_quantised_model_to_llama_cpp(
    quantised: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    """finetune and export as a user calls them: the file has the codes of the one without training, the gate passes,
    llama.cpp answers otherwise than before."""
    handle = quantised("q4_1", True)
    before = exported(handle, tmp_path / "before.gguf")
    rows = [
        {"text": f"win a prize {n}" if n % 2 else f"mum is home {n}", "label": ("ham", "spam")[n % 2]}
        for n in range(16)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = edgellm.finetune(
        "qzo", model=str(handle.path if start == "folder" else tmp_path / "before.gguf"),
        data=str(tmp_path / "data.jsonl"), output=tmp_path / "run", rounds=2, watch=0,
        options={"steps": 20, "batch_size": 8, "learning_rate": 2e-3},
    )  # fmt: skip
    assert done.model is not None and done.model.dtype == "q4_1"
    out = edgellm.export("gguf", model=str(tmp_path / "run"), output=tmp_path / "after.gguf")
    assert out.report.verified["passed"]
    after = gguf_file.read(tmp_path / "after.gguf")
    assert same_codes(before, after) > 1000
    assert (tmp_path / "after.gguf").stat().st_size == (tmp_path / "before.gguf").stat().st_size
    logits = []
    for name in ("before", "after"):
        with edgellm.deploy(str(tmp_path / f"{name}.gguf")) as session:
            logits.append(session.logits([session.encode("win a free prize")])[0])
    assert np.abs(logits[0] - logits[1]).max() > 0.01


@pytest.mark.model
def test_the_blocks_of_the_real_file(smollm2: ModelHandle, tmp_path: Path) -> None:
    """SmolLM2 by its alias: what is taken from the file decodes to what the converter made of it."""
    _, found = sources(smollm2, context(tmp_path))
    assert len(found) == 211
    assert {rows.format for rows in found.values()} == {"q4_1", "q8_0"}
    folder = checkpoint.inspect(smollm2.path)
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        name = f"model.layers.7.{part}.weight"
        assert np.array_equal(blocks.decode(found[name].read(), found[name].format), folder.array(name))
