"""All three layers over a file of evidence, offline: what a policy would decide, and why.

Nothing here is a release: the evidence in a file may be old or somebody else's, and the verdict
says so. The steps are those of a release, in the same code (docs/kbs-policies.md §7).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from cai.attest.anchors import TrustAnchors
from cai.attest.evidence_file import EvidenceFile, verify_hard
from cai.attest.gpu.ocsp_store import OcspStore
from cai.attest.gpu.rim_store import RimStore
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.verdict import Verdict
from cai.attest.verify import hardware_identity
from kbs.names import Realm, ResourceName
from kbs.policy.appraisal import Appraisal
from kbs.policy.pool import RegoPool
from kbs.policy.references import References
from kbs.policy.store import Policies
from kbs.protocol.token import USE, TokenContext, ear_claims
from kbs.release.decision import judge

LIFETIME: Final = 300
"""Life of the token that the resource policy is shown, seconds."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What the layers say.

    Attributes:
        hard: layer 1, the checks in code.
        appraisal: layer 2; ``None`` when layer 1 failed.
        verdict: every check of all layers.
    """

    hard: Verdict
    appraisal: Appraisal | None
    verdict: Verdict


def dry_run(
    file: EvidenceFile,
    *,
    subject: str,
    resource: ResourceName,
    policies: Policies,
    references: References,
    pool: RegoPool,
    anchors: TrustAnchors,
    collateral: CollateralStore,
    now: datetime,
    rims: RimStore | None = None,
    ocsp: OcspStore | None = None,
) -> DryRun:
    """Appraise a file of evidence as a release of one resource would.

    Args:
        file: the evidence.
        subject: names it in the verdict.
        resource: what a guest with this evidence would ask for.
        policies: the policies to try.
        references: reference values to try them with.
        pool: evaluates Rego.
        anchors: trusted roots; those of a simulator mark the verdict.
        collateral: Intel's statements about platforms.
        now: time of the appraisal.
        rims: NVIDIA's reference measurements.
        ocsp: NVIDIA's revocation answers.
    """
    # (1) Hard checks, as at attestation, except that nobody asked a fresh question.
    asked = policies.verification is not None and policies.verification.tdx.require_agreement
    hard, facts = verify_hard(
        file, subject=subject, expected_report_data=None, require_agreement=asked,
        anchors=anchors, collateral=collateral, now=now, rims=rims, ocsp=ocsp,
    )  # fmt: skip
    if facts is None:
        return DryRun(hard, None, hard)
    realm = Realm.SIMULATED if anchors.simulated else Realm.PRODUCTION
    context = TokenContext(
        realm.issuer, "dry-run", USE, now, int(now.timestamp()) + LIFETIME, "dry-run"
    )

    def claims(appraisal: Appraisal) -> dict[str, Any]:
        return ear_claims(appraisal, context, evidence={}, simulated=facts.simulated)

    # (2), (3) The code of a release.
    verdict, appraisal = judge(
        facts, resource=resource, realm=realm, policies=policies, references=references,
        pool=pool, claims=claims, hardware=hardware_identity(facts, now=now), now=now,
        hard=hard.checks,
    )  # fmt: skip
    risks = dict.fromkeys((*hard.residual_risks, *verdict.residual_risks))
    return DryRun(hard, appraisal, verdict.extended((), residual_risks=tuple(risks)))
