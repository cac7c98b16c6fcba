"""The child process that holds llama.cpp: `python -m edgellm_hardware.llama_cpp.worker` (no torch here).

It answers the frames of `frames.py` on stdin/stdout one after the other and ends when stdin closes, even in the middle
of a computation, so it never outlives its parent. Address space and core files are limited before the model file is
touched.
"""

from __future__ import annotations

import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any, BinaryIO

from edgellm_hardware.llama_cpp.engine import Engine, Model, Refused
from edgellm_hardware.llama_cpp.frames import PREFIX, frame, lengths, parse
from edgellm_hardware.llama_cpp.losses import Losses


def answer(model: Model, request: Mapping[str, Any]) -> dict[str, Any]:
    """The final frame of one request."""
    what = request["do"]
    if what == "encode":
        return {"tokens": model.encode(request["text"])}
    if what == "decode":
        return {"text": model.decode(request["tokens"])}
    if what == "prompt":
        return {"tokens": model.prompt_ids(request["text"])}
    if what == "stats":
        return model.stats()
    if isinstance(model, Engine):
        if what == "logits":
            model.logits(request["sequences"], request["first"])
            return {}
        if what == "generate":
            return model.generate(request)
        if what == "adapt":
            model.adapt(request["adapters"])
            return {}
    elif isinstance(model, Losses):
        if what == "hold":
            model.hold(request["name"], request["path"])
            return {}
        if what == "losses":
            return {"losses": model.losses(request["sequences"], request["starts"], request["mixes"])}
        if what == "score":
            return model.score(request["sequences"], request["starts"], request["mix"], request["labels"])
    raise Refused("device", f"this worker does not do {what!r}")


def read_exactly(source: BinaryIO, count: int) -> bytes:
    """`count` bytes, or leave the process: the parent is gone."""
    raw = source.read(count)
    if len(raw) < count:
        os._exit(0)
    return raw


def listen(source: BinaryIO, requests: queue.Queue[dict[str, Any]]) -> None:
    """Queue every request; runs in a thread of its own so that a closed stdin is noticed while llama.cpp computes."""
    while True:
        header, payload = lengths(read_exactly(source, PREFIX.size))
        requests.put(parse(read_exactly(source, header)))
        read_exactly(source, payload)


def confine(address_space: int) -> None:
    """No core file, no growing file on disk, and at most `address_space` bytes of memory mapped."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = address_space if most == resource.RLIM_INFINITY else min(address_space, most)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not land between frames
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=listen, args=(sys.stdin.buffer, requests), daemon=True).start()
    sink = os.fdopen(out, "wb", buffering=1 << 20)

    def send(header: Mapping[str, Any], rows: Any = (), payload_bytes: int = 0) -> None:
        sink.write(frame(header, payload_bytes))
        for row in rows:
            sink.write(row)
        sink.flush()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; we end when it lets go
    request = requests.get()
    confine(int(request["limit"]))
    engine: Model | None = None
    while True:
        try:
            if engine is None:
                engine = Losses(request, send) if request["contexts"] else Engine(request, send)
                send({"done": {"vocabulary": engine.vocabulary, "eos": engine.eos, "context": engine.context}})
            else:
                send({"done": answer(engine, request)})
        except Refused as error:
            send({"error": error.kind, "text": str(error)[:300]})
        except MemoryError:
            send({"error": "device", "text": "out of memory"})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
            send({"error": "device", "text": f"the llama.cpp worker failed: {type(error).__name__}: {error}"[:300]})
        if engine is None:
            sink.flush()
            os._exit(1)
        request = requests.get()


if __name__ == "__main__":
    main()
