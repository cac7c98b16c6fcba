"""The nouns. Frozen, cheap, free of torch; arrays are numpy and only typed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edgellm_sdk.kit.loading import LoadedModel

    Array: TypeAlias = NDArray[Any]
    Arrays: TypeAlias = Mapping[str, Array]
    Float32: TypeAlias = NDArray[np.float32]
else:  # numpy is not imported to name a type
    Array = Arrays = Float32 = Any

SERVER = "server/"
"""Begins the names of a State's arrays that are sent to no client."""
FROZEN = "frozen/"
"""Begins the names of an assignment's arrays that its client uses under the rest of the name, but does not train."""
FOLDED = ("folded_A", "folded_B")
"""End the names of a LoRA that a module's own LoRA rests on: X.folded_A (R, d_in), X.folded_B (d_out, R), scale 1."""

Scalar: TypeAlias = str | int | float | bool | None
Scalars: TypeAlias = Mapping[str, Any]  # JSON values
Message: TypeAlias = Mapping[str, str]  # {"role": ..., "content": ...}
Prompt: TypeAlias = str | tuple[Message, ...]

__all__ = [
    "Adaptable",
    "Artifact",
    "Assignment",
    "Dataset",
    "DeviceInfo",
    "Example",
    "Generation",
    "Message",
    "Metric",
    "ModelHandle",
    "Profile",
    "Prompt",
    "Session",
    "SessionStats",
    "State",
    "Update",
]


@dataclass(frozen=True)
class ModelHandle:
    """A model on disk: a reference, never weights.

    `path` is a folder with `config.json` and safetensors (`format="hf"`) or one GGUF file (`format="gguf"`).
    `adapters` are folders of unmerged adapters that belong on top, in order (see `edgellm_sdk.kit.adapters`).
    `digest` is the sha256 over what `path` and `adapters` hold; `parameters` counts the base's scalars.
    """

    path: Path
    digest: str
    format: Literal["hf", "gguf"]
    architecture: str
    dtype: str
    parameters: int
    adapters: tuple[Path, ...] = ()
    name: str = ""

    def load(self, dtype: str = "float32", device: str = "cpu", merge: bool = False) -> LoadedModel:
        """Weights in memory (imports torch). `merge` folds every adapter in; ModelError if one cannot be."""
        from edgellm_sdk.kit.loading import load

        return load(self, dtype=dtype, device=device, merge=merge)

    def tensors(self) -> Iterator[tuple[str, Array]]:
        """(name, float array) one at a time, adapters merged, quantised tensors decoded to float32."""
        from edgellm_sdk.kit.loading import stream_tensors

        return stream_tensors(self)


@dataclass(frozen=True, slots=True)
class Example:
    """One training or test example; the loss falls on `completion` (all of it when `prompt` is empty)."""

    prompt: Prompt
    completion: str
    label: str | None = None
    user: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Examples in file order, some built only when read; `fingerprint` is a sha256 of the content.

    Classification data has `labels` and, in the same order, the `answers` that stand for them as completions.
    """

    examples: Sequence[Example]
    fingerprint: str
    name: str = ""
    labels: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def select(self, indices: Sequence[int]) -> Dataset:
        """The examples at `indices`, in that order, under a fingerprint of their own."""
        from edgellm_sdk.data import select

        return select(self, indices)


@dataclass(frozen=True)
class Update:
    """What one client sends in one round; `edgellm_sdk.wire` turns it into bytes and back.

    `base` is the digest of the model it was computed on, `kind` says how `arrays` are to be read
    (`delta`, `lora`, `seeds`, `gradients`, ...), `examples` is the client's claim of its data size, `rng` names the
    random stream that seeds refer to, `scalars` are small JSON values (a mean loss, a step count).
    """

    base: str
    round: int
    client: str
    kind: str
    arrays: Arrays
    examples: int
    rng: str = ""
    scalars: Scalars = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """What the server knows after `round` rounds. A run resumes from these bytes alone.

    Arrays whose names begin with `server/` are sent to no client. `cohort` selects the clients of the next round: two
    states with one cohort sample the same clients. A method that wants the same clients again (FwdLLM while it rejects)
    returns the cohort it was given.
    """

    base: str
    round: int
    arrays: Arrays
    scalars: Scalars = field(default_factory=dict)
    cohort: int = 0

    @property
    def sent(self) -> Arrays:
        """The arrays that clients may be sent."""
        return {name: array for name, array in self.arrays.items() if not name.startswith(SERVER)}


@dataclass(frozen=True)
class Assignment:
    """What the server sends one client for one round; its bytes are counted as download."""

    base: str
    round: int
    client: str
    arrays: Arrays
    scalars: Scalars = field(default_factory=dict)
    options: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """What a client says it has: bytes that a training process may use, cores, bits a second each way; 0: unknown."""

    kind: str = ""
    memory: int = 0
    cores: int = 0
    up: float = 0.0
    down: float = 0.0


@dataclass(frozen=True)
class Metric:
    """A measured value with its unit, the number of items behind it and a 95 % confidence interval if it has one."""

    value: float
    unit: str = ""
    n: int = 0
    ci95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Artifact:
    """Exported files (the first is the one to run), their sha256, their device, what they were checked against."""

    files: tuple[Path, ...]
    digests: tuple[str, ...]
    target: str
    device: str
    source: str
    verified: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.files[0]


@dataclass(frozen=True)
class DeviceInfo:
    """What a backend found: `available` with `details`, or not, with the `reason` and what to do."""

    name: str
    available: bool
    reason: str = ""
    details: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """Greedy or sampled continuation. `stop` is `eos`, `length` or `text`."""

    tokens: tuple[int, ...]
    text: str
    stop: str
    seconds: float


@dataclass(frozen=True)
class SessionStats:
    """Seconds, tokens per second and bytes, measured in the process that ran the model."""

    load_seconds: float
    prompt_tokens: int
    prompt_seconds: float
    generated_tokens: int
    generate_seconds: float
    peak_rss: int


@runtime_checkable
class Session(Protocol):
    """A model loaded on a device. Every backend gives this and the gate compares two of them."""

    device: str
    vocabulary: int
    eos: tuple[int, ...]  # ids that end a generation

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens written in it are parsed, nothing is added."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The ids the engine feeds for `prompt`: messages through the model's own chat template with the assistant
        header open, plain text as it is, and BOS where this model's engine adds one."""
        ...

    def logits(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[Float32]:
        """For each sequence the next-token logits after positions `first[i]`, ..., end: (n_i, vocabulary) float32.
        `first` None means the last position only."""
        ...

    def generate(
        self, tokens: Sequence[int], max_tokens: int, temperature: float = 0.0, seed: int = 0, stop: Sequence[str] = ()
    ) -> Generation: ...

    def stats(self) -> SessionStats: ...

    def close(self) -> None: ...


@runtime_checkable
class Adaptable(Protocol):
    """A session that changes its LoRA adapters and keeps its base."""

    def adapt(self, adapters: Sequence[tuple[Path, float]]) -> None:
        """Make these files, each at its scale, all the adapters there are. ModelError for one that does not fit; those
        before then stay."""
        ...
