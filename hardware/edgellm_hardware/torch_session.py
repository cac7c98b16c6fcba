"""A Session over PyTorch, shared by the cpu and cuda backends. It is the reference that the gate measures against."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from edgellm_hardware.sampling import Chooser, cut
from edgellm_sdk.errors import DataError, DeviceError
from edgellm_sdk.kit import prompts
from edgellm_sdk.report import peak_rss
from edgellm_sdk.types import Artifact, Generation, ModelHandle, Prompt, SessionStats

if TYPE_CHECKING:
    from edgellm_sdk.types import Float32

BATCH_TOKENS = 1024


def handle_of(subject: ModelHandle | Artifact) -> ModelHandle:
    """The model behind an exported file, or the handle itself."""
    if isinstance(subject, ModelHandle):
        return subject
    from edgellm_sdk.models import resolve

    return resolve(str(subject.path))


def batches(lengths: Sequence[int], budget: int = BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices grouped by similar length; a group padded to its longest holds at most `budget` tokens (or one item)."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if group and (len(group) + 1) * lengths[index] > budget:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


class TorchSession:
    """`Session` over a causal language model. `dtype` is a torch name; logits are float32 whatever it is.

    DeviceError when the device has not enough memory, DataError for token ids the model does not have.
    """

    def __init__(self, handle: ModelHandle, device: str, dtype: str) -> None:
        begin = time.perf_counter()
        try:
            loaded = handle.load(dtype=dtype, device=device)
        except torch.OutOfMemoryError:
            raise DeviceError(
                "not enough memory for the model", device, "use a smaller one or --dtype bfloat16"
            ) from None
        self.device = device
        self._model: Any = loaded.model.eval()
        self._tokenizer: Any = loaded.tokenizer
        self._head: Any = self._model.get_output_embeddings()
        self._body: Any = getattr(self._model, self._model.base_model_prefix)
        self.vocabulary = int(self._head.weight.shape[0])
        configs = (self._model.config, getattr(self._model, "generation_config", None))
        self.eos = tuple(sorted({i for config in configs for i in prompts.stop_ids(self._tokenizer, config)}))
        self._load_seconds = time.perf_counter() - begin
        self._prompt_tokens = self._generated_tokens = 0
        self._prompt_seconds = self._generate_seconds = 0.0

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text with special tokens written out, so that `encode(decode(ids))` can be `ids`."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        return prompts.prompt_ids(self._tokenizer, prompt)

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]], first: Sequence[int] | None = None) -> list[Float32]:
        """As in `Session`: sorted by length, padded on the right (causal attention never sees it), and only the wanted
        positions go through the output matrix."""
        import numpy as np

        begin = time.perf_counter()
        given = [self._checked(sequence) for sequence in sequences]
        begins = [len(sequence) - 1 for sequence in given] if first is None else [int(place) for place in first]
        for sequence, place in zip(given, begins, strict=True):
            if not 0 <= place < len(sequence):
                raise DataError(f"a sequence of {len(sequence)} tokens has no position {place}")
        found: list[Float32] = [np.empty((0, 0), np.float32)] * len(given)
        for group in batches([len(sequence) for sequence in given]):
            longest = max(len(given[i]) for i in group)
            padded = [given[i] + [0] * (longest - len(given[i])) for i in group]
            hidden = self._hidden(torch.tensor(padded, device=self.device))
            wanted = torch.cat([hidden[row, begins[i] : len(given[i])] for row, i in enumerate(group)])
            rows = torch.split(self._project(wanted), [len(given[i]) - begins[i] for i in group])
            for i, part in zip(group, rows, strict=True):
                found[i] = part.numpy()
        self._prompt_tokens += sum(len(sequence) for sequence in given)
        self._prompt_seconds += time.perf_counter() - begin
        return found

    @torch.inference_mode()
    def generate(
        self, tokens: Sequence[int], max_tokens: int, temperature: float = 0.0, seed: int = 0, stop: Sequence[str] = ()
    ) -> Generation:
        """Ids after `tokens` without the id that ended them; text up to the stop string that ended it."""
        given, chooser, stops = self._checked(tokens), Chooser(temperature, seed), tuple(stop)
        begin = time.perf_counter()
        step = self._step(torch.tensor([given], device=self.device), None)
        middle = time.perf_counter()
        out: list[int] = []
        why, text = "length", None
        while len(out) < max_tokens:
            token = chooser.choose(step[0])
            if token in self.eos:
                why = "eos"
                break
            out.append(token)
            if stops and (text := cut(self.decode(out), stops)) is not None:
                why = "text"
                break
            if len(out) < max_tokens:
                step = self._step(torch.tensor([[token]], device=self.device), step[1])
        end = time.perf_counter()
        self._prompt_tokens += len(given)
        self._prompt_seconds += middle - begin
        self._generated_tokens += len(out)
        self._generate_seconds += end - middle
        return Generation(tuple(out), self.decode(out) if text is None else text, why, end - begin)

    def stats(self) -> SessionStats:
        return SessionStats(
            self._load_seconds,
            self._prompt_tokens,
            self._prompt_seconds,
            self._generated_tokens,
            self._generate_seconds,
            peak_rss(),
        )

    def close(self) -> None:
        """Let go of the weights."""
        self._model = self._body = self._head = None

    def _hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Last hidden states: ids (batch, length) int64 -> (batch, length, width)."""
        try:
            return self._body(input_ids=ids, use_cache=False).last_hidden_state
        except torch.OutOfMemoryError:
            raise DeviceError("not enough memory for this batch", self.device, "use shorter texts") from None

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (n, width) -> logits (n, vocabulary) float32 on the CPU, soft-capped where the model is."""
        logits = self._head(hidden).float()
        cap = getattr(self._model.config, "final_logit_softcapping", None)
        if cap:
            logits = torch.tanh(logits / cap) * cap
        return logits.cpu()

    def _step(self, ids: torch.Tensor, cache: Any) -> tuple[Float32, Any]:
        """Next-token logits after ids (1, n): ((vocabulary,) float32, the grown key/value cache)."""
        out = self._body(input_ids=ids, past_key_values=cache, use_cache=True)
        return self._project(out.last_hidden_state[0, -1:])[0].numpy(), out.past_key_values

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        given = [int(token) for token in tokens]
        if not given:
            raise DataError("an empty sequence has no next token")
        bad = next((token for token in given if not 0 <= token < self.vocabulary), None)
        if bad is not None:
            raise DataError(f"token {bad} is outside a vocabulary of {self.vocabulary}")
        return given
