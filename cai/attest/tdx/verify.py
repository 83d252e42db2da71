"""Hard checks of a TDX quote: no policy lifts any of them (docs/spec-evidence.md §3).

The engine (dcap-qvl) does everything cryptographic and stops at its first failure. Our own checks
of framing, TEE type, report data, debug bit, attributes and root are made before it and without
it, so that a refusal names all of its reasons; and every field that the engine reports is compared
with our own parse, so that the two can never have read different quotes.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dcap_qvl
from cryptography.hazmat.primitives.serialization import Encoding

from cai.attest.certificates import load_chain
from cai.attest.facts import TdxFacts
from cai.attest.tdx.collateral import Collateral, CollateralStore
from cai.attest.tdx.quote import TD15, TEE_TDX, Quote, parse_header, parse_quote
from cai.attest.verdict import Check, Outcome, check, not_asked
from cai.errors import FormatError, LimitExceeded

PCK_CHAIN_LENGTH = 3
"""Certificates in a quote: PCK leaf, Platform or Processor CA, root."""

DEBUG = 1 << 0
SEPT_VE_DISABLE = 1 << 28
MIGRATABLE = 1 << 29
PERMITTED = SEPT_VE_DISABLE | 1 << 27 | 1 << 30 | 1 << 31 | 1 << 63
"""Bits of td_attributes that may be set: SEPT_VE_DISABLE, LASS, PKS, KL, PERFMON.

The policy then compares the exact value; this only keeps out what no policy may let in.
"""

MAX_ENGINE_TEXT = 200
"""Characters of the engine's error text that a verdict carries."""

_ENGINE_NAMES = {
    "tcb_svn": "tee_tcb_svn", "mrsigner_seam": "mr_signer_seam", "rtmr_0": "rt_mr0",
    "rtmr_1": "rt_mr1", "rtmr_2": "rt_mr2", "rtmr_3": "rt_mr3",
}  # fmt: skip
"""Where the engine names a body field otherwise than Trustee does."""


@dataclass(frozen=True, slots=True)
class TdxResult:
    """Checks in order, and the facts when every one of them passed."""

    checks: tuple[Check, ...]
    facts: TdxFacts | None


def verify_quote(
    quote: bytes,
    *,
    report_data: bytes,
    root: bytes,
    collateral: CollateralStore,
    now: datetime,
) -> TdxResult:
    """Make every hard check of a quote.

    Args:
        quote: as the guest gave it, padding included.
        report_data: the 64 bytes that the quote must carry.
        root: DER of the pinned root.
        collateral: where to find Intel's statements about the platform.
        now: time of the verification, timezone-aware.
    """
    checks: list[Check] = []
    parsed = _parse(quote, checks)
    if parsed is None:
        checks.extend(not_asked(name, reason="the quote cannot be read") for name in _AFTER_PARSING)
        return TdxResult(tuple(checks), None)
    _check_report_data(parsed, report_data, checks)
    _check_attributes(parsed, checks)
    _check_root(parsed, root, checks)
    found = _find_collateral(parsed, collateral, now, checks)
    claims = _run_engine(parsed, found, root, now, checks)
    if claims is None:
        checks.append(not_asked("tdx.parse_agreement", reason="there is nothing to compare with"))
        return TdxResult(tuple(checks), None)
    differing = disagreements(parsed, claims)
    checks.append(
        check(
            "tdx.parse_agreement",
            passed=not differing,
            observed=", ".join(differing) or "every field equal",
            reason="parser and engine read different quotes",
        )
    )
    if any(item.outcome is Outcome.FAIL for item in checks):
        return TdxResult(tuple(checks), None)
    try:
        facts = _facts(parsed, claims)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        checks.append(check("tdx.claims", passed=False, observed=type(error).__name__,
                            reason="the engine's claims have an unexpected form"))  # fmt: skip
        return TdxResult(tuple(checks), None)
    return TdxResult(tuple(checks), facts)


_AFTER_PARSING = (
    "tdx.report_data", "tdx.debug", "tdx.attributes", "tdx.service_td", "tdx.root",
    "tdx.collateral", "tdx.genuine", "tdx.parse_agreement",
)  # fmt: skip


def _parse(data: bytes, checks: list[Check]) -> Quote | None:
    # (1) TEE type, before framing: an SGX quote should be refused as one, not for its size.
    try:
        tee_type = parse_header(data).tee_type
    except FormatError:
        checks.append(not_asked("tdx.tee_type", reason="there is no whole header"))
    else:
        checks.append(
            check(
                "tdx.tee_type", passed=tee_type == TEE_TDX, observed=f"{tee_type:#x}",
                expected=f"{TEE_TDX:#x}", reason="this is not a TDX quote",
            )
        )  # fmt: skip
    # (2) Exact framing.
    try:
        parsed = parse_quote(data)
    except (FormatError, LimitExceeded) as error:
        checks.append(check("tdx.framing", passed=False, reason=error.message))
        return None
    checks.append(check("tdx.framing", passed=True, observed=f"version {parsed.header.version}"))
    return parsed


def _check_report_data(quote: Quote, expected: bytes, checks: list[Check]) -> None:
    # (3) All 64 bytes, so that a stock digest never stands for one of our statements.
    observed = quote.body["report_data"]
    checks.append(
        check(
            "tdx.report_data",
            passed=hmac.compare_digest(observed, expected),
            observed=observed.hex(),
            expected=expected.hex(),
            reason="the quote was made for something else (replayed, relayed or altered)",
        )
    )


