"""One control interface for several workers: asks all of them, answers as one."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from cai.errors import CaiError
from tng.ingress.http1 import ClientConnection

ASK_TIMEOUT_S = 10.0
"""Longest wait for one worker's answer, seconds."""

MAX_ANSWER = 16 * 1024 * 1024
"""Longest answer of a worker, bytes."""

MAX_CLIENTS = 64
"""Most connections of the control interface at once."""

_MAXIMA = ("_age_seconds", "_start_time_seconds")
"""Ends of names of gauges of which the largest counts, not the sum."""

_MINIMA = ("_ready", "_up", "live")
"""And of which the smallest counts."""


class Gathered:
    """The control interface of the keeper.

    Args:
        sockets: gives the workers' own control interfaces.
    """

    def __init__(self, sockets: Callable[[], Sequence[Path]]) -> None:
        self._sockets = sockets
        self._clients = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, one request."""
        if self._clients >= MAX_CLIENTS:
            writer.close()
            return
        self._clients += 1
        client = ClientConnection(reader, writer)
        try:
            with contextlib.suppress(CaiError):
                request = await client.next_request()
                if request is not None:
                    path = request.target.partition(b"?")[0]
                    answers = await self._ask(request.method, request.target)
                    await client.send_raw(gather(path, answers))
        finally:
            self._clients -= 1
            writer.close()

    async def _ask(self, method: bytes, target: bytes) -> list[bytes]:
        asked = b"%s %s HTTP/1.1\r\nhost: worker\r\nconnection: close\r\n\r\n" % (method, target)
        return list(await asyncio.gather(*(_answer(path, asked) for path in self._sockets())))


def gather(path: bytes, answers: Sequence[bytes]) -> bytes:
    """One answer out of the workers'.

    Args:
        path: that was asked for.
        answers: whole HTTP messages; one that did not answer is empty.
    """
    missing = sum(not answer for answer in answers)
    if missing:
        if path == b"/livez" and missing < len(answers):
            return next(answer for answer in answers if answer)
        return _message(b"503 Service Unavailable", b"%d workers do not answer\n" % missing)
    for answer in answers:
        if not answer.startswith(b"HTTP/1.1 200"):
            return answer
    bodies = [answer.partition(b"\r\n\r\n")[2].decode("utf-8", "replace") for answer in answers]
    if path == b"/metrics":
        kind = b"text/plain; version=0.0.4; charset=utf-8"
        return _message(b"200 OK", merge_expositions(bodies).encode(), kind)
    if path == b"/status":
        workers = [json.loads(body) for body in bodies]
        ready = all(worker.get("ready") for worker in workers)
        value = {**workers[0], "ready": ready, "workers": workers}
        return _message(
            b"200 OK", json.dumps(value, indent=2).encode() + b"\n", b"application/json"
        )
    return answers[0]


def merge_expositions(texts: Sequence[str]) -> str:
    """Prometheus texts as one: what counts is added up, ages are the largest, readiness the least.

    Args:
        texts: expositions with the same families, in the same order.
    """
    order: list[str] = []
    values: dict[str, list[float]] = {}
    for text in texts:
        for line in text.splitlines():
            if not line.strip():
                continue
            series, _, number = line.rpartition(" ")
            if line.startswith("#") or not series:
                if line not in values:
                    values[line] = []
                    order.append(line)
                continue
            if series not in values:
                values[series] = []
                order.append(series)
            with contextlib.suppress(ValueError):
                values[series].append(float(number))
    lines = [
        name if name.startswith("#") else f"{name} {_combined(name, values[name])}"
        for name in _grouped(order)
    ]
    return "\n".join(lines) + "\n"


def _grouped(order: Sequence[str]) -> list[str]:
    """Series that only a later worker has, moved to their family."""
    families: dict[str, list[str]] = {}
    current = ""
    for name in order:
        if name.startswith("# "):
            current = name.split(" ")[2] if name.count(" ") >= 2 else name
            families.setdefault(current, []).append(name)
            continue
        bare = name.partition("{")[0]
        for end in ("", "_bucket", "_sum", "_count"):
            family = bare.removesuffix(end) if end else bare
            if family in families:
                families[family].append(name)
                break
        else:
            families.setdefault(bare, []).append(name)
    return [name for members in families.values() for name in members]


def _combined(name: str, numbers: Sequence[float]) -> str:
    bare = name.partition("{")[0]
    if bare.endswith(_MAXIMA):
        value = max(numbers, default=0.0)
    elif bare.endswith(_MINIMA):
        value = min(numbers, default=0.0)
    else:
        value = sum(numbers)
    return str(int(value)) if value == int(value) else repr(value)


async def _answer(path: Path, asked: bytes) -> bytes:
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(str(path))
            try:
                writer.write(asked)
                data = b""
                while len(data) <= MAX_ANSWER and (more := await reader.read(65536)):
                    data += more
                return data if len(data) <= MAX_ANSWER else b""
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


def _message(status: bytes, body: bytes, kind: bytes = b"text/plain; charset=utf-8") -> bytes:
    return (
        b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncache-control: no-store\r\n"
        b"content-length: %d\r\nconnection: close\r\n\r\n" % (status, kind, len(body)) + body
    )
