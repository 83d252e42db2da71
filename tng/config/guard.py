"""``guard`` of an egress: what may reach its backend, from whom, and how much of it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cai.errors import SettingError
from cai.settings import Section, suggestion
from tng.config.addresses import is_loopback
from tng.config.filters import Network
from tng.config.notes import NoteKind, Notes
from tng.guard.bodies import STRICT, BodyRules
from tng.guard.limits import NO_LIMITS, Limits, parse_limits
from tng.guard.routes import INFERENCE, KNOWN, Route

BODY_MIB = 8
"""Longest body of a request, MiB; media as data need more than text."""

MAX_BODY_MIB = 256
"""Largest ``max_body_mib``."""

MAX_REQUESTS = 1024
"""Requests at once, of all callers together."""

HEAD_KIB = 32
"""Longest head of a request, KiB."""

REQUEST_S = 60
"""Longest time from the first byte of a request to its last, seconds."""

RESPONSE_S = 1800
"""Longest silence of the backend, before its first byte and inside a stream, seconds."""

DRAIN_S = 60
"""How long running requests may go on after SIGTERM, seconds."""

MAX_DRAIN_S = 300
"""Largest ``drain_s``, seconds: that of a lease."""

MAX_SECONDS = 24 * 3600
"""Largest time of any kind, seconds."""

HEALTH_PATH = "/health"
HEALTH_INTERVAL_S = 5

MAX_NETWORKS = 4096
"""Most entries of ``allow`` or ``deny``."""

MAX_PATHS = 256
"""Most entries of ``paths``."""


@dataclass(frozen=True, slots=True)
class JwtSettings:
    """Tokens of an identity provider.

    Attributes:
        keys: its JWKS, as a file or an address.
        issuer: exact.
        audience: exact.
        limits: of each subject.
    """

    keys: Path | str
    issuer: str
    audience: str
    limits: Limits = NO_LIMITS


@dataclass(frozen=True, slots=True)
class Guard:
    """Everything that a guard does.

    Attributes:
        routes: what may be asked for, by path.
        tokens: file of API tokens; ``None`` has none.
        jwt: tokens of an identity provider; ``None`` takes none.
        body: rules for bodies.
        salted: whether each caller gets its own prompt cache.
        limits: of callers whose token says nothing.
        allow: only from these networks; empty is everywhere.
        deny: never from these.
        body_bytes: longest body.
        head_bytes: longest head.
        requests: most requests at once.
        request_s: longest time that a request may take to arrive.
        response_s: longest silence of the backend.
        drain_s: how long running requests may go on after SIGTERM.
        health_path: what is asked of a backend to see whether it lives; empty asks nothing.
        health_interval_s: how often.
        receipts: whether callers may ask for receipts.
    """

    routes: dict[str, Route]
    tokens: Path | None = None
    jwt: JwtSettings | None = None
    body: BodyRules = STRICT
    salted: bool = True
    limits: Limits = NO_LIMITS
    allow: tuple[Network, ...] = ()
    deny: tuple[Network, ...] = ()
    body_bytes: int = BODY_MIB * 2**20
    head_bytes: int = HEAD_KIB * 2**10
    requests: int = MAX_REQUESTS
    request_s: float = REQUEST_S
    response_s: float = RESPONSE_S
    drain_s: float = DRAIN_S
    health_path: str = HEALTH_PATH
    health_interval_s: float = HEALTH_INTERVAL_S
    receipts: bool = True

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force."""
        shared = ("unsafe_shared_prompt_cache",) if not self.salted else ()
        return (*shared, *(("unsafe_remote_media",) if self.body.remote_media else ()))


def parse_guard(section: Section | None, notes: Notes) -> Guard | None:
    """Read the ``guard`` of an entry; unknown members are refused.

    Raises:
        SettingError: something is unknown, of another shape, or out of its range.
    """
    if section is None:
        return None
    unknown = section.text("unknown_fields", "refuse")
    if unknown not in ("refuse", "drop"):
        raise SettingError(f"{section.where}: unknown_fields is 'refuse' or 'drop'")
    limits, health = section.section("limits"), section.section("health")
    guard = Guard(
        routes=_routes(section),
        tokens=_file(section, "tokens"),
        jwt=_jwt(section.section("jwt")),
        body=BodyRules(unknown == "drop", section.flag("unsafe_remote_media", default=False)),
        salted=not section.flag("unsafe_shared_prompt_cache", default=False),
        limits=parse_limits(limits),
        allow=_networks(section, "allow"),
        deny=_networks(section, "deny"),
        body_bytes=2**20
        * section.integer("max_body_mib", BODY_MIB, least=1, most=MAX_BODY_MIB, unit="MiB"),
        head_bytes=2**10
        * section.integer("max_head_kib", HEAD_KIB, least=1, most=64, unit="KiB"),
        requests=section.integer(
            "max_requests", MAX_REQUESTS, least=1, most=100_000, unit="requests"
        ),
        request_s=_seconds(section, "request_timeout_s", REQUEST_S),
        response_s=_seconds(section, "response_timeout_s", RESPONSE_S),
        drain_s=_seconds(section, "drain_s", DRAIN_S, most=MAX_DRAIN_S),
        health_path=_health_path(health),
        health_interval_s=_seconds(health, "interval_s", HEALTH_INTERVAL_S)
        if health
        else HEALTH_INTERVAL_S,
        receipts=section.flag("receipts", default=True),
    )
    if health:
        health.finish()
    section.finish()
    if guard.tokens is None and guard.jwt is None:
        notes.add(
            NoteKind.CLEAR, section.where,
            "neither tokens nor jwt: whoever reaches this egress is served; callers are told apart "
            "by their channel only",
        )  # fmt: skip
    return guard


