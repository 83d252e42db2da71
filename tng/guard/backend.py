"""The guarding backend of an egress: streams of HTTP/1, each request judged, then forwarded."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from http import HTTPStatus

import h11

from cai.errors import CaiError, PeerError, PeerUnreachable
from tng.egress.upstreams import Lease, Upstreams
from tng.guard.callers import Identity
from tng.guard.desk import Desk
from tng.guard.exchange import Exchange, Outcome
from tng.guard.http import Incoming, StreamServer
from tng.guard.receipts import PATH, Record, Standing
from tng.guard.refusals import GuardRefused, as_refusal, error_body, error_headers
from tng.guard.routes import Counting, Route
from tng.guard.usage import Usage
from tng.ingress.http1 import ClientGone
from tng.operation.accesslog import Access
from tng.operation.journal import Journal
from tng.streams import ByteStream, Caller, Code

ESTIMATE_BYTES = 4
"""Bytes of a body that count as one token where an answer was cut short before its usage came."""


@dataclass
class _Told:
    """What the log learns of one request."""

    started: float = field(default_factory=time.monotonic)
    method: str = "request"
    caller: str = ""
    status: int | str = ""
    error: CaiError | None = None


class _Charge:
    """What one request costs its caller; charged once, however it ends."""

    def __init__(self, backend: GuardBackend, identity: Identity, route: Route) -> None:
        self._backend = backend
        self._identity = identity
        self._route = route
        self._open = True
        self.size = 0
        self.outcome = Outcome(self.settle)

    def settle(self) -> None:
        if self._open:
            self._open = False
            size = self.size if self.outcome.status == HTTPStatus.OK else 0
            self._backend.settle(self._identity, self._route, self.outcome.usage, size)


class GuardBackend:
    """Serves the streams of one listening port.

    Args:
        name: of the entry.
        desk: of the entry.
        upstreams: where requests go.
        journal: where its lines go.
        unsafe: the ``unsafe_…`` settings of the entry.
    """

    def __init__(
        self,
        name: str,
        desk: Desk,
        upstreams: Upstreams,
        journal: Journal,
        unsafe: tuple[str, ...],
    ) -> None:
        self._name = name
        self._desk = desk
        self._upstreams = upstreams
        self._journal = journal
        self._unsafe = unsafe
        self._leaving = asyncio.Event()

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._unsafe

    @property
    def ready(self) -> bool:
        """Whether a backend is believed to live."""
        return self._upstreams.ready

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {"guard": self._desk.status(), "upstreams": self._upstreams.status()}

    def leave(self) -> None:
        """Take no further request; running ones go on."""
        self._leaving.set()

    async def close(self) -> None:
        """End what runs in the background."""
        self._leaving.set()
        await self._upstreams.close()

    async def carry(self, stream: ByteStream, caller: Caller) -> None:
        """Serve one stream to its end."""
        server = StreamServer(stream, head_bytes=self._desk.guard.head_bytes)
        try:
            await stream.accept()
            while await self._one(server, caller):
                pass
            await server.finish()
        except CaiError as error:
            # The answer is not whole, and only a broken stream says so.
            stream.reset(Code.UPSTREAM, "the answer broke off")
            self._journal.line(f"{caller.name} ended: {error.message}")
        except Exception as error:
            # A fault of our own ends one stream; its text may quote a request.
            stream.reset(Code.INTERNAL)
            self._journal.line(f"{caller.name} fault of our own: {type(error).__name__}")
        finally:
            await server.close()

    async def _one(self, server: StreamServer, caller: Caller) -> bool:
        """One request; whether another may follow."""
        told = _Told()
        try:
            try:
                request = await self._next(server)
            except ClientGone:
                return False
            if request is None:
                return False
            told.started, told.method = time.monotonic(), request.method
            await self._serve(server, request, caller, told)
        except ClientGone as error:
            told.status, told.error = "client left", error
            self._tell(caller, told)
            return False
        except CaiError as error:
            refusal = as_refusal(error)
            told.error, told.status = error, refusal.status
            self._tell(caller, told)
            if server.response_started or isinstance(error, PeerError):
                raise
            await _refuse(server, refusal, head=told.method == "HEAD")
            return False
        self._tell(caller, told)
        return server.reusable and not self._leaving.is_set()

    async def _next(self, server: StreamServer) -> Incoming | None:
        reading = asyncio.create_task(server.next_request())
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            # A request that was on its way when the gateway began to leave is still served.
            return await reading if reading.done() else None
        finally:
            reading.cancel()
            leaving.cancel()
            await asyncio.gather(reading, leaving, return_exceptions=True)

    async def _serve(
        self, server: StreamServer, request: Incoming, caller: Caller, told: _Told
    ) -> None:
        desk = self._desk
        identity = await desk.callers.identify(request, caller)
        told.caller = identity.name
        if request.path.startswith(PATH) and desk.receipts is not None:
            await self._receipt(server, request, identity)
            told.status = 200
            return
        route = desk.route(request)
        record = desk.receipts.begin(request) if desk.receipts else None
        desk.ledger.admit(identity.name, identity.limits)
        charge = _Charge(self, identity, route)
        outcome = charge.outcome
        try:
            with desk.holding(request, route):
                received, judged = await desk.body(route, server, identity)
                charge.size = len(received)
                if record:
                    record.asked(received, judged.data if judged else b"")
                del received
                lease = await self._connect()
                exchange = Exchange(server, lease, record, desk.guard.response_s)
                await exchange.run(request, route, judged, outcome)
            told.status = outcome.status
        finally:
            charge.settle()
            self._keep(record, outcome, identity, caller)

    async def _connect(self) -> Lease:
        try:
            return await self._upstreams.connect()
        except PeerUnreachable as error:
            # The client learns that there is none, not where it would have been.
            raise GuardRefused(
                502, "bad_gateway", "no backend of this egress answers", retry_after_s=2
            ) from error

    async def _receipt(
        self, server: StreamServer, request: Incoming, identity: Identity
    ) -> None:
        receipts = self._desk.receipts
        signed = receipts.fetch(request.path, identity.name) if receipts else None
        if request.method != "GET":
            raise GuardRefused(405, "method_not_allowed", "receipts are fetched", allow=("GET",))
        if signed is None:
            raise GuardRefused(404, "no_receipt", "there is no such receipt of this caller")
        await server.body(0, self._desk.guard.request_s)
        await _answer(server, 200, signed)

    def settle(self, identity: Identity, route: Route, usage: Usage, size: int) -> None:
        """Charge a caller with what an answer used, and let its next request in.

        Args:
            identity: the caller.
            route: that it asked.
            usage: as the answer told.
            size: of the request's body, bytes; 0 where no answer began.
        """
        if size and route.counting is not Counting.NONE:
            if not usage.told:
                usage.prompt = max(1, size // ESTIMATE_BYTES)
            meters = self._journal.meters
            meters.tokens.add(usage.prompt, identity.label, "prompt")
            meters.tokens.add(usage.completion, identity.label, "completion")
        else:
            usage = Usage()
        self._desk.ledger.done(
            identity.name, identity.limits, prompt=usage.prompt, completion=usage.completion
        )

    def _keep(
        self, record: Record | None, outcome: Outcome, identity: Identity, caller: Caller
    ) -> None:
        if record and outcome.status and self._desk.receipts:
            standing = Standing.of(caller.statement)
            self._desk.receipts.keep(record, identity.name, standing)

    def _tell(self, caller: Caller, told: _Told) -> None:
        if told.error is not None and not isinstance(told.error, ClientGone):
            self._journal.refused(self._name, told.error)
        entry, _, client = caller.name.partition(" ")
        self._journal.access(
            Access(
                entry,
                told.method,
                client=client,
                status=told.status,
                elapsed_ms=round(1000 * (time.monotonic() - told.started)),
                caller=told.caller,
                error=told.error.machine_code if told.error else "",
                message=told.error.message if told.error else "",
            )
        )


async def _refuse(server: StreamServer, refusal: GuardRefused, *, head: bool) -> None:
    body = error_body(refusal)
    headers = [*error_headers(refusal, len(body)), (b"connection", b"close")]
    await server.send(
        h11.Response(status_code=refusal.status, headers=headers, reason=_reason(refusal.status)),
        *(() if head else (h11.Data(data=body),)),
        h11.EndOfMessage(),
    )


async def _answer(server: StreamServer, status: int, body: bytes) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"cache-control", b"no-store"),
    ]
    await server.send(
        h11.Response(status_code=status, headers=headers, reason=_reason(status)),
        h11.Data(data=body),
        h11.EndOfMessage(),
    )


def _reason(status: int) -> bytes:
    return HTTPStatus(status).phrase.encode("ascii")
