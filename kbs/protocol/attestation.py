"""The key broker's side of the protocol as pure steps: messages and time in, verdicts out.

Sockets, the database and the clock are in ``kbs.release.broker``; this can be replayed in a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256

from cai.attest.anchors import TrustAnchors
from cai.attest.evidence import Evidence
from cai.attest.facts import Facts
from cai.attest.gpu.ocsp_store import OcspStore
from cai.attest.gpu.rim_store import RimStore
from cai.attest.rcar import (
    FLAT_VERSION,
    TEE,
    VERSION,
    Attestation,
    Request,
    init_data_digest,
    parse_additional_evidence,
    parse_tdx_evidence,
)
from cai.attest.statement import stock_report_data
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.verdict import Binding, Verdict, check
from cai.attest.verify import verify_evidence
from cai.errors import FormatError, InputError, SettingError
from kbs.names import Realm

SERVED_VERSIONS = (VERSION, FLAT_VERSION)
"""Protocol versions whose evidence is verified."""

OLD_VERSIONS = ("0.1.0", "0.1.1")
"""Versions that get a challenge and then a refusal: their answer needs PKCS#1 v1.5."""

MR_CONFIG_ID_SIZE = 48
"""Bytes of MRCONFIGID, which carries the digest of the init-data."""

SUBJECT = "tdx guest at attest"
"""What a verdict of this module is about."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The outcome of one attestation.

    Attributes:
        verdict: every hard check.
        facts: what they establish; ``None`` when one failed.
        evidence: SHA-256 digests of what was looked at, hex.
    """

    verdict: Verdict
    facts: Facts | None
    evidence: dict[str, str]


def version_mismatch(version: str) -> FormatError:
    """The refusal of a protocol version, in the words that stock clients look for."""
    return FormatError(
        f"KBS Client Protocol Version Mismatch: expect ={VERSION} while the request is "
        f"{version[:32]}",
        hint=f"use a client of protocol {VERSION}",
        code="protocol-version",
    )


def accept_request(request: Request) -> None:
    """Check the first message.

    Raises:
        FormatError: a version that gets no challenge, or another TEE than ``tdx``.
    """
    if request.version not in (*SERVED_VERSIONS, *OLD_VERSIONS):
        raise version_mismatch(request.version)
    if request.tee != TEE:
        raise FormatError(
            f"TEE {request.tee[:32]!r} is not served here", hint="this broker serves tdx"
        )


def parse_attestation(body: bytes, *, version: str, nonce: str) -> Attestation:
    """Read the evidence message of a session.

    Args:
        body: the message.
        version: the version that the session began with.
        nonce: the session's challenge.

    Raises:
        FormatError, LimitExceeded: another version or form.
    """
    if version == VERSION:
        return Attestation.parse(body)
    if version == FLAT_VERSION:
        return Attestation.parse_flat(body, nonce=nonce)
    raise version_mismatch(version)


def verify_attestation(
    attestation: Attestation,
    *,
    nonce: str,
    realm: Realm,
    anchors: TrustAnchors,
    collateral: CollateralStore,
    now: datetime,
    require_agreement: bool = False,
    rims: RimStore | None = None,
    ocsp: OcspStore | None = None,
) -> Verified:
    """Verify the evidence of one session (spec-evidence §1).

    Args:
        attestation: the message.
        nonce: the challenge of the session it arrived in.
        realm: of this broker.
        anchors: the roots to trust.
        collateral: Intel's statements about platforms.
        now: the broker's clock.
        require_agreement: both TDX engines must say the same.
        rims: NVIDIA's reference measurements; ``None`` does not compare.
        ocsp: NVIDIA's revocation answers; ``None`` does not ask.

    Returns:
        Verdict and facts; evidence of a wrong form is a failed check, not an error.
    """
    digests = {"additional_sha256": _digest(attestation.additional_evidence.encode("utf-8"))}
    # (1) The message is of this session.
    fresh = check(
        "rcar.nonce",
        passed=attestation.nonce == nonce,
        observed=attestation.nonce[:64],
        expected=nonce,
        reason="the evidence answers another challenge",
    )
    # (2) The parts have their form; only known members, none twice.
    try:
        quote, event_log = parse_tdx_evidence(attestation.primary_evidence)
        devices, statement = parse_additional_evidence(attestation.additional_evidence)
        wanted_init = None
        if attestation.init_data is not None:
            wanted_init = init_data_digest(attestation.init_data, size=MR_CONFIG_ID_SIZE).hex()
    except (InputError, SettingError) as error:
        malformed = check("rcar.form", passed=False, reason=error.message)
        return Verified(_verdict((fresh, malformed), realm), None, digests)
    evidence = Evidence(quote=quote, devices=devices, event_log=event_log)
    digests |= {"quote_sha256": _digest(quote), "gpu_digest": evidence.gpu_digest.hex()}
    if event_log is not None:
        digests["event_log_sha256"] = _digest(event_log)
    # (3) The quote binds nonce, key and the exact additional evidence; hard checks of all parts.
    verdict, facts = verify_evidence(
        evidence,
        subject=SUBJECT,
        report_data=stock_report_data(attestation.report_digest),
        gpu_nonce=attestation.gpu_nonce,
        anchors=anchors,
        collateral=collateral,
        now=now,
        require_agreement=require_agreement,
        rims=rims,
        ocsp=ocsp,
    )
    checks = [fresh, check("rcar.form", passed=True), *verdict.checks]
    # (4) A simulated platform can never speak in the production realm, nor the other way round.
    simulated = realm is Realm.SIMULATED
    checks.append(
        check(
            "kbs.realm",
            passed=anchors.simulated is simulated,
            observed="simulated" if anchors.simulated else "production",
            expected=realm.value,
            reason="the trust anchors are of another realm",
        )
    )
    # (5) Init-data, where the guest names some, is what MRCONFIGID says.
    if wanted_init is not None and facts is not None:
        checks.append(
            check(
                "tdx.init_data",
                passed=facts.tdx.body["mr_config_id"] == wanted_init,
                observed=facts.tdx.body["mr_config_id"],
                expected=wanted_init,
                reason="MRCONFIGID is not the digest of the init-data",
            )
        )
    result = Verdict(
        subject=SUBJECT,
        checks=tuple(checks),
        simulated=verdict.simulated or simulated,
        binding=Binding.KEY,
        hardware=verdict.hardware,
        unsafe=verdict.unsafe,
        residual_risks=verdict.residual_risks,
    )
    if not result.passed or facts is None:
        return Verified(result, None, digests)
    # (6) Only now is the statement bound: it is part of the text whose digest the quote carries.
    if statement is not None:
        facts = facts.with_statement(statement)
    return Verified(result, facts, digests)


def _verdict(checks: tuple[object, ...], realm: Realm) -> Verdict:
    return Verdict(
        subject=SUBJECT,
        checks=checks,  # type: ignore[arg-type]
        simulated=realm is Realm.SIMULATED,
        binding=Binding.KEY,
    )


def _digest(data: bytes) -> str:
    return sha256(data).hexdigest()
