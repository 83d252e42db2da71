"""Trustee's key broker protocol as both ends see it: Request, Challenge, Attestation, Response.

Pure messages and digests; sockets are elsewhere. Version 0.4.0 is spoken, 0.2.0 is read, and 0.1.x
gets a challenge so that its client can be told why it is refused.

The binding (RFC 8785 bytes, SHA-384), with K the typed public key and A the exact text of the
additional evidence:

    device:   D = SHA-384( {"nonce": N, "tee-pubkey": K} )                           nonce = D[:32]
    primary:  P = SHA-384( {"additional-evidence": A, "nonce": N, "tee-pubkey": K} )

The quote's report data is P and sixteen zero bytes, which no statement of ours can equal.
"""

from __future__ import annotations

import base64
import binascii
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import new as new_hash
from hashlib import sha384
from typing import Any, Final

from cai import jcs
from cai.attest.evidence import DeviceEvidence
from cai.attest.jwk import PublicJwk, TeeKey
from cai.attest.statement import MAX_STATEMENT, ReleaseStatement
from cai.errors import FormatError, LimitExceeded

__all__ = [
    "Attestation",
    "Challenge",
    "ErrorInformation",
    "PublicJwk",
    "Request",
    "TeeKey",
    "additional_evidence",
    "device_digest",
    "encode_tdx_evidence",
    "init_data_digest",
    "parse_additional_evidence",
    "parse_devices",
    "parse_tdx_evidence",
    "primary_digest",
    "tee_name",
]

VERSION: Final = "0.4.0"
"""The protocol version that is spoken."""

FLAT_VERSION: Final = "0.2.0"
"""The older version whose evidence is one flat member; report data is D."""

TEE: Final = "tdx"
"""The one TEE that is served."""

NONCE_SIZE = 32
"""Bytes of a challenge nonce."""

GPU_NONCE_SIZE = 32
"""Bytes of D that are the nonce of the GPU reports."""

MAX_MESSAGE = 2 * 1024 * 1024
"""Largest message of the protocol, bytes (Trustee's ``payload_request_size``)."""

MAX_NONCE_TEXT = 256
"""Longest nonce text that a client passes on, characters."""

MAX_QUOTE = 64 * 1024
"""Largest quote, bytes; a version 4 quote with its certificates has about 5000."""

MAX_EVENT_LOG = 1024 * 1024
"""Largest event log, bytes."""

MAX_DEVICES = 32
"""Most devices in one message; an eight-GPU machine with switches has twelve."""

MAX_REPORT = 64 * 1024
"""Largest report of one device, bytes."""

MAX_CHAIN = 64 * 1024
"""Largest certificate chain of one device, bytes."""

MAX_INIT_DATA = 128 * 1024
"""Largest init-data text, bytes."""

MAX_NAME = 64
"""Longest version, TEE, selector and device name, characters."""

SELECTOR: Final = "attestation-policy-selector"
"""Member of ``extra-params`` by which a client names the policy it expects to be appraised with."""

ERROR_PAGES: Final = "/kbs/v0/errors"
"""Where a broker of ours has a page for each kind of error; stock clients read what follows the
last ``/`` of ``type``."""

_ALIASES: Final = {
    "azsnpvtpm": "az-snp-vtpm",
    "aztdxvtpm": "az-tdx-vtpm",
    "hygontpm": "hygon-tpm",
}

_SELECTOR: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Request:
    """The first message: which protocol version, which TEE."""

    version: str = VERSION
    tee: str = TEE
    extra_params: Any = None

    def encode(self) -> bytes:
        """The message as JSON."""
        extra = {} if self.extra_params is None else self.extra_params
        return jcs.canonical({"version": self.version, "tee": self.tee, "extra-params": extra})

    @classmethod
    def parse(cls, data: bytes) -> Request:
        """Parse the message; all three members are required.

        Raises:
            FormatError, LimitExceeded: anything else.
        """
        value = _message(data, "request")
        if "extra-params" not in value:
            raise FormatError("request: extra-params is missing")
        return cls(
            version=_text(value, "version", "request", MAX_NAME),
            tee=tee_name(_text(value, "tee", "request", MAX_NAME)),
            extra_params=value["extra-params"],
        )

    @property
    def selector(self) -> str:
        """The policy that the client expects; empty when it names none.

        Raises:
            FormatError, LimitExceeded: it is not a policy id.
        """
        if not isinstance(self.extra_params, dict) or self.extra_params.get(SELECTOR) is None:
            return ""
        text = _text(self.extra_params, SELECTOR, "request.extra-params", MAX_NAME)
        if not _SELECTOR.fullmatch(text):
            raise FormatError(f"request.extra-params: {SELECTOR} is not a policy id")
        return text


