"""The second engine: a TDX quote verified in pure Python over ``cryptography``.

It shares nothing with the first one but the strict parser in front of both: own chain building,
own revocation, own TCB matching. Where a policy demands agreement both must say the same; in tests
each is the other's oracle. Steps cite docs/spec-evidence.md §3.2.
"""

from __future__ import annotations

import hmac
from datetime import datetime
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric import ec

from cai.attest.certificates import LIBRARY_ERRORS
from cai.attest.tdx.attributes import attribute_errors, stamp
from cai.attest.tdx.collateral import Collateral, members_of
from cai.attest.tdx.facts import TdxFacts
from cai.attest.tdx.pck import PckExtension, pck_extension
from cai.attest.tdx.quote import TD15, Quote
from cai.attest.tdx.signed import (
    PCK,
    PCK_CA,
    ROOT,
    Revocation,
    chain_to_root,
    check_signature,
    signed_part,
)
from cai.attest.tdx.signed_json import Members
from cai.attest.tdx.tcb import (
    Platform,
    SvnLevel,
    TcbResult,
    check_masked,
    evaluate,
    qe_level,
    svn_levels,
)
from cai.errors import EvidenceRefused

QE_DEBUG = 0x02
"""Bit of attributes byte 0 of an SGX report."""

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
    lists = Revocation(members, root, now)
    # (b) Chains of the platform and of the two signers, to the pinned root.
    pck = chain_to_root(quote.pck_chain, "PCK chain", (PCK, PCK_CA, ROOT), root, now)
    lists.clear(pck)
    # (c), (d) What Intel signed, within its window, for this kind of TEE.
    info, info_start, info_end = signed_part(members, "tcb_info", lists, root, now)
    if info.text("id") != "TDX" or info.integer("version", _MAX_NUMBER) != 3:
        raise EvidenceRefused("TCB information is not of TDX, version 3")
    identity, identity_start, identity_end = signed_part(members, "qe_identity", lists, root, now)
    if identity.text("id") != "TD_QE" or identity.integer("version", _MAX_NUMBER) != 2:
        raise EvidenceRefused("QE identity is not of the TD quoting enclave, version 2")
    platform = pck_extension(pck[0])
    if info.hex("fmspc", 6) != platform.fmspc or info.hex("pceId", 2) != platform.pce_id:
        raise EvidenceRefused("TCB information is of another platform family")
    # (e) The quoting enclave: signed by this platform, Intel's, and it vouches for the key.
    check_signature(pck[0].public_key(), quote.qe_signature, quote.qe_report, "QE report")
    enclave = _quoting_enclave(quote, identity)
    # (f) The quote itself.
    check_signature(_attestation_key(quote.attestation_key), quote.signature, quote.signed, "quote")
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


def _attestation_key(point: bytes) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + point)
    except LIBRARY_ERRORS as error:
        raise EvidenceRefused("the attestation key is not on the curve") from error


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
