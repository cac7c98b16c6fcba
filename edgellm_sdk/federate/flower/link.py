"""A client's end: fetch a message, answer it, over gRPC with TLS, the client's certificate and signed calls."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.primitives.asymmetric import generate_key_pairs

from edgellm_sdk.errors import EdgeLLMError, FederationError, printable
from edgellm_sdk.federate.flower.keys import Identity, public_pem
from edgellm_sdk.federate.flower.parts import CALL

NEW_KEY = "ask the operator for a new key"
HEARTBEAT = 10.0
CALL_SECONDS = 120.0
RETRY_SECONDS = 2.0
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
LOST = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.NOT_FOUND)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


class Lost(Exception):
    """The server no longer knows this node: it has been started again."""


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of `host:port` or `[v6]:port`. FederationError."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise FederationError(f"{address[:80]!r} is no address", fix="write HOST:PORT")
    return host, int(port)


def check_door(address: str, ca: str, cert: str, key: str) -> None:
    """One TLS handshake, with PEM files, that tells apart what gRPC calls `unavailable`. OSError when nobody listens.

    With TLS 1.3 a server refuses a certificate only after the handshake, so the first answer is read as well.
    """
    host, port = split_address(address)
    context = ssl.create_default_context(cafile=ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_cert_chain(cert, key)
    with socket.create_connection((host, port), 10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as door:
                door.settimeout(10)
                door.sendall(PREFACE)
                if not door.recv(1):
                    raise FederationError("the server refused this client's certificate", address, NEW_KEY)
        except ssl.SSLCertVerificationError as error:
            what = f"not the server of this federation ({printable(error.verify_message)[:60]})"
            raise FederationError(what, address, "check the address and the keys") from None
        except ssl.SSLError as error:
            alert = printable(str(error.reason or error)).lower().replace("_", " ")[:60]
            raise FederationError(f"the server refused the connection ({alert})", address, NEW_KEY) from None
        except ConnectionError:
            raise FederationError(
                "the server refused the connection", address, "does it use TLS? or: " + NEW_KEY
            ) from None


class Link:
    """A node's calls. `patience` is how long a server may be away;"""

    def __init__(self, address: str, identity: Identity | None, patience: float) -> None:
        self.address, self.patience = address, patience
        options = (
            ("grpc.max_receive_message_length", CALL),
            ("grpc.max_send_message_length", CALL),
            ("grpc.initial_reconnect_backoff_ms", 500),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        )
        if identity is None:
            private, public = generate_key_pairs()
            channel = grpc.insecure_channel(address, options=options)
        else:
            private = identity.private
            public = private.public_key()
            credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)
            channel = grpc.secure_channel(address, credentials, options=options)
        self._key = public_pem(private)
        self._own = identity is None
        self._channel = channel
        self._stub = FleetStub(grpc.intercept_channel(channel, NodeAuthClientInterceptor(private, public)))
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        self.node: Any = None

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        """One call, again and again while the server is away. Lost, or FederationError when it is away too long."""
        until = time.monotonic() + self.patience
        while True:
            try:
                return method(request, timeout=CALL_SECONDS)
            except grpc.RpcError as error:
                code, details = error.code(), printable(str(error.details() or ""))[:120]
                if code in LOST:
                    raise Lost(details) from None
                if code not in PASSING:
                    raise FederationError(f"the server refused: {details}", self.address) from None
                if time.monotonic() > until:
                    what = f"no server for {self.patience:.0f} s ({details})"
                    raise FederationError(what, self.address) from None
            self._stop.wait(RETRY_SECONDS)
            if self._stop.is_set():
                raise FederationError("the connection was closed", self.address)

    def activate(self) -> None:
        """Tell the server that this node is here. FederationError when it does not admit this key."""
        request = ActivateNodeRequest(public_key=self._key, heartbeat_interval=HEARTBEAT)
        try:
            if self._own:
                with contextlib.suppress(Lost):  # it is known already
                    self._call(self._stub.RegisterNode, RegisterNodeFleetRequest(public_key=self._key))
            found = self._call(self._stub.ActivateNode, request)
        except (Lost, FederationError) as error:
            if isinstance(error, EdgeLLMError) and "no server" in error.what:
                raise
            fix = "ask the operator whether this key is admitted"
            raise FederationError("the server does not admit this client", self.address, fix) from None
        first = self.node is None
        self.node = Node(node_id=found.node_id)
        if first:
            self._heart = threading.Thread(target=self._beat, name="federation-heartbeat", daemon=True)
            self._heart.start()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT)
            with contextlib.suppress(grpc.RpcError):  # the next call will tell
                self._stub.SendNodeHeartbeat(request, timeout=HEARTBEAT / 2)

    def fetch(self) -> Message | None:
        """The next message for this node, with its content, if there is one."""
        response = self._call(self._stub.PullMessages, PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return None
        about = message_from_proto(response.messages_list[0])
        tree = response.message_object_trees[0]
        run = about.metadata.run_id
        contents = {}
        for thing in dict.fromkeys(item.object_id for item in iterate_object_tree(tree)):
            found = self._call(self._stub.PullObject, PullObjectRequest(node=self.node, run_id=run, object_id=thing))
            if not found.object_found or not found.object_available:
                raise Lost("a part of the message is gone")
            contents[thing] = found.object_content
        message = inflate_object_from_contents(tree.object_id, contents)
        if not isinstance(message, Message):
            raise FederationError("the server sent no message", self.address)
        message.metadata.__dict__["_message_id"] = tree.object_id
        confirm = ConfirmMessageReceivedRequest(node=self.node, run_id=run, message_object_id=tree.object_id)
        self._call(self._stub.ConfirmMessageReceived, confirm)
        return message

    def answer(self, message: Message) -> None:
        """Send a reply; its parts go one by one, each again until it is there."""
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            things = get_all_nested_objects(message)
            tree = get_object_tree(message)
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(message))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        response = self._call(self._stub.PushMessages, request)
        for name in response.objects_to_push:
            push = PushObjectRequest(
                node=self.node,
                run_id=message.metadata.run_id,
                object_id=name,
                object_content=things[name].deflate(),
                session_id=response.session_id,
            )
            self._call(self._stub.PushObject, push)

    def close(self) -> None:
        self._stop.set()
        if self._heart is not None:
            self._heart.join(HEARTBEAT)  # a channel may not be closed below a call
        if self.node is not None:
            with contextlib.suppress(grpc.RpcError):
                self._stub.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id), timeout=5)
        self._channel.close()
