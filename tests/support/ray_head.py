"""Takes the place of Ray's head, as far as it is asked whether it is there."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

grpc: Any = pytest.importorskip("grpc", reason="Ray has no wheel for this system or Python")


class RayHead:
    """``token``: what it asks for; while it ``hangs``, nobody answers. ``another``: it is another server,
    which does not know the question."""

    def __init__(self, token: str = "", *, another: bool = False) -> None:
        self.hangs = False
        self._token = token
        self._another = another

    def open(self, port: int = 0) -> str:
        """Begin to answer; returns the address."""
        self._server = grpc.server(ThreadPoolExecutor(4))
        methods = {} if self._another else {"GetClusterId": grpc.unary_unary_rpc_method_handler(self._answer)}
        handler = grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", methods)
        self._server.add_generic_rpc_handlers((handler,))
        address = f"127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()
        return address

    def _answer(self, _request: bytes, context: Any) -> bytes:
        while self.hangs and context.is_active():
            time.sleep(0.01)
        shown = dict(context.invocation_metadata()).get("authorization")
        if self._token and shown != f"Bearer {self._token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return b""

    def close(self) -> None:
        self._server.stop(None).wait()
