"""A Session on a GGUF file: the strict reader looks at it first, then a guarded child runs it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm_hardware.llama_cpp import INSTALL, Config
from edgellm_hardware.llama_cpp.child import Child
from edgellm_sdk.errors import ConfigError, DataError, DeviceError, ModelError
from edgellm_sdk.templates import Renderer
from edgellm_sdk.types import Artifact, Generation, ModelHandle, Prompt, SessionStats

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Float32

ADAPTER = "adapter.gguf"
_WORKER = "edgellm_hardware.llama_cpp.worker"
_TRAINING = {
    # contexts side by side, or a busy machine: threads that spin at a barrier hold up the one they wait for
    "OMP_WAIT_POLICY": "passive",
    # adapters come and go: each in memory of its own, given back whole, leaves no holes
    "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
}
_MARGIN = 2 << 30  # address space of Python, numpy, thread stacks and allocator arenas; little of it resident
_BUDGET_MARGIN = 1 << 30


def deploy(subject: ModelHandle | Artifact, config: Config, ctx: Context) -> LlamaSession:
    """A live session on `subject`: a GGUF file, or adapters that `training` left beside one."""
    check_installed()
    if isinstance(subject, ModelHandle) and subject.format != "gguf":
        path, tuned = trained_here(subject)
        return LlamaSession(path, dataclasses.replace(config, adapters=",".join([*tuned, config.adapters])), ctx)
    spare = 0
    if isinstance(subject, Artifact):  # adapters that `adapt` may bring later
        spare = max((path.stat().st_size for path in subject.files[1:] if path.suffix == ".gguf"), default=0)
    return LlamaSession(subject.path, config, ctx, spare=spare)


def check_installed() -> None:
    from importlib.util import find_spec

    if find_spec("llama_cpp") is None:
        raise DeviceError("llama-cpp-python is not installed", "", INSTALL)


def trained_here(model: ModelHandle) -> tuple[Path, list[str]]:
    """The GGUF file under a tuned model, and the adapters on it as `PATH@1`. ModelError when it rests on no such file.

    That the base is the one trained on was checked when the handle was made.
    """
    from edgellm_sdk.store import read_json

    note = read_json(model.adapters[0] / "base.json") if model.adapters else {}
    base = Path(str(note.get("path", "")))
    files = [folder / ADAPTER for folder in model.adapters]
    if base.suffix != ".gguf" or not base.is_file() or not all(file.is_file() for file in files):
        raise ModelError("llama_cpp runs GGUF files", str(model.path), "edgellm export --plugin gguf makes one")
    return base, [f"{file}@1" for file in files]


def adapter_list(text: str) -> list[tuple[Path, float]]:
    """`a.gguf,b.gguf@0.5` as (absolute path, scale) pairs; ConfigError for a scale that is no finite number."""
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, at, number = item.rpartition("@")
        try:
            scale = float(number) if at else 1.0
        except ValueError:
            raise ConfigError(f"{number!r} is not a scale", f"adapter {item}", "write PATH@SCALE") from None
        if not abs(scale) < float("inf"):
            raise ConfigError(f"{number!r} is not a finite scale", f"adapter {item}")
        found.append((Path(name if at else item).absolute(), scale))
    return found


def physical_cores() -> int:
    """Physical cores this process may use: hyperthreads slow llama.cpp down."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


def address_space(file_bytes: int, vocabulary: int, config: Config, budget: int | None, contexts: int = 1) -> int:
    """Bytes of RLIMIT_AS: three times the files (map, copy, repacked copy), `contexts` times the logits of a batch and
    the cache, and a margin.

    A `budget` of resident bytes lowers it to budget + 1 GiB for what is mapped but never touched.
    """
    if config.memory:
        return config.memory << 20
    logits = 8 * config.batch * vocabulary * 4
    limit = 3 * file_bytes + contexts * (logits + config.context * (1 << 19)) + _MARGIN
    return limit if budget is None else min(limit, budget + _BUDGET_MARGIN)


def chat_parts(metadata: Mapping[str, Any]) -> tuple[str | None, dict[str, str]]:
    """(chat template or None, the special tokens it may name as text) of a GGUF file."""
    tokens, special = metadata.get("tokenizer.ggml.tokens", ()), {}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            special[f"{ours}_token"] = str(tokens[token])
    template = metadata.get("tokenizer.chat_template")
    return (template if isinstance(template, str) else None), special


