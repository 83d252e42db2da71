"""What a client of the attestation service sends: Trustee's two shapes, and what we add to them.

The newer shape is a list, one entry for each TEE with its own runtime data; the older is one flat
object. Both become one question: this quote, these devices, bound to these bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import new as new_hash
from typing import Any, Final

from cai import jcs
from cai.attest.evidence import DeviceEvidence, Evidence
from cai.attest.jwk import b64u_decode
from cai.attest.rcar import (
    MAX_DEVICES,
    MAX_INIT_DATA,
    MAX_MESSAGE,
    TEE,
    init_data_digest,
    parse_devices,
    parse_tdx_evidence,
    tee_name,
)
from cai.attest.statement import (
    MAX_STATEMENT,
    REPORT_DATA_SIZE,
    ChannelStatement,
    Purpose,
    gpu_evidence_digest,
    report_data,
)
from cai.errors import EvidenceRefused, FormatError, LimitExceeded
from kbs.policy.names import DEFAULT_ID, require_id

DEVICE: Final = "nvidia"
"""The one kind of device that is served."""

HASHES: Final = ("sha256", "sha384", "sha512")
"""Algorithms of structured runtime data; report data is the digest and zeros."""

DEFAULT_HASH: Final = "sha384"
"""Algorithm where none is named."""

GPU_DIGEST_CLAIM: Final = "cai-gpu-digest"
"""Claim that binds the devices beside a quote, hex (``gpu_evidence_digest``)."""

GPU_NONCE_CLAIM: Final = "cai-gpu-nonce"
"""Claim with the nonce of those devices' reports, hex."""

NONCE_SIZE: Final = 32
"""Bytes of runtime data that are the nonce of a device."""

MAX_REQUESTS: Final = 1 + MAX_DEVICES
"""Most entries of one request: the guest and its devices."""

INIT_DATA_SIZE: Final = 48
"""Bytes of MRCONFIGID."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request for an appraisal.

    Attributes:
        evidence: what is to be verified.
        report_data: the 64 bytes that the quote must carry.
        gpu_nonce: the 32 bytes that every device report must carry; ``None`` without devices.
        structured: the runtime data whose digest that is; ``None`` when it was raw.
        statement: our own statement that the report data binds; ``None`` without one.
        init_data: what MRCONFIGID must be, hex; empty when it is not asked.
        policy_id: the policies to appraise with.
    """

    evidence: Evidence
    report_data: bytes
    gpu_nonce: bytes | None = None
    structured: dict[str, Any] | None = None
    statement: ChannelStatement | None = None
    init_data: str = ""
    policy_id: str = DEFAULT_ID

    @property
    def challenge_token(self) -> str:
        """The challenge that the guest says it answers, as a token; empty without one."""
        return self._text("challenge_token")

    @property
    def nonce(self) -> str:
        """The challenge that the guest says it answers, as a nonce; empty without one."""
        return self._text("nonce")

    def _text(self, name: str) -> str:
        value = (self.structured or {}).get(name)
        return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True)
class _Bound:
    """Runtime data of one entry: what it is, and the 64 bytes that stand for it."""

    data: bytes
    structured: dict[str, Any] | None = field(default=None)


def parse_question(body: bytes) -> Question:
    """Read a request of either shape.

    Raises:
        FormatError, LimitExceeded: it has another form, or nothing binds the evidence.
        EvidenceRefused: the raw runtime data is not that of the statement that came along.
    """
    value = jcs.parse(body, what="attestation request", limit=MAX_MESSAGE)
    if not isinstance(value, dict):
        raise FormatError("attestation request: expected an object")
    entries = _entries(value)
    primary = [entry for entry in entries if _tee(entry) == TEE]
    devices = [entry for entry in entries if _tee(entry) == DEVICE]
    if len(primary) != 1 or len(primary) + len(devices) != len(entries):
        raise FormatError(
            f"attestation request: expected one entry of tee {TEE} and any of tee {DEVICE}"
        )
    cpu = primary[0]
    quote, event_log = parse_tdx_evidence(_evidence(cpu))
    bound = _bound(cpu)
    if bound is None:
        raise FormatError(
            "attestation request: runtime_data is missing, so nothing binds the evidence",
            hint="send the raw or structured runtime data that the quote was made for",
        )
    statement = _statement(cpu, bound)
    reports, nonce = _devices(devices, bound, statement)
    return Question(
        evidence=Evidence(quote, reports, event_log),
        report_data=bound.data,
        gpu_nonce=nonce,
        structured=bound.structured,
        statement=statement,
        init_data=_init_data(cpu),
        policy_id=_policy_id(value),
    )


