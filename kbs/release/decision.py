"""The decision: verified facts, appraised anew at every request for a resource.

Three layers (docs/spec-policy.md): the hard checks already passed, or there would be no facts; the
verification policy says which guests; the Rego policy says who may have which resource. A layer
that is not configured denies.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from cai.attest.facts import Facts
from cai.attest.policy import VerificationPolicy
from cai.attest.verdict import Binding, Check, Verdict, check, not_asked
from kbs.names import Realm, ResourceName
from kbs.policy.rego import CHECK_NAME, ReleasePolicy


def decide(
    facts: Facts,
    *,
    resource: ResourceName,
    realm: Realm,
    verification: VerificationPolicy | None,
    release: ReleasePolicy | None,
    claims: Callable[[tuple[Check, ...]], dict[str, Any]],
    hardware: dict[str, str],
    now: datetime,
) -> Verdict:
    """Decide one request.

    Args:
        facts: of the session that asks.
        resource: what it asks for.
        realm: of this broker.
        verification: layer 2; ``None`` when no policy is set.
        release: layer 3; ``None`` when no policy is set.
        claims: makes the Rego input from the checks of layer 2.
        hardware: identity of the platform, for the record.
        now: the broker's clock.

    Returns:
        The verdict; the resource may be given only if it passed.
    """
    # (1) Facts of a simulated platform stay in the simulated realm.
    checks: list[Check] = [
        check(
            "kbs.realm",
            passed=facts.simulated is (realm is Realm.SIMULATED),
            observed="simulated" if facts.simulated else "production",
            expected=realm.value,
            reason="the facts are of another realm",
        )
    ]
    # (2) Layer 2: the verification policy names this guest.
    checks.append(_present("policy.verification", verification is not None))
    appraisal = verification.appraise(facts, now=now) if verification is not None else ()
    checks += appraisal
    # (3) Layer 3: asked only when everything before it passed.
    checks.append(_present("policy.release", release is not None))
    verdict = Verdict(
        subject=f"release of {resource.uri}",
        checks=tuple(checks),
        simulated=facts.simulated,
        binding=Binding.KEY,
        hardware=hardware,
        unsafe=verification.unsafe if verification is not None else (),
        residual_risks=verification.residual_risks if verification is not None else (),
    )
    if release is None or not verdict.passed:
        return verdict.extended((not_asked(CHECK_NAME),))
    return verdict.extended((release.decide(claims(appraisal), resource),))


def _present(name: str, present: bool) -> Check:  # noqa: FBT001 - the one thing it says
    return check(
        name,
        passed=present,
        observed="set" if present else "none",
        expected="set",
        reason="no such policy is set, and without one nothing is released",
    )
