"""The server's end: Flower's link state and Fleet servicer in this process, behind one port.

Messages lie in Flower's stores in memory until they are fetched. What must survive a crash is not here but in the run
folder: after a restart the clients come back, and the round is done again.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from flwr.app import DEFAULT_TTL, Message, MessageType, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.proto.fleet_pb2_grpc import add_FleetServicer_to_server
from flwr.server.superlink.fleet.grpc_rere.fleet_servicer import FleetServicer
from flwr.server.superlink.fleet.grpc_rere.node_auth_server_interceptor import NodeAuthServerInterceptor
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RpcErrorTranslationServerInterceptor
from flwr.supercore.object_store import NoObjectInStoreError, ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager

from edgellm_sdk.errors import ModelError
from edgellm_sdk.federate.flower.front import Front
from edgellm_sdk.federate.flower.gate import Gate
from edgellm_sdk.federate.flower.keys import Identity
from edgellm_sdk.federate.flower.parts import CALL, cost_of, from_records, to_records

WORKERS = 32
TASK_SECONDS = 10.0
HOLD = 20.0  # how long a call for the next message waits for one
HELD = 512  # such calls at once; beyond, they return at once
SILENCE = 30.0  # three of a client's heartbeats


def begin_run(state: Any, stop: threading.Event) -> int:
    """A running run in a link state, kept alive until `stop` is set; returns its id."""
    run: int = state.create_run("", "", "", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
    task = state.get_run_info(run_ids=[run])[0].primary_task_id
    state.claim_task(task)
    state.activate_task(task)

    def alive() -> None:
        while not stop.wait(TASK_SECONDS):
            state.acknowledge_task_heartbeat(task)

    threading.Thread(target=alive, name="federation-run", daemon=True).start()
    return run


def addressed(run: int, node: int, records: RecordDict, round: int) -> Message:
    """A message of the server to a node."""
    about = Metadata(
        run_id=run,
        message_id="",
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=node,
        reply_to_message_id="",
        group_id=str(round),
        created_at=time.time(),
        ttl=DEFAULT_TTL,
        message_type=MessageType.TRAIN,
    )
    return make_message(metadata=about, content=records)


@dataclass(frozen=True)
class Reply:
    """What a node answered, and what that `cost` it; `kind` is empty when the answer could not be read, and `body` then
    says why."""

    kind: str
    body: bytes
    cost: bytes = b""


class Hub:
    """`admitted` maps client names to public keys; without `identity` there is neither TLS nor a list of keys."""

    def __init__(
        self, host: str, port: int, identity: Identity | None, admitted: Mapping[str, bytes], limit: int, most: int
    ) -> None:
        self.limit = limit
        self._workers = WORKERS + min(HELD, most)
        stores = ObjectStoreFactory()
        factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), stores)
        self.state = factory.state()
        self.store = stores.store()
        self.names: dict[int, str] = {}
        self.last_seen: dict[int, float] = {}
        self.fresh: set[int] = set()
        self._objects: dict[int, set[str]] = {}
        self._pending: dict[int, int] = {}
        self._mail = threading.Condition()
        self._held = 0
        self._sent: dict[str, tuple[int, set[str]]] = {}
        for name, key in sorted(admitted.items()):
            self.names[self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, 0)] = name
        self._stop = threading.Event()
        self.run = begin_run(self.state, self._stop)
        self.front = Front(host, port, identity is not None, most)
        gate = Gate(self.state.get_node_id_by_public_key, self._seen, self._arrives, self._hold, self._mine, limit)
        self.server = grpc.server(
            concurrent.futures.ThreadPoolExecutor(self._workers),
            interceptors=(RpcErrorTranslationServerInterceptor(), NodeAuthServerInterceptor(factory), gate),
            options=(
                ("grpc.max_receive_message_length", CALL),
                ("grpc.max_send_message_length", CALL),
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.so_reuseport", 0),
            ),
            maximum_concurrent_rpcs=2 * self._workers,
        )
        add_FleetServicer_to_server(FleetServicer(factory, stores, identity is not None), self.server)
        if identity is None:
            inner = self.server.add_insecure_port("127.0.0.1:0")
        else:
            pair = (identity.key, identity.cert)
            credentials = grpc.ssl_server_credentials([pair], identity.ca, require_client_auth=True)
            inner = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.server.start()
        self.port = self.front.open(inner)

    def _seen(self, node: int, peer: str) -> None:
        self.last_seen[node] = time.monotonic()
        self.front.claim(peer, str(node))

    def _arrives(self, node: int) -> None:
        """A node activates: what it was before, it is a new session of it that has seen nothing yet."""
        self.state.deactivate_node(node)
        self.fresh.add(node)

    def _hold(self, node: int) -> None:
        """Return when there is a message for the node, or after a while: it need not ask again and again."""
        with self._mail:
            self._held += 1
            if self._held <= min(HELD, self._workers - WORKERS):
                self._mail.wait_for(lambda: self._pending.get(node, 0) > 0 or self._stop.is_set(), HOLD)
            self._held -= 1
            self._pending[node] = max(0, self._pending.get(node, 0) - 1)

    def _mine(self, node: int, thing: str) -> bool:
        return thing in self._objects.get(node, ())

    def arrived(self) -> list[int]:
        """Nodes that have activated since the last call."""
        nodes = sorted(self.fresh)
        self.fresh.difference_update(nodes)
        return nodes

    def present(self, node: int) -> bool:
        """Whether the node has a connection and was heard of within two heartbeats."""
        heard = time.monotonic() - self.last_seen.get(node, -SILENCE)
        return heard < SILENCE and self.front.connected(str(node))

    def send(self, node: int, kind: str, body: bytes, round: int = 0) -> str | None:
        """Leave a message for a node to fetch; its id, or None when the node has never been here."""
        message = addressed(self.run, node, to_records(kind, body), round)
        with no_object_id_recompute():
            where = message.metadata.__dict__["_message_id"] = message.object_id
            nested = get_all_nested_objects(message)
            tree = get_object_tree(message)
        self.store.preregister(self.run, tree)
        for name, thing in nested.items():
            self.store.put(name, thing.deflate())
        self._objects.setdefault(node, set()).update(nested)
        if self.state.store_message_ins(remove_content_from_message(message)) is None:
            self.store.delete(where)
            return None
        self._sent[where] = (node, set(nested))
        with self._mail:
            self._pending[node] = self._pending.get(node, 0) + 1
            self._mail.notify_all()
        return where

    def replies(self, waiting: Iterable[str]) -> dict[str, Reply]:
        """The answers that are here in full, by the id of the message they answer; both are then forgotten."""
        found: dict[str, Reply] = {}
        for message_id in list(waiting):
            reply = self._reply(message_id)
            if reply is not None:
                found[message_id] = reply
                self.forget(message_id)
        return found

    def _reply(self, message_id: str) -> Reply | None:
        answer_id = self.state.message_ins_id_to_message_res_id.get(message_id)
        if answer_id is None:
            return None
        try:
            things = [tree.object_id for tree in iterate_object_tree(self.store.get_object_tree(answer_id))]
        except NoObjectInStoreError:
            return None
        contents = {thing: self.store.get(thing) for thing in things}
        if not all(contents.values()):
            return None
        try:
            answer = inflate_object_from_contents(answer_id, {k: v for k, v in contents.items() if v})
            if not isinstance(answer, Message) or not answer.has_content():
                return Reply("", b"sent an error")
            kind, body = from_records(answer.content, self.limit, "the answer")
            cost = cost_of(answer.content)
        except ModelError as error:
            return Reply("", error.what.encode())
        except Exception as error:  # the bytes are a stranger's, and Flower's readers raise what they like
            return Reply("", f"malformed: {type(error).__name__}".encode())
        finally:
            self.store.delete(answer_id)
        return Reply(kind, body, cost)

    def forget(self, message_id: str) -> None:
        """Drop a message, its answer and their parts."""
        node, things = self._sent.pop(message_id, (0, set()))
        self._objects.get(node, set()).difference_update(things)
        answer_id = self.state.message_ins_id_to_message_res_id.get(message_id)
        self.state.delete_messages({message_id})
        self.store.delete(message_id)
        if answer_id is not None:
            self.store.delete(answer_id)

    def close(self) -> None:
        self._stop.set()
        with self._mail:
            self._mail.notify_all()
        self.server.stop(0.5).wait(5)
        self.front.close()
