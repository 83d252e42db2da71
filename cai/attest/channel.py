"""Evidence for one channel session, and its verification (docs/spec-channel.md).

The prover's session becomes a leaf of a tree whose root stands in a statement whose digest stands
in a quote. Verification walks the same way back: leaf, root, statement, report data, quote, GPU
reports, policy, expectation. It is pure; the TLS session that the leaf was made from is the
caller's, and so is the promise that ``leaf`` was computed from that session and from no message.
"""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any

from cai import jcs, merkle
from cai.attest.anchors import TrustAnchors
from cai.attest.evidence import DeviceEvidence, Evidence
from cai.attest.facts import Facts
from cai.attest.gpu.ocsp_store import OcspStore
from cai.attest.gpu.rim_store import RimStore
from cai.attest.policy import VerificationPolicy
from cai.attest.statement import ChannelStatement, Purpose, report_data
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.tdx.quote import parse_quote
from cai.attest.ticket import ChannelView, platform_id, verify_ticket
from cai.attest.verdict import Binding, Check, Verdict, check, not_asked
from cai.attest.verify import verify_evidence
from cai.errors import CaiError, FormatError, InputError
from cai.settings import Section

LEAF_DATA_SIZE = 70
"""Bytes of leaf data: version, role, sequence, SPKI digest, exporter value (decisions §4)."""

_LEAF_KEY = slice(6, 38)
"""Where leaf data has the SHA-256 of the prover's SubjectPublicKeyInfo."""

MAX_CHANNEL_EVIDENCE = 1024 * 1024
"""Largest encoded channel evidence, bytes: sixteen devices and an event log fit."""

MAX_DEVICES = 16
"""Most devices of one guest (8 GPUs and 4 switches are the largest known)."""

MAX_PATH = 12
"""Longest inclusion path: the tree has at most 4096 leaves."""

MAX_GPU_AGE_S = 15 * 60
"""Oldest GPU evidence a channel may rest on, seconds (decisions §2.5)."""


class Role(StrEnum):
    """Which end of the channel proves itself."""

    SERVER = "S"
    CLIENT = "C"


def leaf_data(role: Role, seq: int, spki: bytes, ekm: bytes) -> bytes:
    """The 70 bytes of a session leaf: ``01 ‖ role ‖ seq u32 ‖ SHA-256(prover SPKI) ‖ ekm``.

    Args:
        role: the prover's.
        seq: number of the proof within the session, from 0.
        spki: the prover's SubjectPublicKeyInfo, DER.
        ekm: exporter value of the session, 32 bytes.

    Raises:
        FormatError: ``ekm`` or ``seq`` is out of its range.
    """
    if len(ekm) != 32 or not 0 <= seq < 2**32:
        raise FormatError("session leaf: exporter value or sequence number out of range")
    return b"\x01" + role.value.encode() + seq.to_bytes(4, "big") + sha256(spki).digest() + ekm


