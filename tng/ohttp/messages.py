"""What TNG's ends say around an encapsulated request: key configurations, evidence, metadata.

JSON members, protobuf fields and the RFC 9458 list are those of stock TNG 2.7 to 2.12 (reference
"TNG" §2.5). Everything here is pure.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cai import jcs
from cai.attest import ttrpc
from cai.errors import FormatError, LimitExceeded
from tng.ohttp.hpke import KEY_SIZE
from tng.ohttp.keyconfig import KeyConfig, base64_text, object_of, unbase64
from tng.stock.certificate import CocoEvidence

API_HEADER: Final = b"x-tng-ohttp-api"
"""Names the API that an outer request is for."""

API_KEY_CONFIG: Final = b"/tng/key-config"
API_CHALLENGE: Final = b"/tng/background-check/challenge"
API_VERIFY: Final = b"/tng/background-check/verify"
API_TUNNEL: Final = b"/tng/tunnel"

REQUEST_TYPE: Final = b"message/ohttp-chunked-req"
RESPONSE_TYPE: Final = b"message/ohttp-chunked-res"

MAX_JSON = 16 * 1024 * 1024
"""Longest JSON message, bytes; evidence with devices has some hundred KB."""

MAX_METADATA = 1024 * 1024
"""Longest metadata before an encapsulated request, bytes (stock allows 32 MiB)."""

MAX_TEXT = 1024
"""Longest name in a message, characters."""

PUBLIC_KEY_CLAIM: Final = "pk_s"
"""Claim that binds a client's HPKE key."""

CHALLENGE_CLAIM: Final = "challenge_token"
CONFIG_CLAIM: Final = "hpke_key_config"


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """What a client asks for beside the key: a model, or nothing.

    Attributes:
        model: ``background_check``, ``passport`` or empty.
        challenge: token to be bound; only with ``background_check``.
    """

    model: str = ""
    challenge: str = ""

    def encode(self) -> bytes:
        """The body of a key-config request."""
        if not self.model:
            return jcs.canonical({"attestation_request": None})
        asked: dict[str, Any] = {"model": self.model}
        if self.model == "background_check":
            asked["challenge_token"] = self.challenge
        return jcs.canonical({"attestation_request": asked})

    @classmethod
    def decode(cls, data: bytes) -> KeyRequest:
        """Parse the body.

        Raises:
            FormatError, LimitExceeded: of another form.
        """
        value = object_of(jcs.parse(data, what="key-config request", limit=MAX_JSON), "key-config")
        asked = value.get("attestation_request")
        if asked is None:
            return cls()
        members = object_of(asked, "attestation_request")
        model, challenge = members.get("model"), members.get("challenge_token", "")
        if model not in ("background_check", "passport") or not isinstance(challenge, str):
            raise FormatError("key-config request: of another form")
        if model == "background_check" and not challenge:
            raise FormatError("key-config request: no challenge_token")
        return cls(model, challenge)


@dataclass(frozen=True, slots=True)
class KeyAnswer:
    """A server's key with what proves it: evidence, a token, or nothing."""

    config: KeyConfig
    evidence: CocoEvidence | None = None
    token: str = ""

    def encode(self) -> bytes:
        """The body of a key-config answer."""
        info: dict[str, Any] | None = None
        if self.token:
            info = {"model": "passport", "attestation_result": self.token, "as_provider": "coco"}
        elif self.evidence is not None:
            info = {
                "model": "background_check",
                "evidence": evidence_json(self.evidence),
                "aa_provider": "coco",
            }
        return jcs.canonical({CONFIG_CLAIM: self.config.to_json(), "attestation_info": info})

    @classmethod
    def decode(cls, data: bytes) -> KeyAnswer:
        """Parse the body; nothing of it is verified yet.

        Raises:
            FormatError, LimitExceeded: of another form.
        """
        value = object_of(jcs.parse(data, what="key-config answer", limit=MAX_JSON), "key-config")
        config = KeyConfig.from_json(value.get(CONFIG_CLAIM))
        info = value.get("attestation_info")
        if info is None:
            return cls(config)
        members = object_of(info, "attestation_info")
        if members.get("model") == "passport":
            return cls(config, token=_text(members, "attestation_result"))
        if members.get("model") == "background_check":
            return cls(config, evidence=parse_evidence(members.get("evidence")))
        raise FormatError("key-config answer: of another model")