def _entries(value: dict[str, Any]) -> list[dict[str, Any]]:
    if "verification_requests" not in value:
        if "evidence" not in value:
            raise FormatError("attestation request: verification_requests is missing")
        return [value]  # the older shape
    entries = value["verification_requests"]
    if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
        raise FormatError("attestation request: verification_requests must be a list of objects")
    if not 1 <= len(entries) <= MAX_REQUESTS:
        raise LimitExceeded(
            f"attestation request: {len(entries)} entries, expected 1 to {MAX_REQUESTS}"
        )
    return entries


def _tee(entry: dict[str, Any]) -> str:
    name = entry.get("tee")
    if not isinstance(name, str):
        raise FormatError("attestation request: an entry does not name its tee")
    name = tee_name(name.lower())
    if name not in (TEE, DEVICE):
        raise FormatError(
            f"attestation request: tee {name[:32]!r} is not served here",
            hint=f"this service verifies {TEE} and {DEVICE}",
        )
    return name


def _evidence(entry: dict[str, Any]) -> Any:
    data = _b64u(entry.get("evidence"), "evidence", MAX_MESSAGE)
    return jcs.parse(data, what="attestation request: evidence", limit=MAX_MESSAGE)


def _bound(entry: dict[str, Any]) -> _Bound | None:
    runtime = entry.get("runtime_data")
    if runtime is None:
        return None
    if not isinstance(runtime, dict) or len(runtime) != 1:
        raise FormatError("attestation request: runtime_data must be either raw or structured")
    if "raw" in runtime:
        # Used as it is: shorter data is padded, longer data is not cut but refused, since what is
        # cut off would not be bound.
        data = _b64u(runtime["raw"], "runtime_data.raw", REPORT_DATA_SIZE)
        if not data:
            raise FormatError("attestation request: runtime_data.raw is empty and binds nothing")
        return _Bound(data.ljust(REPORT_DATA_SIZE, b"\x00"))
    structured = runtime.get("structured")
    if not isinstance(structured, dict):
        raise FormatError("attestation request: runtime_data.structured must be an object")
    algorithm = entry.get("runtime_data_hash_algorithm") or DEFAULT_HASH
    if not isinstance(algorithm, str) or algorithm.lower() not in HASHES:
        raise FormatError(
            "attestation request: runtime_data_hash_algorithm is not served",
            hint=f"one of {', '.join(HASHES)}",
        )
    digest = new_hash(algorithm.lower(), jcs.canonical(structured)).digest()
    return _Bound(digest.ljust(REPORT_DATA_SIZE, b"\x00"), structured)


def _statement(entry: dict[str, Any], bound: _Bound) -> ChannelStatement | None:
    if entry.get("cai_statement") is None:
        return None
    if bound.structured is not None:
        raise FormatError("attestation request: cai_statement goes with raw runtime data")
    text = _b64u(entry["cai_statement"], "cai_statement", MAX_STATEMENT)
    statement = ChannelStatement.decode(text)
    if report_data(text, Purpose.CHANNEL) != bound.data:
        raise EvidenceRefused(
            "the raw runtime data is not that of the statement", code="statement-unbound"
        )
    return statement


