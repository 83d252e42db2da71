"""The first engine, dcap-qvl: everything cryptographic, and one error at its first failure.

It runs with the pinned root, without its network functions and without its policy: a status that
it reports is for ours to judge (docs/spec-evidence.md §3, steps 9 and 10).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import dcap_qvl

from cai.attest.tdx.attributes import stamp
from cai.attest.tdx.collateral import Collateral
from cai.attest.tdx.facts import TdxFacts
from cai.attest.tdx.quote import TD15, Quote
from cai.errors import EvidenceRefused, FormatError

MAX_ENGINE_TEXT = 200
"""Characters of the engine's error text that a verdict carries."""

_ENGINE_NAMES = {
    "tcb_svn": "tee_tcb_svn", "mrsigner_seam": "mr_signer_seam", "rtmr_0": "rt_mr0",
    "rtmr_1": "rt_mr1", "rtmr_2": "rt_mr2", "rtmr_3": "rt_mr3",
}  # fmt: skip
"""Where the engine names a body field otherwise than Trustee does."""


def platform_family(quote: Quote) -> tuple[str, str]:
    """FMSPC in lower-case hex and ``platform`` or ``processor``: look-up terms, unauthenticated.

    Raises:
        FormatError: the certificates in the quote do not tell.
    """
    try:
        unverified = dcap_qvl.parse_quote(quote.data)
        return str(unverified.fmspc()).lower(), str(unverified.ca())
    except ValueError as error:
        raise FormatError(_first_line(error)) from error


def run_engine(
    quote: Quote, collateral: Collateral, *, root: bytes, now: datetime
) -> dict[str, Any]:
    """Verify signatures, chains, revocation, QE identity and TCB level.

    Returns:
        The engine's claims (evidence.md §1.4).

    Raises:
        EvidenceRefused: with the engine's causes.
    """
    seconds = int(now.timestamp())
    try:
        result = dcap_qvl.QuoteVerifier(root).verify_with_policy(
            quote.data,
            dcap_qvl.QuoteCollateralV3.from_json(collateral.text),
            seconds,
            dcap_qvl.QuotePolicy.claims_only(seconds),
        )
        claims: dict[str, Any] = json.loads(result.to_json())
    except (ValueError, OverflowError) as error:
        raise EvidenceRefused(_first_line(error)) from error
    return claims


def disagreements(quote: Quote, claims: Mapping[str, Any]) -> list[str]:
    """Names of the fields in which the engine's claims differ from our parse (step 10)."""
    wrong: list[str] = []
    header = claims.get("header", {})
    expected_header = {
        "version": quote.header.version,
        "attestation_key_type": quote.header.key_type,
        "tee_type": quote.header.tee_type,
        "qe_vendor_id": quote.header.fields["vendor_id"].hex(),
        "user_data": quote.header.fields["user_data"].hex(),
    }
    wrong += [f"header.{name}" for name, value in expected_header.items()
              if header.get(name) != value]  # fmt: skip
    report = claims.get("report", {})
    if quote.body_type == TD15:
        outer = report.get("TD15", {})
        engine = {**outer, **outer.get("base", {})}
    else:
        engine = report.get("TD10", {})
    for name, value in quote.body.items():
        if engine.get(_ENGINE_NAMES.get(name, name)) != value.hex():
            wrong.append(f"body.{name}")
    qe_report = claims.get("qe", {}).get("report", {})
    if qe_report.get("report_data") != quote.qe_report[320:384].hex():
        wrong.append("qe_report.report_data")
    return wrong


def facts_of(quote: Quote, claims: Mapping[str, Any], collateral: Collateral) -> TdxFacts:
    """Facts from our parse and the engine's claims.

    Raises:
        FormatError: the claims have an unexpected form.
    """
    try:
        return _facts(quote, claims, collateral)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FormatError(f"the engine's claims have an unexpected form: {error!r}") from error


def _facts(quote: Quote, claims: Mapping[str, Any], collateral: Collateral) -> TdxFacts:
    tcb, platform = claims["tcb"], claims["platform"]
    pck = platform["pck"]
    expires = min(claims["earliest_expiration_date"], claims["qe_iden_earliest_expiration_date"])
    return TdxFacts(
        header={name: value.hex() for name, value in quote.header.fields.items()},
        body={name: value.hex() for name, value in quote.body.items()},
        debug=False,
        tcb_status=str(tcb["status"]),
        tcb_date=str(platform["tcb_level"]["tcbDate"]),
        advisory_ids=tuple(sorted({str(item) for item in tcb["advisory_ids"]})),
        fmspc=bytes(pck["fmspc"]).hex(),
        ppid=bytes(pck["ppid"]).hex(),
        eval_data_number=int(tcb["eval_data_number"]),
        collateral_issued=stamp(collateral.signed),
        collateral_expires=stamp(datetime.fromtimestamp(expires, UTC)),
        platform_instance_id=bytes(pck["platform_instance_id"] or b"").hex(),
        pck_flags={
            name: str(pck[name]).lower() for name in ("dynamic_platform", "cached_keys",
                                                      "smt_enabled")
        },
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    """The engine's causes on one line; its wording may change, nothing matches on it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " / ".join(lines)[:MAX_ENGINE_TEXT] or type(error).__name__
