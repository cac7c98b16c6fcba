"""Training on an engine that only infers: the loss of a GGUF file as a function of a LoRA beside it.

Method (b) of "fine-tuning with inference engines" (P-RGE / MobiZO, arXiv 2409.15520) for any method that asks for
losses along directions. theta = all B of a LoRA-FA (arXiv 2308.03303). With A frozen a perturbation of B is linear in
the adapter, so theta = (A, B) and v = (A, v) are two adapter files and theta + h v is the pair at scales (1, h): one
file a direction, none a step. Where A trains too (kind `lora`), or an adapter is so large that a second one in memory
counts, every point is a file of its own.

Files lie in a private folder in memory and are gone once the child has read them. The child keeps one copy of the
weights, theta, and as many directions as are being evaluated; see `losses` for what it computes and why twice the same
question gives the same bits.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from edgellm_plugins.export import architectures, gguf_container, llama_family
from edgellm_plugins.export.gguf_container import Planned, Value

from edgellm_hardware.llama_cpp import Config
from edgellm_hardware.llama_cpp.method import ADAPTER, LlamaSession, check_installed
from edgellm_sdk.errors import ConfigError, ModelError, printable
from edgellm_sdk.gguf_file import GGUFFile, read
from edgellm_sdk.kit import adapters, prompts, scoring
from edgellm_sdk.types import Array, Arrays, Dataset, Metric, ModelHandle

if TYPE_CHECKING:
    from edgellm_sdk.context import Context
    from edgellm_sdk.types import Float32

MODULES = {  # of a decoder layer, in the order in which torch finds them
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
KINDS = ("lora", "lora-fa")
TRAINING = {"adapters": "its own", "batch": "whole minibatches", "cache": "f32, so that losses repeat"}
SMALL = 0.05
"""The size of an adapter, as a share of its model's file, up to which a second one is held beside it."""
KEPT_BATCHES = 1024  # token ids of so many batches are kept
_CONTROL, _USER_DEFINED = 3, 4


@dataclass(frozen=True)
class Linear:
    """A weight (d_out, d_in): its transformers and GGUF names; `heads` whose rows GGUF keeps in another order;
    `top_ffn`: it is in the FFN of the last layer."""

    name: str
    tensor: str
    d_in: int
    d_out: int
    heads: int
    top_ffn: bool


def linears(file: GGUFFile, spec: adapters.Spec) -> list[Linear]:
    """The matrices that `spec` puts a LoRA on, in the order in which torch's `adapters.install` meets them.

    ModelError for another architecture than llama, ConfigError when nothing matches.
    """
    found, about, where = [], file.metadata, str(file.path)
    family = architectures.LLAMA.gguf
    if about.get("general.architecture") != family:
        named = printable(str(about.get("general.architecture")))[:30]
        raise ModelError(f"{named} models cannot be trained here yet", where, "Llama models can")
    numbers: list[Any] = [about.get(f"{family}.{key}") for key in ("block_count", "attention.head_count")]
    numbers.append(about.get(f"{family}.attention.head_count_kv", numbers[1]))
    if any(type(number) is not int or number < 1 for number in numbers):
        raise ModelError("lacks the number of its layers or heads, or has another in each layer", where)
    layers, heads, kv_heads = numbers
    if spec.layers > layers:
        raise ConfigError(f"layers: {spec.layers} asked for, the model has {layers}")
    for index in range(layers - (spec.layers or layers), layers):
        for module, stem in MODULES.items():
            info = file.tensors.get(f"blk.{index}.{stem}.weight")
            if info is None or len(info.shape) != 2 or not module.endswith(spec.targets):
                continue
            d_in, d_out = info.shape
            rows, top = {"attn_q": heads, "attn_k": kv_heads}.get(stem, 0), index == layers - 1
            name = f"model.layers.{index}.{module}"
            found.append(Linear(name, info.name, d_in, d_out, rows, top and module.startswith("mlp.")))
    if not found:
        raise ConfigError(f"no module ends in {', '.join(spec.targets)}", "targets")
    return found


class GGUFTokenizer:
    """A file's own tokenizer with the face that `kit.prompts` knows from transformers."""

    def __init__(self, session: LlamaSession) -> None:
        about = session.file.metadata
        self._session = session
        named, kinds = session.special_tokens, about.get("tokenizer.ggml.token_type", ())
        self.chat_template = session.chat_template
        self.bos_token, self.eos_token = named.get("bos_token"), named.get("eos_token")
        self.unk_token, self.pad_token = named.get("unk_token"), named.get("pad_token")
        self.eos_token_id = about.get("tokenizer.ggml.eos_token_id") if self.eos_token is not None else None
        self.all_special_ids = [i for i, kind in enumerate(kinds) if kind in (_CONTROL, _USER_DEFINED)]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self._session.plain_ids(text) if add_special_tokens else self._session.encode(text)


