"""The compiled sweeps: the bits of torch and numpy, on any number of threads, and torch where they cannot be had."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edgellm_sdk.kit import native, noise
from edgellm_sdk.kit.noise import BANK, BLOCK, Move, Noise

SIZES = (1, 63, BLOCK - 1, BLOCK, 2 * BLOCK + 12_345)
MOVES = (Move((3,), (0.5,)), Move((3, 1 << 63, 5), (0.5, -1e-3, 2.0)), Move((9, 9), (1e-7, 0.0)))
DTYPES = (torch.float32, torch.bfloat16)
FUSED = torch.backends.cpu.get_cpu_capability() != "DEFAULT" or platform.machine() in ("aarch64", "arm64")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGELLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(native.SWITCH, raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that holds the compiled sweeps."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("compiled")
        patch.setenv("EDGELLM_CACHE", str(cache))
        patch.delenv(native.SWITCH, raising=False)
        if native.library() is None:
            pytest.skip("no compiler")
        yield cache


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def weights(size: int, dtype: torch.dtype) -> Tensor:
    """Usual weights, then a few that are hard to round."""
    values = np.random.default_rng(size).normal(0, 0.02, size).astype(np.float32)
    odd = np.array([0.0, -0.0, 1e-40, -1e-39, 1.0, -65536.0, 3e38, np.inf, -np.inf, np.nan], np.float32)[: size // 2]
    values[size - len(odd) :] = odd
    return torch.from_numpy(values).to(dtype)


def made(size: int, swept: bool) -> Noise:
    """Noise for a tensor `w` in a set that is large enough to be swept."""
    found = Noise("gaussian", {"a": BANK, "w": size})
    assert found._sweeps is not None
    if not swept:
        found._sweeps = None
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """The same bits, but for which NaN a NaN is."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.isnan(), b.isnan()) and bool(((a.view(kind) == b.view(kind)) | a.isnan()).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limit", [np.inf, 0.02])
def test_a_move_has_the_bits_of_torch(compiled: Path, dtype: torch.dtype, size: int, limit: float) -> None:
    for move in MOVES:
        wanted, start = weights(size, dtype), weights(size, dtype)
        made(size, swept=False).move(wanted, "w", move, limit)
        assert size < 100 or not same(wanted, start)
        for count in (1, 2, 3):
            found = start.clone()
            with threads(count):
                made(size, swept=True).move(found, "w", move, limit)
            assert same(found, wanted)


@pytest.mark.parametrize("limit", [np.inf, 0.02])
def test_a_float32_move_has_the_bits_of_numpy(compiled: Path, limit: float) -> None:
    for move in MOVES:
        wanted, found = weights(SIZES[-1], torch.float32), weights(SIZES[-1], torch.float32)
        noise.move("gaussian", wanted.numpy(), "w", move, limit)
        made(SIZES[-1], swept=True).move(found, "w", move, limit)
        assert same(found, wanted)


