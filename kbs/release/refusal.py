"""How a refusal is logged, and how it is told: the same checks, and a stable code.

The code of a refusal is the name of its first failed check (docs/kbs-errors.md), or the machine
code of the error where there was nothing to check.
"""

from __future__ import annotations

from dataclasses import replace

from cai.attest.verdict import Verdict, check
from cai.errors import CaiError, EvidenceRefused, PolicyDenied, Tampered
from kbs.audit.log import Entry
from kbs.protocol.sessions import Session

HINT = "the administrator sees every check with `kbs audit show`"

# What the vendor's engine says of a quote follows from these, which say it better.
_PLAIN = ("tdx.debug", "tdx.report_data", "tdx.tee_type", "tdx.framing")


def guest(session: Session) -> dict[str, str]:
    """The guest behind a session, as audit leaves name it."""
    return {"kind": "guest", "session": session.ref}


def reasons(verdict: Verdict) -> str:
    """Every failed check in one line."""
    return "; ".join(f"{item.name}: {item.reason}" for item in verdict.failures)


def code_of(verdict: Verdict) -> str:
    """The code of a refusal: the failed check that says most."""
    failed = [item.name for item in verdict.failures]
    plain = [name for name in _PLAIN if name in failed]
    return (plain or failed or ["refused"])[0]


def evidence_refused(verdict: Verdict) -> EvidenceRefused:
    """The error about evidence that a hard check refused."""
    return EvidenceRefused(
        f"{verdict.subject} refused: {reasons(verdict) or 'no check was made'}",
        verdict=verdict, code=code_of(verdict),
    )  # fmt: skip


def denied(entry: Entry) -> PolicyDenied:
    """The error about a release that policies or blocks deny."""
    code = None if entry.verdict is None else code_of(entry.verdict)
    return PolicyDenied(
        f"Access denied by policy: {entry.reason}", verdict=entry.verdict, hint=HINT, code=code
    )


def failed_entry(
    action: str,
    session: Session,
    request: str,
    error: CaiError,
    *,
    subject: str = "",
    simulated: bool,
    unsafe: tuple[str, ...],
) -> Entry:
    """The leaf of a request that an error ended before it could be appraised."""
    name = error.machine_code if "." in error.machine_code else f"kbs.{error.machine_code}"
    failed = check(name, passed=False, reason=error.message)
    verdict = Verdict(subject=action, checks=(failed,), simulated=simulated, unsafe=unsafe)
    return Entry(
        action, guest(session), request, allowed=False, reason=error.message,
        subject=subject, verdict=verdict,
    )  # fmt: skip


def refused_by(entry: Entry, error: CaiError) -> Entry:
    """An entry that would have been allowed, refused by this error after all."""
    if entry.verdict is None or isinstance(error, Tampered):
        return replace(entry, allowed=False, reason=error.message)
    name = error.machine_code if "." in error.machine_code else f"kbs.{error.machine_code}"
    failed = check(name, passed=False, reason=error.message)
    return replace(
        entry, allowed=False, reason=error.message, verdict=entry.verdict.extended((failed,))
    )