@dataclass(frozen=True, slots=True)
class Challenge:
    """The answer to a request: the nonce, base64 text that clients pass on as it is."""

    nonce: str
    extra_params: Any = ""

    @classmethod
    def for_nonce(cls, nonce: bytes) -> Challenge:
        """The challenge over these random bytes."""
        return cls(base64.b64encode(nonce).decode("ascii"))

    def to_json(self) -> dict[str, Any]:
        """The message as a JSON value."""
        return {"nonce": self.nonce, "extra-params": self.extra_params}

    @classmethod
    def parse(cls, data: bytes) -> Challenge:
        """Parse the message as a client does.

        Raises:
            FormatError, LimitExceeded: a member is missing, or another hash than SHA-384 is asked.
        """
        value = _message(data, "challenge")
        if "extra-params" not in value:
            raise FormatError("challenge: extra-params is missing")
        extra = value["extra-params"]
        chosen = extra.get("selected-hash-algorithm") if isinstance(extra, dict) else None
        if chosen is not None and str(chosen).lower() != "sha384":
            raise FormatError(f"challenge: hash algorithm {str(chosen)[:16]!r} is not supported")
        nonce = _text(value, "nonce", "challenge", MAX_NONCE_TEXT)
        if len(_base64(nonce, "challenge.nonce", MAX_NONCE_TEXT)) < NONCE_SIZE:
            raise FormatError(f"challenge: the nonce has fewer than {NONCE_SIZE} bytes")
        return cls(nonce, extra)