def _check_attributes(quote: Quote, checks: list[Check]) -> None:
    attributes = int.from_bytes(quote.body["td_attributes"], "little")
    text = quote.body["td_attributes"].hex()
    # (4) A debug TD has no secrets from its host.
    checks.append(
        check(
            "tdx.debug", passed=not attributes & DEBUG, observed="on" if attributes & DEBUG
            else "off", expected="off", reason="the host can read and change a debug guest",
        )
    )  # fmt: skip
    # (5) SEPT_VE_DISABLE on, MIGRATABLE off, no reserved or untrusted bit.
    wrong = [
        reason
        for bad, reason in (
            (not attributes & SEPT_VE_DISABLE, "SEPT_VE_DISABLE is off"),
            (attributes & MIGRATABLE, "the guest can be migrated"),
            (attributes & ~(PERMITTED | MIGRATABLE | DEBUG), "an unknown attribute is set"),
        )
        if bad
    ]
    checks.append(
        check("tdx.attributes", passed=not wrong, observed=text, reason="; ".join(wrong) or None)
    )
    # (6) A service TD could read or move the guest.
    if quote.body_type == TD15:
        service = quote.body["mr_service_td"]
        checks.append(
            check(
                "tdx.service_td", passed=not any(service), observed=service.hex(),
                expected="zero", reason="a service TD is bound to the guest",
            )
        )  # fmt: skip
    else:
        checks.append(not_asked("tdx.service_td", reason="a TD 1.0 body has no such field"))


def _check_root(quote: Quote, root: bytes, checks: list[Check]) -> None:
    # (7) The engine uses the pinned root whatever the quote carries; naming the mismatch here
    # tells a wrong anchor from a broken quote.
    try:
        chain = load_chain(quote.pck_chain, what="PCK chain")
        carried = chain[-1].public_bytes(Encoding.DER)
        reason = "the quote's certificates lead to another root than the pinned one"
        if len(chain) != PCK_CHAIN_LENGTH:
            carried, reason = b"", f"{len(chain)} certificates, expected {PCK_CHAIN_LENGTH}"
    except (FormatError, LimitExceeded) as error:
        carried, reason = b"", error.message
    checks.append(check("tdx.root", passed=carried == root, reason=reason))


def _find_collateral(
    quote: Quote, store: CollateralStore, now: datetime, checks: list[Check]
) -> Collateral | None:
    # (8) Unauthenticated look-up terms; the engine compares FMSPC and issuer again.
    try:
        unverified = dcap_qvl.parse_quote(quote.data)
        fmspc, authority = str(unverified.fmspc()).lower(), str(unverified.ca())
    except ValueError as error:
        checks.append(check("tdx.collateral", passed=False, reason=_first_line(error)))
        return None
    found = store.find(fmspc, authority, now)
    if found is None:
        checks.append(
            check(
                "tdx.collateral", passed=False, observed=f"FMSPC {fmspc}, {authority} CA",
                reason="there is no collateral for this platform",
            )
        )  # fmt: skip
        return None
    checks.append(
        check(
            "tdx.collateral",
            passed=found.covers(now),
            observed=f"{_stamp(found.issued)} to {_stamp(found.expires)}",
            expected=_stamp(now),
            reason="the collateral is not valid at this time",
        )
    )
    return found


def _run_engine(
    quote: Quote, collateral: Collateral | None, root: bytes, now: datetime, checks: list[Check]
) -> dict[str, Any] | None:
    # (9) Signatures, chains, revocation, QE identity, TCB level: all of it, or one error.
    if collateral is None:
        checks.append(not_asked("tdx.genuine", reason="there is no collateral to verify with"))
        return None
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
        checks.append(check("tdx.genuine", passed=False, reason=_first_line(error)))
        return None
    status = claims.get("tcb", {}).get("status")
    checks.append(check("tdx.genuine", passed=True, observed=f"TCB {status}"))
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


def _facts(quote: Quote, claims: Mapping[str, Any]) -> TdxFacts:
    tcb, platform = claims["tcb"], claims["platform"]
    pck = platform["pck"]
    expires = min(claims["earliest_expiration_date"], claims["qe_iden_earliest_expiration_date"])
    return TdxFacts(
        header={name: value.hex() for name, value in quote.header.fields.items()},
        body={name: value.hex() for name, value in quote.body.items()},
        debug=False,
        tcb_status=str(tcb["status"]),
        tcb_date=str(platform["tcb_level"]["tcbDate"]),
        advisory_ids=tuple(sorted(str(item) for item in tcb["advisory_ids"])),
        fmspc=bytes(pck["fmspc"]).hex(),
        ppid=bytes(pck["ppid"]).hex(),
        eval_data_number=int(tcb["eval_data_number"]),
        collateral_expires=_stamp(datetime.fromtimestamp(expires, UTC)),
        platform_instance_id=bytes(pck["platform_instance_id"] or b"").hex(),
        pck_flags={
            name: str(pck[name]).lower() for name in ("dynamic_platform", "cached_keys",
                                                      "smt_enabled")
        },
    )  # fmt: skip


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _first_line(error: Exception) -> str:
    """The engine's causes on one line; its wording may change, nothing matches on it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " / ".join(lines)[:MAX_ENGINE_TEXT] or type(error).__name__
