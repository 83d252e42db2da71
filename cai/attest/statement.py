"""What a quote says: canonical statements and the report data that binds them.

The byte layouts are in docs/spec-statement.md.

A statement is RFC 8785 JSON. Its report data is ``SHA-384("cai/statement/v1" ‖ 00 ‖ statement)``
followed by a 16-byte purpose tag. Stock digests (Trustee, TNG) end in sixteen zero bytes, so no
stock request can ever produce the report data of a statement (decisions §2.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256, sha384
from typing import Any

from cai import jcs
from cai.errors import FormatError
from cai.settings import Section

REPORT_DATA_SIZE = 64
"""Bytes of TDX report data."""

DIGEST_SIZE = 48
"""Bytes of the SHA-384 in front of the purpose tag."""

MAX_STATEMENT = 64 * 1024
"""Largest statement that is parsed, bytes."""

_DOMAIN = b"cai/statement/v1\x00"


class Purpose(StrEnum):
    """What a statement is for; the value is the member ``purpose``."""

    CHANNEL = "channel"
    RELEASE = "release"

    @property
    def tag(self) -> bytes:
        """The 16-byte tail of the report data, e.g. ``CAI-CHANNEL-V1`` and two zero bytes."""
        return f"CAI-{self.name}-V1".encode("ascii").ljust(16, b"\x00")


def report_data(statement: bytes, purpose: Purpose) -> bytes:
    """The 64 bytes of report data that bind a canonical statement (spec-statement §2)."""
    return sha384(_DOMAIN + statement).digest() + purpose.tag


def stock_report_data(digest: bytes) -> bytes:
    """Report data of a stock digest: at most 48 bytes, then zeros, never a tag (decisions §2.2).

    Raises:
        FormatError: the digest is longer than 48 bytes.
    """
    if len(digest) > DIGEST_SIZE:
        raise FormatError(f"stock report data is at most {DIGEST_SIZE} bytes, got {len(digest)}")
    return digest.ljust(REPORT_DATA_SIZE, b"\x00")


def gpu_evidence_digest(devices: Sequence[tuple[bytes, bytes]]) -> bytes:
    """SHA-256 over the list of (report, certificate chain); parts are length-prefixed (u32 BE).

    The list's own length comes first, so "no GPU" is a bound statement as well.
    """
    digest = sha256(len(devices).to_bytes(4, "big"))
    for report, chain in devices:
        for part in (report, chain):
            digest.update(len(part).to_bytes(4, "big"))
            digest.update(part)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model that a guest serves.

    Attributes:
        root: ``model_root``, 64 lower-case hex digits (decisions §3.4).
        content_root: RFC 6962 root over the plain tree, 64 hex digits; the owner's claim.
        allow: flags the host honours, sorted.
    """

    root: str
    content_root: str
    allow: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The model as a statement member."""
        return {"root": self.root, "content_root": self.content_root, "allow": list(self.allow)}


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """The GPU evidence that a channel statement reuses (decisions §2.5).

    Attributes:
        digest: ``gpu_evidence_digest`` in hex.
        nonce: the 32-byte nonce the reports were made under, hex.
        age_s: seconds since collection, by the guest's monotonic clock.
    """

    digest: str
    nonce: str
    age_s: int

    def to_json(self) -> dict[str, object]:
        """The facts as a statement member."""
        return {"digest": self.digest, "nonce": self.nonce, "age_s": self.age_s}


@dataclass(frozen=True, slots=True)
class ChannelStatement:
    """What a quote says about a channel (decisions §2.4).

    Attributes:
        launch_digest: SHA-384 of the exact bytes of ``launch.json``, hex.
        service_id: the service as the owner names it.
        owner_key: the owner's Ed25519 public key, 64 hex digits; empty when no model has one.
        models: what is served.
        gpu: the GPU evidence behind it.
        guest_facts: what the guest says of itself (``launched_by``, CC mode, driver, …), strings.
        ticket_digest: SHA-256 of the admission ticket, hex; empty when there is none.
        dialects: ALPN names the gateway speaks.
        boot_id: random id of this boot, 32 hex digits.
        epoch: counts the quotes of this boot.
        session_root: root of the session tree, hex.
        session_size: number of its leaves, 1 to 4096.
    """

    launch_digest: str
    service_id: str
    owner_key: str
    models: tuple[ServedModel, ...]
    gpu: GpuFacts
    guest_facts: Mapping[str, str]
    ticket_digest: str
    dialects: tuple[str, ...]
    boot_id: str
    epoch: int
    session_root: str
    session_size: int

    def encode(self) -> bytes:
        """The canonical bytes that the quote binds."""
        return jcs.canonical(
            {
                "purpose": Purpose.CHANNEL.value,
                "launch_digest": self.launch_digest,
                "service_id": self.service_id,
                "owner_key": self.owner_key,
                "models": [model.to_json() for model in self.models],
                "gpu": self.gpu.to_json(),
                "guest_facts": dict(self.guest_facts),
                "ticket_digest": self.ticket_digest,
                "dialects": list(self.dialects),
                "boot_id": self.boot_id,
                "epoch": self.epoch,
                "session_root": self.session_root,
                "session_size": self.session_size,
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> ChannelStatement:
        """Parse canonical bytes strictly.

        Raises:
            FormatError, LimitExceeded, SettingError: any member is missing, unknown or of another
                form, or the bytes are not canonical.
        """
        section = _open(data, Purpose.CHANNEL)
        gpu = _nested(section, "gpu")
        statement = cls(
            launch_digest=_hex(section, "launch_digest", 48),
            service_id=section.text("service_id"),
            owner_key=_hex(section, "owner_key", 32, empty=True),
            models=tuple(_model(item, section.where) for item in _list(section, "models")),
            gpu=GpuFacts(
                digest=_hex(gpu, "digest", 32),
                nonce=_hex(gpu, "nonce", 32),
                age_s=gpu.integer("age_s", least=0, most=jcs.MAX_INTEGER, unit="seconds"),
            ),
            guest_facts=_facts(section),
            ticket_digest=_hex(section, "ticket_digest", 32, empty=True),
            dialects=tuple(section.texts("dialects")),
            boot_id=_hex(section, "boot_id", 16),
            epoch=section.integer("epoch", least=0, most=jcs.MAX_INTEGER, unit="quotes"),
            session_root=_hex(section, "session_root", 32),
            session_size=section.integer("session_size", least=1, most=4096, unit="leaves"),
        )
        gpu.finish()
        section.finish()
        return statement


@dataclass(frozen=True, slots=True)
class ReleaseStatement:
    """What rides as member ``cai`` in a release's ``additional_evidence`` (decisions §2.3).

    Trustee's own digest covers the whole string, so this needs no report data of its own.

    Attributes:
        launch_digest: SHA-384 of the exact bytes of ``launch.json``, hex.
        guest_facts: as in ``ChannelStatement``.
        agent_version: version of the attestation agent.
    """

    launch_digest: str
    guest_facts: Mapping[str, str]
    agent_version: str

    def to_json(self) -> dict[str, object]:
        """The statement as a JSON value."""
        return {
            "purpose": Purpose.RELEASE.value,
            "launch_digest": self.launch_digest,
            "guest_facts": dict(self.guest_facts),
            "agent_version": self.agent_version,
        }

    @classmethod
    def from_json(cls, value: Any) -> ReleaseStatement:
        """Parse the member strictly.

        Raises:
            FormatError, SettingError: any member is missing, unknown or of another form.
        """
        section = _purposed(value, Purpose.RELEASE)
        statement = cls(
            launch_digest=_hex(section, "launch_digest", 48),
            guest_facts=_facts(section),
            agent_version=section.text("agent_version"),
        )
        section.finish()
        return statement


def _open(data: bytes, purpose: Purpose) -> Section:
    return _purposed(jcs.parse_canonical(data, what="statement", limit=MAX_STATEMENT), purpose)


def _purposed(value: Any, purpose: Purpose) -> Section:
    section = Section(value, where=f"{purpose.value} statement")
    if section.text("purpose") != purpose.value:
        raise FormatError(f"{section.where}: made for another purpose")
    return section


def _nested(section: Section, name: str) -> Section:
    inner = section.section(name)
    if inner is None:
        raise FormatError(f"{section.where}: {name} is missing")
    return inner


def _list(section: Section, name: str) -> list[Any]:
    value = section.raw(name)
    if not isinstance(value, list):
        raise FormatError(f"{section.where}: {name} must be a list")
    return value


def _model(value: Any, where: str) -> ServedModel:
    section = Section(value, where=f"{where}.models")
    model = ServedModel(
        root=_hex(section, "root", 32),
        content_root=_hex(section, "content_root", 32),
        allow=tuple(section.texts("allow")),
    )
    section.finish()
    return model


def _facts(section: Section) -> dict[str, str]:
    value = section.raw("guest_facts")
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FormatError(f"{section.where}: guest_facts must map names to strings")
    return dict(value)


def _hex(section: Section, name: str, size: int, *, empty: bool = False) -> str:
    value = section.text(name)
    if empty and not value:
        return value
    if len(value) != 2 * size or not set(value) <= set("0123456789abcdef"):
        raise FormatError(f"{section.where}: {name} must be {2 * size} lower-case hex digits")
    return value
