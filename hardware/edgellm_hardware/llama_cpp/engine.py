"""A model in llama.cpp, driven through its C functions (llama-cpp-python's ctypes layer); runs in the child only.

Logits are asked for, and copied, only at wanted positions, and several sequences share one call. No torch here.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgellm_hardware.llama_cpp.frames import MAX_PAYLOAD
from edgellm_sdk.report import peak_rss

MAX_SEQUENCES = 64  # llama.cpp's own limit is 256; each costs bookkeeping
_CACHE_TYPES = {"f32": 0, "f16": 1}  # ggml_type


class Refused(Exception):
    """A request that cannot be served; `kind` is `model`, `device` or `data`, the text is for the user."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(text)


def set_adapters(lib: Any, context: Any, adapters: Sequence[tuple[Any, float]]) -> int:
    """Replace the adapters of `context` by these (handle, scale) pairs; 0 when it worked.

    Bindings before 0.3.17 add one adapter at a time; in later ones that name replaces the set, so it is not used there.
    """
    if not hasattr(lib, "llama_set_adapters_lora"):
        lib.llama_clear_adapter_lora(context)
        return sum(int(lib.llama_set_adapter_lora(context, handle, scale) != 0) for handle, scale in adapters)
    if not adapters:
        return int(lib.llama_set_adapters_lora(context, None, 0, None))
    handles = (lib.llama_adapter_lora_p_ctypes * len(adapters))(*(handle for handle, _ in adapters))
    scales = (ctypes.c_float * len(adapters))(*(scale for _, scale in adapters))
    return int(lib.llama_set_adapters_lora(context, handles, len(adapters), scales))


