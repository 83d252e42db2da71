"""How attested bytes travel: RATS-TLS, plain or multiplexed, or OHTTP."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai.errors import SettingError
from cai.settings import Section
from tng.config.notes import NoteKind, Notes
from tng.config.patterns import compile_pattern

MAX_PATTERNS = 64
"""Most path patterns of one entry."""

MAX_COUNT = 2**32 - 1
"""Largest limit of a multiplexed pool (an unsigned 32-bit number in TNG)."""

ROTATION_S = 300
"""How long an OHTTP key is the active one unless told otherwise, seconds."""


@dataclass(frozen=True, slots=True)
class RatsTls:
    """Sessions over TLS; what runs inside is negotiated by ALPN.

    Attributes:
        multiplex: ``h2`` with stock peers; our own dialect always multiplexes.
        max_streams: soft limit of streams in one connection, or ``None``.
        max_connections: soft limit of connections to one peer, or ``None``.
    """

    multiplex: bool = False
    max_streams: int | None = None
    max_connections: int | None = None


@dataclass(frozen=True, slots=True)
class HeaderPassthrough:
    """Headers that are copied to the outer message; ``None`` means all of them."""

    request: tuple[str, ...] | None = ()
    response: tuple[str, ...] | None = ()


@dataclass(frozen=True, slots=True)
class PathRewrite:
    """Outer path of requests whose whole path matches."""

    pattern: re.Pattern[str]
    substitution: str


@dataclass(frozen=True, slots=True)
class OhttpClient:
    """OHTTP at an ingress.

    Attributes:
        rewrites: first match gives the outer path.
        keep_path: outer path when none matches: the original one, else ``/``.
        passthrough: headers outside.
        tls: whether the outer request is HTTPS.
        ca_files: PEM roots for that; empty uses the system's.
    """

    rewrites: tuple[PathRewrite, ...] = ()
    keep_path: bool = False
    passthrough: HeaderPassthrough = HeaderPassthrough()
    tls: bool = False
    ca_files: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class KeyFile:
    """An X25519 key in a PKCS#8 PEM file, read again when it changes."""

    path: Path


@dataclass(frozen=True, slots=True)
class OwnKey:
    """A key that this process makes and rotates."""

    rotation_s: int = ROTATION_S


