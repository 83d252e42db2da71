"""The admission ticket as bytes: its members, their strict form, its signature (spec-lease §4).

What a verifier makes of one is ``cai.attest.ticket``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from cai import jcs, merkle
from cai.attest.checkpoint import CheckpointProof
from cai.attest.tdx.facts import TdxFacts
from cai.errors import FormatError, SettingError
from cai.settings import Section

VERSION: Final = 1
"""Member ``cai-ticket``."""

DOMAIN: Final = b"cai/ticket/v1\x00"
"""In front of the canonical ticket when it is signed."""

CLAIMS_DOMAIN: Final = b"cai/ticket-claims/v1\x00"
"""In front of the claims when the audit leaf names their digest."""

PLATFORM_DOMAIN: Final = b"cai/platform/v1\x00"
"""In front of a platform's identity when it is hashed."""

MAX_TICKET = 32 * 1024
"""Largest ticket that is parsed, bytes."""

MAX_CHANNEL_KEYS = 64
"""Most channel keys of one ticket: gateway processes of one guest."""

MAX_MODELS = 64
"""Most models of one ticket."""

MAX_TTL_S = 86_400
"""Longest lifetime, seconds."""

MAX_DRAIN_S = 300
"""Longest time in which running requests may end, seconds (decisions §5)."""

_HEX: Final = re.compile(r"[0-9a-f]*", re.ASCII)
_REALMS: Final = ("production", "simulated")
TIME: Final = "%Y-%m-%dT%H:%M:%SZ"
"""How a ticket spells a moment in UTC."""


@dataclass(frozen=True, slots=True)
class AuditProof:
    """That the decision is in the broker's log.

    Attributes:
        leaf: hash of the decision's leaf, 32 bytes.
        proof: that the log of a signed checkpoint holds it.
    """

    leaf: bytes
    proof: CheckpointProof

    def to_json(self) -> dict[str, Any]:
        """The proof as a member of the ticket."""
        return self.proof.to_json() | {"leaf": self.leaf.hex()}


