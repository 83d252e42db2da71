"""A guard over a stream in memory, in front of a small engine: its tests need no channel."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai.settings import Section
from tests.tng.gateways import serving
from tng.config.addresses import UnixUpstream
from tng.config.guard import Guard, parse_guard
from tng.config.notes import Notes
from tng.egress.upstreams import Upstreams
from tng.guard.backend import GuardBackend
from tng.guard.desk import BootKeys, Desk
from tng.operation.journal import Journal
from tng.streams import Caller, Code, StreamReset

ANSWER_S = 60.0
CHAT = "/v1/chat/completions"
PROMPT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def guard_of(**settings: object) -> Guard:
    found = parse_guard(Section(settings, where="guard"), Notes())
    assert found is not None
    return found


class MemoryStream:
    """The egress's end of a stream; the test is the client."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[bytes] = asyncio.Queue()
        self.answer = asyncio.StreamReader()
        self.reset_code: Code | None = None
        self.accepted = False

    async def opened(self) -> None:
        return

    async def read(self) -> bytes:
        if self.reset_code is not None:
            raise StreamReset(self.reset_code, "over")
        return await self.sent.get()

    async def write(self, data: bytes) -> None:
        if self.reset_code is not None:
            raise StreamReset(self.reset_code, "over")
        self.answer.feed_data(data)

    async def accept(self) -> None:
        self.accepted = True

    async def finish(self) -> None:
        self.answer.feed_eof()

    def reset(self, code: Code = Code.CANCELLED, text: str = "") -> None:
        self.reset_code = code
        self.answer.set_exception(StreamReset(code, text))


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        found = json.loads(self.body)["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Client:
    """One stream to the guard."""

    stream: MemoryStream
    task: asyncio.Task[None]

    def send(self, data: bytes) -> None:
        self.stream.sent.put_nowait(data)

    def leave(self) -> None:
        self.stream.sent.put_nowait(b"")

    async def read(self) -> Answer:
        async with asyncio.timeout(ANSWER_S):
            head = await self.stream.answer.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            pairs = (line.partition(":") for line in lines[1:] if line)
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            status = int(lines[0].split(" ")[1])
            if status == 100:
                return Answer(status, headers, b"")
            if headers.get("transfer-encoding") == "chunked":
                body = b""
                while size := int(await self.stream.answer.readline(), 16):
                    body += (await self.stream.answer.readexactly(size + 2))[:-2]
                await self.stream.answer.readline()
            else:
                length = int(headers.get("content-length", "0"))
                body = await self.stream.answer.readexactly(length)
            return Answer(status, headers, body)

    async def ask(self, *args: Any, **kwargs: Any) -> Answer:
        self.send(request(*args, **kwargs))
        return await self.read()


def request(
    path: str = CHAT,
    body: object = None,
    *,
    method: str = "POST",
    token: str = "",
    headers: dict[str, str] | None = None,
    raw: bytes | None = None,
) -> bytes:
    data = b"" if method == "GET" else json.dumps(PROMPT if body is None else body).encode()
    data = data if raw is None else raw
    lines = [f"{method} {path} HTTP/1.1", "host: guest"]
    if token:
        lines.append(f"authorization: Bearer {token}")
    if method != "GET":
        lines += ["content-type: application/json", f"content-length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


Behaviour = Callable[["Engine", dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Engine:
    """An OpenAI-compatible engine that remembers what it got."""

    behave: Behaviour | None = None
    heads: list[bytes] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    stopped: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        data = await reader.readexactly(length)
        self.heads.append(head)
        self.raw.append(data)
        body = json.loads(data) if data else {}
        self.bodies.append(body)
        watching = asyncio.create_task(self._watch(reader))
        try:
            if self.behave:
                await self.behave(self, body, writer)
            else:
                await plain(self, body, writer)
        finally:
            watching.cancel()

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(1024):
                pass
        self.stopped.set()


async def plain(_engine: Engine, _body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    data = json.dumps({"choices": [{"text": "ok"}], "usage": usage}).encode()
    await answer(writer, data)


async def answer(
    writer: asyncio.StreamWriter, data: bytes, *, status: str = "200 OK", more: str = ""
) -> None:
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{more}"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()


@dataclass
class Bench:
    """Everything of one test."""

    backend: GuardBackend
    desk: Desk
    journal: Journal
    log: io.StringIO
    clients: list[Client] = field(default_factory=list)

    def connect(self, session: str = "5e", client_key: str = "", **more: Any) -> Client:
        stream = MemoryStream()
        caller = Caller("egress[0] 192.0.2.7:40312", session, client_key, **more)
        client = Client(stream, asyncio.create_task(self.backend.carry(stream, caller)))
        self.clients.append(client)
        return client

    async def ask(self, *args: Any, session: str = "5e", key: str = "", **kwargs: Any) -> Answer:
        return await self.connect(session, key).ask(*args, **kwargs)


@contextlib.asynccontextmanager
async def before(socket: Path, **settings: Any) -> AsyncIterator[Bench]:
    """A guard before an engine that listens on a Unix socket."""
    log = io.StringIO()
    journal = Journal(log)
    desk = Desk(guard_of(**settings), BootKeys())
    upstreams = Upstreams("egress[0]", (UnixUpstream(socket),), journal)
    backend = GuardBackend("egress[0]", desk, upstreams, journal, ())
    bench = Bench(backend, desk, journal, log)
    try:
        yield bench
    finally:
        await backend.close()
        for client in bench.clients:
            client.task.cancel()
        await asyncio.gather(*(c.task for c in bench.clients), return_exceptions=True)


@contextlib.asynccontextmanager
async def guarded(
    tmp_path: Path, engine: Engine | None = None, **settings: Any
) -> AsyncIterator[Bench]:
    socket = tmp_path / "engine.sock"
    async with serving((engine or Engine()).serve, socket), before(socket, **settings) as bench:
        yield bench
