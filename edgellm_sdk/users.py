"""What `edgellm export --users` writes: one base file, an adapter file for each user it helps, and who has which.

    base.gguf            the base
    federation.gguf      the federation's adapter, where someone keeps it
    users/NAME.gguf      one user's own; NAME is `federate.personal.safe_name` of the user
    MANIFEST.json        sha256 of every file; of the base also those of its tokenizer and its chat template alone

Nothing runs before its digest was compared: an adapter on another base gives fluent nonsense, not an error. A user's
device needs the base, the manifest and its own adapter; those of others may be left out, and tell of their texts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgellm_sdk import checkpoint, store
from edgellm_sdk.config import nearest
from edgellm_sdk.errors import ConfigError, DeviceError, ModelError, printable
from edgellm_sdk.gguf_file import read as read_gguf
from edgellm_sdk.models import cache_folder
from edgellm_sdk.types import Adaptable, Artifact, Float32, Generation, Prompt, Session, SessionStats

KIND, FORMAT = "users", 1
BASE_FILE, SHARED_FILE = "base.gguf", "federation.gguf"
_FILE = re.compile(r"users/[a-z0-9][a-z0-9_-]{0,63}\.gguf|federation\.gguf", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Users:
    """`files` maps each user to its adapter file below `folder`, "" for those whom the base serves best; `digests` are
    the sha256 of the files, `tokenizer` and `template` those of the base's."""

    folder: Path
    files: Mapping[str, str]
    digests: Mapping[str, str]
    tokenizer: str
    template: str

    @property
    def base(self) -> Path:
        return self.folder / BASE_FILE

    def checked_base(self) -> Path:
        """The base file. ModelError when it is not the one the adapters were made on, saying what differs."""
        if _present(self.base) == self.digests[BASE_FILE]:
            return self.base
        tokenizer, template = tokenizer_digests(self.base)
        differs = "tokenizer" if tokenizer != self.tokenizer else "chat template" if template != self.template else ""
        what = f"is not the base that the adapters were made on: its {differs or 'content'} differs"
        raise ModelError(what, str(self.base), "export again, or bring the base back")

    def checked_adapter(self, user: str) -> Path | None:
        """The adapter file of `user`, None for the bare base. ConfigError for nobody's name, ModelError for a file
        other than the exported one."""
        if user not in self.files:
            told = f"there is no user {printable(user)[:80]!r}{nearest(user, self.files)}"
            raise ConfigError(told, "user", f"{len(self.files)} users are in {store.MANIFEST}")
        name = self.files[user]
        if not name:
            return None
        path = self.folder / name
        if _present(path) != self.digests[name]:
            raise ModelError("is not the adapter that was exported", str(path), "export again, or bring it back")
        return path

    def artifact(self) -> Artifact:
        """The base to run; the files behind it are the adapters that may come, as far as they are here."""
        adapters = sorted(set(filter(None, self.files.values())))
        names = [BASE_FILE, *(name for name in adapters if (self.folder / name).is_file())]
        paths = tuple(self.folder / name for name in names)
        return Artifact(paths, tuple(self.digests[name] for name in names), "gguf", "", "", {"kind": KIND})


def _present(path: Path) -> str:
    """The sha256 of a file. ModelError when it is not there."""
    if not path.is_file():
        raise ModelError("is missing", str(path), "bring it back, or export again")
    return checkpoint.file_digest(path, cache_folder())


def tokenizer_digests(path: Path) -> tuple[str, str]:
    """sha256 of all that a GGUF file says of its tokenizer but the chat template, and of that template's text."""
    metadata = read_gguf(path).metadata
    sha = hashlib.sha256()
    for key in sorted(metadata):
        if key.startswith("tokenizer.") and key != _TEMPLATE:
            value = metadata[key]
            plain = value.tolist() if hasattr(value, "tolist") else value
            sha.update(json.dumps([key, plain]).encode() + b"\n")
    return sha.hexdigest(), hashlib.sha256(str(metadata.get(_TEMPLATE, "")).encode()).hexdigest()


def publish(folder: Path, files: Mapping[str, str], source: str) -> None:
    """Write the manifest, last. `files` as in `Users`; `source` is the digest of the model that became the base."""
    tokenizer, template = tokenizer_digests(folder / BASE_FILE)
    about = {
        "kind": KIND, "format": FORMAT, "source": source, "tokenizer": tokenizer, "template": template,
        "users": dict(files),
    }  # fmt: skip
    store.publish(folder, {BASE_FILE, *filter(None, files.values())}, about)


def is_folder_of_users(typed: str) -> bool:
    """Whether `typed` names such a folder, or its manifest."""
    manifest = _manifest(typed)
    try:
        if not manifest.is_file():
            return False
    except OSError:  # a name too long, a loop of links: who opens it will say which
        return False
    about = store.read_json(manifest)
    return isinstance(about, dict) and isinstance(about.get("about"), dict) and about["about"].get("kind") == KIND


def _manifest(typed: str) -> Path:
    path = Path(typed)
    return path if path.name == store.MANIFEST else path / store.MANIFEST


def read(typed: str) -> Users:
    """What a manifest says, every name in it checked: none leads out of its folder. ModelError otherwise."""
    path = _manifest(typed)
    manifest = store.read_json(path)
    try:
        about, digests = manifest["about"], manifest["files"]
        files, alone = about["users"], [about["tokenizer"], about["template"]]
        good = about["format"] == FORMAT and BASE_FILE in digests
        good = good and all(isinstance(d, str) and _SHA256.fullmatch(d) for d in [*digests.values(), *alone])
        good = good and all(not name or (_FILE.fullmatch(name) and name in digests) for name in files.values())
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ModelError("is no manifest of users' adapters", str(path), "export again")
    return Users(path.parent, files, digests, *alone)


class UserSession:
    """A `Session` on the base with one user's adapter at a time; `switch` changes whose."""

    def __init__(self, inner: Session, users: Users, user: str = "") -> None:
        """`user` "" is the bare base. DeviceError when the backend cannot change adapters."""
        if not isinstance(inner, Adaptable):
            raise DeviceError("cannot change adapters on a loaded base", inner.device, "use --device llama_cpp")
        self._inner, self._adaptable, self._users = inner, inner, users
        self.user = ""
        self.device, self.vocabulary, self.eos = inner.device, inner.vocabulary, inner.eos
        if user:
            self.switch(user)

    @property
    def users(self) -> Iterable[str]:
        """Everyone there is, in the manifest's order."""
        return self._users.files.keys()

    def switch(self, user: str) -> None:
        """From now on `user`'s adapter on the base that is loaded; "" for the bare base. ConfigError for nobody's name,
        ModelError for a file that is not the one exported; the session then stays as it was."""
        path = self._users.checked_adapter(user) if user else None
        self._adaptable.adapt([(path.absolute(), 1.0)] if path else [])
        self.user = user

    def encode(self, text: str) -> list[int]:
        return self._inner.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._inner.decode(tokens)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return self._inner.prompt_ids(prompt)

    def logits(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[Float32]:
        return self._inner.logits(sequences, first)

    def generate(
        self, tokens: Sequence[int], max_tokens: int, temperature: float = 0.0, seed: int = 0, stop: Sequence[str] = ()
    ) -> Generation:
        return self._inner.generate(tokens, max_tokens, temperature, seed, stop)

    def stats(self) -> SessionStats:
        return self._inner.stats()

    def close(self) -> None:
        self._inner.close()