@dataclass(frozen=True, slots=True)
class ChannelEvidence:
    """What a prover sends for one session.

    Attributes:
        statement: canonical bytes of a ``ChannelStatement``.
        evidence: quote and devices.
        index: place of the session's leaf in the tree.
        path: its inclusion path, bottom up.
        ticket: the admission ticket that the statement names, canonical bytes; empty without one.
    """

    statement: bytes
    evidence: Evidence
    index: int
    path: tuple[bytes, ...]
    ticket: bytes = b""

    def encode(self) -> bytes:
        """The evidence as RFC 8785 JSON; bulk bytes in base64, the statement as its own text."""
        body: dict[str, Any] = {
            "statement": self.statement.decode("utf-8"),
            "quote": _b64(self.evidence.quote),
            "devices": [
                {
                    "arch": device.arch,
                    "uuid": device.uuid,
                    "report": _b64(device.report),
                    "chain": _b64(device.chain),
                }
                for device in self.evidence.devices
            ],
            "index": self.index,
            "path": [node.hex() for node in self.path],
        }
        if self.evidence.event_log is not None:
            body["event_log"] = _b64(self.evidence.event_log)
        if self.ticket:
            body["ticket"] = self.ticket.decode("utf-8")
        return jcs.canonical(body)

    @classmethod
    def decode(cls, data: bytes) -> ChannelEvidence:
        """Parse strictly.

        Raises:
            FormatError, LimitExceeded, SettingError: any member is missing, unknown or malformed.
        """
        value = jcs.parse_canonical(data, what="channel evidence", limit=MAX_CHANNEL_EVIDENCE)
        section = Section(value, where="channel evidence")
        devices = section.raw("devices")
        path = section.texts("path")
        if not isinstance(devices, list) or len(devices) > MAX_DEVICES or len(path) > MAX_PATH:
            raise FormatError("channel evidence: device list or path out of range")
        result = cls(
            statement=section.text("statement").encode("utf-8"),
            evidence=Evidence(
                quote=_unb64(section.text("quote")),
                devices=tuple(_device(item) for item in devices),
                event_log=_unb64(section.text("event_log")) if section.has("event_log") else None,
            ),
            index=section.integer("index", least=0, most=4095, unit="leaves"),
            path=tuple(_node(text) for text in path),
            ticket=section.text("ticket").encode("utf-8") if section.has("ticket") else b"",
        )
        if section.holds("ticket") and not result.ticket:
            raise FormatError("channel evidence: an empty ticket is left out")
        section.finish()
        return result


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a client expects of the guest it talks to (``verify.expect``); empty is not asked.

    Attributes:
        launch: launch digest, 96 hex digits.
        service: service id.
        owner: owner's public key, 64 hex digits.
        model_root: root of one served model, 64 hex digits.
        content_root: content root of one served model, 64 hex digits.
    """

    launch: str = ""
    service: str = ""
    owner: str = ""
    model_root: str = ""
    content_root: str = ""

    @property
    def asks_for_model(self) -> bool:
        """Whether a model is pinned; else verdicts say ``model: not asked``."""
        return bool(self.model_root or self.content_root)


def verify_channel(
    evidence: ChannelEvidence,
    leaf: bytes,
    *,
    subject: str,
    policy: VerificationPolicy,
    expect: Expectation,
    anchors: TrustAnchors,
    collateral: CollateralStore,
    now: datetime,
    rims: RimStore | None = None,
    ocsp: OcspStore | None = None,
    ticket_keys: Sequence[bytes] = (),
) -> tuple[Verdict, Facts | None]:
    """Verify a prover's evidence for one session (spec-channel §5).

    Args:
        evidence: as received.
        leaf: the 70 bytes that the verifier computed from its own end of the session.
        subject: names the peer in the verdict.
        policy: the verification policy (layer 2).
        expect: what the client pins beyond it.
        anchors: trusted roots.
        collateral: TDX collateral.
        now: time of verification.
        rims: NVIDIA's reference measurements; ``None`` does not compare.
        ocsp: NVIDIA's revocation answers; ``None`` does not ask.
        ticket_keys: Ed25519 keys, 32 bytes each, of the broker whose admission ticket must be
            stapled; none asks for no ticket.

    Returns:
        The verdict with every check, and the facts when it passed.
    """
    # Step 1: the statement is canonical and complete.
    try:
        statement = ChannelStatement.decode(evidence.statement)
    except CaiError as error:
        failed = check("channel.statement", passed=False, reason=error.message)
        return Verdict(subject, (failed,), simulated=anchors.simulated), None
    bound = [check("channel.statement", passed=True), _session_check(statement, evidence, leaf)]
    # Steps 3 to 5: the quote binds the statement, and quote and reports are genuine.
    verdict, facts = verify_evidence(
        evidence.evidence,
        subject=subject,
        report_data=report_data(evidence.statement, Purpose.CHANNEL),
        gpu_nonce=bytes.fromhex(statement.gpu.nonce),
        anchors=anchors,
        collateral=collateral,
        now=now,
        require_agreement=policy.tdx.require_agreement,
        rims=rims,
        ocsp=ocsp,
    )
    # Step 6: the reports are the ones that the statement names, and recent.
    bound += gpu_checks(statement, evidence.evidence.gpu_digest)
    verdict = replace(verdict, checks=(*bound, *verdict.checks), binding=Binding.SESSION)
    if facts is not None:
        # Step 7: the owner's policy. The quote binds the statement, so its words are facts now.
        facts = facts.with_statement(statement)
        verdict = policy.apply(verdict, facts, now=now)
    # Step 8: what this client expects.
    verdict = verdict.extended(_expect_checks(statement, expect))
    # Step 9: the key broker admits this very guest and channel key now.
    verdict = verdict.extended(
        ticket_checks(
            evidence,
            leaf,
            keys=ticket_keys,
            platform=platform_id(facts.tdx) if facts is not None else "",
            simulated=anchors.simulated,
            now=now,
        )
    )
    return verdict, facts if verdict.passed else None


def check_session(
    evidence: ChannelEvidence, leaf: bytes, *, expect: Expectation
) -> tuple[tuple[Check, ...], ChannelStatement | None]:
    """What the verifier must check itself where an attestation service appraises the evidence.

    Steps 1, 2, 6 and 8 of spec-channel §5, and that the quote says what the statement does; whether
    the quote is genuine is what the service answers.

    Args:
        evidence: as received.
        leaf: the 70 bytes that the verifier computed from its own end of the session.
        expect: what the client pins.

    Returns:
        The checks, and the statement when it can be read.
    """
    try:
        statement = ChannelStatement.decode(evidence.statement)
    except CaiError as error:
        return (check("channel.statement", passed=False, reason=error.message),), None
    expected = report_data(evidence.statement, Purpose.CHANNEL)
    try:
        said: bytes | None = parse_quote(evidence.evidence.quote).body["report_data"]
    except InputError:
        said = None
    return (
        check("channel.statement", passed=True),
        _session_check(statement, evidence, leaf),
        check(
            "tdx.report_data",
            passed=said is not None and hmac.compare_digest(said, expected),
            observed=None if said is None else said.hex(),
            expected=expected.hex(),
            reason="the quote was made for another statement",
        ),
        *gpu_checks(statement, evidence.evidence.gpu_digest),
        *_expect_checks(statement, expect),
    ), statement


def _session_check(
    statement: ChannelStatement, evidence: ChannelEvidence, leaf: bytes
) -> Check:
    """Step 2: the verifier's own leaf leads to the root that the statement names."""
    reached = merkle.root_from_path(
        merkle.leaf_hash(leaf), evidence.index, statement.session_size, evidence.path
    )
    named = bytes.fromhex(statement.session_root)
    return check(
        "channel.session",
        passed=len(leaf) == LEAF_DATA_SIZE
        and reached is not None
        and hmac.compare_digest(reached, named),
        observed=statement.session_root,
        expected=reached.hex() if reached else f"a path that fits {statement.session_size} leaves",
        reason="the proof was made for another session",
    )