def shifted(weight: Tensor, z: Tensor, c: float) -> Tensor:
    """weight + c * z rounded to float32 once (twice without a fused multiply-add), then to the dtype."""
    if FUSED:
        return (weight.double() + z.double() * float(np.float32(c))).float().to(weight.dtype)
    return (weight.float() + z.float() * float(np.float32(c))).to(weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", [0, 17, BLOCK - 5])
@pytest.mark.parametrize("limit", [np.inf, 0.02])
def test_a_shift_of_a_piece_is_rounded_to_the_nearest(
    compiled: Path, dtype: torch.dtype, start: int, limit: float
) -> None:
    size, c = SIZES[-1], 0.0123
    swept, whole = made(size, swept=True), weights(size, dtype)
    before, part = whole.clone(), whole[start : size - 3]
    z = torch.from_numpy(noise.take("gaussian", 9, "w", size))[start : size - 3]
    wanted = shifted(part, z.to(dtype) * (part.abs() <= limit), c)
    for count in (1, 2, 3):
        out = torch.empty_like(part)
        with threads(count):
            swept.shifted(part, 9, "w", c, out, start, limit)
        assert same(out, wanted) and same(whole, before)
    if dtype == torch.float32:
        made(size, swept=False).shifted(part, 9, "w", c, out, start, limit)
        assert same(out, wanted)
    swept.shifted(part, 9, "w", c, part, start, limit)
    assert same(part, wanted)


def test_what_would_pass_an_end_is_refused(compiled: Path) -> None:
    swept, weight = made(BLOCK, swept=True), torch.zeros(BLOCK)
    with pytest.raises(ValueError, match="of 1 blocks"):
        swept.shifted(weight, 1, "w", 1.0, torch.empty(BLOCK), start=1)
    with pytest.raises(ValueError, match="of 1 blocks"):
        swept.move(torch.zeros(BLOCK + 1), "w", Move((1,), (1.0,)))
    for out in (torch.empty(BLOCK - 1), torch.empty(BLOCK, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="one size and dtype"):
            swept.shifted(weight, 1, "w", 1.0, out)


def test_what_is_rare_stays_in_torch(compiled: Path) -> None:
    """Decay, second moments and float16."""
    moves = (Move((3,), (0.5,), decay=0.1), Move((3, 4), (0.5, 1.0), second=(0.1, 0.3)))
    cases = [(move, dtype) for move in moves for dtype in DTYPES] + [(MOVES[0], torch.float16)]
    for move, dtype in cases:
        found, wanted = (torch.full((1000,), 0.02, dtype=dtype) for _ in range(2))
        made(1000, swept=True).move(found, "w", move)
        made(1000, swept=False).move(wanted, "w", move)
        assert torch.equal(found, wanted)


def test_it_is_compiled_once_and_only_for_a_large_set_on_the_cpu(compiled: Path, cache: Path) -> None:
    assert Noise("gaussian", {"w": BANK - 1})._sweeps is None
    assert Noise("gaussian", {"w": BANK}, "meta")._sweeps is None
    assert not cache.exists()
    assert Noise("gaussian", {"w": BANK})._sweeps is not None
    (made_once,) = (cache / "native").iterdir()
    stamp = made_once.stat()
    assert Noise("gaussian", {"w": BANK})._sweeps is not None
    assert [path.stat() for path in (cache / "native").iterdir()] == [stamp]


def refused(caplog: pytest.LogCaptureFixture) -> bool:
    """That a large set moves in torch, with the bits of numpy, and that one line says so."""
    caplog.clear()
    with caplog.at_level("DEBUG", native.__name__):
        made = Noise("gaussian", {"a": BANK, "w": 1000})
    wanted, found = weights(1000, torch.float32), weights(1000, torch.float32)
    noise.move("gaussian", wanted.numpy(), "w", MOVES[1])
    made.move(found, "w", MOVES[1])
    return made._sweeps is None and same(found, wanted) and len(caplog.records) == 1


def test_without_a_compiler(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    assert refused(caplog)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(caplog) and not cache.exists()
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    broken.chmod(0o755)
    assert refused(caplog) and not list((cache / "native").iterdir())
    broken.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo no library > "$2"; shift; done\n')
    assert refused(caplog)


def test_where_the_threads_of_torch_are_of_another_make(
    compiled: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled for threads asks for a library that is not there; what is compiled without does not."""
    real, wrapper = " ".join(native._compiler()), tmp_path / "cc"
    wrapper.write_text(
        f'#!/bin/sh\ncase " $* " in *" -fopenmp "*) {real} "$@" -fsanitize=address;; *) {real} "$@";; esac\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    wanted, found = weights(SIZES[-1], torch.bfloat16), weights(SIZES[-1], torch.bfloat16)
    one = made(SIZES[-1], swept=True)
    with threads(2):
        one.move(found, "w", MOVES[1])
    made(SIZES[-1], swept=False).move(wanted, "w", MOVES[1])
    assert same(found, wanted)


def test_with_a_cache_that_is_not_a_folder(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_text("")
    assert refused(caplog)


def test_switched_off(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    assert Noise("gaussian", {"w": BANK})._sweeps is None and not cache.exists()


def test_a_cache_that_others_may_write_to_is_not_loaded(
    compiled: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert native.library() is not None
    folder = cache / "native"
    (library,) = folder.iterdir()
    for path, mode in ((folder, 0o770), (folder, 0o701), (library, 0o720), (library, 0o702)):
        path.chmod(mode)
        assert refused(caplog)
        path.chmod(0o700)
    assert native.library() is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert refused(caplog)
    moved = library.rename(cache / "elsewhere.so")
    library.symlink_to(moved)
    assert refused(caplog)
    library.unlink()
    folder.rename(cache / "elsewhere")
    folder.symlink_to(cache / "elsewhere")
    assert refused(caplog)
