"""``cai.json``: the public header, the wrapped DEK and the MAC that ties them (spec-format §4, §2).

The order of the checks is the specification's (§8, steps 1 to 5): form, key commitment, wrap,
commitment, MAC.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cai import jcs
from cai.errors import Tampered, WrongKey
from cai.model import derive
from cai.model.layout import (
    FORMAT,
    GOCRYPTFS,
    HEADER_FILE,
    MAX_HEADER_FILE,
    MAX_INDEX_FILE,
    MAX_MANIFEST,
    METHOD,
    MIN_MANIFEST,
    SUITE,
)
from cai.model.members import Members
from cai.model.object import Shape
from cai.secret import Secret

MAX_METHOD = 32
"""Longest name of a method, bytes."""


@dataclass(frozen=True, slots=True)
class WrappedDek:
    """A DEK under a KEK.

    Attributes:
        kek_commitment: which KEK, hex; says nothing about it.
        nonce: 12 bytes, hex.
        wrapped: ciphertext and tag, 48 bytes, hex.
    """

    kek_commitment: str
    nonce: str
    wrapped: str


@dataclass(frozen=True, slots=True)
class Header:
    """The public header of a sealed model; nothing in it is secret.

    Attributes:
        model_id: 64 hex digits, the same in every revision.
        revision: from 1.
        dek: the wrapped DEK.
        commitment: to the DEK, hex.
        manifest: shape of the manifest object.
        manifest_digest: its ``object_digest``, hex.
        index_sha256: of ``index.cai``, hex.
        index_size: bytes of ``index.cai``.
        mac: over all of the above, hex; empty before it is sealed.
        method: how the files are stored, ``cai`` or ``gocryptfs``; the MAC covers it too.
    """

    model_id: str
    revision: int
    dek: WrappedDek
    commitment: str
    manifest: Shape
    manifest_digest: str
    index_sha256: str
    index_size: int
    mac: str = field(default="")
    method: str = METHOD

    def encode(self) -> bytes:
        """The canonical bytes of the file."""
        return jcs.canonical(self._members() | {"mac": self.mac})

    def authenticated(self) -> bytes:
        """What the MAC covers: the canonical form of all other members."""
        return jcs.canonical(self._members())

    def _members(self) -> dict[str, Any]:
        return {
            "cai": FORMAT,
            "method": self.method,
            "suite": SUITE,
            "model_id": self.model_id,
            "revision": self.revision,
            "dek": {
                "kek_commitment": self.dek.kek_commitment,
                "nonce": self.dek.nonce,
                "wrapped": self.dek.wrapped,
            },
            "commitment": self.commitment,
            "manifest": {
                "chunk": self.manifest.chunk,
                "digest": self.manifest_digest,
                "size": self.manifest.size,
            },
            "index": {"sha256": self.index_sha256, "size": self.index_size},
        }

    @classmethod
    def parse(cls, data: bytes) -> Header:
        """Parse the file's bytes (§8, step 1); nothing in it is authenticated yet.

        Raises:
            FormatError, LimitExceeded: not canonical, or a member of another form.
        """
        members = Members(
            jcs.parse_canonical(data, what=HEADER_FILE, limit=MAX_HEADER_FILE), where=HEADER_FILE
        )
        members.constant("cai", FORMAT)
        method = members.text("method", most=MAX_METHOD)
        if method not in (METHOD, GOCRYPTFS):
            raise members.wrong("method", f"{METHOD!r} or {GOCRYPTFS!r}")
        members.constant("suite", SUITE)
        dek, manifest = members.object("dek"), members.object("manifest")
        index = members.object("index")
        header = cls(
            model_id=members.hex("model_id", 32),
            revision=members.integer("revision", least=1),
            dek=WrappedDek(
                dek.hex("kek_commitment", 32), dek.hex("nonce", 12), dek.hex("wrapped", 48)
            ),
            commitment=members.hex("commitment", 32),
            manifest=Shape.read(
                manifest, manifest.integer("size", least=MIN_MANIFEST, most=MAX_MANIFEST)
            ),
            manifest_digest=manifest.hex("digest", 32),
            index_sha256=index.hex("sha256", 32),
            index_size=index.integer("size", least=1, most=MAX_INDEX_FILE),
            mac=members.hex("mac", 32),
            method=method,
        )
        for part in (dek, manifest, index, members):
            part.finish()
        return header


@dataclass(frozen=True, slots=True)
class DekKeys:
    """What is derived from a DEK (§2)."""

    commitment: str
    header_key: bytes = field(repr=False)
    manifest_key: bytes = field(repr=False)

    @classmethod
    def of(cls, dek: bytes, model_id: str) -> DekKeys:
        """Derive commitment, header MAC key and manifest key."""
        prk = derive.extract(bytes.fromhex(model_id), dek)
        return cls(
            derive.expand(prk, derive.COMMIT).hex(),
            derive.expand(prk, derive.HEADER),
            derive.expand(prk, derive.MANIFEST),
        )

    def mac(self, header: Header) -> str:
        """The header's MAC, hex (§4)."""
        return hmac.digest(self.header_key, header.authenticated(), sha256).hex()


