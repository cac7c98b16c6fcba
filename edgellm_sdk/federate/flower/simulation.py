"""Flower's simulation engine: thousands of clients on one machine, spread over Ray's worker processes.

The clients, their names, data and order are those of the engine in process, so the bytes are the same. A worker loads
the model and the data once and then plays whichever client a message names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.app import Context as FlowerContext
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce import start_vce
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from edgellm_sdk.context import Context, Cost
from edgellm_sdk.errors import EdgeLLMError, FederationError, printable
from edgellm_sdk.federate.client import work
from edgellm_sdk.federate.flower import QUIET
from edgellm_sdk.federate.flower.enrol import FAILURE, UPDATE, WORK
from edgellm_sdk.federate.flower.hub import addressed, begin_run
from edgellm_sdk.federate.flower.parts import cost_of, from_records, to_records
from edgellm_sdk.federate.rounds import Engine, Failure
from edgellm_sdk.federate.sent import round_of
from edgellm_sdk.federate.told import cost_from_bytes, cost_to_bytes
from edgellm_sdk.relay import Relay
from edgellm_sdk.types import Dataset, ModelHandle

CLIENT, FAULT = "client", "fault"
MAX_NODES = 256  # of Flower's; any of them can play any client, and it looks at each in turn
POLL = 0.02


@dataclass(frozen=True)
class Worker:
    """What a worker process needs for any client's turn."""

    relay: Relay
    model: ModelHandle
    shards: Callable[[str], Dataset]
    ctx: Context


@lru_cache(maxsize=1)
def worker(description: str) -> Worker:
    """The worker of this process, made from the JSON of a job. Loads once, whatever it is asked."""
    from edgellm_sdk.steps.federated import as_worker

    return as_worker(json.loads(description))


def client_app(description: str) -> ClientApp:
    """Flower's client app: a client's turn, the client being named by the message."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: FlowerContext) -> Message:
        mine = worker(description)
        client = str(message.content.config_records[CLIENT]["name"])
        del message.content[CLIENT]
        body = from_records(message.content, 1 << 40, "the assignment")[1]
        try:
            done = work(mine.relay, mine.model, mine.shards(client), client, body, mine.ctx)
        except EdgeLLMError as error:
            return Message(to_records(FAULT, str(error).encode()), reply_to=message)
        cost = cost_to_bytes(mine.ctx.spent.get(client))
        kind, said = (FAILURE, done.reason.encode()) if isinstance(done, Failure) else (UPDATE, done)
        return Message(to_records(kind, said, cost), reply_to=message)

    return app


def _start_ray(cores: int) -> None:
    """Ray on `cores`, silent, before Flower would start it. It would else take our place at SIGTERM."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    path = os.pathsep.join(sys.path)
    ray.init(
        num_cpus=cores,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {**QUIET, "PYTHONPATH": path}},
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


@contextmanager
def simulated(job: Mapping[str, Any], clients: int, cores: int, gpu: bool, spent: dict[str, Cost]) -> Iterator[Engine]:
    """Start Ray with a worker on each of `cores`, for `job` (JSON values); what turns cost goes to `spent`.
    FederationError when it does not come up."""
    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    stop = threading.Event()
    run = state.get_run_info(run_ids=[begin_run(state, stop)])[0]
    grid = InMemoryGrid(factory, POLL)
    grid.set_run(run)
    _start_ray(cores)
    backend = {
        "client_resources": {"num_cpus": 1, "num_gpus": 1.0 / cores if gpu else 0.0},
        "actor": {"tensorflow": 0},
    }
    nodes = min(clients, MAX_NODES)
    trouble: list[BaseException] = []

    def engine() -> None:
        try:
            start_vce(
                backend_name="ray",
                backend_config_json_stream=json.dumps(backend),
                app_dir="",
                is_app=False,
                f_stop=stop,
                run=run,
                metrics=VceMetrics(),
                client_app=client_app(json.dumps(dict(job), sort_keys=True)),
                num_supernodes=nodes,
                state_factory=factory,
            )
        except BaseException as error:
            trouble.append(error)
            stop.set()

    thread = threading.Thread(target=engine, name="federation-simulation", daemon=True)
    thread.start()
    try:
        while len(list(grid.get_node_ids())) < nodes and not stop.is_set():
            time.sleep(POLL)
        yield _over(grid, run.run_id, stop, trouble, spent)
    finally:
        stop.set()
        thread.join(30)


def _over(
    grid: InMemoryGrid, run: int, stop: threading.Event, trouble: list[BaseException], spent: dict[str, Cost]
) -> Engine:
    nodes = sorted(grid.get_node_ids())

    def exchange(messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | Failure]]:
        waiting: dict[str, str] = {}
        for client in messages:
            spent.pop(client, None)
        for number, (client, body) in enumerate(messages.items()):
            records = to_records(WORK, body)
            records[CLIENT] = ConfigRecord({"name": client})
            message = addressed(run, nodes[number % len(nodes)], records, round_of(body))
            waiting.update(dict.fromkeys(grid.push_messages([message]), client))
        while waiting:
            if stop.is_set():
                cause = type(trouble[0]).__name__ if trouble else "stopped"
                raise FederationError(f"the simulation ended early ({cause})", "Ray", "try --engine process")
            for answer in grid.pull_messages(waiting):
                client = waiting.pop(answer.metadata.reply_to_message_id)
                if answer.has_error():
                    yield client, Failure(printable(str(answer.error.reason))[:300])
                    continue
                kind, body = from_records(answer.content, 1 << 40, "the answer")
                if (cost := cost_from_bytes(cost_of(answer.content))) is not None:
                    spent[client] = cost
                if kind == FAULT:
                    raise FederationError(printable(body.decode())[:300], client)
                yield client, body if kind == UPDATE else Failure(body.decode())
            time.sleep(POLL)

    return exchange
