"""The control interface: whether the gateway lives, is ready, and what it last thought of whom."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

from cai.errors import CaiError
from tng.ingress.http1 import ClientConnection

Status = Callable[[], dict[str, object]]


class Control:
    """Answers ``/livez``, ``/readyz`` and ``/status`` (GET only, one request a connection).

    Args:
        ready: whether every listener is up and none is leaving.
        status: the body of ``/status``.
    """

    def __init__(self, ready: Callable[[], bool], status: Status) -> None:
        self._ready = ready
        self._status = status

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        client = ClientConnection(reader, writer)
        with contextlib.suppress(CaiError):
            try:
                request = await client.next_request()
                if request is not None:
                    await client.send_raw(self._answer(request.method, request.target))
            except CaiError as error:
                await client.send_raw(_response(400, error.message))
                raise
        writer.close()

    def _answer(self, method: bytes, target: bytes) -> bytes:
        if method != b"GET":
            return _response(405, "GET only")
        path = target.partition(b"?")[0]
        if path == b"/livez":
            return _response(200, "ok")
        if path == b"/readyz":
            return _response(200, "ok") if self._ready() else _response(503, "not ok")
        if path in (b"/status", b"/status/"):
            return _response(200, json.dumps(self._status(), indent=2), kind="application/json")
        return _response(404, '{"error":"not found"}', kind="application/json")


_PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


def _response(status: int, text: str, *, kind: str = "text/plain; charset=utf-8") -> bytes:
    body = text.encode() + b"\n"
    return (
        f"HTTP/1.1 {status} {_PHRASES[status]}\r\ncontent-type: {kind}\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode("ascii") + body