def ticket_checks(
    evidence: ChannelEvidence,
    leaf: bytes,
    *,
    keys: Sequence[bytes],
    platform: str,
    simulated: bool,
    now: datetime,
) -> tuple[Check, ...]:
    """Step 9: the stapled ticket is in force, and about this quote and leaf (decisions §4).

    Args:
        evidence: whose statement has been parsed before.
        leaf: the verifier's own leaf data.
        keys: of the broker; none asks for no ticket.
        platform: ``platform_id`` of the verified quote, hex; empty where a service verified it.
        simulated: whether the verifier trusts a simulated root.
        now: time of verification.
    """
    statement = ChannelStatement.decode(evidence.statement)
    if not keys:
        return (not_asked("ticket.present", statement.ticket_digest or "none"),)
    # A statement that names no ticket would leave the stapled one bound to nothing.
    present = check(
        "ticket.present",
        passed=bool(evidence.ticket and statement.ticket_digest),
        observed="stapled" if evidence.ticket else "none",
        expected="a ticket that the statement names",
        reason="the guest shows no admission ticket",
    )
    if not evidence.ticket or not statement.ticket_digest:
        return (present,)
    view = ChannelView(
        channel_key=leaf[_LEAF_KEY].hex(),
        launch_digest=statement.launch_digest,
        platform=platform,
        models=tuple(model.root for model in statement.models),
        ticket_digest=statement.ticket_digest,
    )
    verdict, _ticket = verify_ticket(
        evidence.ticket, keys=keys, view=view, simulated=simulated, now=now
    )
    return (present, *verdict.checks)


def gpu_checks(statement: ChannelStatement, gpu_digest: bytes) -> list[Check]:
    """Step 6: the reports that came along are the ones that the statement names, and recent."""
    digest = gpu_digest.hex()
    return [
        check(
            "channel.gpu_digest",
            passed=hmac.compare_digest(digest, statement.gpu.digest),
            observed=digest,
            expected=statement.gpu.digest,
            reason="the GPU reports are not the ones that the quote binds",
        ),
        check(
            "channel.gpu_age",
            passed=statement.gpu.age_s <= MAX_GPU_AGE_S,
            observed=f"{statement.gpu.age_s} s",
            expected=f"at most {MAX_GPU_AGE_S} s",
            reason="the GPU reports are too old",
        ),
    ]


def _expect_checks(statement: ChannelStatement, expect: Expectation) -> list[Check]:
    roots = [model.root for model in statement.models]
    contents = [model.content_root for model in statement.models]
    asked: list[tuple[str, str, list[str]]] = [
        ("expect.launch", expect.launch, [statement.launch_digest]),
        ("expect.service", expect.service, [statement.service_id]),
        ("expect.owner", expect.owner, [statement.owner_key]),
        ("expect.model_root", expect.model_root, roots),
        ("expect.content_root", expect.content_root, contents),
    ]
    checks = []
    for name, expected, observed in asked:
        seen = ", ".join(observed) or "none"
        if not expected:
            checks.append(not_asked(name, seen))
            continue
        checks.append(
            check(
                name,
                passed=expected in observed,
                observed=seen,
                expected=expected,
                reason="the guest serves something else than this client expects",
            )
        )
    return checks


def _device(value: Any) -> DeviceEvidence:
    section = Section(value, where="channel evidence.devices")
    device = DeviceEvidence(
        arch=section.text("arch"),
        uuid=section.text("uuid"),
        report=_unb64(section.text("report")),
        chain=_unb64(section.text("chain")),
    )
    section.finish()
    return device


def _node(text: str) -> bytes:
    if len(text) != 2 * merkle.HASH_SIZE or not set(text) <= set("0123456789abcdef"):
        raise FormatError("channel evidence: path node is not 64 lower-case hex digits")
    return bytes.fromhex(text)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unb64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError("channel evidence: not base64") from error
    if _b64(data) != text:
        raise FormatError("channel evidence: base64 is not canonical")
    return data
