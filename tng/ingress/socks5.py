"""Ingress ``socks5``: CONNECT of RFC 1928, with the login of RFC 1929 where one is set.

The client is told that it is connected only when the attested channel stands. Names are not
resolved by the client, so they are checked here as everywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time

from cai.errors import CaiError, FormatError, PeerError, PeerUnreachable
from tng.config.modes import Socks5
from tng.operation.journal import Journal, endpoint_text
from tng.peers.destination import (
    BadRequest,
    Destination,
    DestinationRefused,
    matches,
    parse_authority,
    refuse_unmatched,
)
from tng.relay import relay
from tng.streams import Code, Peers

MAX_CLIENTS = 1024
"""Most client connections of one entry at once."""

HANDSHAKE_TIMEOUT_S = 10.0
"""How long a client may take to say where it wants to go, seconds."""

VERSION = 5
NO_LOGIN, LOGIN, NO_METHOD = 0x00, 0x02, 0xFF
CONNECT = 1
IPV4, NAME, IPV6 = 1, 3, 4

SUCCEEDED, FAILED, NOT_ALLOWED, UNREACHABLE, REFUSED = 0, 1, 2, 4, 5
NO_COMMAND, NO_ADDRESS_TYPE = 7, 8


class LoginRefused(CaiError):
    """No login, or a wrong one."""

    code, exit_status, http_status = "login-refused", 7, 407


class SocksProxy:
    """One ``socks5`` entry.

    Args:
        name: of the entry.
        settings: its mode.
        peers: its attested peers.
        direct: where what no filter matches goes; ``None`` refuses it.
        journal: where its lines go.
    """

    def __init__(
        self, name: str, settings: Socks5, peers: Peers, direct: Peers | None, journal: Journal
    ) -> None:
        self._name = name
        self._settings = settings
        self._peers = peers
        self._direct = direct
        self._journal = journal
        self._clients = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one client connection to its end."""
        if self._clients >= MAX_CLIENTS:
            writer.close()
            return
        self._clients += 1
        what = f"{self._name} {endpoint_text(writer.get_extra_info('peername'))}"
        started = time.monotonic()
        try:
            destination = await self._asked(reader, writer)
            what = f"{what} to {destination}"
            sent, received = await self._carry(reader, writer, destination)
            elapsed = 1000 * (time.monotonic() - started)
            self._journal.line(f"{what} done, {received} B out, {sent} B in, {elapsed:.0f} ms")
        except CaiError as error:
            self._journal.line(f"{what} ended: {error.machine_code}: {error.message}")
        except (EOFError, OSError):
            # The client left within its handshake.
            pass
        finally:
            self._clients -= 1
            writer.close()

    async def _asked(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Destination:
        try:
            async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                await self._greet(reader, writer)
                return await self._request(reader, writer)
        except TimeoutError as error:
            raise BadRequest(f"no request within {HANDSHAKE_TIMEOUT_S:g} s") from error

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        version, count = await reader.readexactly(2)
        if version != VERSION:
            raise BadRequest(f"SOCKS version {version}, expected {VERSION}")
        methods = await reader.readexactly(count)
        wanted = NO_LOGIN if self._settings.login is None else LOGIN
        if wanted not in methods:
            await _send(writer, bytes([VERSION, NO_METHOD]))
            raise LoginRefused("the client offers no login that this proxy takes")
        await _send(writer, bytes([VERSION, wanted]))
        if self._settings.login is None:
            return
        version, size = await reader.readexactly(2)
        user = await reader.readexactly(size)
        password = await reader.readexactly((await reader.readexactly(1))[0])
        name, secret = (part.encode("utf-8") for part in self._settings.login)
        # Both are compared always, and in constant time.
        good = hmac.compare_digest(user, name) & hmac.compare_digest(password, secret)
        await _send(writer, bytes([1, 0 if good and version == 1 else 1]))
        if not good or version != 1:
            raise LoginRefused("wrong user name or password")

    async def _request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Destination:
        version, command, _reserved, kind = await reader.readexactly(4)
        if version != VERSION:
            raise BadRequest(f"SOCKS version {version}, expected {VERSION}")
        if kind == IPV4:
            host = str(ipaddress.IPv4Address(await reader.readexactly(4)))
        elif kind == IPV6:
            host = f"[{ipaddress.IPv6Address(await reader.readexactly(16))}]"
        elif kind == NAME:
            name = await reader.readexactly((await reader.readexactly(1))[0])
            host = name.decode("ascii", "replace")
        else:
            await _reply(writer, NO_ADDRESS_TYPE)
            raise BadRequest(f"SOCKS address type {kind}")
        port = int.from_bytes(await reader.readexactly(2))
        if command != CONNECT:
            await _reply(writer, NO_COMMAND)
            raise BadRequest(f"SOCKS command {command}; only CONNECT is served")
        try:
            if ":" in host and not host.startswith("["):
                raise BadRequest("the destination is not a host name")
            return parse_authority(f"{host}:{port}", default_port=None)
        except BadRequest:
            await _reply(writer, FAILED)
            raise

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        destination: Destination,
    ) -> tuple[int, int]:
        stream = None
        try:
            peers = self._peers
            if not matches(destination, self._settings.filters):
                if self._direct is None:
                    raise refuse_unmatched(destination)
                peers = self._direct
            stream, _proven = await peers.open(destination)
            await stream.opened()
        except CaiError as error:
            await _reply(writer, _code(error))
            if stream is not None:
                stream.reset(Code.CANCELLED)
            raise
        try:
            await _reply(writer, SUCCEEDED)
            return await relay(stream, reader, writer)
        finally:
            stream.reset(Code.CANCELLED)


def _code(error: CaiError) -> int:
    if isinstance(error, DestinationRefused):
        return NOT_ALLOWED
    if isinstance(error, PeerUnreachable):
        return UNREACHABLE
    if isinstance(error, (PeerError, FormatError)):
        return REFUSED
    return FAILED


async def _reply(writer: asyncio.StreamWriter, code: int) -> None:
    # The bound address is of no use to a client of CONNECT; zeros are customary.
    await _send(writer, bytes([VERSION, code, 0, IPV4]) + bytes(6))


async def _send(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(OSError):
        writer.write(data)
        await writer.drain()
