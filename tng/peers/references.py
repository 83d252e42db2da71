"""What a built-in verification compares with: policy, collateral, roots, reference measurements."""

from __future__ import annotations

from dataclasses import dataclass

from cai.attest.anchors import TrustAnchors, simulated_anchors, vendor_anchors
from cai.attest.gpu.ocsp_store import OcspStore, load_ocsp
from cai.attest.gpu.rim_store import RimStore, load_rims
from cai.attest.policy import VerificationPolicy
from cai.attest.tdx.collateral import CollateralStore, load_collateral
from cai.settings import read_settings_file
from tng.config.trust import BuiltinVerify


@dataclass(frozen=True, slots=True)
class References:
    """Everything that the files of one ``verify`` hold.

    Attributes:
        policy: layer 2.
        anchors: the roots to trust.
        collateral: Intel's statements about platforms.
        rims: NVIDIA's reference measurements; ``None`` does not compare.
        ocsp: NVIDIA's revocation answers; ``None`` does not ask.
    """

    policy: VerificationPolicy
    anchors: TrustAnchors
    collateral: CollateralStore
    rims: RimStore | None
    ocsp: OcspStore | None

    @classmethod
    def load(cls, settings: BuiltinVerify) -> References:
        """Read the files, once.

        Raises:
            CaiError: one is missing or malformed.
        """
        data = read_settings_file(settings.policy, what="verification policy")
        root = settings.simulated_root
        return cls(
            policy=VerificationPolicy.parse(data, where=settings.policy.name),
            anchors=simulated_anchors(root) if root else vendor_anchors(),
            collateral=(
                load_collateral(settings.collateral)
                if settings.collateral
                else CollateralStore.empty()
            ),
            # What is missing in either is not asked; the policy decides whether that will do.
            rims=load_rims(settings.rims, if_available=True) if settings.rims else None,
            ocsp=load_ocsp(settings.ocsp, if_available=True) if settings.ocsp else None,
        )

    @property
    def unsafe(self) -> tuple[str, ...]:
        """The ``unsafe_…`` settings in force beside those of the policy."""
        return ("unsafe_simulated_root",) if self.anchors.simulated else ()
