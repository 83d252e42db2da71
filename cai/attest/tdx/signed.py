"""What Intel signed, verified in pure Python: chains, revocation lists, signed texts.

Parts of the second engine (docs/spec-evidence.md §3.2) that also look at collateral by itself,
without a quote, when it is fetched or shown.
"""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from cai.attest.certificates import LIBRARY_ERRORS, common_name, load_chain, verify_chain
from cai.attest.tdx.collateral import Collateral, members_of
from cai.attest.tdx.signed_json import Members
from cai.errors import EvidenceRefused, FormatError

PCK_CHAIN = 3
SIGNER_CHAIN = 2
"""Certificates in the chain of a quote, and in those of signed collateral."""

PCK = ("Intel SGX PCK Certificate",)
PCK_CA = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
ROOT = ("Intel SGX Root CA",)
SIGNER = ("Intel SGX TCB Signing",)



def verify_collateral(collateral: Collateral, *, root: bytes, now: datetime) -> None:
    """Verify collateral by itself: every signature and window, to the pinned root.

    Raises:
        EvidenceRefused: naming the first part that fails.
        FormatError, LimitExceeded: a part is malformed.
    """
    now = now.replace(microsecond=0)
    members = members_of(collateral)
    lists = Revocation(members, root, now)
    issuer = _platform_ca(members["pck_crl_issuer_chain"], root, now)
    lists.of_platforms(issuer)
    lists.clear_issuer(issuer)
    for name in ("tcb_info", "qe_identity"):
        signed_part(members, name, lists, root, now)


def _platform_ca(pem: str, root: bytes, now: datetime) -> x509.Certificate:
    """The Platform or Processor CA, which the root must have issued."""
    what = "PCK revocation list's chain"
    chain = load_chain(pem.encode(errors="replace"), what=what)
    if len(chain) != SIGNER_CHAIN or chain[1].public_bytes(Encoding.DER) != root:
        raise EvidenceRefused(f"{what} does not end in the pinned root")
    issuer = chain[0]
    try:
        issuer.verify_directly_issued_by(chain[1])
        basic = issuer.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (*LIBRARY_ERRORS, x509.ExtensionNotFound) as error:
        raise EvidenceRefused(f"{what} is not signed by the pinned root") from error
    valid = issuer.not_valid_before_utc <= now <= issuer.not_valid_after_utc
    if not basic.ca or not valid or common_name(issuer) not in PCK_CA:
        raise EvidenceRefused(f"{what}: not a platform authority that is valid at this time")
    return issuer


class Revocation:
    """Both revocation lists; a list that cannot be verified revokes everything."""

    def __init__(self, members: dict[str, str], root: bytes, now: datetime) -> None:
        self._now = now
        self._root_list = _load_list(members["root_ca_crl"], "root revocation list")
        self._pck_list = _load_list(members["pck_crl"], "PCK revocation list")
        self.ends: list[datetime] = []
        self.signers: list[x509.Certificate] = []
        try:
            anchor = x509.load_der_x509_certificate(root)
        except LIBRARY_ERRORS as error:
            raise FormatError("the root is not a certificate") from error
        self._verify(self._root_list, anchor)
        self._absent(self._root_list, anchor)

    def clear(self, chain: tuple[x509.Certificate, ...]) -> None:
        """Refuse a verified chain of which any member is revoked."""
        if len(chain) == PCK_CHAIN:
            self.of_platforms(chain[1])
            self._absent(self._pck_list, chain[0])
        else:
            self.signers += chain
        self._absent(self._root_list, chain[-2])

    def of_platforms(self, issuer: x509.Certificate) -> None:
        """Verify the list of revoked platforms, which ``issuer`` must have signed."""
        self._verify(self._pck_list, issuer)

    def clear_issuer(self, issuer: x509.Certificate) -> None:
        """Refuse a Platform or Processor CA that the root has revoked."""
        self._absent(self._root_list, issuer)

    def _verify(self, revoked: x509.CertificateRevocationList, issuer: x509.Certificate) -> None:
        try:
            start, end = revoked.last_update_utc, revoked.next_update_utc
            key = issuer.public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise EvidenceRefused("a revocation list's issuer has no elliptic-curve key")
            genuine = revoked.issuer == issuer.subject and revoked.is_signature_valid(key)
            strange = any(extension.critical for extension in revoked.extensions)
        except LIBRARY_ERRORS as error:
            raise FormatError("revocation list: unusable") from error
        if not genuine:
            raise EvidenceRefused("a revocation list is not signed by its issuer")
        if strange:  # it could make the list a partial one
            raise EvidenceRefused("a revocation list has an unknown critical extension")
        if end is None or not start <= self._now < end:
            raise EvidenceRefused("a revocation list is not valid at this time")
        self.ends.append(end)

    def _absent(
        self, revoked: x509.CertificateRevocationList, certificate: x509.Certificate
    ) -> None:
        try:
            found = revoked.get_revoked_certificate_by_serial_number(certificate.serial_number)
        except LIBRARY_ERRORS as error:
            raise FormatError("revocation list: unusable") from error
        if found is not None:
            raise EvidenceRefused(f"{common_name(certificate)!r} is revoked")


