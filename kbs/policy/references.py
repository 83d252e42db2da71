"""Reference values: which measurements are good, signed by who says so, with an end.

Pure. A *bundle* is canonical JSON that names its values, when it was made and when it ends; it is
signed over its exact bytes by an Ed25519 or ECDSA P-256 key that an administrator registered, so
``cosign sign-blob`` signs one as well as ``kbs reference sign`` does (docs/kbs-policies.md §5).
Trustee's own message is read too; nothing signs that, so an administrator answers for it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from cai import jcs
from cai.errors import FormatError, InputMissing, LimitExceeded, Refused, SettingError
from cai.settings import Section
from kbs.policy.names import is_segment

BUNDLE_VERSION: Final = 1
"""Member ``cai-references`` of a bundle."""

MAX_BUNDLE = 1024 * 1024
"""Largest bundle, and largest set of single values, bytes."""

MAX_ID = 256
"""Longest name of a reference value, characters."""

MAX_KEY = 4096
"""Largest PEM of a public key, bytes."""

MAX_SIGNATURE = 1024
"""Longest signature in base64, characters."""

MESSAGE_VERSION: Final = "0.1.0"
"""Version of Trustee's message."""

MESSAGE_TYPE: Final = "sample"
"""The one extractor of Trustee's that takes plain JSON."""

CLOCK_SKEW = timedelta(minutes=5)
"""How far in the future a bundle may have been issued."""

MAX_LIFE = timedelta(days=3650)
"""Longest life of a reference value."""

TIME_FORMAT: Final = "%Y-%m-%dT%H:%M:%SZ"
"""How moments are written."""


@dataclass(frozen=True, slots=True)
class ReferenceValue:
    """One value and where it comes from.

    Attributes:
        value: any JSON value; Trustee's policies mostly expect a list.
        expires: from then on it is not in force.
        source: ``bundle <name>`` or ``value``.
        tenant: whose it is; empty for everybody's.
    """

    value: Any
    expires: datetime
    source: str
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class References:
    """The values in force at one moment: plain data.

    Attributes:
        values: id to JSON value.
        digest: SHA-256 of their canonical JSON, hex; empty when there are none.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> References:
        """References of these values."""
        if not values:
            return cls()
        return cls(dict(values), sha256(jcs.canonical(dict(values))).hexdigest())


@dataclass(frozen=True, slots=True)
class Bundle:
    """Reference values that somebody signs together.

    Attributes:
        name: a later bundle of the same name replaces it.
        issued: when it was made; a later one must not be older.
        expires: its end.
        values: id to JSON value.
    """

    name: str
    issued: datetime
    expires: datetime
    values: Mapping[str, Any]

    @classmethod
    def parse(cls, data: bytes) -> Bundle:
        """Read a bundle's exact bytes.

        Raises:
            LimitExceeded: longer than ``MAX_BUNDLE``.
            FormatError: not canonical JSON of this form.
        """
        value = jcs.parse_canonical(data, what="reference bundle", limit=MAX_BUNDLE)
        if not isinstance(value, dict):
            raise FormatError("reference bundle: expected an object")
        section = Section(value, where="reference bundle")
        try:
            section.integer(
                "cai-references", least=BUNDLE_VERSION, most=BUNDLE_VERSION,
                unit="(the format's version)",
            )  # fmt: skip
            bundle = cls(
                section.text("name"),
                parse_time(section.text("issued")),
                parse_time(section.text("expires")),
                checked_values(section.raw("values")),
            )
            section.finish()
        except SettingError as error:
            raise FormatError(error.message) from error
        if not is_segment(bundle.name):
            raise FormatError("reference bundle: name must be letters, digits, -, _ and inner .")
        if not bundle.issued < bundle.expires <= bundle.issued + MAX_LIFE:
            raise FormatError(
                f"reference bundle: it must expire after it was issued, within {MAX_LIFE.days} days"
            )
        return bundle

    def encode(self) -> bytes:
        """Its exact bytes."""
        return jcs.canonical(
            {
                "cai-references": BUNDLE_VERSION,
                "name": self.name,
                "issued": self.issued.strftime(TIME_FORMAT),
                "expires": self.expires.strftime(TIME_FORMAT),
                "values": dict(self.values),
            }
        )


class ReferenceKey:
    """A public key that may sign bundles.

    Attributes:
        kind: ``ed25519`` or ``ecdsa-p256``.
        id: SHA-256 of its SubjectPublicKeyInfo, hex.
    """

    def __init__(self, key: Ed25519PublicKey | ec.EllipticCurvePublicKey) -> None:
        self._key = key
        self.kind = "ed25519" if isinstance(key, Ed25519PublicKey) else "ecdsa-p256"
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.id = sha256(spki).hexdigest()

    @classmethod
    def parse(cls, pem: bytes) -> ReferenceKey:
        """Read a PEM ``PUBLIC KEY``, as ``openssl`` and ``cosign`` write it.

        Raises:
            LimitExceeded: longer than ``MAX_KEY``.
            FormatError: not PEM, or a key of another kind.
        """
        if len(pem) > MAX_KEY:
            raise LimitExceeded(f"public key: {len(pem)} bytes, at most {MAX_KEY} are accepted")
        try:
            key = load_pem_public_key(pem)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise FormatError("public key: not a PEM public key") from error
        if isinstance(key, Ed25519PublicKey):
            return cls(key)
        if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
            return cls(key)
        raise FormatError("public key: expected Ed25519 or ECDSA P-256")

    def verifies(self, data: bytes, signature: bytes) -> bool:
        """Whether this key signed these bytes (ECDSA: DER, SHA-256, as cosign does)."""
        try:
            if isinstance(self._key, Ed25519PublicKey):
                self._key.verify(signature, data)
            else:
                self._key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True, slots=True)
class SignedBundle:
    """A bundle's exact bytes and the signature over them."""

    bundle: bytes
    signature: bytes

    @classmethod
    def parse(cls, data: bytes) -> SignedBundle:
        """Read ``{"bundle": base64, "signature": base64}``.

        Raises:
            LimitExceeded, FormatError: it has another form.
        """
        value = jcs.parse(data, what="signed bundle", limit=2 * MAX_BUNDLE)
        if not isinstance(value, dict) or set(value) != {"bundle", "signature"}:
            raise FormatError("signed bundle: expected the members bundle and signature")
        signature = value["signature"]
        if not isinstance(signature, str) or len(signature) > MAX_SIGNATURE:
            raise FormatError("signed bundle: signature must be short base64")
        return cls(unb64(value["bundle"], "bundle"), unb64(signature, "signature"))

    def encode(self) -> bytes:
        """The form that ``parse`` reads, canonical."""
        return jcs.canonical(
            {
                "bundle": base64.b64encode(self.bundle).decode("ascii"),
                "signature": base64.b64encode(self.signature).decode("ascii"),
            }
        )

    def opened(self, keys: Mapping[str, ReferenceKey]) -> tuple[Bundle, str]:
        """The bundle, if one of these keys signed it, and that key's name.

        Raises:
            Refused: none did.
            FormatError, LimitExceeded: the bundle has another form.
        """
        # The signature first: nobody else's bytes are worth parsing.
        for name, key in sorted(keys.items()):
            if key.verifies(self.bundle, self.signature):
                return Bundle.parse(self.bundle), name
        raise Refused(
            "no registered key signed this bundle",
            hint="kbs reference keys add NAME FILE.pem",
            code="reference-signature",
        )


