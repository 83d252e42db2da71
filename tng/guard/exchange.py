"""One request at a backend, and its answer as it comes; a client's cancel goes through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import h11

from cai.errors import PeerError
from tng.egress.upstreams import Lease
from tng.guard.bodies import Judged
from tng.guard.http import Incoming, StreamServer
from tng.guard.receipts import Record
from tng.guard.refusals import GuardRefused
from tng.guard.routes import Route
from tng.guard.usage import EventAnswer, PlainAnswer, Usage
from tng.ingress.http1 import told

MAX_ANSWER_HEAD = 64 * 1024
"""Longest head of a backend's answer, bytes."""

CHUNK = 64 * 1024
"""Most bytes that are read of an answer at once."""

_TO_BACKEND = ("accept", "anthropic-version", "anthropic-beta", "user-agent")
"""Headers of a request that go on; none of them carries a credential or chooses a worker."""

_TO_CLIENT = frozenset({
    b"content-type", b"content-length", b"cache-control", b"retry-after", b"x-request-id",
    b"x-accel-buffering",
})  # fmt: skip
"""Headers of an answer that go on."""


@dataclass
class Outcome:
    """What became of a request.

    Attributes:
        status: of the backend's answer; 0 before it came.
        whole: whether it came to its end.
        usage: what it used.
        settle: called when the usage is known, before the client learns that its answer is whole:
            its next request may follow at once.
    """

    settle: Callable[[], None]
    status: int = 0
    whole: bool = False
    usage: Usage = field(default_factory=Usage)


class Exchange:
    """One request and its answer.

    Args:
        server: towards the client.
        lease: connection to the backend, of this request alone.
        record: what the receipt needs; ``None`` when nobody asked for one.
        silence_s: longest silence of the backend, seconds.
    """

    def __init__(
        self, server: StreamServer, lease: Lease, record: Record | None, silence_s: float
    ) -> None:
        self._server = server
        self._lease = lease
        self._record = record
        self._silence_s = silence_s
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_ANSWER_HEAD)

    async def run(
        self, request: Incoming, route: Route, judged: Judged | None, outcome: Outcome
    ) -> None:
        """Do it; the lease is closed afterwards, and dropped when the answer did not come whole.

        Args:
            request: as the client sent it.
            route: where it goes.
            judged: its body; ``None`` has none.
            outcome: filled as things happen, so that it also tells of what was cut short.

        Raises:
            GuardRefused: 502 or 504, before anything was answered.
            PeerError: the answer broke off.
            ClientGone: the client left.
        """
        work = asyncio.create_task(self._work(request, route, judged, outcome))
        gone = asyncio.create_task(self._server.until_gone())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                gone.result()
            await work
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            # A closed connection is how an engine learns to stop.
            self._lease.close(abort=not outcome.whole)

    async def _work(
        self, request: Incoming, route: Route, judged: Judged | None, outcome: Outcome
    ) -> None:
        try:
            await self._ask(request, route, judged)
            response = await self._head()
        except (OSError, h11.ProtocolError) as error:
            raise GuardRefused(502, "bad_gateway", "the backend gives no answer") from error
        outcome.status = response.status_code
        if self._record:
            self._record.status = response.status_code
        headers, kind = _kept(response)
        watch: PlainAnswer | EventAnswer
        if kind == b"text/event-stream":
            headers = [(name, value) for name, value in headers if name != b"content-length"]
            dropped = judged is not None and judged.usage_added
            watch = EventAnswer(outcome.usage, drop_usage=dropped)
        else:
            watch = PlainAnswer(outcome.usage)
        await self._server.send(
            h11.Response(status_code=response.status_code, headers=headers, reason=response.reason)
        )
        await self._pass(watch, outcome)
        outcome.whole = True
        if self._record:
            self._record.whole = True

    async def _ask(self, request: Incoming, route: Route, judged: Judged | None) -> None:
        headers = [(b"host", b"localhost"), (b"connection", b"close")]
        headers += [
            (name.encode("ascii"), value.encode("latin-1"))
            for name in _TO_BACKEND
            if (value := request.header(name))
        ]
        events: list[h11.Event] = []
        if judged is not None:
            headers += [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(judged.data)).encode("ascii")),
            ]
            events.append(h11.Data(data=judged.data))
        events.append(h11.EndOfMessage())
        start = h11.Request(method=route.method, target=route.path, headers=headers)
        data = b"".join(self._http.send(event) or b"" for event in (start, *events))
        self._lease.writer.write(data)
        try:
            await self._lease.writer.drain()
        except OSError:
            # It may have answered early and stopped reading; then its answer counts.
            return

    async def _head(self) -> h11.Response:
        while True:
            try:
                event = await self._event()
            except TimeoutError as error:
                raise GuardRefused(
                    504, "gateway_timeout", f"the backend was silent for {self._silence_s:g} s"
                ) from error
            if isinstance(event, h11.Response):
                return event
            if isinstance(event, h11.InformationalResponse) and event.status_code != 101:
                continue
            raise GuardRefused(502, "bad_gateway", "the backend gives no answer")

    async def _pass(self, watch: PlainAnswer | EventAnswer, outcome: Outcome) -> None:
        while True:
            try:
                event = await self._event()
            except h11.RemoteProtocolError as error:
                raise PeerError(f"the backend's answer broke off: {told(error)}") from error
            except (OSError, TimeoutError) as error:
                raise PeerError("the backend's answer broke off") from error
            if isinstance(event, h11.Data):
                await self._send(watch.passes(bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                rest = watch.rest()
                outcome.settle()
                await self._send(rest, h11.EndOfMessage())
                return
            else:
                raise PeerError("the backend's answer broke off")

    async def _send(self, data: bytes, *more: h11.Event) -> None:
        if data and self._record:
            self._record.answered(data)
        await self._server.send(*((h11.Data(data=data),) if data else ()), *more)

    async def _event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            async with asyncio.timeout(self._silence_s):
                self._http.receive_data(await self._lease.reader.read(CHUNK))
        return event


def _kept(response: h11.Response) -> tuple[list[tuple[bytes, bytes]], bytes]:
    headers = [(name, value) for name, value in response.headers if name in _TO_CLIENT]
    kind = next((value for name, value in headers if name == b"content-type"), b"")
    return headers, kind.partition(b";")[0].strip().lower()
