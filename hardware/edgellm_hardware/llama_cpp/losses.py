"""Losses of a model under several mixes of LoRA adapters, in llama.cpp; runs in the child only.

With A frozen, s (B + h v) A = s B A + h s v A: adapters (A, B) and (A, v) at scales (1, h) are the model at B + h v, so
one pair of files serves every step h. One set of adapters holds for a whole context, not for a sequence; several
contexts on the one model therefore evaluate several mixes at the same time.

What the last layer's FFN adds reaches no key or value. When only it is adapted (`top_only`) the tokens before the first
scored one go through the model once for a batch, and each mix costs the scored positions alone.

A loss is the same bits however often it is computed: keys and values in float32, no flash attention, and calls laid out
by the sequences alone. Logits stay here; what leaves is one number for a mix, or one for a scored token.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgellm_hardware.llama_cpp.engine import MAX_SEQUENCES, Model, Refused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CELLS = 256  # llama.cpp rounds a context up to this many cells
UBATCH = 512  # tokens in one pass over the weights; bounds the activations, not the batch
_F32 = 0  # ggml_type


@dataclass(frozen=True)
class Scored:
    """Sequences whose tokens from `starts[i]` on are scored: `groups` of sequence numbers share one call."""

    sequences: Sequence[Sequence[int]]
    starts: Sequence[int]
    groups: tuple[tuple[int, ...], ...]

    def tokens(self, group: Sequence[int]) -> int:
        return sum(len(self.sequences[i]) for i in group)

    def first(self, i: int) -> int:
        """The position whose next token is the first scored one of sequence `i`."""
        return self.starts[i] - 1


def grouped(sequences: Sequence[Sequence[int]], starts: Sequence[int], cells: int, longest: int) -> Scored:
    """Consecutive sequences, none above `longest` tokens, go into one call while they fit `cells` tokens: a function
    of the sequences alone."""
    groups: list[list[int]] = []
    room = 0
    for index, sequence in enumerate(sequences):
        if not 1 <= starts[index] < len(sequence) <= longest:
            raise Refused("data", f"{len(sequence)} tokens, scored from {starts[index]}, do not fit {longest}")
        if len(sequence) > room or len(groups[-1]) == MAX_SEQUENCES:
            groups.append([])
            room = cells
        groups[-1].append(index)
        room -= len(sequence)
    return Scored(sequences, starts, tuple(map(tuple, groups)))


class Losses(Model):
    """`contexts` contexts on one model. Adapters are held under names; a mix is a list of (name, scale) pairs."""

    def __init__(self, request: Mapping[str, Any], send: Callable[..., None]) -> None:
        super().__init__(request)
        self._send = send
        self._count = int(request["contexts"])
        self._cells = int(request["context"])  # of one call, over all its sequences
        self._threads = max(1, int(request["threads"]) // self._count)
        self._held: dict[str, Any] = {}
        self._contexts: list[Any] = []
        self._room = (0, 0)
        self._top_only = bool(request["top_only"])
        self._read: list[Scored | None] = [None] * self._count  # whose beginning each context's memory holds
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(self._count)

    def _grow(self, scored: Scored) -> None:
        """Contexts with room for the largest call, made anew when they are too small. The room changes no bit."""
        tokens = max(map(scored.tokens, scored.groups))
        slots = max(map(len, scored.groups))
        if tokens <= self._room[0] and slots <= self._room[1]:
            return
        self._close()
        cells, slots = -(-max(tokens, self._room[0]) // CELLS) * CELLS, max(slots, self._room[1])
        params = self._lib.llama_context_default_params()
        params.n_ctx = params.n_batch = cells
        params.n_ubatch = min(UBATCH, cells)
        params.n_seq_max = slots
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = _F32
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = 0
        else:
            params.flash_attn = False
        for _ in range(self._count):
            context = self._lib.llama_init_from_model(self._model, params)
            if not context:
                raise Refused("device", f"llama.cpp cannot make a context of {cells} tokens")
            self._contexts.append((context, self._lib.llama_batch_init(cells, 0, 1)))
        self._room = cells, slots

    def _close(self) -> None:
        for context, batch in self._contexts:
            self._lib.llama_batch_free(batch)
            self._lib.llama_free(context)
        self._contexts.clear()
        self._read = [None] * self._count

    def hold(self, name: str, path: str | None) -> None:
        """Load the adapter file `path` under `name`; None lets the one there go."""
        for context, _ in self._contexts:  # a freed adapter must not be in use, nor its address taken for "unchanged"
            self._apply(context, ())
        if name in self._held:
            self._lib.llama_adapter_lora_free(self._held.pop(name))
        if path is not None:
            self._held[name] = self._adapter(path)

    def losses(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        mixes: Sequence[Sequence[tuple[str, float]]],
    ) -> list[float]:
        """Mean negative log-likelihood of the scored tokens under each mix, nats, float64."""
        scored = grouped(sequences, starts, self._cells, self.context)
        self._grow(scored)
        found = [0.0] * len(mixes)

        def work(which: int) -> None:
            for place in range(which, len(mixes), self._count):
                parts = [nll for nll, _ in self._run(which, scored, mixes[place], ())]
                found[place] = float(sum(map(sum, parts)) / sum(map(len, parts)))

        begin = time.perf_counter()
        self._together(work, min(self._count, len(mixes)))
        self.prompt_seconds += time.perf_counter() - begin
        return found

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        starts: Sequence[int],
        mix: Sequence[tuple[str, float]],
        labels: Sequence[int],
    ) -> dict[str, list[float] | list[int]]:
        """`nll`: negative log-likelihood of every scored token, sequence by sequence. `chosen`: for every sequence the
        place in `labels` of the likeliest of those tokens where its scoring starts."""
        scored = grouped(sequences, starts, self._cells, self.context)
        self._grow(scored)
        found = []
        for part in self._run(0, scored, mix, labels):
            found.append(part)
            self._send({"beat": 1})
        return {
            "nll": [float(x) for nll, _ in found for x in nll],
            "chosen": [x for _, chosen in found for x in chosen],
        }

    def _together(self, work: Callable[[int], None], count: int) -> None:
        """`work(0)`, ..., `work(count - 1)` in threads of their own: llama.cpp computes without Python's lock."""
        begun = [self._pool.submit(work, which) for which in range(count)]
        for _ in concurrent.futures.as_completed(begun):
            self._send({"beat": 1})
        for done in begun:
            done.result()

    def _run(
        self, which: int, scored: Scored, mix: Sequence[tuple[str, float]], labels: Sequence[int]
    ) -> Iterator[tuple[NDArray[np.float64], list[int]]]:
        """For every sequence in order: the losses of its scored tokens, and, given `labels`, the choice among them."""
        context, batch = self._contexts[which]
        memory = self._lib.llama_get_memory(context)
        begun = self._top_only and len(scored.groups) == 1
        if begun and self._read[which] != scored:
            self._begin(which, scored)
        self._apply(context, [*self._adapters, *((self._held[name], scale) for name, scale in mix if scale)])
        for group in scored.groups:
            if begun:
                for slot, i in enumerate(group):
                    self._lib.llama_memory_seq_rm(memory, slot, scored.first(i), -1)
                spans = [(scored.first(i), len(scored.sequences[i]) - 1) for i in group]
            else:
                # the data too: a number that is not finite would outlive its turn, masked or not
                self._lib.llama_memory_clear(memory, True)
                self._read[which] = None
                spans = [(0, len(scored.sequences[i]) - 1) for i in group]
            rows = self._decode(context, batch, scored, group, spans)
            for i, places in zip(group, rows, strict=True):
                yield self._nll(context, places, scored.sequences[i][scored.starts[i] :], labels)

    def _begin(self, which: int, scored: Scored) -> None:
        """Leave the keys and values of everything before the first scored position in the context's memory."""
        context, batch = self._contexts[which]
        (group,) = scored.groups
        self._read[which] = None
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)
        self._apply(context, self._adapters)
        self._decode(context, batch, scored, group, [(0, scored.first(i)) for i in group])
        self._read[which] = scored

    def _decode(
        self, context: Any, batch: Any, scored: Scored, group: Sequence[int], spans: Sequence[tuple[int, int]]
    ) -> list[list[int]]:
        """Run positions `spans[k]` of each sequence in one call; the places of its positions that have logits."""
        place = 0
        rows: list[list[int]] = []
        for slot, (i, span) in enumerate(zip(group, spans, strict=True)):
            rows.append([])
            for position in range(*span):
                wanted = position >= scored.first(i)
                batch.token[place] = scored.sequences[i][position]
                batch.pos[place] = position
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = slot
                batch.logits[place] = wanted
                if wanted:
                    rows[-1].append(place)
                place += 1
        batch.n_tokens = place
        if place:
            code = self._lib.llama_decode(context, batch)
            if code != 0:
                raise Refused("device", f"llama.cpp cannot decode (code {code})")
            with self._lock:
                self.prompt_tokens += place
        return rows

    def _nll(
        self, context: Any, places: Sequence[int], targets: Sequence[int], labels: Sequence[int]
    ) -> tuple[NDArray[np.float64], list[int]]:
        """One sequence's losses, from views of its logits rows widened to float64 one at a time."""
        import numpy as np

        losses = np.empty(len(places), np.float64)
        chosen: list[int] = []
        for k, (place, target) in enumerate(zip(places, targets, strict=True)):
            pointer = self._lib.llama_get_logits_ith(context, place)
            if not pointer:
                raise Refused("device", "llama.cpp gave no logits")
            row = np.ctypeslib.as_array(pointer, (self.vocabulary,))
            if labels and not k:
                chosen.append(int(row[list(labels)].argmax()))
            wide = row.astype(np.float64)
            wide -= wide.max()
            wanted = wide[target]
            losses[k] = np.log(np.exp(wide, out=wide).sum()) - wanted
        return losses, chosen
