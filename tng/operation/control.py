"""The control interface: whether the gateway lives, is ready, and what it last thought of whom.

Paths: ``/livez``, ``/readyz`` (``?verbose`` says what is missing), ``/metrics``, ``/status`` (ours,
one document) and ``/status/…`` (TNG's tree of names, reference of its control interface).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping

from cai import __version__
from cai.errors import CaiError
from tng.ingress.http1 import ClientConnection
from tng.operation.metrics import CONTENT_TYPE, Meters, exposition

MAX_CLIENTS = 64
"""Most connections of the control interface at once."""

Status = Callable[[], dict[str, object]]
Ready = Callable[[], Awaitable[tuple[str, ...]]]
"""Gives what is missing; nothing when the gateway is ready."""

_JSON = "application/json"
_TEXT = "text/plain; charset=utf-8"


class Control:
    """Answers GET, one request a connection.

    Args:
        ready: what keeps the gateway from serving.
        status: the body of ``/status``.
        meters: behind ``/metrics``.
    """

    def __init__(self, ready: Ready, status: Status, meters: Meters) -> None:
        self._ready = ready
        self._status = status
        self._meters = meters
        self._clients = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        if self._clients >= MAX_CLIENTS:
            writer.close()
            return
        self._clients += 1
        client = ClientConnection(reader, writer)
        try:
            with contextlib.suppress(CaiError):
                try:
                    request = await client.next_request()
                    if request is not None:
                        answer = await self._answer(request.method, request.target)
                        await client.send_raw(answer)
                except CaiError as error:
                    await client.send_raw(_response(400, error.message))
                    raise
        finally:
            self._clients -= 1
            writer.close()

    async def _answer(self, method: bytes, target: bytes) -> bytes:
        if method != b"GET":
            return _response(405, "GET only")
        path, _, query = target.partition(b"?")
        if path == b"/livez":
            return _response(200, "ok")
        if path == b"/readyz":
            missing = await self._ready()
            self._meters.ready.set(0 if missing else 1)
            lines = ["not ok" if missing else "ok"]
            if query == b"verbose":
                lines += missing
            return _response(503 if missing else 200, "\n".join(lines))
        if path == b"/metrics":
            text = exposition(self._meters.families())
            return _response(200, text.rstrip("\n"), kind=CONTENT_TYPE)
        if path == b"/status":
            return _json(self._status(), indent=2)
        if path.startswith(b"/status/"):
            found = stock_status(self._status(), path.removeprefix(b"/status/").decode("latin-1"))
            if found is not None:
                return _json(found)
        return _response(404, '{"error":"not found"}', kind=_JSON)


def stock_status(status: Mapping[str, object], path: str) -> object | None:
    """What TNG's tree has at ``path``: ``""``, ``egress``, ``egress/0``, ``egress/0/ohttp/keys``.

    Args:
        status: the whole status.
        path: behind ``/status/``.

    Returns:
        Names, or a document; ``None`` where there is nothing.
    """
    steps = [step for step in path.split("/") if step]
    sides = {side: _entries(status.get(side)) for side in ("ingress", "egress")}
    if not steps:
        return [side for side, entries in sides.items() if entries]
    entries = sides.get(steps[0])
    if not entries or len(steps) > 4:
        return None
    if len(steps) == 1:
        return [str(number) for number in range(len(entries))]
    number = steps[1]
    if not number.isascii() or not number.isdigit() or len(number) > 3:
        return None
    if int(number) >= len(entries):
        return None
    ohttp = entries[int(number)].get("ohttp")
    if len(steps) == 2:
        return ["rats_tls" if ohttp is None else "ohttp"]
    if steps[2] != "ohttp" or not isinstance(ohttp, Mapping):
        return None
    if len(steps) == 3:
        return sorted(ohttp)
    found: object = ohttp.get(steps[3])
    return found


def _entries(side: object) -> list[Mapping[str, object]]:
    if not isinstance(side, Mapping):
        return []
    return [entry for entry in side.values() if isinstance(entry, Mapping)]


_PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


def _json(value: object, *, indent: int | None = None) -> bytes:
    separators = (",", ":") if indent is None else None
    return _response(200, json.dumps(value, indent=indent, separators=separators), kind=_JSON)


def _response(status: int, text: str, *, kind: str = _TEXT) -> bytes:
    body = text.encode() + b"\n"
    return (
        f"HTTP/1.1 {status} {_PHRASES[status]}\r\nserver: tng/{__version__}\r\n"
        f"content-type: {kind}\r\ncache-control: no-store\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    ).encode("ascii") + body