def _load_list(text: str, what: str) -> x509.CertificateRevocationList:
    try:
        return x509.load_der_x509_crl(bytes.fromhex(text))
    except LIBRARY_ERRORS as error:
        raise FormatError(f"{what}: not the hex of DER") from error


def chain_to_root(
    pem: bytes, what: str, names: tuple[tuple[str, ...], ...], root: bytes, now: datetime
) -> tuple[x509.Certificate, ...]:
    """Verify a PEM chain, leaf first, whose members must have the expected names.

    Raises:
        EvidenceRefused: it does not lead to the root, or a name is another.
        FormatError, LimitExceeded: it is no PEM chain.
    """
    chain = load_chain(pem, what=what)
    if len(chain) != len(names):
        raise EvidenceRefused(f"{what}: {len(chain)} certificates, expected {len(names)}")
    for certificate, allowed in zip(chain, names, strict=True):
        if common_name(certificate) not in allowed:
            raise EvidenceRefused(f"{what}: unexpected name {common_name(certificate)[:60]!r}")
    verify_chain(chain, root=root, now=now)
    return chain


def signed_part(
    members: dict[str, str], name: str, lists: Revocation, root: bytes, now: datetime
) -> tuple[Members, datetime, datetime]:
    """Verify a signed text: its chain, that nobody there is revoked, signature and window.

    Args:
        members: of the collateral.
        name: ``tcb_info`` or ``qe_identity``.
        lists: revocation lists.
        root: DER of the pinned root.
        now: time of the verification.

    Returns:
        The text parsed, and when it was issued and expires.

    Raises:
        EvidenceRefused: something does not verify.
        FormatError, LimitExceeded: a part is malformed.
    """
    chain = chain_to_root(
        members[f"{name}_issuer_chain"].encode(errors="replace"), f"{name} issuer chain",
        (SIGNER, ROOT), root, now,
    )  # fmt: skip
    lists.clear(chain)
    text = members[name]
    try:
        signature = bytes.fromhex(members[f"{name}_signature"])
        data = text.encode("utf-8")
    except ValueError as error:
        raise FormatError(f"{name}: signature is not hex, or text is not UTF-8") from error
    # The exact text as delivered: another spelling of the same JSON is another message.
    check_signature(chain[0].public_key(), signature, data, name)
    value = Members.parse(text, name)
    start, end = (_moment(value, member) for member in ("issueDate", "nextUpdate"))
    if not start <= now <= end:
        raise EvidenceRefused(f"{name} is not valid at this time")
    return value, start, end


def _moment(value: Members, name: str) -> datetime:
    try:
        moment = datetime.fromisoformat(value.text(name))
        if moment.tzinfo is None:
            raise FormatError(f"{value.where}: {name} has no time zone")
        return moment.astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise FormatError(f"{value.where}: {name} is not a time") from error


def check_signature(key: object, signature: bytes, data: bytes, what: str) -> None:
    """ECDSA P-256 with SHA-256, signature as r ‖ s."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise EvidenceRefused(f"{what}: the key is not of P-256")
    if len(signature) != 64:
        raise FormatError(f"{what}: signature of {len(signature)} bytes, expected 64")
    r, s = (int.from_bytes(signature[at : at + 32], "big") for at in (0, 32))
    try:
        key.verify(encode_dss_signature(r, s), data, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, *LIBRARY_ERRORS) as error:
        raise EvidenceRefused(f"{what}: the signature is wrong") from error
