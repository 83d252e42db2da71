"""The egress's end of OHTTP: key configurations, client evidence, and encapsulated requests.

Plain HTTP/1.1 (a load balancer may end TLS in front); the header ``x-tng-ohttp-api`` names the API.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Sequence
from hashlib import sha256

import h11

from cai import jcs
from cai.errors import CaiError, FormatError, InputError, LimitExceeded, Tampered
from tng.config.transport import OhttpServer
from tng.config.trust import Attest, ServiceVerify
from tng.egress.direct import demand_direct
from tng.ingress.http1 import ClientConnection, ClientGone
from tng.ohttp.answers import (
    API_FAILED,
    OuterError,
    cors_headers,
    drain,
    header_of,
    plain_error,
    send_json,
    whole_body,
)
from tng.ohttp.attester import KeyAttester
from tng.ohttp.chunked import HEADER_SIZE, Header, RequestReceiver
from tng.ohttp.clients import ClientJudge
from tng.ohttp.fields import Field
from tng.ohttp.hpke import KEY_SIZE
from tng.ohttp.keys import KeyRing, Replayed
from tng.ohttp.messages import (
    API_CHALLENGE,
    API_HEADER,
    API_KEY_CONFIG,
    API_TUNNEL,
    API_VERIFY,
    MAX_JSON,
    MAX_METADATA,
    REQUEST_TYPE,
    KeyRequest,
    Metadata,
    parse_evidence,
)
from tng.ohttp.request import OuterBody, RequestStream
from tng.ohttp.tunnel import ClearStream, TunnelStream
from tng.operation.journal import Journal, endpoint_text
from tng.streams import Backend, Caller, Code, StreamReset

MAX_CONNECTIONS = 1024
"""Most connections of one entry at once; the newest is refused beyond them."""

GRACE_S = 2.0
"""How long a backend may take to end after its response is whole, seconds."""


class OhttpAcceptor:
    """Connections of one entry.

    Args:
        name: of the entry.
        settings: its ``ohttp``.
        attest: how it proves itself; ``None`` when it does not.
        verify: how it checks clients; ``None`` takes every one.
        journal: where its lines go.
        direct: paths of plain requests that are let through unprotected.

    Raises:
        CaiError: the key file cannot be read.
    """

    def __init__(
        self,
        name: str,
        settings: OhttpServer,
        attest: Attest | None,
        verify: ServiceVerify | None,
        journal: Journal,
        direct: Sequence[re.Pattern[str]] = (),
    ) -> None:
        self._name = name
        self._direct = tuple(direct)
        self._settings = settings
        self._journal = journal
        self._ring = KeyRing(settings.key, journal, name)
        self._attester = KeyAttester(attest)
        self._judge = ClientJudge(verify) if verify else None
        self._idle: set[ClientConnection] = set()
        self._connections = 0
        self._streams = 0
        self._leaving = False

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, backend: Backend
    ) -> None:
        """Serve one connection to its end."""
        peername = writer.get_extra_info("peername")
        peer = f"{self._name} {endpoint_text(peername)}"
        if self._connections >= MAX_CONNECTIONS or self._leaving:
            self._journal.line(f"{peer} refused: {MAX_CONNECTIONS} connections are open")
            writer.close()
            return
        address = str(peername[0]) if isinstance(peername, tuple) else ""
        connection = _Connection(ClientConnection(reader, writer), peer, address, backend)
        self._connections += 1
        try:
            while not self._leaving and await self._next(connection):
                pass
        except ClientGone:
            self._journal.line(f"{peer} left inside a request")
        except CaiError as error:
            self._journal.line(f"{peer} ended: {error.message}")
            with contextlib.suppress(CaiError):
                # What HTTP itself refuses has a status of its own.
                status = error.http_status if error.http_status < 500 else 400
                await connection.client.send_raw(plain_error(status, error.message))
        finally:
            self._connections -= 1
            writer.close()

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {
            "dialect": "ohttp",
            "sessions": self._connections,
            "streams": self._streams,
            "ohttp": {"keys": self._ring.status()},
        }

    def leave(self) -> None:
        """Take no new requests: connections between two requests are closed now."""
        self._leaving = True
        for client in list(self._idle):
            client.abort()

    async def close(self) -> None:
        """Close the connections to the services."""
        self._leaving = True
        await self._attester.close()
        if self._judge is not None:
            await self._judge.close()

    async def _next(self, connection: _Connection) -> bool:
        client = connection.client
        self._idle.add(client)
        try:
            request = await client.next_request()
        finally:
            self._idle.discard(client)
        if request is None:
            return False
        headers = cors_headers(self._settings.cors, request)
        body = OuterBody(client)
        try:
            await self._answer(connection, request, body, headers)
        except OuterError as error:
            self._journal.line(f"{connection.peer} refused: {error.name}: {error.message}")
            self._journal.refused(self._name, error)
            if client.response_started:
                client.abort()
                return False
            told = {"code": error.name, "message": error.message}
            await send_json(client, error.status, told, headers)
        if not body.ended:
            await drain(body)
        return client.reusable

    async def _answer(
        self,
        connection: _Connection,
        request: h11.Request,
        body: OuterBody,
        headers: Sequence[Field],
    ) -> None:
        given = [value for name, value in request.headers if name == API_HEADER]
        client = connection.client
        if request.method == b"OPTIONS" and self._settings.cors is not None and not given:
            await client.send(
                h11.Response(status_code=204, headers=list(headers), reason=b"No Content")
            )
            await client.send(h11.EndOfMessage())
            return
        if not given and self._direct:
            await self._clear(connection, request, body)
            return
        if len(given) != 1:
            raise OuterError(403, "RejectNonTngRequest", "not a request of a TNG client")
        wanted = b"GET" if given[0] == API_CHALLENGE else b"POST"
        if given[0] not in (API_KEY_CONFIG, API_CHALLENGE, API_VERIFY, API_TUNNEL):
            raise OuterError(400, "InvalidOhttpApiHeaderValue", "no such API")
        if request.method != wanted:
            raise OuterError(405, "MethodNotAllowed", f"{wanted.decode()} only")
        if given[0] == API_TUNNEL:
            await self._tunnel(connection, request, body, headers)
            return
        try:
            if given[0] == API_KEY_CONFIG:
                asked = KeyRequest.decode(await whole_body(body))
                answer = await self._key_config(asked)
            else:
                answer = await self._about_clients(given[0], body)
        except ClientGone:
            raise
        except InputError as error:
            raise OuterError(error.http_status, "InvalidRequest", error.message) from error
        except CaiError as error:
            # The reason may name addresses of this guest: it stays in the journal.
            self._journal.line(f"{connection.peer} {given[0].decode()}: {error.message}")
            name, text = API_FAILED[given[0]]
            busy = error.http_status == 503
            raise OuterError(503 if busy else 500, name, text) from error
        await send_json(client, 200, answer, headers)

    async def _key_config(self, asked: KeyRequest) -> bytes:
        started = time.monotonic()
        answer = await self._attester.answer(asked, self._ring.active().config)
        if asked.model:
            elapsed = time.monotonic() - started
            self._journal.meters.attestation.observe(elapsed, self._name)
        return answer.encode()

    async def _about_clients(self, api: bytes, body: OuterBody) -> bytes:
        data = await whole_body(body)
        if self._judge is None:
            raise FormatError("this egress asks its clients for no evidence")
        if api == API_CHALLENGE:
            return jcs.canonical({"challenge_token": await self._judge.challenge()})
        value = jcs.parse(data, what="evidence", limit=MAX_JSON)
        evidence = parse_evidence(value.get("evidence") if isinstance(value, dict) else None)
        token = await self._judge.appraise(evidence)
        return jcs.canonical({"attestation_result": token, "as_provider": "coco"})

    async def _tunnel(
        self,
        connection: _Connection,
        request: h11.Request,
        body: OuterBody,
        headers: Sequence[Field],
    ) -> None:
        if header_of(request, b"content-type").partition(b";")[0].strip() != REQUEST_TYPE:
            raise OuterError(415, "InvalidContentType", "not an encapsulated request")
        receiver, caller = await self._receiver(connection, body)
        stream = TunnelStream(
            connection.client,
            body,
            receiver,
            address=connection.address if self._settings.forward_client_ip else "",
            outer=request.headers if self._settings.forward_client_ip else (),
            headers=headers,
            passed=self._settings.passthrough.response,
        )
        await self._carry(connection, stream, caller)

    async def _clear(
        self, connection: _Connection, request: h11.Request, body: OuterBody
    ) -> None:
        try:
            demand_direct(request, self._direct)
        except CaiError as error:
            raise OuterError(403, "RejectNonTngRequest", error.message) from error
        address = connection.address if self._settings.forward_client_ip else ""
        stream = ClearStream(connection.client, request, body, address=address)
        caller = Caller(f"{connection.peer} in clear", secrets.token_hex(8))
        await self._carry(connection, stream, caller)

    async def _carry(
        self, connection: _Connection, stream: RequestStream, caller: Caller
    ) -> None:
        self._streams += 1
        try:
            await _carried(stream, connection.backend, caller)
        finally:
            self._streams -= 1
        if not stream.finished:
            await self._unfinished(connection, stream)

    async def _receiver(
        self, connection: _Connection, body: OuterBody
    ) -> tuple[RequestReceiver, Caller]:
        try:
            size = int.from_bytes(await body.exactly(4))
            if size > MAX_METADATA:
                raise OuterError(413, "MetadataTooLong", f"at most {MAX_METADATA} bytes")
            metadata = Metadata.decode(await body.exactly(size))
            header = Header.decode(await body.exactly(HEADER_SIZE))
            enc = await body.exactly(KEY_SIZE)
            key = self._ring.find(metadata.hint, header.key_id)
            if key is None:
                raise OuterError(422, "ServerKeyConfigNotFound", "no such key here, or no more")
            if self._judge is not None:
                await self._judge.judge(metadata, f"client {connection.peer}")
            receiver = RequestReceiver(header, enc, key.private, metadata.public or None)
            key.open_once(enc)
        except Replayed as error:
            raise OuterError(400, "ReplayedRequest", error.message) from error
        except InputError as error:
            raise OuterError(error.http_status, "InvalidRequest", error.message) from error
        except (OuterError, ClientGone):
            raise
        except CaiError as error:
            self._journal.line(f"{connection.peer}: {error.message}")
            status = 403 if error.http_status in (401, 403) else 502
            raise OuterError(status, "ClientRefused", "the client is not proven") from error
        return receiver, self._caller(connection, metadata.public)

    def _caller(self, connection: _Connection, public: bytes) -> Caller:
        # A load balancer's connection carries requests of many, so it tells nobody apart; a key
        # does, because nobody else can send with it, whether or not it was to be attested.
        key = sha256(public).hexdigest() if public else ""
        return Caller(
            f"{connection.peer} request {connection.count()}",
            key[:16] or secrets.token_hex(8),
            key if self._judge is not None else "",
        )

    async def _unfinished(self, connection: _Connection, stream: RequestStream) -> None:
        fault = stream.fault
        if isinstance(fault, ClientGone):
            raise fault
        if stream.started:
            # Part of a response is out: without its last chunk nobody takes it for whole.
            connection.client.abort()
            raise ClientGone("the response was cut off")
        if isinstance(fault, (FormatError, LimitExceeded, Tampered)):
            # Never 422: that would have the client ask for another key.
            status = 413 if isinstance(fault, LimitExceeded) else 400
            raise OuterError(status, "InvalidRequest", fault.message) from fault
        error = CaiError("the backend gave no whole response", code="upstream")
        if isinstance(fault, StreamReset) and fault.reset_code is Code.UPSTREAM:
            error = CaiError(fault.message, code="upstream")
        await stream.refuse(502, error)


class _Connection:
    """One outer connection."""

    def __init__(
        self, client: ClientConnection, peer: str, address: str, backend: Backend
    ) -> None:
        self.client = client
        self.peer = peer
        self.address = address
        self.backend = backend
        self._count = 0

    def count(self) -> int:
        """Number of the next request."""
        self._count += 1
        return self._count


async def _carried(stream: RequestStream, backend: Backend, caller: Caller) -> None:
    """Let the backend serve a request; it may not outlive the response for long."""
    carrying = asyncio.ensure_future(backend.carry(stream, caller))
    over = asyncio.ensure_future(stream.wait_finished())
    try:
        await asyncio.wait({carrying, over}, return_when=asyncio.FIRST_COMPLETED)
        if not carrying.done():
            await asyncio.wait({carrying}, timeout=GRACE_S)
    finally:
        carrying.cancel()
        over.cancel()
        await asyncio.gather(carrying, over, return_exceptions=True)
    if not carrying.cancelled() and (error := carrying.exception()):
        raise error
