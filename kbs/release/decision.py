"""The decision: verified facts, appraised anew at every request for a resource.

Three layers (docs/spec-policy.md): the hard checks already passed, or there would be no facts; the
verification policy says which guests, and attestation policies how much each part of one is worth;
the resource policy says who may have which resource. A layer that is not configured denies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

from cai.attest.facts import Facts
from cai.attest.verdict import Binding, Check, Verdict, check, not_asked
from kbs.names import Realm, ResourceName
from kbs.policy.appraisal import Appraisal, appraise
from kbs.policy.names import TeeClass
from kbs.policy.pool import RegoPool
from kbs.policy.references import References
from kbs.policy.rego import CHECK_NAME
from kbs.policy.store import Policies


def judge(
    facts: Facts,
    *,
    resource: ResourceName,
    realm: Realm,
    policies: Policies,
    references: References,
    pool: RegoPool,
    claims: Callable[[Appraisal], dict[str, Any]],
    hardware: dict[str, str],
    now: datetime,
    selector: str = "",
    runtime: dict[str, Any] | None = None,
    hard: Iterable[Check] = (),
) -> tuple[Verdict, Appraisal]:
    """Decide one request; outside any transaction, since Rego takes its time.

    Args:
        facts: of the session that asks.
        resource: what it asks for.
        realm: of this broker.
        policies: ``core.policies.for_resource``.
        references: ``core.references.current`` for the resource's repository.
        pool: ``core.rego``.
        claims: makes the input of the resource policy from the appraisal.
        hardware: identity of the platform, for the record.
        now: the broker's clock.
        selector: the policy id that the client named; empty when it named none.
        runtime: ``runtime_data_claims``: nonce and public key of the session.
        hard: checks of layer 1, as the session keeps them.

    Returns:
        The verdict, and the appraisal behind it; the resource may be given only if it passed.
    """
    # (1) Facts of a simulated platform stay in the simulated realm.
    checks: list[Check] = [*hard, _realm(facts, realm)]
    # (2) A client may name the policy that it expects, and no other one.
    checks.append(_selector(selector, policies.id))
    # (3) Layer 2: the policies name this guest.
    appraisal = appraise(facts, policies, references, now=now, pool=pool, runtime=runtime)
    verification = policies.verification
    stands_in = policies.unsafe_rego_only and TeeClass.CPU in policies.attestation
    checks.append(_present("policy.verification", verification is not None or stands_in))
    checks += [*(appraisal.checks or ()), *appraisal.attestation]
    # (4) Layer 3: asked only when everything before it passed.
    release = policies.release
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
        return verdict.extended((not_asked(CHECK_NAME),)), appraisal
    decided = release.decide(pool, claims(appraisal), resource, references.values)
    return verdict.extended((decided,)), appraisal


def _realm(facts: Facts, realm: Realm) -> Check:
    return check(
        "kbs.realm",
        passed=facts.simulated is (realm is Realm.SIMULATED),
        observed="simulated" if facts.simulated else "production",
        expected=realm.value,
        reason="the facts are of another realm",
    )


def _selector(selector: str, policy_id: str) -> Check:
    if not selector:
        return not_asked("policy.selector", reason="the client names no policy")
    return check(
        "policy.selector",
        passed=selector == policy_id,
        observed=selector,
        expected=policy_id,
        reason="the client names another policy than the resource is bound to",
    )


def _present(name: str, present: bool) -> Check:  # noqa: FBT001 - the one thing it says
    return check(
        name,
        passed=present,
        observed="set" if present else "none",
        expected="set",
        reason="no such policy is set, and without one nothing is released",
    )
