"""Files that are either the old ones or the new ones, never torn; one owner for each run folder.

A write goes to a temporary file in the same folder, is fsynced, renamed over the target, and the folder is fsynced.
A folder of several files is described by `MANIFEST.json`, written last, with the sha256 of each; readers trust only
what it names. A `flock` on the folder lasts as long as its process, so a kill -9 leaves no stale lock behind.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgellm_sdk.errors import ModelError, StorageError

if TYPE_CHECKING:
    from edgellm_sdk.types import Arrays

MANIFEST = "MANIFEST.json"
_TEMP = ".tmp"


def storage_error(error: OSError, path: Path) -> StorageError:
    """The one-line error for a failed system call on `path`."""
    fixes = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space", errno.EROFS: "choose another --output"}
    name = errno.errorcode.get(error.errno or 0, "error")
    return StorageError(f"{error.strerror or 'I/O error'} ({name})", str(path), fixes.get(error.errno or 0, ""))


@contextmanager
def atomic(path: Path, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` whole when the block ends, or not at all."""
    temp = path.parent / f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}{_TEMP}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temp.chmod(mode)
            temp.replace(path)
            sync_folder(path.parent)
        finally:
            temp.unlink(missing_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error


def sync_folder(folder: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target`, in place of what is there, when the block ends."""
    temp = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        yield temp
        for path in temp.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(temp)
        if target.exists():
            shutil.rmtree(target)
        temp.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise storage_error(error, target) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    with atomic(path) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Canonical JSON: sorted keys, no NaN, one trailing newline. ValueError for what JSON cannot say."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_bytes(path, text.encode() + b"\n")


def read_json(path: Path, limit: int = 64 << 20) -> Any:
    """A JSON file written by us. ModelError when it is missing, too large or malformed."""
    try:
        if path.stat().st_size > limit:
            raise ModelError(f"larger than {limit} bytes", str(path))
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", str(path)) from None
    except (ValueError, RecursionError):
        raise ModelError("is not valid JSON", str(path)) from None


def digest_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file's bytes, in hex."""
    sha = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                sha.update(chunk)
                if progress:
                    progress(len(chunk))
    except OSError as error:
        raise storage_error(error, path) from error
    return sha.hexdigest()


def digest_files(files: Iterable[Path], root: Path) -> str:
    """One sha256 over the names (relative to `root`) and contents of files, in sorted order."""
    sha = hashlib.sha256()
    for path in sorted(files):
        sha.update(f"{path.relative_to(root).as_posix()}\0{digest_file(path)}\n".encode())
    return sha.hexdigest()


def publish(folder: Path, files: Iterable[str], about: Mapping[str, Any]) -> None:
    """Write the manifest that makes the named files of `folder` a whole; `about` travels in it."""
    digests = {name: digest_file(folder / name) for name in sorted(files)}
    write_json(folder / MANIFEST, {"about": dict(about), "files": digests})


def published(folder: Path) -> dict[str, Any] | None:
    """The `about` of a folder whose manifest and every file it names are intact, else None."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        manifest = read_json(folder / MANIFEST)
        whole = all(digest_file(folder / name) == digest for name, digest in manifest["files"].items())
    except (ModelError, StorageError, KeyError, AttributeError, TypeError):
        return None
    return manifest["about"] if whole else None


def save_arrays(path: Path, arrays: Arrays, scalars: Mapping[str, Any]) -> None:
    """Arrays and JSON scalars as one safetensors file, atomically. Equal inputs give equal bytes."""
    from edgellm_sdk.wire import pack

    write_bytes(path, pack(arrays, scalars))


def load_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `save_arrays` wrote. ModelError when the file is missing or malformed."""
    from edgellm_sdk.wire import unpack

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", str(path)) from None
    return unpack(raw, str(path))


def try_load_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    try:
        return load_arrays(path)
    except ModelError:
        return None


@contextmanager
def run_folder(folder: Path) -> Iterator[Path]:
    """Own `folder` for the length of the block; StorageError names the process that holds it.

    Temporary files of a killed predecessor are swept once the lock is held.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise storage_error(error, folder) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            raise StorageError(f"in use by process {holder}", str(folder), "wait or choose another --output") from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        for stale in folder.rglob(f".*{_TEMP}"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        yield folder
    finally:
        os.close(descriptor)
