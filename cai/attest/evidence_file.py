"""Evidence in a file: what ``cai attest`` writes and ``cai verify`` reads (spec-evidence §8).

Three forms are read: our own JSON, the evidence object of Trustee's attesters, and a bare quote.
A file comes from anywhere; what it says that report data or a nonce should be is only what its
writer says, and the verdict tells so.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cai import jcs
from cai.attest.anchors import TrustAnchors
from cai.attest.evidence import DeviceEvidence, Evidence
from cai.attest.facts import Facts
from cai.attest.gpu.ocsp_store import OcspStore
from cai.attest.gpu.rim_store import RimStore
from cai.attest.policy import VerificationPolicy
from cai.attest.statement import ChannelStatement, Purpose, report_data
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.tdx.verify import NO_COLLATERAL
from cai.attest.verdict import Binding, Check, Verdict, check
from cai.attest.verify import verify_evidence
from cai.errors import FormatError, InputError, LimitExceeded, SettingError
from cai.settings import Section

VERSION = 1
"""Version of our own form."""

MAX_EVIDENCE_FILE = 4 * 1024 * 1024
"""Largest evidence file that is read, bytes."""

MAX_DEVICES = 16
"""Most devices in one file."""

RISK_FRESHNESS = (
    "freshness is not asked: nobody says what the report data should be, so this evidence may be"
    " old or made for somebody else"
)


@dataclass(frozen=True, slots=True)
class EvidenceFile:
    """One guest's evidence as a file carries it.

    Attributes:
        evidence: quote, devices, event log.
        statement: canonical bytes of the channel statement that the quote binds, if there is one.
        report_data: what its writer says the quote carries.
        gpu_nonce: the nonce of the device reports, as its writer says.
    """

    evidence: Evidence
    statement: bytes | None = None
    report_data: bytes | None = None
    gpu_nonce: bytes | None = None

    def encode(self) -> bytes:
        """Our own form: RFC 8785 JSON, bulk bytes in base64."""
        body: dict[str, Any] = {
            "cai-evidence": VERSION,
            "quote": _b64(self.evidence.quote),
            "devices": [
                {
                    "arch": device.arch, "uuid": device.uuid, "report": _b64(device.report),
                    "chain": _b64(device.chain),
                }
                for device in self.evidence.devices
            ],
        }  # fmt: skip
        if self.evidence.event_log is not None:
            body["event_log"] = _b64(self.evidence.event_log)
        if self.statement is not None:
            body["statement"] = self.statement.decode("utf-8")
        for name, value in (("report_data", self.report_data), ("gpu_nonce", self.gpu_nonce)):
            if value is not None:
                body[name] = value.hex()
        return jcs.canonical(body)


def decode_evidence(data: bytes, *, where: str) -> EvidenceFile:
    """Read a file of any of the three forms.

    Args:
        data: the file.
        where: names it in errors.

    Raises:
        LimitExceeded: longer than ``MAX_EVIDENCE_FILE``.
        FormatError, SettingError: JSON of neither form.
    """
    if len(data) > MAX_EVIDENCE_FILE:
        raise LimitExceeded(f"{where}: {len(data)} bytes, at most {MAX_EVIDENCE_FILE} are accepted")
    if data[:1] != b"{":
        return EvidenceFile(Evidence(data))
    value = jcs.parse(data, what=where, limit=MAX_EVIDENCE_FILE)
    section = Section(value, where=where)
    if not section.has("cai-evidence"):
        return _trustee(section)
    section.integer("cai-evidence", least=VERSION, most=VERSION, unit="(the format's version)")
    devices = section.raw("devices") if section.has("devices") else []
    if not isinstance(devices, list) or len(devices) > MAX_DEVICES:
        raise FormatError(f"{where}: devices must be a list of at most {MAX_DEVICES}")
    statement = section.text("statement") if section.has("statement") else None
    found = EvidenceFile(
        Evidence(
            quote=_unb64(section.text("quote"), where),
            devices=tuple(_device(item, where) for item in devices),
            event_log=_event_log(section, "event_log"),
        ),
        statement=None if statement is None else _utf8(statement, where),
        report_data=_hex(section, "report_data", 64),
        gpu_nonce=_hex(section, "gpu_nonce", 32),
    )
    section.finish()
    return found


def verify_file(
    file: EvidenceFile,
    *,
    subject: str,
    expected_report_data: bytes | None,
    policy: VerificationPolicy,
    anchors: TrustAnchors,
    collateral: CollateralStore,
    now: datetime,
    rims: RimStore | None = None,
    ocsp: OcspStore | None = None,
) -> tuple[Verdict, Facts | None]:
    """Make every check of a file's evidence (spec-evidence §8).

    Args:
        file: as ``verify_hard``, which makes layer 1.
        subject: as there.
        expected_report_data: as there.
        policy: layer 2.
        anchors: as there.
        collateral: as there.
        now: as there.
        rims: as there.
        ocsp: as there.

    Returns:
        The verdict, and the facts if it passed.
    """
    verdict, facts = verify_hard(
        file, subject=subject, expected_report_data=expected_report_data,
        require_agreement=policy.tdx.require_agreement, anchors=anchors, collateral=collateral,
        now=now, rims=rims, ocsp=ocsp,
    )  # fmt: skip
    if facts is None:
        return verdict, None
    verdict = policy.apply(verdict, facts, now=now)
    return verdict, facts if verdict.passed else None


def verify_hard(
    file: EvidenceFile,
    *,
    subject: str,
    expected_report_data: bytes | None,
    require_agreement: bool,
    anchors: TrustAnchors,
    collateral: CollateralStore,
    now: datetime,
    rims: RimStore | None = None,
    ocsp: OcspStore | None = None,
) -> tuple[Verdict, Facts | None]:
    """Layer 1 of a file's evidence: the checks in code.

    Args:
        file: the evidence.
        subject: what is verified, as the verdict names it.
        expected_report_data: the 64 bytes that the verifier expects; ``None`` asks only that a
            statement or the file's own word fit the quote.
        require_agreement: the second TDX engine must say the same as the first.
        anchors: trusted roots.
        collateral: Intel's statements about platforms.
        now: time of the verification.
        rims: NVIDIA's reference measurements.
        ocsp: NVIDIA's answers about certificates.

    Returns:
        The verdict, and the facts if it passed.
    """
    checks: list[Check] = []
    statement: ChannelStatement | None = None
    expected, nonce, binding = file.report_data, file.gpu_nonce, Binding.NONE
    if file.statement is not None:
        # (1) A statement's words count once the quote binds them.
        try:
            statement = ChannelStatement.decode(file.statement)
        except (InputError, SettingError) as error:
            failed = check("evidence.statement", passed=False, reason=error.message)
            return Verdict(subject, (failed,), simulated=anchors.simulated), None
        expected = report_data(file.statement, Purpose.CHANNEL)
        nonce = bytes.fromhex(statement.gpu.nonce)
        checks.append(_gpu_digest(statement, file.evidence))
    if expected_report_data is not None:
        # (2) What the verifier knows stands above what the file says.
        if expected not in (None, expected_report_data):
            checks.append(check("evidence.report_data", passed=False,
                                reason="the file is of other report data"))  # fmt: skip
        expected, binding = expected_report_data, Binding.TOKEN
    verdict, facts = verify_evidence(
        file.evidence, subject=subject, report_data=expected, gpu_nonce=nonce, anchors=anchors,
        collateral=collateral, now=now, require_agreement=require_agreement, rims=rims, ocsp=ocsp,
    )  # fmt: skip
    risks = () if expected_report_data else (RISK_FRESHNESS,)
    verdict = verdict.extended(
        checks, binding=binding, residual_risks=(*verdict.residual_risks, *risks)
    )
    if facts is None or not verdict.passed:
        return verdict, None
    return verdict, facts if statement is None else facts.with_statement(statement)


def undecided(verdict: Verdict) -> tuple[Check, ...]:
    """The failures, if every one of them says only that something to verify with is absent."""
    failures = verdict.failures
    return failures if failures and all(_absence(item) for item in failures) else ()


def _absence(item: Check) -> bool:
    if item.name == "tdx.collateral":
        return item.reason == NO_COLLATERAL
    return item.name.endswith((".rim_compared", ".ocsp_age")) and item.observed == "none"


def _gpu_digest(statement: ChannelStatement, evidence: Evidence) -> Check:
    observed = evidence.gpu_digest.hex()
    return check(
        "evidence.gpu_digest", passed=observed == statement.gpu.digest, observed=observed,
        expected=statement.gpu.digest, reason="the GPU reports are not those of the statement",
    )  # fmt: skip


def _trustee(section: Section) -> EvidenceFile:
    """``{"quote": base64, "cc_eventlog": base64 or null}``, as Trustee's attesters send."""
    found = EvidenceFile(
        Evidence(
            quote=_unb64(section.text("quote"), section.where),
            event_log=_event_log(section, "cc_eventlog"),
        )
    )
    section.finish()
    return found


def _event_log(section: Section, name: str) -> bytes | None:
    return _unb64(section.text(name), section.where) if section.has(name) else None


def _device(value: Mapping[str, Any], where: str) -> DeviceEvidence:
    section = Section(value, where=f"{where}: devices")
    found = DeviceEvidence(
        arch=section.text("arch"),
        uuid=section.text("uuid", "unknown"),
        report=_unb64(section.text("report"), section.where),
        chain=_unb64(section.text("chain"), section.where),
    )
    section.finish()
    return found


def _hex(section: Section, name: str, size: int) -> bytes | None:
    if not section.has(name):
        return None
    text = section.text(name)
    if len(text) != 2 * size or not set(text) <= set("0123456789abcdef"):
        raise FormatError(f"{section.where}: {name} must be {2 * size} lower-case hex digits")
    return bytes.fromhex(text)


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"{where}: lone surrogate") from error


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unb64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{where}: not base64") from error