class Perturbed:
    """The `Objective` on a GGUF file. One per process; its child and folder go with it."""

    def __init__(self, model: ModelHandle, spec: adapters.Spec, max_length: int, config: Config, ctx: Context) -> None:
        check_installed()
        if spec.kind not in KINDS:
            what = f"llama.cpp adds a LoRA to a GGUF file, not {spec.kind!r}"
            raise ConfigError(what, "train", f"use {' or '.join(KINDS)}, or --device cpu")
        for name in ("adapters", "batch", "cache"):
            if getattr(config, name) != getattr(Config(), name):
                fix = f"leave it out: training uses {TRAINING[name]}"
                raise ConfigError(f"{name}: cannot be chosen in training", "llama_cpp", fix)
        if model.format != "gguf" or model.adapters:
            raise ModelError("llama_cpp trains over GGUF files", str(model.path), "give the .gguf file as --model")
        self._spec, self._max_length, self._contexts = spec, max_length, config.contexts
        self._linears = linears(read(model.path), spec)
        top_only = all(linear.top_ffn for linear in self._linears)
        self._session = LlamaSession(model.path, config, ctx, config.contexts, top_only)
        self._folder = tempfile.TemporaryDirectory(prefix="edgellm-", dir=_memory_folder())
        weakref.finalize(self, _end, self._session, self._folder)
        self._tokenizer = GGUFTokenizer(self._session)
        self._initial: dict[str, Float32] = {}
        self._frozen: dict[str, Float32] = {}
        stream = ctx.stream("adapter")
        for linear in self._linears:
            a, b = adapters.lora_start(spec.rank, linear.d_in, linear.d_out, stream)
            (self._initial if spec.kind == "lora" else self._frozen)[f"{linear.name}.lora_A"] = a
            self._initial[f"{linear.name}.lora_B"] = b
        values = sum(value.nbytes for value in (*self._initial.values(), *self._frozen.values()))
        self._pairs = spec.kind == "lora-fa" and values <= SMALL * model.path.stat().st_size
        self._held: dict[str, Array] = {}
        self._batches: OrderedDict[str, list[prompts.Encoded]] = OrderedDict()

    @property
    def initial(self) -> Mapping[str, Float32]:
        return self._initial

    def evaluate(
        self,
        name: str,
        make: Callable[[], Dataset],
        theta: Arrays,
        directions: Sequence[Arrays],
        steps: Sequence[float],
    ) -> Array:
        """As in `Objective`."""
        batch = _question(self._batch(name, make))
        if not self._pairs:
            return self._at_points(batch, theta, directions, steps)
        self._hold_theta(theta)
        unique = list({id(v): v for v in directions}.values())
        places = {id(v): place for place, v in enumerate(unique)}
        at_once = max(1, self._contexts * len(unique) // len(directions))
        found = np.empty(len(directions), np.float64)
        for begin in range(0, len(unique), at_once):
            chosen = [k for k, v in enumerate(directions) if begin <= places[id(v)] < begin + at_once]
            held = {f"v{places[id(directions[k])] - begin}": directions[k] for k in chosen if steps[k]}
            for slot, v in held.items():
                self._hold(slot, v)
            mixes = [
                [("theta", 1.0), *([(f"v{places[id(directions[k])] - begin}", float(steps[k]))] if steps[k] else [])]
                for k in chosen
            ]
            found[chosen] = self._session.ask({"do": "losses", **batch, "mixes": mixes})["losses"]
        for place in range(min(at_once, len(unique))):
            self._drop(f"v{place}")
        return found

    def _at_points(
        self, batch: Mapping[str, Any], theta: Arrays, directions: Sequence[Arrays], steps: Sequence[float]
    ) -> Array:
        """Every theta + h v as an adapter of its own, `contexts` of them at a time."""
        if self._held:
            self._drop("theta")
            self._held = {}
        found: list[float] = []
        for begin in range(0, len(directions), self._contexts):
            chosen = range(begin, min(begin + self._contexts, len(directions)))
            for slot, k in enumerate(chosen):
                h = np.float32(steps[k])
                self._hold(f"p{slot}", {name: value + h * directions[k][name] for name, value in theta.items()})
            mixes = [[(f"p{slot}", 1.0)] for slot in range(len(chosen))]
            found += self._session.ask({"do": "losses", **batch, "mixes": mixes})["losses"]
        for slot in range(min(self._contexts, len(directions))):
            self._drop(f"p{slot}")
        return np.array(found, np.float64)

    def measure(self, theta: Arrays, data: Dataset) -> dict[str, Metric]:
        """As in `Objective`, with the interval and the choice among labels that torch's has."""
        self._hold_theta(theta)
        firsts = scoring.first_tokens(data, self._session.encode) if data.labels else []
        losses: list[float] = []
        chosen: list[int] = []
        for start in range(0, len(data), scoring.CHUNK):
            rows = range(start, min(start + scoring.CHUNK, len(data)))
            batch = self._batch(f"{data.fingerprint}/{start}", lambda rows=rows: data.select(rows))  # type: ignore[misc]
            answer = self._session.ask({"do": "score", **_question(batch), "mix": [("theta", 1.0)], "labels": firsts})
            losses += answer["nll"]
            chosen += answer["chosen"]
        return scoring.metrics(np.array(losses, np.float64), [data.labels[i] for i in chosen], data)

    def write(self, folder: Path, theta: Arrays, base: Mapping[str, str]) -> None:
        """As in `Objective`, and `adapter.gguf` beside it, which runs on the base file as it is."""
        adapters.write_arrays(folder, self._spec, {**self._frozen, **theta}, base)
        self._write_file(folder / ADAPTER, theta, base["name"])

    def close(self) -> None:
        """End the child and remove what is left of the files. Harmless when repeated."""
        _end(self._session, self._folder)

    @property
    def session(self) -> LlamaSession:
        return self._session

    def encode(self, name: str, make: Callable[[], Dataset]) -> list[prompts.Encoded]:
        """The token ids of the batch called `name`, and where its loss begins."""
        return self._batch(name, make)

    def _batch(self, name: str, make: Callable[[], Dataset]) -> list[prompts.Encoded]:
        if name not in self._batches:
            self._batches[name] = prompts.encode(self._tokenizer, make().examples, self._max_length)
            if len(self._batches) > KEPT_BATCHES:
                self._batches.popitem(last=False)
        self._batches.move_to_end(name)
        return self._batches[name]

    def _hold_theta(self, theta: Arrays) -> None:
        """Load theta as the adapter `theta`, unless it is there already."""
        if self._held.keys() != theta.keys() or any(not np.array_equal(self._held[n], a) for n, a in theta.items()):
            self._held = {}
            self._hold("theta", theta)
            self._held = {name: np.array(value) for name, value in theta.items()}

    def _hold(self, name: str, values: Arrays) -> None:
        path = Path(self._folder.name) / f"{name}.gguf"
        try:
            self._write_file(path, values, name)
            self._session.ask({"do": "hold", "name": name, "path": str(path)})
        finally:
            path.unlink(missing_ok=True)

    def _drop(self, name: str) -> None:
        self._session.ask({"do": "hold", "name": name, "path": None})

    def _write_file(self, path: Path, values: Arrays, name: str) -> None:
        """A and `values` as a GGUF adapter; alpha / r is folded into B, so that alpha 0 means 0 and not 1."""
        whole = {**self._frozen, **values}
        arrays: dict[str, Array] = {}
        for linear in self._linears:
            arrays[f"{linear.tensor}.lora_a"] = np.ascontiguousarray(whole[f"{linear.name}.lora_A"], np.float32)
            b = np.asarray(whole[f"{linear.name}.lora_B"], np.float32) * np.float32(self._spec.scale)
            arrays[f"{linear.tensor}.lora_b"] = llama_family.permute(b, linear.heads) if linear.heads else b
        about = {
            "general.type": Value("string", "adapter"),
            "general.architecture": Value("string", architectures.LLAMA.gguf),
            "general.name": Value("string", name),
            "adapter.type": Value("string", "lora"),
            "adapter.lora.alpha": Value("f32", float(self._spec.rank)),
        }
        plan = [Planned(key, array.shape, "F32") for key, array in arrays.items()]
        gguf_container.write(path, about, plan, arrays.items())


def _question(batch: Sequence[prompts.Encoded]) -> dict[str, Any]:
    return {
        "sequences": [list(row.tokens) for row in batch],
        "starts": [max(row.start, 1) for row in batch],
    }


def _memory_folder() -> str | None:
    """A folder that lives in memory, or None for the usual temporary one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None


def _end(session: LlamaSession, folder: tempfile.TemporaryDirectory[str]) -> None:
    with contextlib.suppress(OSError):
        session.close()
    folder.cleanup()
