"""Hard checks of a TDX quote: no policy lifts any of them (docs/spec-evidence.md §3).

The engine (dcap-qvl) does everything cryptographic and stops at its first failure. Our own checks
of framing, TEE type, report data, debug bit, attributes and root are made before it and without
it, so that a refusal names all of its reasons; and every field that the engine reports is compared
with our own parse, so that the two can never have read different quotes.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, fields, replace
from datetime import datetime
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from cai.attest.certificates import is_plain, load_chain
from cai.attest.tdx.attributes import bit_errors, has_service_td, is_debug, stamp
from cai.attest.tdx.collateral import Collateral, CollateralStore
from cai.attest.tdx.engine import disagreements, facts_of, platform_family, run_engine
from cai.attest.tdx.facts import TdxFacts
from cai.attest.tdx.pure import verify_pure
from cai.attest.tdx.quote import TD15, TEE_TDX, Quote, parse_header, parse_quote
from cai.attest.verdict import Check, Outcome, check, not_asked
from cai.errors import CaiError, EvidenceRefused, FormatError, InputError, LimitExceeded

PCK_CHAIN_LENGTH = 3
"""Certificates in a quote: PCK leaf, Platform or Processor CA, root."""

NO_COLLATERAL = "there is no collateral for this platform"
"""Reason of a failed ``tdx.collateral`` that more collateral would mend."""

ENGINES = ("dcap-qvl", "pure")
"""The engines by the names that facts give them."""

@dataclass(frozen=True, slots=True)
class TdxResult:
    """Checks in order, and what came out.

    Attributes:
        checks: every one of them.
        facts: if every check passed.
        platform: which platform it is, where the engine and our parse agree on a genuine quote,
            whatever else failed; a refusal names the machine by it and nothing rests on it.
    """

    checks: tuple[Check, ...]
    facts: TdxFacts | None
    platform: TdxFacts | None = None


def verify_quote(
    quote: bytes,
    *,
    report_data: bytes | None,
    root: bytes,
    collateral: CollateralStore,
    now: datetime,
    require_agreement: bool = False,
) -> TdxResult:
    """Make every hard check of a quote.

    Args:
        quote: as the guest gave it, padding included.
        report_data: the 64 bytes that the quote must carry; ``None`` does not ask, which is for
            files alone: no protocol may pass it.
        root: DER of the pinned root.
        collateral: where to find Intel's statements about the platform.
        now: time of the verification, timezone-aware.
        require_agreement: the second engine must say the same (step 11).
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
    claims = _run_first(parsed, found, root, now, checks)
    second = _run_second(parsed, found, root, now) if require_agreement and found else None
    if claims is None or found is None:
        checks.append(not_asked("tdx.parse_agreement", reason="there is nothing to compare with"))
        checks.append(not_asked("tdx.second_engine", _told(second), "the first engine refuses"))
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
    try:
        facts = facts_of(parsed, claims, found)
    except FormatError as error:
        checks.append(check("tdx.claims", passed=False, reason=error.message))
        return TdxResult(tuple(checks), None)
    if second is None:
        checks.append(not_asked("tdx.second_engine"))
    else:
        checks.append(_agreement(facts, second))
        if checks[-1].outcome is Outcome.PASS:
            facts = replace(facts, engines=ENGINES)
    failed = any(item.outcome is Outcome.FAIL for item in checks)
    return TdxResult(tuple(checks), None if failed else facts, None if differing else facts)


def _run_second(
    quote: Quote, collateral: Collateral, root: bytes, now: datetime
) -> TdxFacts | CaiError:
    try:
        return verify_pure(quote, collateral, root=root, now=now)
    except (EvidenceRefused, InputError) as error:
        return error


def _told(second: TdxFacts | CaiError | None) -> str | None:
    if second is None:
        return None
    return second.message if isinstance(second, CaiError) else second.tcb_status