@dataclass(frozen=True, slots=True)
class Cors:
    """CORS headers of the outer answers."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    credentials: bool = False


@dataclass(frozen=True, slots=True)
class OhttpServer:
    """OHTTP at an egress."""

    key: KeyFile | OwnKey = OwnKey()
    passthrough: HeaderPassthrough = HeaderPassthrough()
    cors: Cors | None = None
    forward_client_ip: bool = True


Transport = RatsTls | OhttpClient | OhttpServer


def parse_transport(entry: Section, notes: Notes, *, egress: bool) -> Transport:
    """``rats_tls`` or ``ohttp`` of one entry; without either it is RATS-TLS.

    Raises:
        SettingError: both, or something of another shape.
    """
    alias = "decap_from_http" if egress else "encap_in_http"
    if entry.has("ohttp") and entry.has(alias):
        raise SettingError(f"{entry.where}: ohttp and {alias} are the same setting")
    ohttp = entry.section("ohttp") or entry.section(alias)
    rats = entry.section("rats_tls")
    if ohttp is not None and rats is not None:
        raise SettingError(f"{entry.where}: ohttp and rats_tls exclude each other")
    quic = entry.section("quic")
    if quic is not None:
        if quic.has("max_datagram_size"):
            quic.integer("max_datagram_size", least=0, most=MAX_COUNT, unit="bytes")
        quic.finish()
        notes.add(NoteKind.IGNORED, quic.where, "has no effect: UDP is not carried")
    if ohttp is not None:
        return _server(ohttp, notes) if egress else _client(ohttp)
    return _rats_tls(rats, egress=egress) if rats is not None else RatsTls()


def _rats_tls(section: Section, *, egress: bool) -> RatsTls:
    multiplex = section.flag("multiplex", default=False)
    limits: dict[str, int | None] = {
        name: section.integer(name, least=1, most=MAX_COUNT, unit="(a count)")
        if not egress and section.has(name)
        else None
        for name in ("multiplex_max_streams_per_connection", "multiplex_max_connections")
    }
    section.finish()
    if any(limits.values()) and not multiplex:
        raise SettingError(f"{section.where}: limits of a pool need multiplex: true")
    return RatsTls(multiplex, *limits.values())


def _client(section: Section) -> OhttpClient:
    rewrites = []
    for index, item in enumerate(_list(section, "path_rewrites")):
        rule = Section(item, where=f"{section.where}.path_rewrites[{index}]")
        pattern = compile_pattern(rule.text("match_regex"), f"{rule.where}: match_regex")
        substitution = re.sub(r"\\(\d)", r"${\1}", rule.text("substitution"))
        rule.finish()
        rewrites.append(PathRewrite(pattern, substitution))
    default = section.text("path_default", "root")
    if default not in ("root", "original"):
        raise SettingError(
            f"{section.where}: path_default is {default!r}, expected 'root' or 'original'"
        )
    result = OhttpClient(
        rewrites=tuple(rewrites),
        keep_path=default == "original",
        passthrough=_passthrough(section),
        tls=section.flag("tls", default=False),
        ca_files=tuple(Path(name) for name in section.texts("tls_ca_certs", [])),
    )
    section.finish()
    return result


def _server(section: Section, notes: Notes) -> OhttpServer:
    if section.has("allow_non_tng_traffic_regexes"):
        for pattern in section.texts("allow_non_tng_traffic_regexes"):
            compile_pattern(pattern, f"{section.where}: allow_non_tng_traffic_regexes")
    cors = section.section("cors")
    result = OhttpServer(
        key=_key(section.section("key"), notes),
        passthrough=_passthrough(section),
        cors=_cors(cors) if cors is not None else None,
        forward_client_ip=section.flag("forward_client_ip", default=True),
    )
    section.finish()
    return result


def _cors(section: Section) -> Cors:
    cors = Cors(
        origins=tuple(section.texts("allow_origins", [])),
        methods=tuple(section.texts("allow_methods", [])),
        headers=tuple(section.texts("allow_headers", [])),
        expose=tuple(section.texts("expose_headers", [])),
        credentials=section.flag("allow_credentials", default=False),
    )
    section.finish()
    return cors


def _key(section: Section | None, notes: Notes) -> KeyFile | OwnKey:
    if section is None:
        return OwnKey()
    source = section.text("source")
    if source == "file":
        key: KeyFile | OwnKey = KeyFile(Path(section.text("path")))
    elif source in ("self_generated", "peer_shared"):
        # TNG's documents show examples without the interval, which its parser refuses.
        key = OwnKey(
            section.integer(
                "rotation_interval", ROTATION_S, least=0, most=MAX_COUNT, unit="seconds"
            )
        )
        if source == "peer_shared":
            _peer_shared(section, notes)
    else:
        raise SettingError(
            f"{section.where}: source is {source!r}",
            hint="expected 'self_generated', 'file' or 'peer_shared'",
        )
    notes.ignore_unknown(section)
    return key


def _peer_shared(section: Section, notes: Notes) -> None:
    section.text("host", "")
    for name, most in (("port", 65535), ("join_timeout", 2**63), ("preboot_timeout", 2**63)):
        if section.has(name):
            section.integer(name, least=0, most=most, unit="(a whole number)")
    section.texts("peers", [])
    section.text("peers_file", "")
    for name in ("no_ra", "attest", "verify"):
        section.raw(name)
    notes.refuse(
        section.where,
        "sharing OHTTP keys by gossip",
        "give every node the same key with source: file",
    )


def _passthrough(section: Section) -> HeaderPassthrough:
    passing = section.section("header_passthrough")
    if passing is None:
        return HeaderPassthrough()
    values = [_headers(passing, name) for name in ("request_headers", "response_headers")]
    passing.finish()
    return HeaderPassthrough(*values)


def _headers(section: Section, name: str) -> tuple[str, ...] | None:
    if section.raw(name) == "all":
        return None
    return tuple(item.lower() for item in section.texts(name, []))


def _list(section: Section, name: str) -> list[Any]:
    # As in TNG, an explicit null is not an absent list.
    if section.raw(name) is None and not section.holds(name):
        return []
    value = section.raw(name)
    if not isinstance(value, list) or len(value) > MAX_PATTERNS:
        raise SettingError(
            f"{section.where}: {name} must be a list of at most {MAX_PATTERNS} entries"
        )
    return value
