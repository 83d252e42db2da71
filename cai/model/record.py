"""The release record: what the KBS hands to a guest that proved itself (docs/spec-format.md §7).

The owner signs it, because the encrypted answer that carries it proves nothing about its sender.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from cai import jcs
from cai.errors import FormatError, Tampered
from cai.model.layout import KEY_SIZE
from cai.model.members import Members, valid_flags
from cai.secret import Secret

DOMAIN = b"cai/1 record\x00"
MAX_RECORD = 64 * 1024
"""Largest record that is parsed, bytes."""

MIN_TTL_S, MAX_TTL_S = 10, 86_400
"""Shortest and longest lease, seconds."""

MAX_DRAIN_S = 300
"""Longest time in which running requests may end, seconds (decisions §5)."""


@dataclass(frozen=True, slots=True)
class Lease:
    """How long a release holds.

    Attributes:
        ttl_s: seconds from the sending of the request to the end of new requests.
        drain_s: seconds more for running ones.
    """

    ttl_s: int = 900
    drain_s: int = 300


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    """What a guest needs to open one model, and what it may do with it.

    Attributes:
        kek: the key-encryption key; empty in the record of a gocryptfs model, whose password is a
            resource of its own (decisions §3.1).
        model_id: 64 hex digits.
        manifest_root: the ``model_root`` to open, 64 hex digits.
        min_revision: the oldest revision to accept, from 1.
        index_sha256: of ``index.cai``, 64 hex digits.
        owner_key: the owner's Ed25519 public key, 64 hex digits.
        allow: flags, sorted; what counts is the intersection with the manifest's.
        lease: how long the release holds.
    """

    kek: Secret
    model_id: str
    manifest_root: str
    min_revision: int
    index_sha256: str
    owner_key: str
    allow: tuple[str, ...] = ()
    lease: Lease = field(default_factory=Lease)

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """The record's canonical bytes with the owner's signature; they hold the KEK.

        Raises:
            FormatError: a member is not of its form, or ``owner_key`` is not this key's.
        """
        if public_key_hex(key) != self.owner_key:
            raise FormatError("release record: owner_key is not the key that signs")
        members = self._members()
        signature = key.sign(DOMAIN + jcs.canonical(members))
        signed = jcs.canonical(members | {"signature": signature.hex()})
        ReleaseRecord.parse(signed, owner_key=self.owner_key, with_kek=len(self.kek) > 0)
        return signed

    @classmethod
    def parse(cls, data: bytes, *, owner_key: str, with_kek: bool = True) -> ReleaseRecord:
        """Parse a record and verify its signature under the key that the caller expects.

        Args:
            data: the resource's bytes.
            owner_key: 64 hex digits, from ``launch.json`` or the caller.
            with_kek: the member ``kek`` must be there; else it must not.

        Raises:
            FormatError, LimitExceeded: not canonical, or a member of another form.
            Tampered: another owner's, or the signature does not verify.
        """
        value = jcs.parse_canonical(data, what="release record", limit=MAX_RECORD)
        members = Members(value, where="release record")
        members.constant("cai-key", 1)
        signature = members.hex("signature", 64)
        record = cls(
            kek=Secret(bytes.fromhex(members.hex("kek", KEY_SIZE)) if with_kek else b""),
            model_id=members.hex("model_id", 32),
            manifest_root=members.hex("manifest_root", 32),
            min_revision=members.integer("min_revision", least=1),
            index_sha256=members.hex("index_sha256", 32),
            owner_key=members.hex("owner_key", 32),
            allow=members.flags("allow"),
            lease=_parse_lease(members.object("lease")),
        )
        members.finish()
        if not hmac.compare_digest(record.owner_key.encode(), owner_key.encode()):
            raise Tampered(
                f"the release record names owner key {record.owner_key}, expected {owner_key}",
                code="wrong-owner", hint="check the owner key of launch.json and of the record",
            )
        _verify(record, value, signature)
        return record

    def _members(self) -> dict[str, Any]:
        if not valid_flags(list(self.allow)):
            raise FormatError("release record: allow holds a bad, repeated or unsorted flag")
        kek = {"kek": self.kek.reveal().hex()} if len(self.kek) else {}
        return kek | {
            "cai-key": 1,
            "model_id": self.model_id,
            "manifest_root": self.manifest_root,
            "min_revision": self.min_revision,
            "index_sha256": self.index_sha256,
            "owner_key": self.owner_key,
            "allow": list(self.allow),
            "lease": {"ttl_s": self.lease.ttl_s, "drain_s": self.lease.drain_s},
        }


def public_key_hex(key: Ed25519PrivateKey) -> str:
    """The public half as records, policies and ``launch.json`` name it, 64 hex digits."""
    return key.public_key().public_bytes_raw().hex()


def _parse_lease(members: Members) -> Lease:
    lease = Lease(
        members.integer("ttl_s", least=MIN_TTL_S, most=MAX_TTL_S),
        members.integer("drain_s", least=0, most=MAX_DRAIN_S),
    )
    members.finish()
    return lease


def _verify(record: ReleaseRecord, value: dict[str, Any], signature: str) -> None:
    covered = {name: member for name, member in value.items() if name != "signature"}
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(record.owner_key))
        key.verify(bytes.fromhex(signature), DOMAIN + jcs.canonical(covered))
    except (InvalidSignature, ValueError) as error:
        raise Tampered(
            "the release record's signature does not verify",
            hint="upload the record that 'cai encrypt' signed",
        ) from error