@dataclass(frozen=True, slots=True)
class TicketClaims:
    """What was decided.

    Attributes:
        kbs: id of the broker's database, 32 hex digits.
        realm: ``production`` or ``simulated``.
        lease: id of the lease, 32 hex digits; a renewal keeps it.
        nonce: the guest's nonce of this request, 64 hex digits.
        channel_keys: SHA-256 of each channel key's SubjectPublicKeyInfo, hex, sorted.
        platform: ``platform_id`` of the guest's platform, hex.
        launch_digest: SHA-384 of ``launch.json``, 96 hex digits.
        models: ``model_root`` of each model that may be served, hex, sorted.
        issued: when it was decided, whole seconds, UTC.
        ttl_s: how long it holds, seconds; a guest counts from sending its request.
        drain_s: how long running requests may go on after that, seconds.
        policy: ``policy_hash`` of the policies behind the decision, hex.
    """

    kbs: str
    realm: str
    lease: str
    nonce: str
    channel_keys: tuple[str, ...]
    platform: str
    launch_digest: str
    models: tuple[str, ...]
    issued: datetime
    ttl_s: int
    drain_s: int
    policy: str

    @property
    def expires(self) -> datetime:
        """The moment from which nothing new may start."""
        return self.issued + timedelta(seconds=self.ttl_s)

    @property
    def digest(self) -> str:
        """SHA-256 of the claims, hex, as the audit leaf of the decision names it."""
        return sha256(CLAIMS_DOMAIN + jcs.canonical(self.to_json())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The claims as members of the ticket."""
        return {
            "cai-ticket": VERSION,
            "kbs": self.kbs,
            "realm": self.realm,
            "lease": self.lease,
            "nonce": self.nonce,
            "channel_keys": list(self.channel_keys),
            "platform": self.platform,
            "launch_digest": self.launch_digest,
            "models": list(self.models),
            "issued": self.issued.strftime(TIME),
            "ttl_s": self.ttl_s,
            "drain_s": self.drain_s,
            "policy": self.policy,
        }


@dataclass(frozen=True, slots=True)
class Ticket:
    """A parsed ticket; nothing in it counts before ``verify_ticket``.

    Attributes:
        claims: what was decided.
        audit: that the decision is in the log.
        signature: Ed25519, hex.
    """

    claims: TicketClaims
    audit: AuditProof
    signature: str = ""

    @classmethod
    def parse(cls, data: bytes) -> Ticket:
        """Read a ticket strictly: canonical bytes, known members, bounded lists.

        Raises:
            FormatError, LimitExceeded: anything else.
        """
        value = jcs.parse_canonical(data, what="ticket", limit=MAX_TICKET)
        try:
            section = Section(value, where="ticket")
            ticket = cls(_claims(section), _audit(section), hex_member(section, "signature", 64))
            section.finish()
        except SettingError as error:
            raise FormatError(error.message) from error
        return ticket

    def signed(self, key: Ed25519PrivateKey) -> bytes:
        """The ticket's canonical bytes with the broker's signature."""
        signature = key.sign(self._covered()).hex()
        return jcs.canonical(self._members() | {"signature": signature})

    def signed_by(self, key: Ed25519PublicKey) -> bool:
        """Whether the signature is this key's."""
        try:
            key.verify(bytes.fromhex(self.signature), self._covered())
        except InvalidSignature:
            return False
        return True

    def _members(self) -> dict[str, Any]:
        return self.claims.to_json() | {"audit": self.audit.to_json()}

    def _covered(self) -> bytes:
        return DOMAIN + jcs.canonical(self._members())


def platform_id(tdx: TdxFacts) -> str:
    """Identity of a TDX platform as tickets and blocks name it, 64 hex digits (spec-lease §4.2)."""
    identity = {
        "fmspc": tdx.fmspc, "platform_instance_id": tdx.platform_instance_id, "ppid": tdx.ppid,
    }  # fmt: skip
    return sha256(PLATFORM_DOMAIN + jcs.canonical(identity)).hexdigest()


def policy_hash(digests: Mapping[str, str]) -> str:
    """One hash over the digests of all policies behind a decision, 64 hex digits."""
    return sha256(jcs.canonical(dict(digests))).hexdigest()


def ticket_digest(data: bytes) -> str:
    """SHA-256 of a ticket's bytes, hex, as a channel statement names it."""
    return sha256(data).hexdigest()


def hex_member(section: Section, name: str, size: int, *, empty: bool = False) -> str:
    """A member of ``2 * size`` lower-case hex digits.

    Raises:
        FormatError: another form.
    """
    return _hex(section.text(name), f"{section.where}: {name}", size, empty=empty)


def hex_list(
    section: Section, name: str, size: int, *, most: int, ordered: bool
) -> tuple[str, ...]:
    """A list of hex members; ``ordered`` demands that it is sorted and holds none twice.

    Raises:
        FormatError: another form, or too long.
    """
    values = section.texts(name)
    where = f"{section.where}: {name}"
    if len(values) > most:
        raise FormatError(f"{where} has more than {most} items")
    if ordered and values != sorted(set(values)):
        raise FormatError(f"{where} is not sorted, or holds an item twice")
    return tuple(_hex(value, where, size) for value in values)


def _hex(value: str, where: str, size: int, *, empty: bool = False) -> str:
    if empty and not value:
        return value
    if len(value) != 2 * size or not _HEX.fullmatch(value):
        raise FormatError(f"{where} must be {2 * size} lower-case hex digits")
    return value


def _claims(section: Section) -> TicketClaims:
    section.integer("cai-ticket", least=VERSION, most=VERSION, unit="(version)")
    realm = section.text("realm")
    if realm not in _REALMS:
        raise FormatError("ticket: realm must be production or simulated")
    return TicketClaims(
        kbs=hex_member(section, "kbs", 16),
        realm=realm,
        lease=hex_member(section, "lease", 16),
        nonce=hex_member(section, "nonce", 32),
        channel_keys=hex_list(section, "channel_keys", 32, most=MAX_CHANNEL_KEYS, ordered=True),
        platform=hex_member(section, "platform", 32),
        launch_digest=hex_member(section, "launch_digest", 48, empty=True),
        models=hex_list(section, "models", 32, most=MAX_MODELS, ordered=True),
        issued=_time(section.text("issued")),
        ttl_s=section.integer("ttl_s", least=1, most=MAX_TTL_S, unit="seconds"),
        drain_s=section.integer("drain_s", least=0, most=MAX_DRAIN_S, unit="seconds"),
        policy=hex_member(section, "policy", 32),
    )


def _audit(section: Section) -> AuditProof:
    value = section.raw("audit")
    if not isinstance(value, dict):
        raise FormatError("ticket: audit is missing")
    leaf = _hex(str(value.get("leaf")), "ticket.audit: leaf", merkle.HASH_SIZE)
    rest = {name: member for name, member in value.items() if name != "leaf"}
    return AuditProof(bytes.fromhex(leaf), CheckpointProof.from_json(rest))


def _time(text: str) -> datetime:
    try:
        moment = datetime.strptime(text, TIME).replace(tzinfo=UTC)
    except ValueError as error:
        raise FormatError("ticket: issued is not a time in UTC") from error
    # strptime accepts single digits; there is one spelling.
    if moment.strftime(TIME) != text:
        raise FormatError("ticket: issued is not a time in UTC")
    return moment
