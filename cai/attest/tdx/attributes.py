"""TD attributes that no policy lets in (docs/spec-evidence.md §3, steps 4 to 6)."""

from __future__ import annotations

from datetime import UTC, datetime

from cai.attest.tdx.quote import TD15, Quote

DEBUG = 1 << 0
SEPT_VE_DISABLE = 1 << 28
MIGRATABLE = 1 << 29
PERMITTED = SEPT_VE_DISABLE | 1 << 27 | 1 << 30 | 1 << 31 | 1 << 63
"""Bits of td_attributes that may be set: SEPT_VE_DISABLE, LASS, PKS, KL, PERFMON.

The policy then compares the exact value; this only keeps out what no policy may let in.
"""


def is_debug(quote: Quote) -> bool:
    """Whether the host can read and change the guest."""
    return bool(_attributes(quote) & DEBUG)


def bit_errors(quote: Quote) -> list[str]:
    """What is wrong with td_attributes, the debug bit apart."""
    attributes = _attributes(quote)
    return [
        reason
        for bad, reason in (
            (not attributes & SEPT_VE_DISABLE, "SEPT_VE_DISABLE is off"),
            (attributes & MIGRATABLE, "the guest can be migrated"),
            (attributes & ~(PERMITTED | MIGRATABLE | DEBUG), "an unknown attribute is set"),
        )
        if bad
    ]


def has_service_td(quote: Quote) -> bool:
    """Whether a service TD, which could read or move the guest, is bound to it."""
    return quote.body_type == TD15 and any(quote.body["mr_service_td"])


def attribute_errors(quote: Quote) -> list[str]:
    """All of it together."""
    return [
        *(["the guest can be debugged"] if is_debug(quote) else []),
        *bit_errors(quote),
        *(["a service TD is bound to the guest"] if has_service_td(quote) else []),
    ]


def stamp(moment: datetime) -> str:
    """RFC 3339 in UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _attributes(quote: Quote) -> int:
    return int.from_bytes(quote.body["td_attributes"], "little")