def _devices(
    entries: list[dict[str, Any]], bound: _Bound, statement: ChannelStatement | None
) -> tuple[tuple[DeviceEvidence, ...], bytes | None]:
    """The devices, and the one nonce that their reports must carry."""
    reports: list[DeviceEvidence] = []
    nonces: set[bytes] = set()
    for entry in entries:
        reports += parse_devices(_evidence(entry))
        own = _bound(entry)
        # Stock clients send devices without runtime data; they are held to that of the guest.
        nonces.add((bound if own is None else own).data[:NONCE_SIZE])
    if len(reports) > MAX_DEVICES:
        raise LimitExceeded(f"attestation request: more than {MAX_DEVICES} devices")
    if not reports:
        return (), None
    if statement is not None:
        return tuple(reports), bytes.fromhex(statement.gpu.nonce)
    if bound.structured is not None and GPU_DIGEST_CLAIM in bound.structured:
        return tuple(reports), _claimed_nonce(bound.structured, reports)
    if len(nonces) != 1:
        raise FormatError("attestation request: devices with different runtime data")
    return tuple(reports), nonces.pop()


def _claimed_nonce(claims: dict[str, Any], reports: Sequence[DeviceEvidence]) -> bytes:
    """The nonce of devices that the quote's own claims bind by their digest.

    A guest of ours answers stock clients with the devices of its last release; their nonce was the
    broker's, so the claims of its certificate name it (decisions §4, Downgrade).
    """
    digest = gpu_evidence_digest([(item.report, item.chain) for item in reports]).hex()
    if claims[GPU_DIGEST_CLAIM] != digest:
        raise EvidenceRefused(
            "the devices are not the ones that the claims bind", code="devices-unbound"
        )
    try:
        nonce = bytes.fromhex(str(claims.get(GPU_NONCE_CLAIM, "")))
    except ValueError:
        nonce = b""
    if len(nonce) != NONCE_SIZE:
        raise FormatError(f"attestation request: {GPU_NONCE_CLAIM} is not {NONCE_SIZE} bytes")
    return nonce


def _init_data(entry: dict[str, Any]) -> str:
    value = entry.get("init_data")
    if value is None:
        return ""
    if not isinstance(value, dict) or len(value) != 1:
        raise FormatError("attestation request: init_data must be a digest or a text")
    if "init_data_toml" in value:
        text = value["init_data_toml"]
        if not isinstance(text, str) or len(text) > MAX_INIT_DATA:
            raise FormatError(
                f"attestation request: init_data_toml is not a text of at most {MAX_INIT_DATA}"
            )
        return init_data_digest(text, size=INIT_DATA_SIZE).hex()
    digest = _b64u(value.get("init_data_digest"), "init_data_digest", 64)
    return digest[:INIT_DATA_SIZE].ljust(INIT_DATA_SIZE, b"\x00").hex()


def _policy_id(value: dict[str, Any]) -> str:
    ids = value.get("policy_ids")
    if ids is None:
        ids = []
    if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
        raise FormatError("attestation request: policy_ids must be a list of strings")
    distinct = set(ids) or {DEFAULT_ID}
    if len(distinct) != 1:
        # A token has one policy id for each submodule; whoever wants two would get half.
        raise FormatError("attestation request: a token is of one policy", hint="ask once for each")
    return require_id(distinct.pop())


def _b64u(value: Any, name: str, limit: int) -> bytes:
    if not isinstance(value, str):
        raise FormatError(f"attestation request: {name} is missing or not a string")
    if len(value) > limit * 4 // 3 + 4:
        raise LimitExceeded(f"attestation request: {name} is longer than {limit} bytes")
    # Clients write either alphabet, with and without padding.
    text = value.rstrip("=").translate(_ALPHABET)
    data = b64u_decode(text, what=f"attestation request: {name}")
    if len(data) > limit:
        raise LimitExceeded(f"attestation request: {name} is longer than {limit} bytes")
    return data


_ALPHABET: Final = str.maketrans("+/", "-_")