@dataclass(frozen=True, slots=True)
class Attestation:
    """The evidence and the key it binds.

    Attributes:
        nonce: the challenge's text.
        tee_pubkey: the key that the resource is encrypted to.
        primary_evidence: the JSON value of the quote, see ``parse_tdx_evidence``.
        additional_evidence: the exact text, see ``parse_additional_evidence``.
        init_data: the plain TOML text, if any.
        version: ``0.4.0``, or ``0.2.0`` for the flat form, whose report data is D.
    """

    nonce: str
    tee_pubkey: PublicJwk
    primary_evidence: Any
    additional_evidence: str = ""
    init_data: str | None = None
    version: str = VERSION

    def encode(self) -> bytes:
        """The message as JSON (version 0.4.0)."""
        init_data = None
        if self.init_data is not None:
            init_data = {"format": "toml", "body": self.init_data}
        return jcs.canonical(
            {
                "init-data": init_data,
                "runtime-data": {"nonce": self.nonce, "tee-pubkey": self.tee_pubkey.to_json()},
                "tee-evidence": {
                    "primary_evidence": self.primary_evidence,
                    "additional_evidence": self.additional_evidence,
                },
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> Attestation:
        """Parse a message of version 0.4.0.

        Raises:
            FormatError, LimitExceeded: a member is missing or of another form.
        """
        value = _message(data, "attestation")
        runtime = _object(value, "runtime-data", "attestation")
        evidence = _object(value, "tee-evidence", "attestation")
        if "primary_evidence" not in evidence:
            raise FormatError("attestation: tee-evidence.primary_evidence is missing")
        return cls(
            nonce=_text(runtime, "nonce", "attestation.runtime-data", MAX_NONCE_TEXT),
            tee_pubkey=PublicJwk.parse(runtime.get("tee-pubkey")),
            primary_evidence=evidence["primary_evidence"],
            additional_evidence=_text(
                evidence, "additional_evidence", "attestation.tee-evidence", MAX_MESSAGE
            ),
            init_data=_init_data(value.get("init-data")),
        )

    @classmethod
    def parse_flat(cls, data: bytes, *, nonce: str) -> Attestation:
        """Parse a message of version 0.2.0: one TEE, no composite evidence, no nonce of its own.

        Args:
            data: the message.
            nonce: the session's challenge.

        Raises:
            FormatError, LimitExceeded: a member is missing or of another form.
        """
        value = _message(data, "attestation")
        if "tee-evidence" not in value:
            raise FormatError("attestation: tee-evidence is missing")
        return cls(
            nonce=nonce,
            tee_pubkey=PublicJwk.parse(value.get("tee-pubkey")),
            primary_evidence=value["tee-evidence"],
            version=FLAT_VERSION,
        )

    @property
    def gpu_nonce(self) -> bytes:
        """The 32-byte nonce that every GPU report of this message must carry."""
        return device_digest(self.nonce, self.tee_pubkey)[:GPU_NONCE_SIZE]

    @property
    def report_digest(self) -> bytes:
        """The 48 bytes that start the quote's report data: P, or D for version 0.2.0."""
        if self.version == FLAT_VERSION:
            return device_digest(self.nonce, self.tee_pubkey)
        return primary_digest(self.nonce, self.tee_pubkey, self.additional_evidence)


@dataclass(frozen=True, slots=True)
class ErrorInformation:
    """Every answer of a key broker that is not 200.

    Attributes:
        kind: what follows the last ``/`` of ``type``, e.g. ``PolicyDeny``.
        detail: one line for people.
    """

    kind: str
    detail: str

    def to_json(self) -> dict[str, str]:
        """The message as a JSON value."""
        return {"type": f"{ERROR_PAGES}/{self.kind}", "detail": self.detail}

    @classmethod
    def parse(cls, data: bytes) -> ErrorInformation:
        """Parse the message; members beyond these two are ignored.

        Raises:
            FormatError, LimitExceeded: not an error message.
        """
        value = _message(data, "error answer")
        kind = _text(value, "type", "error answer", 1024).rpartition("/")[2]
        return cls(kind, _text(value, "detail", "error answer", 64 * 1024))


def tee_name(text: str) -> str:
    """The name of a TEE as upstream spells it; a well-known fork spells some without dashes."""
    return _ALIASES.get(text, text)


def device_digest(nonce: str, jwk: PublicJwk) -> bytes:
    """D: 48 bytes that bind the devices to nonce and key."""
    return sha384(jcs.canonical({"nonce": nonce, "tee-pubkey": jwk.to_json()})).digest()


def primary_digest(nonce: str, jwk: PublicJwk, additional: str) -> bytes:
    """P: 48 bytes that bind the quote to nonce, key and the exact additional evidence."""
    return sha384(
        jcs.canonical(
            {"additional-evidence": additional, "nonce": nonce, "tee-pubkey": jwk.to_json()}
        )
    ).digest()


def init_data_digest(text: str, *, size: int) -> bytes:
    """Digest of the whole init-data text by the algorithm it names, padded or cut to ``size``.

    Raises:
        FormatError: not TOML, or it names no known algorithm.
    """
    try:
        algorithm = tomllib.loads(text).get("algorithm")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FormatError("init-data: not TOML") from error
    if algorithm not in ("sha256", "sha384", "sha512"):
        raise FormatError("init-data: algorithm must be sha256, sha384 or sha512")
    return new_hash(algorithm, text.encode("utf-8")).digest()[:size].ljust(size, b"\x00")


def encode_tdx_evidence(quote: bytes, event_log: bytes | None) -> dict[str, str | None]:
    """The primary evidence of a TDX guest."""
    log = None if event_log is None else base64.b64encode(event_log).decode("ascii")
    return {"quote": base64.b64encode(quote).decode("ascii"), "cc_eventlog": log}


def parse_tdx_evidence(value: Any) -> tuple[bytes, bytes | None]:
    """Quote and event log of the primary evidence; the log may be null or absent.

    Raises:
        FormatError, LimitExceeded: anything else.
    """
    if not isinstance(value, dict):
        raise FormatError("primary_evidence: expected an object")
    quote = _base64(value.get("quote"), "primary_evidence.quote", MAX_QUOTE)
    if value.get("cc_eventlog") is None:
        return quote, None
    return quote, _base64(value["cc_eventlog"], "primary_evidence.cc_eventlog", MAX_EVENT_LOG)


def encode_device(device: DeviceEvidence) -> dict[str, str]:
    """One device as the member ``nvidia`` lists it."""
    return {
        "arch": device.arch,
        "uuid": device.uuid,
        "evidence": base64.b64encode(device.report).decode("ascii"),
        "certificate": base64.b64encode(device.chain).decode("ascii"),
    }


def additional_evidence(
    devices: Sequence[DeviceEvidence], statement: ReleaseStatement | None
) -> str:
    """The text that carries the devices and, to a broker of ours, the release statement.

    Returns:
        Canonical JSON text with the members ``nvidia`` and ``cai``, or the empty text when there
        is neither.
    """
    value: dict[str, Any] = {}
    if devices:
        value["nvidia"] = {
            "device_evidence_list": [encode_device(device) for device in devices]
        }
    if statement is not None:
        value["cai"] = statement.to_json()
    return jcs.canonical(value).decode("utf-8") if value else ""


def parse_additional_evidence(
    text: str,
) -> tuple[tuple[DeviceEvidence, ...], ReleaseStatement | None]:
    """Read the text strictly: only ``nvidia`` and ``cai``, no member twice at any depth.

    Raises:
        FormatError, SettingError, LimitExceeded: anything else.
    """
    if not text:
        return (), None
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError("additional_evidence: lone surrogate") from error
    value = jcs.parse(data, what="additional_evidence", limit=MAX_MESSAGE)
    if not isinstance(value, dict):
        raise FormatError("additional_evidence: expected an object")
    for name in value:
        if name not in ("nvidia", "cai"):
            raise FormatError(f"additional_evidence: {name[:32]!r} is not served")
    devices = parse_devices(value["nvidia"]) if "nvidia" in value else ()
    if "cai" not in value:
        return devices, None
    # What has no canonical form cannot be stored or logged either.
    if len(jcs.canonical(value["cai"])) > MAX_STATEMENT:
        raise LimitExceeded(f"additional_evidence.cai: more than {MAX_STATEMENT} bytes")
    return devices, ReleaseStatement.from_json(value["cai"])


def parse_devices(value: Any) -> tuple[DeviceEvidence, ...]:
    """The devices of NVIDIA's evidence; reports may be hexadecimal, chains PEM text.

    Raises:
        FormatError, LimitExceeded: it has another form.
    """
    listed = value.get("device_evidence_list") if isinstance(value, dict) else None
    if not isinstance(listed, list):
        raise FormatError("additional_evidence.nvidia: device_evidence_list is missing")
    if len(listed) > MAX_DEVICES:
        raise LimitExceeded(f"additional_evidence.nvidia: more than {MAX_DEVICES} devices")
    return tuple(_device(item) for item in listed)


def _device(value: Any) -> DeviceEvidence:
    where = "additional_evidence.nvidia"
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object for each device")
    report = value.get("evidence")
    # Older attesters write hexadecimal; Trustee tries it first, too.
    if isinstance(report, str) and len(report) <= 2 * MAX_REPORT and _is_hex(report):
        decoded = bytes.fromhex(report)
    else:
        decoded = _base64(report, f"{where}.evidence", MAX_REPORT)
    chain = value.get("certificate")
    if isinstance(chain, str) and chain.lstrip().startswith("-----BEGIN"):
        if len(chain) > MAX_CHAIN or not chain.isascii():
            raise FormatError(f"{where}.certificate: not a PEM chain of at most {MAX_CHAIN} bytes")
        pem = chain.encode("ascii")
    else:
        pem = _base64(chain, f"{where}.certificate", MAX_CHAIN)
    uuid = value.get("uuid")
    return DeviceEvidence(
        arch=_text(value, "arch", where, MAX_NAME).upper(),
        uuid="unknown" if uuid is None else _text(value, "uuid", where, MAX_NAME),
        report=decoded,
        chain=pem,
    )


def _init_data(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("format") != "toml":
        raise FormatError("init-data: only the format toml is served")
    return _text(value, "body", "init-data", MAX_INIT_DATA)


def _message(data: bytes, what: str) -> dict[str, Any]:
    value = jcs.parse(data, what=what, limit=MAX_MESSAGE)
    if not isinstance(value, dict):
        raise FormatError(f"{what}: expected an object")
    return value


def _object(value: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    member = value.get(name)
    if not isinstance(member, dict):
        raise FormatError(f"{where}: {name} is missing or not an object")
    return member


def _text(value: dict[str, Any], name: str, where: str, limit: int) -> str:
    member = value.get(name)
    if not isinstance(member, str):
        raise FormatError(f"{where}: {name} is missing or not a string")
    if len(member) > limit:
        raise LimitExceeded(f"{where}: {name} is longer than {limit} characters")
    try:
        member.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: {name} holds a lone surrogate") from error
    return member


def _is_hex(text: str) -> bool:
    return bool(text) and len(text) % 2 == 0 and set(text) <= set("0123456789abcdefABCDEF")


def _base64(text: Any, where: str, limit: int) -> bytes:
    if not isinstance(text, str):
        raise FormatError(f"{where}: missing or not a string")
    if len(text) > limit * 4 // 3 + 4:
        raise LimitExceeded(f"{where}: more than {limit} bytes")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: not base64") from error
    if not data:
        raise FormatError(f"{where}: empty")
    return data
