"""What an authenticated node may do: speak for itself, send no more than agreed, use Fleet calls only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from flwr.common.constant import PUBLIC_KEY_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.utils import get_metadata_bytes

from edgellm_sdk.federate.flower.parts import PART


class Gate(grpc.ServerInterceptor):
    """Stands behind Flower's node authentication, which has checked the signature and the node id of a call.

    `known` gives the node id of a public key; `seen(node, peer)` is told of every call, `arrives(node)` of those that
    begin a session; `hold(node)` may keep a call for messages waiting; `mine(node, object)` says whether an object
    belongs to a message for that node. `limit` is that of a message in bytes, kept by the number of its parts: a call
    holds one.
    """

    def __init__(
        self,
        known: Callable[[bytes], int | None],
        seen: Callable[[int, str], None],
        arrives: Callable[[int], None],
        hold: Callable[[int], None],
        mine: Callable[[int, str], bool],
        limit: int,
    ) -> None:
        self.known, self.seen, self.arrives, self.hold = known, seen, arrives, hold
        self.mine, self.limit = mine, limit

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        handler = continuation(details)
        key = get_metadata_bytes(details.invocation_metadata, PUBLIC_KEY_HEADER) or b""
        if handler is None or handler.unary_unary is None:
            return handler

        def call(request: Any, context: Any) -> Any:
            if isinstance(request, (RegisterNodeFleetRequest, ActivateNodeRequest)) and request.public_key != key:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "the key is not that of the signature")
            node = self.known(key)
            if node is not None:
                problem = self._problem(request, node)
                if problem:
                    context.abort(grpc.StatusCode.PERMISSION_DENIED, problem)
                self.seen(node, context.peer())
                if isinstance(request, ActivateNodeRequest):
                    self.arrives(node)
                if isinstance(request, PullMessagesRequest):
                    self.hold(node)
            response = handler.unary_unary(request, context)
            if node is None and (found := self.known(key)) is not None:
                self.seen(found, context.peer())
            return response

        return grpc.unary_unary_rpc_method_handler(
            call, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )

    def _problem(self, request: Any, node: int) -> str | None:
        if isinstance(request, PushMessagesRequest):
            if len(request.messages_list) != 1 or len(request.message_object_trees) != 1:
                return "a call carries one message"
            if request.messages_list[0].metadata.src_node_id != node:
                return "a node speaks for itself only"
            objects = sum(1 for _ in iterate_object_tree(request.message_object_trees[0]))
            if objects > self.limit // PART + 8:
                return "the message has too many parts"
        if isinstance(request, PullObjectRequest) and not self.mine(node, request.object_id):
            return "the object belongs to another node"
        return None
