"""``manifest.sig``: the owner's signature over a manifest (docs/spec-format.md §11).

A MAC lets every holder of the key make another manifest; a signature does not. The file is public,
says nothing but who signed, and counts only under a key that the reader knows from elsewhere.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cai import jcs
from cai.errors import Tampered
from cai.model.files import SealedFiles
from cai.model.layout import SIGNATURE_FILE
from cai.model.members import Members

DOMAIN = b"cai/1 manifest\x00"
MAX_SIGNATURE_FILE = 4096
"""Largest ``manifest.sig`` that is read, bytes."""


@dataclass(frozen=True, slots=True)
class ManifestSignature:
    """A parsed ``manifest.sig``; nothing in it is verified yet.

    Attributes:
        owner_key: who claims to have signed, Ed25519, 64 hex digits.
        signature: 128 hex digits.
    """

    owner_key: str
    signature: str

    def encode(self) -> bytes:
        """The canonical bytes of the file."""
        return jcs.canonical(
            {"cai-signature": 1, "owner_key": self.owner_key, "signature": self.signature}
        )

    @classmethod
    def parse(cls, data: bytes) -> ManifestSignature:
        """Parse the file's bytes.

        Raises:
            FormatError, LimitExceeded: not canonical, or a member of another form.
        """
        value = jcs.parse_canonical(data, what=SIGNATURE_FILE, limit=MAX_SIGNATURE_FILE)
        members = Members(value, where=SIGNATURE_FILE)
        members.constant("cai-signature", 1)
        signature = cls(members.hex("owner_key", 32), members.hex("signature", 64))
        members.finish()
        return signature


def sign_root(root: str, key: Ed25519PrivateKey) -> bytes:
    """The bytes of ``manifest.sig`` for a model root (hex)."""
    return ManifestSignature(
        key.public_key().public_bytes_raw().hex(),
        key.sign(DOMAIN + bytes.fromhex(root)).hex(),
    ).encode()


def read_signature(files: SealedFiles) -> ManifestSignature | None:
    """The signature beside a manifest, unverified; ``None`` when there is none.

    Raises:
        FormatError, LimitExceeded: it has another form.
        Tampered, StorageError: it cannot be read.
    """
    if SIGNATURE_FILE not in files.listing():
        return None
    return ManifestSignature.parse(files.read(SIGNATURE_FILE, limit=MAX_SIGNATURE_FILE))


def verify_signature(files: SealedFiles, root: str, owner_key: str) -> None:
    """Check that the owner of a key signed this model root (§8, step 12).

    Args:
        files: where ``manifest.sig`` lies.
        root: the model root of the opened manifest, hex.
        owner_key: whose signature is demanded, 64 hex digits, from the record or the caller.

    Raises:
        Tampered: code ``unsigned`` without a signature, ``wrong-owner`` with another's,
            ``signature`` when it does not verify.
        FormatError, LimitExceeded, StorageError: as ``read_signature``.
    """
    found = read_signature(files)
    if found is None:
        raise _refused("the model is not signed, and a signature is demanded", "unsigned")
    if not hmac.compare_digest(found.owner_key.encode(), owner_key.encode()):
        raise _refused(
            f"{SIGNATURE_FILE} names owner key {found.owner_key}, expected {owner_key}",
            "wrong-owner",
        )
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(owner_key))
        key.verify(bytes.fromhex(found.signature), DOMAIN + bytes.fromhex(root))
    except (InvalidSignature, ValueError):
        raise _refused(
            f"{SIGNATURE_FILE} does not verify for this manifest", "signature"
        ) from None


def _refused(message: str, code: str) -> Tampered:
    return Tampered(
        message, path=SIGNATURE_FILE, code=code,
        hint="fetch the model that its owner signed, or check the owner key",
    )
