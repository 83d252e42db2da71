"""The second engine: a TDX quote verified in pure Python over ``cryptography``.

It shares nothing with the first one but the strict parser in front of both: own chain building,
own revocation, own TCB matching. Where a policy demands agreement both must say the same; in tests
each is the other's oracle. Steps cite docs/spec-evidence.md §3.2.
"""

from __future__ import annotations

import hmac
from datetime import datetime, timedelta
from hashlib import sha256

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cai.attest.certificates import LIBRARY_ERRORS, common_name, load_chain, verify_chain
from cai.attest.facts import TdxFacts
from cai.attest.tdx.attributes import attribute_errors, stamp
from cai.attest.tdx.collateral import Collateral, members_of
from cai.attest.tdx.pck import PckExtension, pck_extension
from cai.attest.tdx.quote import TD15, Quote
from cai.attest.tdx.tcb import (
    Members,
    Platform,
    SvnLevel,
    TcbResult,
    check_masked,
    evaluate,
    qe_level,
    svn_levels,
)
from cai.errors import EvidenceRefused, FormatError

PCK_CHAIN = 3
SIGNER_CHAIN = 2
"""Certificates in the chain of a quote, and in those of signed collateral."""

QE_DEBUG = 0x02
"""Bit of attributes byte 0 of an SGX report."""

_PCK = ("Intel SGX PCK Certificate",)
_PCK_CA = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
_ROOT = ("Intel SGX Root CA",)
_SIGNER = ("Intel SGX TCB Signing",)

_MAX_NUMBER = 2**31


def verify_pure(quote: Quote, collateral: Collateral, *, root: bytes, now: datetime) -> TdxFacts:
    """Verify a parsed quote completely.

    Args:
        quote: from ``parse_quote``; that was step (a).
        collateral: Intel's statements, nothing of them trusted yet.
        root: DER of the pinned root.
        now: time of the verification, timezone-aware.

    Raises:
        EvidenceRefused: naming the first step that fails.
        FormatError, LimitExceeded: a part is malformed.
    """
    # Whole seconds, as certificates count and as the other engine does.
    now = now.replace(microsecond=0)
    members = members_of(collateral)
    lists = _Revocation(members, root, now)
    # (b) Chains of the platform and of the two signers, to the pinned root.
    pck = _chain(quote.pck_chain, "PCK chain", (_PCK, _PCK_CA, _ROOT), root, now)
    lists.clear(pck)
    # (c), (d) What Intel signed, within its window, for this kind of TEE.
    info, info_start, info_end = _signed(members, "tcb_info", lists, root, now)
    if info.text("id") != "TDX" or info.integer("version", _MAX_NUMBER) != 3:
        raise EvidenceRefused("TCB information is not of TDX, version 3")
    identity, identity_start, identity_end = _signed(members, "qe_identity", lists, root, now)
    if identity.text("id") != "TD_QE" or identity.integer("version", _MAX_NUMBER) != 2:
        raise EvidenceRefused("QE identity is not of the TD quoting enclave, version 2")
    platform = pck_extension(pck[0])
    if info.hex("fmspc", 6) != platform.fmspc or info.hex("pceId", 2) != platform.pce_id:
        raise EvidenceRefused("TCB information is of another platform family")
    # (e) The quoting enclave: signed by this platform, Intel's, and it vouches for the key.
    _check(pck[0].public_key(), quote.qe_signature, quote.qe_report, "QE report")
    enclave = _quoting_enclave(quote, identity)
    # (f) The quote itself.
    _check(_attestation_key(quote.attestation_key), quote.signature, quote.signed, "quote")
    # (g) TCB level; (h) attributes that no policy lets in.
    result = evaluate(info, _platform(quote, platform), enclave)
    wrong = attribute_errors(quote)
    if wrong:
        raise EvidenceRefused("; ".join(wrong))
    number = min(info.integer("tcbEvaluationDataNumber", _MAX_NUMBER), _MAX_NUMBER)
    certificates = (*pck, *lists.signers)
    ends = (*lists.ends, info_end, identity_end,
            *(item.not_valid_after_utc for item in certificates))  # fmt: skip
    return _facts(quote, platform, result, number, (min(info_start, identity_start), min(ends)))


class _Revocation:
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
            self._verify(self._pck_list, chain[1])
            self._absent(self._pck_list, chain[0])
        else:
            self.signers += chain
        self._absent(self._root_list, chain[-2])

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
        # A critical extension could make the list a partial one.
        if strange or end is None or not start <= self._now < end:
            raise EvidenceRefused("a revocation list is partial or not valid at this time")
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


