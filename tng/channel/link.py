"""Reaching a peer and being reached: TCP, then TLS, then frames.

It also tells a peer that proves nothing (plain text, another TLS, silence) from one that cannot be
reached.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from OpenSSL import SSL

from cai.errors import PeerError, PeerUnreachable, PeerWithoutEvidence
from tng.channel.frames import Frame, FrameDecoder, FrameType, encode, padding_for, reason
from tng.channel.hello import TLS_HANDSHAKE, offered_protocols
from tng.channel.pipe import READ_SIZE, TlsPipe
from tng.channel.tls import ALPN, TlsSession
from tng.streams import Code

CONNECT_TIMEOUT_S = 5.0
"""Longest wait for a TCP connection, seconds."""

TLS_TIMEOUT_S = 5.0
"""Longest TLS handshake, first byte of the peer included, seconds."""

MAX_UNSENT_DIRECT = 64 * 1024
"""Most unsent bytes with which data is added without waiting."""

MAX_UNSENT_CONTROL = 1024 * 1024
"""Most unsent bytes when a control frame is added without waiting; beyond them the link ends."""

MAX_EARLY_FRAMES = 16
"""Most frames that are kept while this end waits for something else than the next frame."""

PLAIN_REQUEST_ANSWER = (
    b"HTTP/1.1 400 Bad Request\r\n"
    b"content-type: text/plain; charset=utf-8\r\n"
    b"content-length: 127\r\n"
    b"connection: close\r\n\r\n"
    b"this port answers attested TLS (cai/1) only; ask through a tng ingress, "
    b"for example http_proxy=http://127.0.0.1:41000 curl ...\n"
)
"""What a plain request to an egress port gets (spec-channel §9)."""


class PlainRequest(PeerError):
    """A client of an egress sends something that is not TLS."""

    code = "plain-request"


class Link:
    """One end of an established session, as frames.

    Args:
        pipe: its TLS session, the handshake done.
        padding: whether DATA frames are padded to a bucket.
    """

    def __init__(self, pipe: TlsPipe, *, padding: bool) -> None:
        self._pipe = pipe
        self._padding = padding
        self._decoder = FrameDecoder()
        self._frames: deque[Frame] = deque()

    @property
    def tls(self) -> TlsSession:
        """The session, for its exporter and the peer's key."""
        return self._pipe.tls

    async def next_frame(self) -> Frame:
        """The next frame of the peer.

        Raises:
            PeerError: the session has ended.
            FormatError: the peer breaks the framing.
        """
        while not self._frames:
            plaintext = await self._pipe.receive()
            if plaintext:
                self._frames.extend(self._decoder.feed(plaintext))
        return self._frames.popleft()

    def hand_over(self, take: Callable[[Frame], None]) -> None:
        """Give frames to ``take`` as they arrive, beside ``next_frame`` (``TlsPipe.hand_over``)."""

        def arrived(plaintext: bytes) -> None:
            for frame in self._decoder.feed(plaintext):
                take(frame)

        self._pipe.hand_over(arrived)

    @property
    def congested(self) -> bool:
        """Whether a sender should wait for the socket."""
        return self._pipe.unsent > MAX_UNSENT_DIRECT

    async def gone(self) -> None:
        """Wait until the session ends; frames that come before are kept, a few of them.

        Raises:
            PeerError: it ended.
            FormatError: the peer breaks the framing.
        """
        while len(self._frames) <= MAX_EARLY_FRAMES:
            plaintext = await self._pipe.receive()
            if plaintext:
                self._frames.extend(self._decoder.feed(plaintext))
        await asyncio.Event().wait()

    async def send(self, *frames: Frame) -> None:
        """Send frames and wait until the socket takes more.

        Raises:
            PeerError: the session has ended.
        """
        self._put(*frames)
        await self._pipe.drain()

    def send_soon(self, *frames: Frame) -> None:
        """Send frames without waiting; the reading side may never wait for writing.

        Raises:
            PeerError: the session has ended, or the peer takes nothing any more.
        """
        self._put(*frames)
        if self._pipe.unsent > MAX_UNSENT_CONTROL:
            self.abort()
            raise PeerError("the peer does not take what it asks for")

    async def refuse(self, code: Code, text: str) -> None:
        """Say why, then close; a peer that is gone already is none the wiser."""
        with contextlib.suppress(PeerError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self.send(Frame(FrameType.REFUSE, 0, reason(code, text)))
        self.close()

    def close(self) -> None:
        """Close politely: close_notify, then the socket."""
        self._pipe.close()

    def abort(self) -> None:
        """Drop the socket at once."""
        self._pipe.abort()

    def _put(self, *frames: Frame) -> None:
        parts = [encode(frame) for frame in frames]
        if self._padding and frames[-1].type is FrameType.DATA:
            # All before the last one are of full size, which needs no padding.
            parts.append(padding_for(len(parts[-1])))
        self._pipe.put(b"".join(parts))


async def dial(
    address: str,
    port: int,
    context: SSL.Context,
    *,
    server_name: str | None,
    protocols: Sequence[bytes] = (ALPN,),
) -> TlsPipe:
    """Connect to a peer and run the TLS handshake.

    Args:
        address: IP address, resolved and checked before.
        port: TCP port.
        context: of ``tng.channel.tls.client_context``.
        server_name: SNI, for a destination given by name.
        protocols: ALPN names of which the peer must choose one.

    Raises:
        PeerUnreachable: nothing answers there.
        PeerWithoutEvidence: something answers, but not in TLS with one of these protocols.
    """
    where = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(address, port)
    except TimeoutError as error:
        raise PeerUnreachable(f"peer {where} does not answer within {CONNECT_TIMEOUT_S:g} s") from (
            error
        )
    except OSError as error:
        raise PeerUnreachable(
            f"peer {where} cannot be reached: {_reason(error)}",
            hint="check the address, and that the tng egress is running there",
        ) from error
    tls = TlsSession(context, server=False, server_name=server_name, protocols=protocols)
    pipe = TlsPipe(reader, writer, tls)
    try:
        tls.start()
        async with asyncio.timeout(TLS_TIMEOUT_S):
            await pipe.shake(b"")
    except TimeoutError as error:
        pipe.abort()
        raise _no_evidence(where, f"it did not answer TLS within {TLS_TIMEOUT_S:g} s") from error
    except PeerError as error:
        pipe.abort()
        raise _no_evidence(where, error.message) from error
    except BaseException:
        pipe.abort()
        raise
    return pipe


async def accept(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    choose: Callable[[tuple[bytes, ...]], Awaitable[tuple[SSL.Context, Sequence[bytes]]]],
) -> TlsPipe:
    """Run the TLS handshake with a client that has connected.

    Args:
        reader: from the client.
        writer: to the client.
        choose: gives the context, and the protocols it may choose, for the ALPN names that the
            client offers; each dialect has a key of its own.

    Raises:
        PlainRequest: it sent something else than TLS; it has been told so.
        PeerError: it did not complete the handshake.
    """
    try:
        async with asyncio.timeout(TLS_TIMEOUT_S):
            first = await reader.read(READ_SIZE)
            if not first:
                raise PeerError("the client connected and left")
            if first[0] != TLS_HANDSHAKE:
                await _answer_plain(writer)
                raise PlainRequest("a plain request came to an attested port")
            while (offered := offered_protocols(first)) is None:
                more = await reader.read(READ_SIZE)
                if not more:
                    raise PeerError("the client left within its first message")
                first += more
            context, protocols = await choose(offered)
            pipe = TlsPipe(
                reader, writer, TlsSession(context, server=True, protocols=protocols)
            )
            await pipe.shake(first)
    except TimeoutError as error:
        writer.transport.abort()
        raise PeerError(f"no TLS handshake within {TLS_TIMEOUT_S:g} s") from error
    except OSError as error:
        writer.transport.abort()
        raise PeerError("the connection broke") from error
    except BaseException:
        writer.close()
        raise
    return pipe


async def _answer_plain(writer: asyncio.StreamWriter) -> None:
    writer.write(PLAIN_REQUEST_ANSWER)
    with contextlib.suppress(OSError):
        await writer.drain()


def _reason(error: OSError) -> str:
    # asyncio replaces the system's text by its own, which repeats the address.
    return os.strerror(error.errno).lower() if error.errno else "no route"


def _no_evidence(where: str, why: str) -> PeerWithoutEvidence:
    return PeerWithoutEvidence(
        f"peer {where} answers without evidence: {why}",
        hint="only a tng egress with `attest` proves itself; check host and port",
    )