class Model:
    """Weights and vocabulary of one file, and its adapters; no context yet."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        from llama_cpp import llama_cpp as lib

        self._lib = lib
        self._log = lib.llama_log_callback(self._write_log)
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        begin = time.perf_counter()
        self._model = self._load(request)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocabulary = int(lib.llama_vocab_n_tokens(self._vocab))
        self.trained_context = int(lib.llama_model_n_ctx_train(self._model))
        self.context = min(request["context"], self.trained_context or request["context"])
        self.eos = [i for i in range(self.vocabulary) if lib.llama_vocab_is_eog(self._vocab, i)]
        self._adapters = [(self._adapter(path), float(scale)) for path, scale in request["adapters"]]
        self.load_seconds = time.perf_counter() - begin
        self.prompt_tokens = self.generated_tokens = 0
        self.prompt_seconds = self.generate_seconds = 0.0

    @staticmethod
    def _write_log(level: int, text: bytes, user_data: Any) -> None:
        if level in (3, 4):  # warnings and errors; the numbering is ggml's
            sys.stderr.write(text.decode("utf-8", "replace"))
            sys.stderr.flush()

    def _load(self, request: Mapping[str, Any]) -> Any:
        lib = self._lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.check_tensors = True
        if hasattr(params, "load_mode"):
            params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if request["mmap"] else lib.LLAMA_LOAD_MODE_NONE
        else:  # llama-cpp-python before 0.3.3x
            params.use_mmap = request["mmap"]
        model = lib.llama_model_load_from_file(os.fsencode(request["path"]), params)
        if not model:
            raise Refused("model", "llama.cpp cannot load it")
        return model

    def _adapter(self, path: str) -> Any:
        adapter = self._lib.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not adapter:
            raise Refused("model", f"llama.cpp cannot load the adapter {path}")
        return adapter

    def _apply(self, context: Any, adapters: Sequence[tuple[Any, float]]) -> None:
        """Make `adapters`, (handle, scale) pairs, the whole set of `context`; none detaches all."""
        if set_adapters(self._lib, context, adapters) != 0:
            raise Refused("model", "llama.cpp cannot apply the adapters")

    def encode(self, text: str) -> list[int]:
        raw = text.encode("utf-8", "replace")
        size = len(raw) + 8
        while True:
            tokens = (self._lib.llama_token * size)()
            count = self._lib.llama_tokenize(self._vocab, raw, len(raw), tokens, size, False, True)
            if count >= 0:
                return list(tokens[:count])
            size = -count

    def decode(self, tokens: Sequence[int]) -> str:
        given = (self._lib.llama_token * len(tokens))(*tokens)
        size = 16 * len(tokens) + 64
        while True:
            text = ctypes.create_string_buffer(size)
            count = self._lib.llama_detokenize(self._vocab, given, len(tokens), text, size, False, True)
            if count >= 0:
                return text.raw[:count].decode("utf-8", "replace")
            size = -count

    def prompt_ids(self, text: str) -> list[int]:
        """`encode` with BOS in front where the file asks for one and the text does not begin with it."""
        ids = self.encode(text)
        bos = self._lib.llama_vocab_bos(self._vocab)
        if self._lib.llama_vocab_get_add_bos(self._vocab) and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def stats(self) -> dict[str, float]:
        return {
            "load_seconds": self.load_seconds,
            "prompt_tokens": self.prompt_tokens,
            "prompt_seconds": self.prompt_seconds,
            "generated_tokens": self.generated_tokens,
            "generate_seconds": self.generate_seconds,
            "peak_rss": peak_rss(),
        }


class Engine(Model):
    """One model, one context. `send` writes a frame and its payload to the parent."""

    def __init__(self, request: Mapping[str, Any], send: Callable[..., None]) -> None:
        super().__init__(request)
        begin = time.perf_counter()
        self._send = send
        self._context = self._make_context(request)
        self._apply(self._context, self._adapters)
        self._memory = self._lib.llama_get_memory(self._context)
        self._batch = self._lib.llama_batch_init(self.batch, 0, 1)
        self._eog = frozenset(self.eos)
        self.load_seconds += time.perf_counter() - begin

    def _make_context(self, request: Mapping[str, Any]) -> Any:
        lib = self._lib
        self.batch = min(request["batch"], self.context)
        self.slots = min(MAX_SEQUENCES, self.batch)
        params = lib.llama_context_default_params()
        params.n_ctx = self.context
        params.n_batch = params.n_ubatch = self.batch
        params.n_seq_max = self.slots
        params.kv_unified = True  # sequences of unlike lengths share the cells
        params.n_threads = params.n_threads_batch = request["threads"]
        params.type_k = params.type_v = _CACHE_TYPES[request["cache"]]
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise Refused("device", f"llama.cpp cannot make a context of {self.context} tokens")
        return context

    def adapt(self, adapters: Sequence[tuple[str, float]]) -> None:
        """Use these adapter files at these scales and no others; those before stay when one cannot be used."""
        fresh: list[tuple[Any, float]] = []
        try:
            for path, scale in adapters:
                fresh.append((self._adapter(path), float(scale)))
            self._apply(self._context, fresh)
        except Refused:
            self._apply(self._context, self._adapters)
            for handle, _ in fresh:
                self._lib.llama_adapter_lora_free(handle)
            raise
        before, self._adapters = self._adapters, fresh
        for handle, _ in before:
            self._lib.llama_adapter_lora_free(handle)

    def _run(self, entries: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Decode (token, position, sequence, wanted) entries, at most `batch`; the batch places that have logits."""
        batch, wanted = self._batch, []
        batch.n_tokens = len(entries)
        for place, (token, position, sequence, want) in enumerate(entries):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = want
            if want:
                wanted.append(place)
        code = self._lib.llama_decode(self._context, batch)
        if code != 0:
            raise Refused("device", f"llama.cpp cannot decode (code {code})")
        return wanted

    def _row(self, place: int) -> Any:
        """The logits of a batch place as a view: (vocabulary,) float32, valid until the next decode."""
        import numpy as np

        pointer = self._lib.llama_get_logits_ith(self._context, place)
        if not pointer:
            raise Refused("device", "llama.cpp gave no logits")
        return np.ctypeslib.as_array(pointer, (self.vocabulary,))

    def logits(self, sequences: Sequence[Sequence[int]], first: Sequence[int]) -> None:
        """Stream frames {"sequence": i, "rows": n} with (n, vocabulary) float32 payloads, rows in order."""
        begin = time.perf_counter()
        rows_at_once = max(1, MAX_PAYLOAD // (4 * self.vocabulary))
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), i))
        while order:
            group = [order.pop(0)]
            room = max(self.batch - len(sequences[group[0]]), 0)
            while order and len(group) < self.slots and len(sequences[order[0]]) <= room:
                room -= len(sequences[order[0]])
                group.append(order.pop(0))
            self._lib.llama_memory_clear(self._memory, False)
            entries = [
                (token, position, slot, position >= first[i])
                for slot, i in enumerate(group)
                for position, token in enumerate(sequences[i])
            ]
            for start in range(0, len(entries), self.batch):
                chunk = entries[start : start + self.batch]
                by_sequence: dict[int, list[int]] = {}
                for place in self._run(chunk):
                    by_sequence.setdefault(group[chunk[place][2]], []).append(place)
                for i, places in by_sequence.items():
                    for at in range(0, len(places), rows_at_once):
                        some = places[at : at + rows_at_once]
                        rows = (memoryview(self._row(place)).cast("B") for place in some)
                        self._send({"sequence": i, "rows": len(some)}, rows, len(some) * self.vocabulary * 4)
                self._send({"beat": 1})
            self.prompt_tokens += len(entries)
        self.prompt_seconds += time.perf_counter() - begin

    def generate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        from edgellm_hardware.sampling import Chooser, cut

        tokens, stops = request["tokens"], tuple(request["stop"])
        room = self.context - len(tokens)
        if room < 1:
            raise Refused("data", f"a prompt of {len(tokens)} tokens leaves no room in a context of {self.context}")
        begin = time.perf_counter()
        self._lib.llama_memory_clear(self._memory, False)
        wanted = [0]
        for start in range(0, len(tokens), self.batch):
            ids = tokens[start : start + self.batch]
            entries = [(t, start + k, 0, start + k == len(tokens) - 1) for k, t in enumerate(ids)]
            wanted = self._run(entries)
            self._send({"beat": 1})
        middle = time.perf_counter()
        chooser, why, text = Chooser(request["temperature"], request["seed"]), "length", None
        out: list[int] = []
        while len(out) < min(request["max_tokens"], room):
            token = chooser.choose(self._row(wanted[0]))
            if token in self._eog:
                why = "eos"
                break
            out.append(token)
            if stops and (text := cut(self.decode(out), stops)) is not None:
                why = "text"
                break
            if len(out) < min(request["max_tokens"], room):
                wanted = self._run([(token, len(tokens) + len(out) - 1, 0, True)])
            self._send({"beat": 1})
        end = time.perf_counter()
        self.prompt_tokens += len(tokens)
        self.prompt_seconds += middle - begin
        self.generated_tokens += len(out)
        self.generate_seconds += end - middle
        return {
            "tokens": out,
            "text": self.decode(out) if text is None else text,
            "stop": why,
            "seconds": end - begin,
        }
