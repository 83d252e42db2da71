"""The OHTTP peers of one ingress entry: proven keys by origin, and streams that use them."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterable, Sequence

from cai.errors import CaiError, FormatError, PeerUnreachable, from_os_error
from tng.config.filters import Filter
from tng.config.transport import OhttpClient
from tng.ohttp.attester import Attester
from tng.ohttp.judge import KeyJudge
from tng.ohttp.origin import Origin
from tng.ohttp.stream import OhttpStream
from tng.operation.journal import Journal
from tng.peers.destination import Destination, resolve
from tng.streams import ByteStream, Proven

MAX_ORIGINS = 256
"""Most origins of one entry."""


class OhttpPeers:
    """The peers of one entry.

    Args:
        name: of the entry.
        settings: its ``ohttp``.
        judge: of their keys.
        attester: how this end proves itself; ``None`` when it does not.
        filters: destination filters of the entry.
        journal: where its lines go.
        own: gives the addresses that this process listens on.
        unsafe: the ``unsafe_…`` settings of the entry.

    Raises:
        CaiError: a root certificate cannot be read.
    """

    def __init__(
        self,
        name: str,
        settings: OhttpClient,
        judge: KeyJudge,
        attester: Attester | None,
        *,
        filters: Sequence[Filter],
        journal: Journal,
        own: Callable[[], Iterable[tuple[str, int]]],
        unsafe: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.settings = settings
        self.judge = judge
        self.attester = attester
        self.journal = journal
        self.tls = _tls(settings)
        self._filters = filters
        self._own = own
        self._unsafe = unsafe
        self._origins: dict[Destination, Origin] = {}
        self._leaving = False

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        return self._unsafe

    async def resolve(self, destination: Destination) -> tuple[str, ...]:
        """Its checked addresses.

        Raises:
            DestinationRefused: they may not be gone to.
            PeerUnreachable: there are none.
        """
        return await resolve(destination, self._filters, self._own())

    async def open(self, destination: Destination) -> tuple[ByteStream, Proven]:
        """A stream whose requests are encapsulated to a proven key.

        Raises:
            DestinationRefused: the address may not be gone to.
            EvidenceRefused, PeerUnreachable, CaiError: there is no proven key.
        """
        if self._leaving:
            raise PeerUnreachable("the gateway is stopping")
        origin = self._origin(destination)
        key = await origin.current()
        origin.streams = {stream for stream in origin.streams if not stream.over}
        stream = OhttpStream(origin, self.settings)
        origin.streams.add(stream)
        return stream, key.proven

    def status(self) -> dict[str, object]:
        """What the control interface shows."""
        return {
            "dialect": "ohttp",
            "unsafe": list(self.unsafe),
            "peers": {
                str(where): {
                    "connected": origin.client.connected,
                    "streams": origin.client.busy,
                    "verdict": origin.verdict.to_json() if origin.verdict else None,
                    "error": origin.error.to_json() if origin.error else None,
                    "at": origin.at.isoformat(timespec="seconds"),
                }
                for where, origin in self._origins.items()
            },
        }

    def leave(self) -> None:
        """Take no new streams, and no new requests on those that are open."""
        self._leaving = True
        for origin in self._origins.values():
            for stream in origin.streams:
                stream.leave()

    async def close(self) -> None:
        """End every exchange now."""
        self._leaving = True
        for origin in self._origins.values():
            await origin.close()
        with contextlib.suppress(CaiError):
            await self.judge.close()
        if self.attester is not None:
            await self.attester.close()

    def _origin(self, destination: Destination) -> Origin:
        origin = self._origins.get(destination)
        if origin is None:
            while len(self._origins) >= MAX_ORIGINS:
                idle = next(
                    (where for where, item in self._origins.items() if not item.client.busy), None
                )
                if idle is None:
                    raise PeerUnreachable(f"{MAX_ORIGINS} peers are in use already")
                self._origins.pop(idle).client.close()
            origin = self._origins[destination] = Origin(destination, self)
        return origin


def _tls(settings: OhttpClient) -> ssl.SSLContext | None:
    if not settings.tls:
        return None
    context = ssl.create_default_context()
    if settings.ca_files:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for path in settings.ca_files:
            try:
                context.load_verify_locations(str(path))
            except ssl.SSLError as error:
                raise FormatError(f"{path}: no PEM certificates") from error
            except OSError as error:
                raise from_os_error(error, f"read {path}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context