def _routes(section: Section) -> dict[str, Route]:
    raw = section.raw("paths")
    if raw is None:
        return {route.path: route for route in INFERENCE}
    if not isinstance(raw, list) or not 1 <= len(raw) <= MAX_PATHS:
        raise SettingError(f"{section.where}: paths is a list of 1 to {MAX_PATHS}")
    routes: dict[str, Route] = {}
    for index, item in enumerate(raw):
        route = _route(item, f"{section.where}.paths[{index}]")
        if route.path in routes:
            raise SettingError(f"{section.where}: path {route.path} is given twice")
        routes[route.path] = route
    return routes


def _route(item: Any, where: str) -> Route:
    if isinstance(item, str):
        known = KNOWN.get(item)
        if known is None:
            raise SettingError(
                f"{where}: no rules for {item!r}",
                hint=suggestion(item, KNOWN)
                or 'give {"path": PATH, "method": "POST", "fields": [NAMES]}',
            )
        return known
    section = Section(item, where=where)
    path, method = section.text("path"), section.text("method", "POST")
    fields = frozenset(section.texts("fields", []))
    salted = section.flag("cache_salt", default=False)
    section.finish()
    if not is_plain_path(path) or method not in ("GET", "POST"):
        raise SettingError(f"{where}: a plain path from '/' and the method GET or POST")
    if method == "POST" and not fields:
        raise SettingError(f"{where}: fields names the members of the body that are let through")
    return Route(path, method, fields if method == "POST" else frozenset(), salted=salted)


def is_plain_path(path: str) -> bool:
    """Whether a path has one spelling only: no escapes, dots, doubled slashes or parameters."""
    parts = path.split("/")
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~:@/")
    return (
        path.startswith("/")
        and len(path) <= 512
        and set(path) <= allowed
        and all(part and part not in (".", "..") for part in parts[1:])
    )


def _jwt(section: Section | None) -> JwtSettings | None:
    if section is None:
        return None
    text = section.text("jwks")
    place: Path | str = text
    if "://" in text:
        url = urlsplit(text)
        local = url.scheme == "http" and is_loopback(url.hostname or "")
        if not url.hostname or url.username or not (url.scheme == "https" or local):
            raise SettingError(f"{section.where}: jwks is a file or an https:// address")
    else:
        place = Path(text)
        if not place.is_absolute():
            raise SettingError(f"{section.where}: jwks is an absolute path or an address")
    settings = JwtSettings(
        place,
        section.text("issuer"),
        section.text("audience"),
        parse_limits(section.section("limits")),
    )
    section.finish()
    if not settings.issuer or not settings.audience:
        raise SettingError(f"{section.where}: issuer and audience are pinned, not empty")
    return settings


def _networks(section: Section, name: str) -> tuple[Network, ...]:
    texts = section.texts(name, [])
    if len(texts) > MAX_NETWORKS:
        raise SettingError(f"{section.where}: {name} has at most {MAX_NETWORKS} entries")
    try:
        return tuple(ipaddress.ip_network(text, strict=True) for text in texts)
    except ValueError as error:
        raise SettingError(f"{section.where}: {name}: {error}") from error


def _file(section: Section, name: str) -> Path | None:
    if not section.has(name):
        return None
    path = Path(section.text(name))
    if not path.is_absolute():
        raise SettingError(f"{section.where}: {name} is an absolute path")
    return path


def _seconds(section: Section, name: str, default: int, *, most: int = MAX_SECONDS) -> int:
    return section.integer(name, default, least=1, most=most, unit="seconds")


def _health_path(section: Section | None) -> str:
    path = section.text("path", HEALTH_PATH) if section else HEALTH_PATH
    if path and not is_plain_path(path):
        assert section is not None  # noqa: S101 - the default is plain
        raise SettingError(f"{section.where}: path is a plain path from '/'")
    return path
