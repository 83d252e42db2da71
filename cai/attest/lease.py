"""Leases as pure messages: ``POST /kbs/v0/lease`` for both ends (docs/spec-lease.md §2, §3).

A lease hands out a resource and an admission ticket together, bound to a nonce of the guest. The
JWE proves nothing about its sender; the ticket is signed, and the grant inside the JWE names it.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any, Final

from cai import jcs, merkle
from cai.attest.checkpoint import MAX_PATH
from cai.attest.jwe import MAX_JWE
from cai.attest.ticket_form import (
    MAX_CHANNEL_KEYS,
    MAX_DRAIN_S,
    MAX_TICKET,
    MAX_TTL_S,
    hex_list,
    hex_member,
    ticket_digest,
)
from cai.errors import FormatError, SettingError, Tampered
from cai.secret import Secret
from cai.settings import Section

VERSION: Final = 1
"""Member ``cai-lease`` of each message."""

NONCE_SIZE = 32
"""Bytes of the guest's nonce."""

MAX_REQUEST = 16 * 1024
"""Largest request, bytes."""

MAX_ANSWER = MAX_JWE + 2 * MAX_TICKET
"""Largest answer, bytes."""

MAX_URI = 512
"""Longest resource name, characters."""

MAX_ORIGIN = 256
"""Longest origin of a checkpoint, characters."""

LEASE_REQUIRED: Final = "lease-required"
"""Machine code of the refusal of a plain GET, ``LeaseRequired`` on the wire."""