def _chain(
    pem: bytes, what: str, names: tuple[tuple[str, ...], ...], root: bytes, now: datetime
) -> tuple[x509.Certificate, ...]:
    chain = load_chain(pem, what=what)
    if len(chain) != len(names):
        raise EvidenceRefused(f"{what}: {len(chain)} certificates, expected {len(names)}")
    for certificate, allowed in zip(chain, names, strict=True):
        if common_name(certificate) not in allowed:
            raise EvidenceRefused(f"{what}: unexpected name {common_name(certificate)[:60]!r}")
    verify_chain(chain, root=root, now=now)
    return chain


def _signed(
    members: dict[str, str], name: str, lists: _Revocation, root: bytes, now: datetime
) -> tuple[Members, datetime, datetime]:
    chain = _chain(
        members[f"{name}_issuer_chain"].encode(errors="replace"), f"{name} issuer chain",
        (_SIGNER, _ROOT), root, now,
    )  # fmt: skip
    lists.clear(chain)
    text = members[name]
    try:
        signature = bytes.fromhex(members[f"{name}_signature"])
        data = text.encode("utf-8")
    except ValueError as error:
        raise FormatError(f"{name}: signature is not hex, or text is not UTF-8") from error
    # The exact text as delivered: another spelling of the same JSON is another message.
    _check(chain[0].public_key(), signature, data, name)
    value = Members.parse(text, name)
    start, end = (_moment(value, member) for member in ("issueDate", "nextUpdate"))
    if not start <= now <= end:
        raise EvidenceRefused(f"{name} is not valid at this time")
    return value, start, end


def _moment(value: Members, name: str) -> datetime:
    try:
        moment = datetime.fromisoformat(value.text(name))
    except ValueError as error:
        raise FormatError(f"{value.where}: {name} is not a time") from error
    if moment.tzinfo is None or abs(moment.utcoffset() or timedelta()) > timedelta(hours=14):
        raise FormatError(f"{value.where}: {name} has no usable time zone")
    return moment


def _attestation_key(point: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + point)
    except LIBRARY_ERRORS as error:
        raise EvidenceRefused("the attestation key is not on the curve") from error


def _check(key: object, signature: bytes, data: bytes, what: str) -> None:
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


def _quoting_enclave(quote: Quote, identity: Members) -> SvnLevel:
    report = quote.qe_report
    binding = sha256(quote.attestation_key + quote.auth_data).digest() + bytes(32)
    if not hmac.compare_digest(report[320:384], binding):
        raise EvidenceRefused("the quoting enclave does not vouch for the attestation key")
    # The identity spells MISCSELECT as the bytes in memory, so little-endian like the report.
    misc = check_masked(
        identity.hex("miscselect", 4), identity.hex("miscselectMask", 4), report[16:20]
    )
    attributes = check_masked(
        identity.hex("attributes", 16), identity.hex("attributesMask", 16), report[48:64]
    )
    product = int.from_bytes(report[256:258], "little")
    if not (
        misc
        and attributes
        and not report[48] & QE_DEBUG
        and report[128:160] == identity.hex("mrsigner", 32)
        and product == identity.integer("isvprodid", 0xFFFF)
    ):
        raise EvidenceRefused("the quoting enclave is not Intel's")
    levels = svn_levels(identity.objects("tcbLevels"))
    return qe_level(levels, int.from_bytes(report[258:260], "little"))


def _platform(quote: Quote, pck: PckExtension) -> Platform:
    body = quote.body
    return Platform(
        components=pck.components,
        pce_svn=pck.pce_svn,
        tee_tcb_svn=body["tcb_svn"],
        tee_tcb_svn2=body["tee_tcb_svn2"] if quote.body_type == TD15 else None,
        seam_signer=body["mrsigner_seam"],
        seam_attributes=body["seam_attributes"],
    )


def _facts(
    quote: Quote, pck: PckExtension, result: TcbResult, number: int,
    window: tuple[datetime, datetime],
) -> TdxFacts:
    return TdxFacts(
        header={name: value.hex() for name, value in quote.header.fields.items()},
        body={name: value.hex() for name, value in quote.body.items()},
        debug=False,
        tcb_status=result.status,
        tcb_date=result.date,
        advisory_ids=result.advisories,
        fmspc=pck.fmspc.hex(),
        ppid=pck.ppid.hex(),
        eval_data_number=number,
        collateral_issued=stamp(window[0]),
        collateral_expires=stamp(window[1]),
        platform_instance_id=pck.platform_instance_id.hex(),
        pck_flags=dict(pck.flags),
    )
