"""Stock evidence verified in this process, whoever carried it: a certificate or an OHTTP server."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from cai import jcs
from cai.attest.evidence import Evidence
from cai.attest.rcar import parse_additional_evidence, parse_tdx_evidence
from cai.attest.statement import stock_report_data
from cai.attest.verdict import Check, Verdict, check
from cai.attest.verify import verify_evidence
from cai.errors import SettingError
from tng.peers.references import References
from tng.stock.certificate import GPU_CLAIM, GPU_NONCE_CLAIM, CocoEvidence

MAX_EVIDENCE = 16 * 1024 * 1024
"""Largest evidence JSON that is parsed, bytes."""


def verify_built_in(
    evidence: CocoEvidence, about: Iterable[Check], *, references: References, now: datetime
) -> Verdict:
    """Hard checks, what the claims are about, and the owner's policy.

    Args:
        evidence: as received; its claims are bound by the report data.
        about: the checks that the claims are about this peer's key.
        references: policy, collateral and roots.
        now: the clock.

    Raises:
        FormatError, LimitExceeded: the evidence is malformed.
        SettingError: it is of a TEE that cannot be verified here.
    """
    claims, bundle = evidence.claims, bundle_of(evidence)
    policy = references.policy
    verdict, facts = verify_evidence(
        bundle,
        subject="",
        report_data=stock_report_data(evidence.report_data),
        gpu_nonce=gpu_nonce_of(claims, bundle),
        anchors=references.anchors,
        collateral=references.collateral,
        now=now,
        require_agreement=policy.tdx.require_agreement,
        rims=references.rims,
        ocsp=references.ocsp,
    )
    checks = list(about)
    if bundle.devices:
        checks.append(
            check(
                "stock.gpu_digest",
                passed=claims.get(GPU_CLAIM) == bundle.gpu_digest.hex(),
                reason="the GPU evidence is not bound to the peer's key",
            )
        )
    if facts is not None:
        checks += policy.appraise(facts, now=now)
    return verdict.extended(
        checks, unsafe=(*references.unsafe, *verdict.unsafe, *policy.unsafe)
    )


def bundle_of(evidence: CocoEvidence) -> Evidence:
    """The TDX and GPU evidence in stock evidence.

    Raises:
        SettingError: it is of another TEE.
        FormatError, LimitExceeded: it is malformed.
    """
    if evidence.tee != "tdx":
        raise SettingError(f"TEE {evidence.tee[:32]!r} cannot be verified here")
    value = jcs.parse(evidence.evidence, what="evidence", limit=MAX_EVIDENCE)
    quote, event_log = parse_tdx_evidence(value)
    additional = (evidence.additional or b"").decode("utf-8", "replace")
    devices, _statement = parse_additional_evidence(additional)
    return Evidence(quote=quote, devices=devices, event_log=event_log)


def gpu_nonce_of(claims: dict[str, Any], evidence: Evidence) -> bytes | None:
    """The nonce of the GPU reports as the claims name it; their digest is what binds them."""
    if not evidence.devices:
        return None
    try:
        nonce = bytes.fromhex(str(claims.get(GPU_NONCE_CLAIM, "")))
    except ValueError:
        nonce = b""
    return nonce if len(nonce) == 32 else bytes(32)
