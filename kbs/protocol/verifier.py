"""What evidence is verified with, exchangeable as a whole while the broker runs.

The roots are fixed when the broker opens. Intel's collateral and NVIDIA's files age and are
replaced on disk; one verification sees one consistent set of them, never half of an exchange.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from cai.attest.anchors import TrustAnchors
from cai.attest.evidence import Evidence
from cai.attest.facts import Facts
from cai.attest.gpu.ocsp_store import OcspStore
from cai.attest.gpu.rim_store import RimStore
from cai.attest.rcar import Attestation
from cai.attest.tdx.collateral import CollateralStore
from cai.attest.verdict import Verdict
from cai.attest.verify import verify_evidence
from kbs.names import Realm
from kbs.protocol.attestation import Verified, verify_attestation


@dataclass(frozen=True, slots=True)
class Endorsements:
    """What vendors say about platforms and devices, as loaded from files.

    Attributes:
        collateral: Intel's statements about platforms.
        rims: NVIDIA's reference measurements; ``None`` does not compare.
        ocsp: NVIDIA's revocation answers; ``None`` does not ask.
    """

    collateral: CollateralStore
    rims: RimStore | None = None
    ocsp: OcspStore | None = None


class Verifier:
    """Verifies evidence of one realm; safe to call from several threads.

    Args:
        anchors: the roots to trust.
        realm: of the broker; another kind of roots fails every verification.
        endorsements: the first set.
    """

    def __init__(self, anchors: TrustAnchors, realm: Realm, endorsements: Endorsements) -> None:
        self.anchors = anchors
        self.realm = realm
        self._endorsements = endorsements

    @property
    def endorsements(self) -> Endorsements:
        """The set in force."""
        return self._endorsements

    def exchange(self, endorsements: Endorsements) -> None:
        """Use another set from the next verification on."""
        self._endorsements = endorsements

    def attestation(
        self, attestation: Attestation, *, nonce: str, now: datetime, require_agreement: bool
    ) -> Verified:
        """Verify the evidence of one protocol session (``verify_attestation``)."""
        used = self._endorsements
        return verify_attestation(
            attestation, nonce=nonce, realm=self.realm, anchors=self.anchors,
            collateral=used.collateral, now=now, require_agreement=require_agreement,
            rims=used.rims, ocsp=used.ocsp,
        )  # fmt: skip

    def evidence(
        self, evidence: Evidence, *, subject: str, report_data: bytes, gpu_nonce: bytes | None,
        now: datetime, require_agreement: bool,
    ) -> tuple[Verdict, Facts | None]:  # fmt: skip
        """Verify evidence outside a protocol session (``verify_evidence``)."""
        used = self._endorsements
        return verify_evidence(
            evidence, subject=subject, report_data=report_data, gpu_nonce=gpu_nonce,
            anchors=self.anchors, collateral=used.collateral, now=now,
            require_agreement=require_agreement, rims=used.rims, ocsp=used.ocsp,
        )  # fmt: skip