def _agreement(first: TdxFacts, second: TdxFacts | CaiError) -> Check:
    # (11) Status, advisories, identity, dates and every field of header and body.
    if isinstance(second, CaiError):
        return check("tdx.second_engine", passed=False, observed="refused",
                     expected=first.tcb_status, reason=second.message)  # fmt: skip
    names = [item.name for item in fields(TdxFacts)]
    wrong = [name for name in names if getattr(first, name) != getattr(second, name)]
    return check(
        "tdx.second_engine", passed=not wrong, observed=", ".join(wrong) or second.tcb_status,
        expected=first.tcb_status, reason="the two engines do not agree",
    )  # fmt: skip


_AFTER_PARSING = (
    "tdx.report_data", "tdx.debug", "tdx.attributes", "tdx.service_td", "tdx.root",
    "tdx.collateral", "tdx.genuine", "tdx.parse_agreement", "tdx.second_engine",
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


def _check_report_data(quote: Quote, expected: bytes | None, checks: list[Check]) -> None:
    # (3) All 64 bytes, so that a stock digest never stands for one of our statements.
    observed = quote.body["report_data"]
    if expected is None:
        checks.append(not_asked("tdx.report_data", observed.hex(), "nobody says what it should be"))
        return
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
    # (4) A debug TD has no secrets from its host.
    debug = is_debug(quote)
    checks.append(
        check(
            "tdx.debug", passed=not debug, observed="on" if debug else "off", expected="off",
            reason="the host can read and change a debug guest",
        )
    )  # fmt: skip
    # (5) SEPT_VE_DISABLE on, MIGRATABLE off, no reserved or untrusted bit.
    wrong = bit_errors(quote)
    text = quote.body["td_attributes"].hex()
    checks.append(
        check("tdx.attributes", passed=not wrong, observed=text, reason="; ".join(wrong) or None)
    )
    # (6) A service TD could read or move the guest.
    if quote.body_type == TD15:
        checks.append(
            check(
                "tdx.service_td", passed=not has_service_td(quote),
                observed=quote.body["mr_service_td"].hex(), expected="zero",
                reason="a service TD is bound to the guest",
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
        elif not is_plain(quote.pck_chain, chain):
            # So that no byte of a quote is free: Intel's services write exactly this.
            carried, reason = b"", "the certificates are not in canonical PEM"
    except (FormatError, LimitExceeded) as error:
        carried, reason = b"", error.message
    checks.append(check("tdx.root", passed=carried == root, reason=reason))


def _find_collateral(
    quote: Quote, store: CollateralStore, now: datetime, checks: list[Check]
) -> Collateral | None:
    # (8) Unauthenticated look-up terms; the engine compares FMSPC and issuer again.
    try:
        fmspc, authority = platform_family(quote)
    except FormatError as error:
        checks.append(check("tdx.collateral", passed=False, reason=error.message))
        return None
    found = store.find(fmspc, authority, now)
    if found is None:
        checks.append(
            check(
                "tdx.collateral", passed=False, observed=f"FMSPC {fmspc}, {authority} CA",
                reason=NO_COLLATERAL,
            )
        )  # fmt: skip
        return None
    checks.append(
        check(
            "tdx.collateral",
            passed=found.covers(now),
            observed=f"{stamp(found.issued)} to {stamp(found.expires)}",
            expected=stamp(now),
            reason="the collateral is not valid at this time",
        )
    )
    return found


def _run_first(
    quote: Quote, collateral: Collateral | None, root: bytes, now: datetime, checks: list[Check]
) -> dict[str, Any] | None:
    # (9) Signatures, chains, revocation, QE identity, TCB level: all of it, or one error.
    if collateral is None:
        checks.append(not_asked("tdx.genuine", reason="there is no collateral to verify with"))
        return None
    try:
        claims = run_engine(quote, collateral, root=root, now=now)
    except EvidenceRefused as error:
        checks.append(check("tdx.genuine", passed=False, reason=error.message))
        return None
    status = claims.get("tcb", {}).get("status")
    checks.append(check("tdx.genuine", passed=True, observed=f"TCB {status}"))
    return claims