class LlamaSession:
    """`Session` over a child process. Every failure is a ModelError, DeviceError or DataError of one line."""

    device = "llama_cpp"

    def __init__(
        self, path: Path, config: Config, ctx: Context, contexts: int = 0, top_only: bool = False, spare: int = 0
    ) -> None:
        """`contexts` above 0: the child answers for losses under mixes of adapters instead of logits and text;
        `top_only`: they will adapt the last layer's FFN alone; `spare` bytes are the largest adapter that may come."""
        from edgellm_sdk.gguf_file import read

        path = path.absolute()
        adapters = adapter_list(config.adapters)
        files = [read(path), *(read(adapter) for adapter, _ in adapters)]
        if files[0].metadata.get("general.type") == "adapter":
            raise ModelError("is a LoRA adapter", str(path), "run its base model with --adapters")
        self._path, self.file = path, files[0]
        self._renderer: Renderer | None = None
        self.chat_template, self.special_tokens = chat_parts(files[0].metadata)
        words = len(files[0].metadata.get("tokenizer.ggml.tokens", ())) or 1 << 18
        size = spare + sum(file.stat().st_size for file in (path, *(adapter for adapter, _ in adapters)))
        self._child = Child(_WORKER, str(path), config.patience, ctx.deadline, _TRAINING if contexts else {})
        request: dict[str, Any] = {
            "path": str(path),
            "context": config.context,
            "batch": config.batch,
            "threads": config.threads or min(physical_cores(), ctx.threads),
            "mmap": config.mmap,
            "cache": config.cache,
            "adapters": [[str(adapter), scale] for adapter, scale in adapters],
            "contexts": contexts,
            "top_only": top_only,
            "limit": address_space(size, words, config, ctx.memory, max(1, contexts)),
        }
        try:
            opened = self._child.call(request)
            self.vocabulary = int(opened["vocabulary"])
            self.eos = tuple(int(token) for token in opened["eos"])
            self.context = int(opened["context"])
        except BaseException:
            self._child.kill()
            self._child.close()
            raise

    def encode(self, text: str) -> list[int]:
        return self._ids(self._child.call({"do": "encode", "text": text}))

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._child.call({"do": "decode", "tokens": self._checked(tokens)})["text"])

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Messages go through the file's own template, which runs in a sandbox of its own, not in the worker."""
        if isinstance(prompt, str):
            text = prompt
        elif self.chat_template is None:
            raise ModelError("has no chat template", str(self._path), "give a plain text prompt")
        else:
            if self._renderer is None:
                self._renderer = Renderer(self.chat_template, self.special_tokens)
            text = self._renderer.render(prompt)
        return self.plain_ids(text)

    def plain_ids(self, text: str) -> list[int]:
        """Token ids of `text`, with BOS in front where the file asks for it."""
        return self._ids(self._child.call({"do": "prompt", "text": text}))

    def adapt(self, adapters: Sequence[tuple[Path, float]]) -> None:
        """Make these LoRA adapter files, each at its scale, all there are; the base stays loaded.

        ModelError for a file that is no adapter or does not fit; those before then stay.
        """
        from edgellm_sdk.gguf_file import read

        for path, _ in adapters:
            if read(path).metadata.get("general.type") != "adapter":
                raise ModelError("is no LoRA adapter", str(path))
        self._child.call({"do": "adapt", "adapters": [[str(path), scale] for path, scale in adapters]})

    def ask(self, request: Mapping[str, Any]) -> Any:
        """What the child answers to a request of another kind."""
        return self._child.call(request)

    def logits(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[Float32]:
        """As in `Session`. DataError for a sequence that is empty or longer than the context."""
        import numpy as np

        given = [self._checked(sequence) for sequence in sequences]
        begins = [len(sequence) - 1 for sequence in given] if first is None else [int(place) for place in first]
        for sequence, begin in zip(given, begins, strict=True):
            if not 0 < len(sequence) <= self.context or not 0 <= begin < len(sequence):
                raise DataError(
                    f"{len(sequence)} tokens, scored from {begin}, do not fit a context of {self.context}",
                    fix="set a larger context, or shorten the text",
                )
        shapes = [(len(sequence) - begin, self.vocabulary) for sequence, begin in zip(given, begins, strict=True)]
        parts: list[tuple[dict[str, Any], bytearray]] = []
        expected = 4 * sum(rows * columns for rows, columns in shapes)
        self._child.call({"do": "logits", "sequences": given, "first": begins}, parts, expected)
        rows: list[list[Float32]] = [[] for _ in given]
        try:
            for header, payload in parts:
                part = np.frombuffer(payload, dtype=np.float32)
                rows[header["sequence"]].append(part.reshape(header["rows"], self.vocabulary))
            found = [part[0] if len(part) == 1 else np.concatenate(part) for part in rows]
        except (ValueError, IndexError, TypeError, KeyError):
            found = []
        if [part.shape for part in found] != shapes:
            self._child.kill()
            raise DeviceError("the llama.cpp worker gave logits of the wrong shape")
        return found

    def generate(
        self, tokens: Sequence[int], max_tokens: int, temperature: float = 0.0, seed: int = 0, stop: Sequence[str] = ()
    ) -> Generation:
        """Ids after `tokens` without the id that ended them; text up to the stop string that ended it."""
        given = self._checked(tokens)
        if not given:
            raise DataError("an empty prompt has no continuation")
        answer = self._child.call(
            {
                "do": "generate",
                "tokens": given,
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seed": seed,
                "stop": list(stop),
            }
        )
        return Generation(tuple(answer["tokens"]), answer["text"], answer["stop"], answer["seconds"])

    def stats(self) -> SessionStats:
        return SessionStats(**self._child.call({"do": "stats"}))

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._child.close()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        given = [int(token) for token in tokens]
        bad = next((token for token in given if not 0 <= token < self.vocabulary), None)
        if bad is not None:
            raise DataError(f"token {bad} is outside a vocabulary of {self.vocabulary}")
        return given

    @staticmethod
    def _ids(answer: Any) -> list[int]:
        return [int(token) for token in answer["tokens"]]
