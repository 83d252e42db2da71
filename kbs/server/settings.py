"""The listeners, as the configuration says it: HTTP surface, limits, TLS."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cai.attest.rcar import MAX_MESSAGE
from cai.errors import SettingError

if TYPE_CHECKING:
    from cai.settings import Section

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_PREFIX = 256
"""Longest path prefix, characters."""

MAX_NETWORKS = 1024
"""Most entries of a list of networks."""

_PREFIX: Final = re.compile(r"(/[A-Za-z0-9._~-]+)*", re.ASCII)


class Compat(StrEnum):
    """Whose status codes are spoken."""

    NONE = "none"
    TRUSTEE = "trustee"


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """The HTTP surface.

    Attributes:
        prefix: path in front of every route, e.g. ``/cai-test``; empty for none.
        compat: ``trustee`` answers 401 wherever Trustee does.
        allow: networks that may speak to the main listener; empty allows all.
        trusted_proxies: networks whose ``X-Forwarded-For`` and ``-Proto`` are believed.
    """

    prefix: str = ""
    compat: Compat = Compat.NONE
    allow: tuple[Network, ...] = ()
    trusted_proxies: tuple[Network, ...] = ()

    @classmethod
    def from_table(cls, section: Section | None) -> HttpSettings:
        """Read ``[http]``.

        Raises:
            SettingError: an unknown member, or one out of its range.
        """
        if section is None:
            return cls()
        compat = section.text("compat", Compat.NONE.value)
        if compat not in list(Compat):
            raise SettingError(
                f"{section.where}: compat is {compat[:32]!r}", hint="use none or trustee"
            )
        settings = cls(
            _prefix(section),
            Compat(compat),
            _networks(section, "allow"),
            _networks(section, "trusted_proxies"),
        )
        section.finish()
        return settings


@dataclass(frozen=True, slots=True)
class LimitSettings:
    """What one process takes on at once.

    Attributes:
        request_bytes: largest body, bytes.
        connections: most connections; further ones are closed at once.
        requests: most requests at once; further ones get 503.
        requests_per_source: most requests at once from one address.
        rate: requests a second from one address, on average; 0 does not limit. Loopback is never
            limited: it is the front proxy's, or our own.
        burst: how many requests beyond the rate one address may send at once.
        verifiers: verifications of evidence that run at once.
        waiting: verifications that wait for a verifier; further ones get 503.
    """

    request_bytes: int = MAX_MESSAGE
    connections: int = 2048
    requests: int = 512
    requests_per_source: int = 128
    rate: int = 100
    burst: int = 200
    verifiers: int = field(default_factory=lambda: max(2, os.cpu_count() or 2))
    waiting: int = 256

    @classmethod
    def from_table(cls, section: Section | None) -> LimitSettings:
        """Read ``[limits]``.

        Raises:
            SettingError: an unknown member, or one out of its range.
        """
        if section is None:
            return cls()
        own = cls()
        settings = cls(
            section.integer(
                "request_bytes", own.request_bytes, least=4096, most=64 << 20, unit="bytes"
            ),
            section.integer(
                "connections", own.connections, least=1, most=1 << 20, unit="connections"
            ),
            section.integer("requests", own.requests, least=1, most=1 << 16, unit="requests"),
            section.integer(
                "requests_per_source", own.requests_per_source, least=1, most=1 << 16,
                unit="requests",
            ),
            section.integer("rate", own.rate, least=0, most=1 << 20, unit="requests a second"),
            section.integer("burst", own.burst, least=1, most=1 << 20, unit="requests"),
            section.integer("verifiers", own.verifiers, least=1, most=1024, unit="threads"),
            section.integer("waiting", own.waiting, least=0, most=1 << 16, unit="verifications"),
        )  # fmt: skip
        section.finish()
        return settings


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The main listener's certificate; both files are read again when they change.

    Attributes:
        certificate: PEM chain, leaf first; ``None`` is plain HTTP.
        key: its private key, PEM.
    """

    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def from_table(cls, section: Section | None) -> TlsSettings:
        """Read ``[tls]``.

        Raises:
            SettingError: an unknown member, or half of the pair.
        """
        if section is None:
            return cls()
        settings = cls(optional_path(section, "certificate"), optional_path(section, "key"))
        section.finish()
        if (settings.certificate is None) is not (settings.key is None):
            raise SettingError(f"{section.where}: certificate and key go together")
        return settings

    @property
    def pair(self) -> tuple[Path, Path] | None:
        """Certificate and key, when there are any."""
        if self.certificate is None or self.key is None:
            return None
        return self.certificate, self.key


def optional_path(section: Section, name: str) -> Path | None:
    """A path member, or ``None`` when it is absent.

    Raises:
        SettingError: it is not a string, or empty.
    """
    if not section.has(name):
        return None
    text = section.text(name)
    if not text:
        raise SettingError(f"{section.where}: {name} is empty")
    return Path(text)


def _prefix(section: Section) -> str:
    text = section.text("prefix", "").rstrip("/")
    if len(text) > MAX_PREFIX or not _PREFIX.fullmatch(text) or ".." in text.split("/"):
        raise SettingError(
            f"{section.where}: prefix {text[:64]!r} is not a path", hint="e.g. /cai-test"
        )
    return text


def _networks(section: Section, name: str) -> tuple[Network, ...]:
    texts = section.texts(name, [])
    if len(texts) > MAX_NETWORKS:
        raise SettingError(f"{section.where}: {name} has more than {MAX_NETWORKS} entries")
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise SettingError(
            f"{section.where}: {name}: {error}", hint="write networks as 192.0.2.0/24"
        ) from error
