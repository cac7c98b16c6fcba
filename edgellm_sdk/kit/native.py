"""The sweeps of `noise` as C loops, each one pass over memory, where this machine has a compiler.

`edgellm_sdk/assets/sweeps.c` is compiled once, for this processor, into the user's cache and loaded from there. Without
a compiler, with a cache that others may write to, or with EDGELLM_NATIVE=0, there are no sweeps and `noise` goes on in
torch. A move ends in the same bits either way. So does a float32 shift on processors with a fused multiply-add, as both
use it. A bfloat16 shift does not: z is in bfloat16 for both, but torch.add rounds the coefficient as well, except for a
few elements that depend on the number of threads, and here it stays float32.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from functools import cached_property, lru_cache
from importlib import resources
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgellm_sdk.models import cache_folder
from edgellm_sdk.types import Array, Float32

SWITCH = "EDGELLM_NATIVE"
COMPILERS = ("cc", "gcc", "clang")
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = ("-std=c99", "-O3", NATIVE, "-ffp-contract=off", "-fno-math-errno", "-fopenmp-simd", "-fPIC")
SECONDS = 60
SHARED = 1 << 16
"""Elements that are worth more than one thread."""

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_NOISE = (_POINTER, _POINTER, _POINTER)
_SHIFT = (ctypes.c_int, _POINTER, _POINTER, _COUNT, _COUNT, *_NOISE, _FLOAT)
_MOVE = (ctypes.c_int, _POINTER, _COUNT, _COUNT, *_NOISE, _COUNT, _COUNT, _FLOAT, _POINTER, _POINTER)


class Directions:
    """Where the noise of some directions lies, block by block, for all tensors of a set one after the other.

    `places` and `factors` (S, blocks), int64 and float32, tell of every block where in the bank its noise is and by
    what it is multiplied, sign included; `rounding` (blocks,) int64 where its bits for rounding are. Addresses are kept
    because a model has hundreds of tensors, and asking numpy for one takes as long as a small sweep.
    """

    def __init__(self, places: Array, factors: Float32, rounding: Array) -> None:
        self.places = np.ascontiguousarray(places, np.int64)
        self.factors = np.ascontiguousarray(factors, np.float32)
        self.rounding = np.ascontiguousarray(rounding, np.int64)
        if self.places.shape != self.factors.shape or self.rounding.shape != self.places.shape[1:]:
            raise ValueError("a block has one factor for each place, and one place for its rounding")
        self.count, self.stride = self.places.shape
        self._starts = self.places.ctypes.data, self.factors.ctypes.data, self.rounding.ctypes.data

    def at(self, first: int) -> tuple[int, int, int]:
        """Addresses of block `first` in the first row of the three arrays."""
        places, factors, rounding = self._starts
        return places + 8 * first, factors + 4 * first, rounding + 8 * first


class Sweeps:
    """Runs the loops on torch's number of threads. `uniform()` is the bank of rounding bits, uint16.

    Tensors are contiguous, on the CPU, float32 or bfloat16; the bank of a shift has their dtype. `blocks` says which of
    the directions' blocks are those of the whole tensor.
    """

    def __init__(self, library: ctypes.CDLL, uniform: Callable[[], Array], block: int) -> None:
        self._uniform, self._block = uniform, block
        self._shift = {t: _function(library, "shift", t, _SHIFT) for t in (torch.float32, torch.bfloat16)}
        self._move = {t: _function(library, "move", t, _MOVE) for t in self._shift}

    @cached_property
    def _bits(self) -> int:
        """The address of the rounding bits, which are not made before they are needed."""
        self._held = self._uniform()
        return int(self._held.ctypes.data)

    def takes(self, dtype: torch.dtype) -> bool:
        return dtype in self._shift

    def shift(
        self,
        weight: Tensor,
        out: Tensor,
        start: int,
        bank: Tensor,
        along: Directions,
        blocks: slice,
        limit: float = inf,
    ) -> None:
        """out = weight + factor * z where |weight| <= limit, rounded to the nearest; `out` may be `weight`, which may
        be a piece of the tensor that begins at its element `start`."""
        dtype, count = weight.dtype, weight.numel()
        if not out.dtype == bank.dtype == dtype or out.numel() != count or not out.is_contiguous():
            raise ValueError("a sweep takes contiguous tensors of one size and dtype")
        places, factors, _ = self._checked(weight, start, along, blocks)
        noise = bank.data_ptr(), places, factors
        tensors = weight.data_ptr(), out.data_ptr(), count, start
        self._shift[dtype](_threads(count), *tensors, *noise, _rounded(limit, dtype))

    def move(self, weight: Tensor, bank: Tensor, along: Directions, blocks: slice, limit: float = inf) -> None:
        """weight += sum_k factor_k z_k where |weight| <= limit, in place, with a float32 bank."""
        dtype, count = weight.dtype, weight.numel()
        places, factors, rounding = self._checked(weight, 0, along, blocks)
        uniform = self._bits if dtype == torch.bfloat16 else bank.data_ptr()  # float32 reads none
        noise = bank.data_ptr(), places, factors, along.count, along.stride
        random = uniform, rounding
        self._move[dtype](_threads(count), weight.data_ptr(), count, 0, *noise, _rounded(limit, dtype), *random)

    def _checked(self, weight: Tensor, start: int, along: Directions, blocks: slice) -> tuple[int, int, int]:
        """Where C reads of the tensor's first block. ValueError where it would read or write past an end."""
        if not weight.is_contiguous():
            raise ValueError("a sweep takes a contiguous tensor")
        first, end = blocks.start, blocks.stop
        if not 0 <= first <= end <= along.stride:
            raise ValueError(f"blocks {first} to {end} of {along.stride}")
        if start < 0 or start + weight.numel() > (end - first) * self._block:
            raise ValueError(f"elements {start} to {start + weight.numel()} of {end - first} blocks")
        return along.at(first)


