"""The simulated NVIDIA's OCSP responder.

It answers for every certificate of the foundry that has an issuer. (ECDSA signatures of answers are
the one thing of a simulator that its seed does not repeat: the library signs them with a fresh
number.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp

from cai.attest.certificates import LIBRARY_ERRORS, common_name
from cai.attest.sim.certificates import Identity
from cai.attest.sim.nvidia import Foundry, Gpu

GOOD, REVOKED, ON_HOLD, UNKNOWN = "good", "revoked", "on-hold", "unknown"


@dataclass(frozen=True, slots=True)
class OcspSettings:
    """How the responder answers.

    Attributes:
        status: common name of a certificate to ``good``, ``revoked``, ``on-hold`` or ``unknown``.
        age: how long before being asked an answer was made.
        lifetime: validity from its making; ``None`` leaves ``nextUpdate`` out.
        unavailable: answer "try later" instead.
        ignore_nonce: leave the request's nonce out.
        signer: common name of another authority of the foundry that signs the answers.
    """

    status: Mapping[str, str] = field(default_factory=dict)
    age: timedelta = timedelta()
    lifetime: timedelta | None = timedelta(hours=12)
    unavailable: bool = False
    ignore_nonce: bool = False
    signer: str = ""


@dataclass(frozen=True, slots=True)
class Responder:
    """Answers requests about the foundry's certificates.

    Attributes:
        links: certificate and issuer, by serial number.
        settings: the dials.
    """

    links: Mapping[int, tuple[x509.Certificate, Identity]]
    settings: OcspSettings = field(default_factory=OcspSettings)

    @classmethod
    def of(
        cls, foundry: Foundry, devices: Iterable[Gpu], settings: OcspSettings | None = None
    ) -> Responder:
        """A responder for a foundry and devices it made."""
        links: dict[int, tuple[x509.Certificate, Identity]] = {}

        def add(part: Identity, issuer: Identity) -> None:
            links[part.certificate.serial_number] = (part.certificate, issuer)

        for identity in foundry.identities.values():
            add(identity, foundry.root)
        above = (foundry.rim_root, *foundry.rim_chain)
        for part, issuer in zip(foundry.rim_chain, above, strict=False):
            add(part, issuer)
        for device in devices:
            provisioner = foundry.provisioners[device.chip.provisioner]
            add(device.boot_rom, provisioner)
            add(provisioner, foundry.identities[device.chip.identity])
        return cls(links, settings or OcspSettings())

    def answer(self, request: bytes, *, now: datetime) -> bytes:
        """The DER of an answer to the DER of a request."""
        try:
            asked = ocsp.load_der_ocsp_request(request)
            serial, algorithm = asked.serial_number, asked.hash_algorithm
            nonces = [item.value.nonce for item in asked.extensions
                      if isinstance(item.value, x509.OCSPNonce)]  # fmt: skip
        except LIBRARY_ERRORS:
            return _failed(ocsp.OCSPResponseStatus.MALFORMED_REQUEST)
        if self.settings.unavailable:
            return _failed(ocsp.OCSPResponseStatus.TRY_LATER)
        link = self.links.get(serial)
        if link is None:
            return _failed(ocsp.OCSPResponseStatus.UNAUTHORIZED)
        nonce = nonces[0] if nonces and not self.settings.ignore_nonce else None
        return self._signed(link, algorithm, nonce, now)

    def about(
        self, certificate: x509.Certificate, *, now: datetime, nonce: bytes | None = None
    ) -> bytes:
        """The DER of an answer about one certificate, as if it had been asked for."""
        link = self.links[certificate.serial_number]
        return self._signed(link, hashes.SHA384(), nonce, now)

    def _signed(
        self,
        link: tuple[x509.Certificate, Identity],
        algorithm: hashes.HashAlgorithm,
        nonce: bytes | None,
        now: datetime,
    ) -> bytes:
        certificate, issuer = link
        settings = self.settings
        made = (now.astimezone(UTC) - settings.age).replace(microsecond=0)
        status = settings.status.get(common_name(certificate), GOOD)
        revoked = status in (REVOKED, ON_HOLD)
        reason = x509.ReasonFlags.key_compromise
        if status == ON_HOLD:
            reason = x509.ReasonFlags.certificate_hold
        cert_status = {GOOD: ocsp.OCSPCertStatus.GOOD, UNKNOWN: ocsp.OCSPCertStatus.UNKNOWN}
        signer = self._signer(issuer)
        builder = (
            ocsp.OCSPResponseBuilder()
            .add_response(
                cert=certificate,
                issuer=issuer.certificate,
                algorithm=algorithm,
                cert_status=cert_status.get(status, ocsp.OCSPCertStatus.REVOKED),
                this_update=made,
                next_update=None if settings.lifetime is None else made + settings.lifetime,
                revocation_time=made if revoked else None,
                revocation_reason=reason if revoked else None,
            )
            .responder_id(ocsp.OCSPResponderEncoding.HASH, signer.certificate)
        )
        if nonce is not None:
            builder = builder.add_extension(x509.OCSPNonce(nonce), critical=False)
        return builder.sign(signer.key, hashes.SHA384()).public_bytes(Encoding.DER)

    def _signer(self, issuer: Identity) -> Identity:
        for _certificate, other in self.links.values():
            if self.settings.signer and common_name(other.certificate) == self.settings.signer:
                return other
        return issuer


def _failed(status: ocsp.OCSPResponseStatus) -> bytes:
    return ocsp.OCSPResponseBuilder.build_unsuccessful(status).public_bytes(Encoding.DER)
