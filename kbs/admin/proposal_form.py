"""The bytes of a proposal, which persons sign (decisions §5).

Canonical JSON of broker, realm, random id, action, object, hash of the object's current state,
salted hash of the full new contents, proposer, time and expiry. The contents are sealed at rest and
go with the proposal; the log holds their salted hash only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cai import jcs
from cai.attest.jwk import b64u_decode, b64u_encode
from cai.errors import FormatError

PROPOSAL_VERSION: Final = 1
"""Member ``cai-proposal`` of every proposal."""

SIGNED_PREFIX: Final = b"cai/kbs proposal v1\x00"
"""In front of the bytes that are signed, so that no token or other statement is ever one."""

MAX_CONTENTS = 2 * 1024 * 1024
"""Largest contents of a proposal, bytes."""

MAX_STORED = 2 * MAX_CONTENTS
"""Largest stored proposal, bytes."""

MAX_TIME: Final = 253_402_300_799
"""Latest moment, Unix seconds: the end of the year 9999."""

_HASH: Final = re.compile(r"[0-9a-f]{64}")
_SALT_SIZE = 32
_MEMBERS: Final = (
    "action", "cai-proposal", "contents", "created", "expires", "id", "kbs", "object", "proposer",
    "realm", "state",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Proposal:
    """What is signed.

    Attributes:
        kbs: id of the broker's database.
        realm: its realm.
        id: random, 32 hex digits.
        action: the kind of change.
        object: its object id.
        state: hash of the object's state when it was proposed, hex.
        size: of the contents, bytes.
        salt: random, hex; keeps the hash of a guessable secret from being searched.
        digest: SHA-256 of salt and contents, hex.
        proposer: the person.
        created: Unix seconds.
        expires: Unix seconds.
    """

    kbs: str
    realm: str
    id: str
    action: str
    object: str
    state: str
    size: int
    salt: str
    digest: str
    proposer: str
    created: int
    expires: int

    @classmethod
    def about(cls, contents: bytes, **members: Any) -> Proposal:
        """A proposal with a fresh id and salt for these contents."""
        salt = os.urandom(_SALT_SIZE)
        return cls(
            id=os.urandom(16).hex(),
            size=len(contents),
            salt=salt.hex(),
            digest=sha256(salt + contents).hexdigest(),
            **members,
        )

    def to_json(self) -> dict[str, Any]:
        """The members that are signed."""
        return {
            "cai-proposal": PROPOSAL_VERSION,
            "kbs": self.kbs,
            "realm": self.realm,
            "id": self.id,
            "action": self.action,
            "object": self.object,
            "state": self.state,
            "contents": {"size": self.size, "salt": self.salt, "sha256": self.digest},
            "proposer": self.proposer,
            "created": self.created,
            "expires": self.expires,
        }

    @classmethod
    def from_json(cls, value: Any) -> Proposal:
        """Read what ``to_json`` wrote.

        Raises:
            FormatError: another form.
        """
        if not isinstance(value, dict) or sorted(value) != sorted(_MEMBERS):
            raise FormatError("proposal: unknown or missing members")
        contents = value["contents"]
        if not isinstance(contents, dict) or sorted(contents) != ["salt", "sha256", "size"]:
            raise FormatError("proposal: unknown or missing members of contents")
        version = value["cai-proposal"]
        if type(version) is not int or version != PROPOSAL_VERSION:
            raise FormatError("proposal: unknown version")
        texts = {**value, "salt": contents["salt"], "digest": contents["sha256"]}
        numbers = {**value, "size": contents["size"]}
        names = ("kbs", "realm", "id", "action", "object", "state", "salt", "digest", "proposer")
        if not all(isinstance(texts[name], str) for name in names):
            raise FormatError("proposal: a member is not text")
        if not all(type(numbers[name]) is int for name in ("size", "created", "expires")):
            raise FormatError("proposal: a member is not a whole number")
        if not all(0 <= numbers[name] <= MAX_TIME for name in ("size", "created", "expires")):
            raise FormatError("proposal: a number is out of its limits")
        if not all(_HASH.fullmatch(texts[name]) for name in ("salt", "digest")):
            raise FormatError("proposal: salt and hash must be 64 lower-case hex digits")
        return cls(
            **{name: texts[name] for name in names},
            **{name: numbers[name] for name in ("size", "created", "expires")},
        )

    def encode(self) -> bytes:
        """The exact bytes that are signed, behind ``SIGNED_PREFIX``."""
        return jcs.canonical(self.to_json())

    def sign(self, key: Ed25519PrivateKey) -> str:
        """This person's signature, hex."""
        return key.sign(SIGNED_PREFIX + self.encode()).hex()

    def signed_by(self, key: Ed25519PublicKey, signature: str) -> bool:
        """Whether this is the signature of ``key``."""
        try:
            key.verify(bytes.fromhex(signature), SIGNED_PREFIX + self.encode())
        except (InvalidSignature, ValueError):
            return False
        return True

    def is_about(self, contents: bytes) -> bool:
        """Whether these are the contents that are proposed."""
        return sha256(bytes.fromhex(self.salt) + contents).hexdigest() == self.digest


@dataclass(frozen=True, slots=True)
class Pending:
    """A stored proposal.

    Attributes:
        proposal: what is signed.
        contents: the full new contents.
        actor: the proposer as audit leaves name them.
        signatures: hex, by person.
    """

    proposal: Proposal
    contents: bytes
    actor: Mapping[str, str]
    signatures: Mapping[str, str]

    def with_signature(self, person: str, signature: str) -> Pending:
        """The same with one more signature."""
        return replace(self, signatures={**self.signatures, person: signature})

    def encode(self) -> bytes:
        """Canonical JSON, to be sealed."""
        return jcs.canonical(
            {
                "proposal": self.proposal.to_json(),
                "contents": b64u_encode(self.contents),
                "actor": dict(self.actor),
                "signatures": dict(self.signatures),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Pending:
        """Read what ``encode`` wrote.

        Raises:
            FormatError: another form, or contents that are not the proposal's.
        """
        value = jcs.parse_canonical(data, what="proposal", limit=MAX_STORED)
        contents = b64u_decode(value["contents"], what="proposal")
        proposal = Proposal.from_json(value["proposal"])
        if not proposal.is_about(contents):
            raise FormatError("proposal: the contents are not the proposed ones")
        return cls(proposal, contents, value["actor"], value["signatures"])