def kek_commitment(kek: Secret, model_id: str) -> str:
    """Which KEK this is, for one model; says nothing about it (§2), hex."""
    prk = derive.extract(bytes.fromhex(model_id), kek.reveal())
    return derive.expand(prk, derive.KEK_COMMIT).hex()


def wrap_dek(dek: bytes, kek: Secret, *, model_id: str, revision: int, nonce: bytes) -> WrappedDek:
    """Wrap a DEK under a KEK (§2); the nonce must be fresh and random."""
    prk = derive.extract(bytes.fromhex(model_id), kek.reveal())
    commitment = derive.expand(prk, derive.KEK_COMMIT).hex()
    aad = _wrap_aad(commitment, model_id, revision)
    wrapped = AESGCM(derive.expand(prk, derive.WRAP)).encrypt(nonce, dek, aad)
    return WrappedDek(commitment, nonce.hex(), wrapped.hex())


def unlock(header: Header, kek: Secret) -> tuple[bytes, DekKeys]:
    """Unwrap the DEK and authenticate the header (§8, steps 2 to 5).

    Raises:
        WrongKey: this KEK did not wrap the DEK.
        Tampered: the wrap, the commitment or the MAC does not verify.
    """
    # (2) the commitment names the KEK, before anything is decrypted under it
    prk = derive.extract(bytes.fromhex(header.model_id), kek.reveal())
    commitment = derive.expand(prk, derive.KEK_COMMIT).hex()
    if not hmac.compare_digest(commitment, header.dek.kek_commitment):
        raise WrongKey(
            f"the key does not open this model ({HEADER_FILE} names another key)",
            hint="give the key that was made when the model was sealed",
        )
    # (3) unwrap
    aad = _wrap_aad(commitment, header.model_id, header.revision)
    try:
        dek = AESGCM(derive.expand(prk, derive.WRAP)).decrypt(
            bytes.fromhex(header.dek.nonce), bytes.fromhex(header.dek.wrapped), aad
        )
    except InvalidTag:
        raise _altered("the wrapped key does not verify") from None
    # (4) commitment of the DEK
    keys = DekKeys.of(dek, header.model_id)
    if not hmac.compare_digest(keys.commitment, header.commitment):
        raise _altered("the commitment to the data key is wrong")
    # (5) MAC over everything else
    if not hmac.compare_digest(keys.mac(header), header.mac):
        raise _altered("its MAC is wrong")
    return dek, keys


def _wrap_aad(kek_commitment: str, model_id: str, revision: int) -> bytes:
    return jcs.canonical(
        {
            "cai": FORMAT,
            "kek_commitment": kek_commitment,
            "model_id": model_id,
            "purpose": "dek",
            "revision": revision,
            "suite": SUITE,
        }
    )


def _altered(what: str) -> Tampered:
    return Tampered(f"{HEADER_FILE} was altered: {what}", path=HEADER_FILE)