def parse_message(data: bytes) -> dict[str, Any]:
    """Trustee's message: ``{"version", "type": "sample", "payload": base64 of {id: value}}``.

    Raises:
        LimitExceeded, FormatError: another version, type or form.
    """
    value = jcs.parse(data, what="reference value message", limit=2 * MAX_BUNDLE)
    if not isinstance(value, dict):
        raise FormatError("reference value message: expected an object")
    if value.get("version") != MESSAGE_VERSION:
        raise FormatError(f"reference value message: version is not {MESSAGE_VERSION}")
    if value.get("type") != MESSAGE_TYPE:
        raise FormatError(
            f"reference value message: type {str(value.get('type'))[:32]!r} is not read here",
            hint=f"send type {MESSAGE_TYPE!r} with the values as JSON",
        )
    payload = unb64(value.get("payload"), "payload")
    return checked_values(jcs.parse(payload, what="reference values", limit=MAX_BUNDLE))


def checked_values(value: Any) -> dict[str, Any]:
    """Reference values by id.

    Raises:
        FormatError: not an object, empty, or an id that is none.
    """
    if not isinstance(value, dict) or not value:
        raise FormatError("reference values: expected an object with at least one value")
    for name in value:
        require_reference_id(name)
    return value


def require_reference_id(name: str) -> str:
    """The id of a reference value; Trustee's have colons and slashes.

    Raises:
        FormatError: empty, too long, or with other than printable ASCII characters.
    """
    if not name or len(name) > MAX_ID or not (name.isascii() and name.isprintable()):
        raise FormatError(f"{name[:64]!r} is no id of a reference value")
    return name


def parse_time(text: str) -> datetime:
    """A moment: ``2026-11-20T12:00:00Z``.

    Raises:
        FormatError: it has another form.
    """
    try:
        return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError as error:
        raise FormatError(
            f"{text[:32]!r} is no moment", hint="write it as 2026-11-20T12:00:00Z"
        ) from error


def unb64(text: Any, what: str) -> bytes:
    """Standard base64.

    Raises:
        FormatError: it is something else.
    """
    if not isinstance(text, str):
        raise FormatError(f"{what}: expected base64 text")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{what}: not base64") from error


def require_current(bundle: Bundle, now: datetime, before: Bundle | None) -> None:
    """Refuse a bundle that is over, of the future, or older than the one it would replace.

    Raises:
        Refused: it is.
    """
    if bundle.expires <= now:
        raise Refused(f"bundle {bundle.name} has expired", code="reference-expired")
    if bundle.issued > now + CLOCK_SKEW:
        raise Refused(f"bundle {bundle.name} was issued in the future", code="reference-future")
    if before is not None and bundle.issued < before.issued:
        raise Refused(
            f"bundle {bundle.name} is older than the one that is stored",
            hint="remove the stored one first, if this is meant",
            code="reference-rollback",
        )


def missing(name: str) -> InputMissing:
    """No such reference value is in force."""
    return InputMissing(f"no reference value {name[:64]!r} is in force")