def evidence_json(evidence: CocoEvidence) -> dict[str, Any]:
    """Evidence as these messages carry it."""
    value = {
        "aa_tee_type": evidence.tee,
        "aa_evidence": base64_text(evidence.evidence),
        "aa_runtime_data": evidence.runtime_data,
        "aa_runtime_data_hash_algo": "sha384",
    }
    if evidence.additional:
        value["aa_additional_evidence"] = base64_text(evidence.additional)
    return value


def parse_evidence(value: object) -> CocoEvidence:
    """Read evidence.

    Raises:
        FormatError: of another form, or of another hash than SHA-384.
    """
    members = object_of(value, "evidence")
    if members.get("aa_runtime_data_hash_algo") != "sha384":
        raise FormatError("evidence: only SHA-384 is accepted")
    additional = members.get("aa_additional_evidence")
    if additional is not None and not isinstance(additional, str):
        raise FormatError("evidence: a member is of another kind")
    tee = _text(members, "aa_tee_type")
    if len(tee) > MAX_TEXT:
        raise LimitExceeded("evidence: the name of a TEE is too long")
    return CocoEvidence(
        tee,
        unbase64(_text(members, "aa_evidence"), "evidence"),
        unbase64(additional, "evidence") if additional else None,
        _text(members, "aa_runtime_data"),
    )


def server_claims(config: KeyConfig, challenge: str) -> dict[str, Any]:
    """What a server's evidence is about; without a challenge in the passport model's old form."""
    claims: dict[str, Any] = {CONFIG_CLAIM: config.to_json()}
    return {**claims, CHALLENGE_CLAIM: challenge} if challenge else claims


def client_claims(public: bytes, challenge: str) -> dict[str, Any]:
    """What a client's evidence is about."""
    claims = {PUBLIC_KEY_CLAIM: base64_text(public)}
    return {**claims, CHALLENGE_CLAIM: challenge} if challenge else claims


@dataclass(frozen=True, slots=True)
class Metadata:
    """What stands before an encapsulated request.

    Attributes:
        hint: the server key that was used, 32 bytes; empty where a client names none.
        token: the client's attestation token; empty when it proves nothing.
        public: the client's HPKE key, 32 bytes, with a token.
    """

    hint: bytes
    token: str = ""
    public: bytes = b""

    def encode(self) -> bytes:
        """Length and protobuf."""
        if self.token:
            auth = ttrpc.bytes_field(1, self.token.encode("ascii"))
            auth += ttrpc.bytes_field(2, self.public) + ttrpc.bytes_field(3, b"coco")
            body = ttrpc.bytes_field(2, auth)
        else:
            body = b"\x0a\x00"
        body += ttrpc.bytes_field(3, ttrpc.bytes_field(1, self.hint))
        return struct.pack(">I", len(body)) + body

    @classmethod
    def decode(cls, data: bytes) -> Metadata:
        """Parse the protobuf, without its length.

        Raises:
            FormatError, LimitExceeded: of another form.
        """
        if len(data) > MAX_METADATA:
            raise LimitExceeded(f"metadata of {len(data)} bytes, at most {MAX_METADATA}")
        fields = _fields(data)
        if (1 in fields) == (2 in fields):
            raise FormatError("metadata: says not whether the client proves itself")
        hint = _fields(fields.get(3, b"")).get(1, b"")
        if len(hint) not in (0, KEY_SIZE):
            raise FormatError("metadata: the key hint is no key")
        if 1 in fields:
            return cls(hint)
        auth = _fields(fields[2])
        token, public = auth.get(1, b""), auth.get(2, b"")
        if not token or len(public) != KEY_SIZE or not token.isascii():
            raise FormatError("metadata: the client's proof is incomplete")
        return cls(hint, token.decode("ascii"), public)


def _fields(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for number, value in ttrpc.read_fields(data):
        if not isinstance(value, bytes) or number in found:
            raise FormatError("metadata: a field is repeated or of another kind")
        found[number] = value
    return found


def _text(members: Mapping[str, Any], name: str) -> str:
    value = members.get(name)
    if not isinstance(value, str) or not value:
        raise FormatError(f"{name} is missing or no text")
    return value