def _function(library: ctypes.CDLL, name: str, dtype: torch.dtype, arguments: tuple[Any, ...]) -> Any:
    function = library[f"{name}_{str(dtype).removeprefix('torch.')}"]
    function.argtypes, function.restype = arguments, None
    return function


def _threads(count: int) -> int:
    return torch.get_num_threads() if count >= SHARED else 1


def _rounded(limit: float, dtype: torch.dtype) -> float:
    """As torch compares a tensor with a number: in the tensor's dtype."""
    return limit if limit == inf else float(torch.tensor(limit, dtype=dtype))


def library() -> ctypes.CDLL | None:
    """The compiled loops; None, and a debug line in the log, where there are none. Compiles at most once a machine."""
    if os.environ.get(SWITCH) == "0" or os.name != "posix":
        return None
    try:
        compiler = _compiler()
        source = (resources.files("edgellm_sdk") / "assets" / "sweeps.c").read_bytes()
        built_by = "\0".join((*FLAGS, *compiler, _version(compiler), platform.machine(), _processor()))
        digest = hashlib.sha256(source + built_by.encode()).hexdigest()
        path = _private(cache_folder() / "native") / f"{digest}.so"
        if not path.exists():
            _compile(compiler, source, path)
        _own(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logging.getLogger(__name__).debug("noise is swept by torch: %s", error)
        return None


def _compiler() -> tuple[str, ...]:
    """$CC, or the first of cc, gcc and clang. FileNotFoundError when there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        found = shutil.which(command[0])
        if found:
            return found, *command[1:]
    raise FileNotFoundError(f"no compiler: {' '.join(named) or ', '.join(COMPILERS)}")


@lru_cache(maxsize=4)
def _version(compiler: tuple[str, ...]) -> str:
    done = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=SECONDS, check=True)
    return done.stdout


def _processor() -> str:
    """What NATIVE stands for, so that machines can share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("flags", "features", "model name", "cpu part", "isa")
    return "\n".join(sorted({line for line in lines if line.lower().startswith(wanted)}))


def _compile(compiler: tuple[str, ...], source: bytes, path: Path) -> None:
    """Compiles for OpenMP but links no library for it: the loops run on the threads that torch has brought along and
    keeps awake. Where those are of another make nothing can be loaded, and the loops are compiled for one thread."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part, whole = f"{folder}/sweeps.o", Path(folder) / path.name
        for threads in (("-fopenmp",), ()):
            compiled = (*compiler, *FLAGS, *threads, "-x", "c", "-c", "-", "-o", part)
            linked = (*compiler, "-shared", part, "-o", str(whole), "-lm")
            try:
                for command in (compiled, linked):
                    subprocess.run(command, input=source, capture_output=True, timeout=SECONDS, check=True)
                ctypes.CDLL(str(whole))
                break
            except (OSError, subprocess.SubprocessError):
                if not threads:
                    raise
        whole.chmod(0o700)
        whole.replace(path)


def _private(folder: Path) -> Path:
    """The folder, made if it is not there. PermissionError unless it is this user's and nobody else may enter."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _own(folder, 0o077)
    return folder


def _own(path: Path, forbidden: int = 0o022) -> None:
    """PermissionError unless `path` is this user's, no link, and without the forbidden mode bits."""
    found = path.lstat()
    if found.st_uid != os.geteuid() or stat.S_ISLNK(found.st_mode) or stat.S_IMODE(found.st_mode) & forbidden:
        raise PermissionError(f"{path} is not this user's alone")