@dataclass(frozen=True, slots=True)
class KnownCheckpoint:
    """The newest checkpoint of the broker's log that a guest has verified.

    Attributes:
        origin: the log.
        size: its leaves.
        root: its root, hex.
    """

    origin: str
    size: int
    root: str


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What a guest asks for, in an attested session.

    Attributes:
        resource: ``kbs:///repository/type/tag``.
        nonce: random, 64 hex digits.
        channel_keys: SHA-256 of the SubjectPublicKeyInfo of each channel key, hex, sorted.
        renews: id of the lease that goes on; empty asks for a new one, and an ended one is begun
            anew under another id.
        checkpoint: the newest that the guest knows; the answer proves that the log only grew.
    """

    resource: str
    nonce: str
    channel_keys: tuple[str, ...] = ()
    renews: str = ""
    checkpoint: KnownCheckpoint | None = None

    def encode(self) -> bytes:
        """The canonical bytes."""
        known = self.checkpoint
        return jcs.canonical(
            {
                "cai-lease": VERSION,
                "resource": self.resource,
                "nonce": self.nonce,
                "channel_keys": list(self.channel_keys),
                "renews": self.renews,
                "checkpoint": None
                if known is None
                else {"origin": known.origin, "size": known.size, "root": known.root},
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> LeaseRequest:
        """Read a request strictly.

        Raises:
            FormatError, LimitExceeded: not canonical, or a member is missing, unknown or of
                another form.
        """
        value = jcs.parse_canonical(data, what="lease request", limit=MAX_REQUEST)
        try:
            section = _open(value, "lease request")
            request = cls(
                resource=_short(section, "resource", MAX_URI),
                nonce=hex_member(section, "nonce", NONCE_SIZE),
                channel_keys=hex_list(
                    section, "channel_keys", 32, most=MAX_CHANNEL_KEYS, ordered=True
                ),
                renews=hex_member(section, "renews", 16, empty=True),
                checkpoint=_known(section),
            )
            section.finish()
        except SettingError as error:
            raise FormatError(error.message) from error
        if request.encode() != data:
            raise FormatError("lease request: a member is missing")
        return request


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """What the JWE holds: the resource, and what it is bound to.

    Attributes:
        lease: id of the lease, 32 hex digits.
        resource: as asked for.
        version: of the resource.
        nonce: the guest's.
        ttl_s: seconds, counted by the guest from sending its request, in which new requests start.
        drain_s: seconds more for running ones.
        ticket: SHA-256 of the ticket beside it, hex.
        contents: the resource's bytes.
    """

    lease: str
    resource: str
    version: int
    nonce: str
    ttl_s: int
    drain_s: int
    ticket: str
    contents: Secret

    def encode(self) -> bytes:
        """The canonical bytes; they hold the resource."""
        return jcs.canonical(
            {
                "cai-lease": VERSION,
                "lease": self.lease,
                "resource": self.resource,
                "version": self.version,
                "nonce": self.nonce,
                "ttl_s": self.ttl_s,
                "drain_s": self.drain_s,
                "ticket": self.ticket,
                "contents": base64.b64encode(self.contents.reveal()).decode("ascii"),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> LeaseGrant:
        """Read a grant strictly.

        Raises:
            FormatError, LimitExceeded: not canonical, or a member is missing, unknown or of
                another form.
        """
        value = jcs.parse_canonical(data, what="lease grant", limit=MAX_JWE)
        try:
            section = _open(value, "lease grant")
            grant = cls(
                lease=hex_member(section, "lease", 16),
                resource=_short(section, "resource", MAX_URI),
                version=section.integer("version", least=1, most=jcs.MAX_INTEGER, unit="(version)"),
                nonce=hex_member(section, "nonce", NONCE_SIZE),
                ttl_s=section.integer("ttl_s", least=1, most=MAX_TTL_S, unit="seconds"),
                drain_s=section.integer("drain_s", least=0, most=MAX_DRAIN_S, unit="seconds"),
                ticket=hex_member(section, "ticket", 32),
                contents=Secret(_base64(section.text("contents"))),
            )
            section.finish()
        except SettingError as error:
            raise FormatError(error.message) from error
        return grant

    def require_answer_to(self, request: LeaseRequest, ticket: bytes) -> None:
        """Demand that this grant answers ``request`` and came with ``ticket``.

        Raises:
            Tampered: it answers another request, or names another ticket.
        """
        if (self.nonce, self.resource) != (request.nonce, request.resource):
            raise Tampered("the lease answers another request", code="lease-nonce")
        if self.ticket != ticket_digest(ticket):
            raise Tampered("the lease came with another ticket", code="lease-ticket")


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """The answer on the wire.

    Attributes:
        jwe: the grant, encrypted to the guest's key.
        ticket: the admission ticket's canonical bytes.
        consistency: proof from the checkpoint that the guest named to the ticket's, hex hashes.
    """

    jwe: bytes
    ticket: bytes
    consistency: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The answer as a JSON value."""
        return {
            "cai-lease": VERSION,
            "jwe": json.loads(self.jwe),
            "ticket": json.loads(self.ticket),
            "consistency": list(self.consistency),
        }

    @classmethod
    def parse(cls, data: bytes) -> LeaseAnswer:
        """Read an answer; the JWE and the ticket are checked by whoever opens them.

        Raises:
            FormatError, LimitExceeded: a member is missing, unknown or of another form.
        """
        value = jcs.parse(data, what="lease answer", limit=MAX_ANSWER)
        try:
            section = _open(value, "lease answer")
            inner, ticket = section.raw("jwe"), section.raw("ticket")
            if not isinstance(inner, dict) or not isinstance(ticket, dict):
                raise FormatError("lease answer: jwe and ticket must be objects")
            answer = cls(
                jwe=jcs.canonical(inner),
                ticket=jcs.canonical(ticket),
                consistency=hex_list(
                    section, "consistency", merkle.HASH_SIZE, most=MAX_PATH, ordered=False
                ),
            )
            section.finish()
        except SettingError as error:
            raise FormatError(error.message) from error
        return answer


def _open(value: Any, where: str) -> Section:
    section = Section(value, where=where)
    section.integer("cai-lease", least=VERSION, most=VERSION, unit="(version)")
    return section


def _short(section: Section, name: str, most: int) -> str:
    value = section.text(name)
    if not 0 < len(value) <= most:
        raise FormatError(f"{section.where}: {name} must have 1 to {most} characters")
    return value


def _known(section: Section) -> KnownCheckpoint | None:
    inner = section.section("checkpoint")
    if inner is None:
        return None
    known = KnownCheckpoint(
        origin=_short(inner, "origin", MAX_ORIGIN),
        size=inner.integer("size", least=0, most=jcs.MAX_INTEGER, unit="leaves"),
        root=hex_member(inner, "root", merkle.HASH_SIZE),
    )
    inner.finish()
    return known


def _base64(text: str) -> bytes:
    try:
        decoded = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError("lease grant: contents is not base64") from error
    if base64.b64encode(decoded).decode("ascii") != text:
        raise FormatError("lease grant: contents is not canonical base64")
    return decoded
