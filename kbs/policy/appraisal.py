"""Layer two as a token tells it: a status and a trustworthiness vector for each submodule.

The verification policy (``policy.toml``) makes checks; an attestation policy (Rego) of a
submodule's class makes its vector. Where there is no such policy, the vector follows the checks.
Where there is one it can only be as good as the checks allow: a failed check contradicts the
submodule whatever the Rego says. Plain data in, plain data out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from cai.attest.facts import CPU, Facts
from cai.attest.verdict import Check, Outcome, check
from cai.errors import FormatError
from kbs.policy.names import TeeClass
from kbs.policy.pool import RegoPool
from kbs.policy.references import References
from kbs.policy.rego import EXTENSIONS, TRUST_CLAIMS, RegoPolicy
from kbs.policy.store import Policies
from kbs.policy.vector import (
    CLAIMS,
    CONTRADICTED,
    CONTRAINDICATED,
    NONE,
    parse_vector,
    status_of,
)

NO_POLICY: Final = "none"
"""Policy id of a submodule that nothing appraised."""

MAX_EXTENSIONS = 16
"""Most extensions of one submodule."""

_OWN: Final = ("configuration", "executables", "hardware")
"""The claims that the checks of a verification policy speak of."""

_AFFIRMED: Final = 2


@dataclass(frozen=True, slots=True)
class Submodule:
    """One part of a guest.

    Attributes:
        name: ``cpu0``, ``gpu0``, ``switch0``, ….
        tee_class: its class.
        claims: its evidence as Trustee names it.
    """

    name: str
    tee_class: TeeClass
    claims: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Appraised:
    """What the policies say of one submodule.

    Attributes:
        submodule: which one.
        status: ``affirming``, ``warning``, ``contraindicated`` or ``none``.
        vector: AR4SI claims.
        policy_id: id of the policy.
        policy_digest: SHA-256 of the policy that made the vector, hex; empty when none did.
        extensions: ``{name, key, value}`` that an attestation policy adds.
    """

    submodule: Submodule
    status: str
    vector: Mapping[str, int]
    policy_id: str
    policy_digest: str
    extensions: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What the policies say of a guest.

    Attributes:
        submodules: in the order of a token, ``cpu0`` first.
        checks: of the verification policy; ``None`` when there is none.
        attestation: one check for each attestation policy that was evaluated: it fails when the
            policy does not evaluate, not when its answer is bad.
    """

    submodules: tuple[Appraised, ...]
    checks: tuple[Check, ...] | None = None
    attestation: tuple[Check, ...] = field(default=())

    @property
    def status(self) -> Mapping[str, str]:
        """Status of each submodule by name."""
        return {item.submodule.name: item.status for item in self.submodules}


def appraise(
    facts: Facts,
    policies: Policies,
    references: References,
    *,
    now: datetime,
    pool: RegoPool,
    runtime: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Appraisal:
    """Appraise verified facts.

    Args:
        facts: of a guest.
        policies: that apply.
        references: reference values in force.
        now: the broker's clock.
        pool: evaluates Rego.
        runtime: ``runtime_data_claims`` of the CPU submodule.
        more: further members of the CPU submodule's claims.
    """
    checks = None
    if policies.verification is not None:
        checks = policies.verification.appraise(facts, now=now)
    submodules: list[Appraised] = []
    made: list[Check] = []
    for submodule in submodules_of(facts, runtime, more):
        refused = _refused(submodule, checks)
        policy = policies.attestation.get(submodule.tee_class)
        if policy is None:
            submodules.append(_by_checks(submodule, policies, checks, refused=refused))
            continue
        appraised, outcome = _by_rego(submodule, policies, policy, references, pool)
        if refused:
            appraised = _contradicted(appraised)
        submodules.append(appraised)
        made.append(outcome)
    return Appraisal(tuple(submodules), checks, tuple(made))


def submodules_of(
    facts: Facts,
    runtime: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> list[Submodule]:
    """The parts of a guest under the names that Trustee gives them."""
    (_, cpu), *devices = facts.claims()
    body = {**cpu, **(more or {})}
    if runtime is not None:
        body["runtime_data_claims"] = dict(runtime)
    found = [Submodule(CPU, TeeClass.CPU, body)]
    counts = {TeeClass.GPU: 0, TeeClass.SWITCH: 0}
    for device, (_, claims) in zip(facts.devices, devices, strict=True):
        tee = TeeClass.SWITCH if device.is_switch else TeeClass.GPU
        found.append(Submodule(f"{tee}{counts[tee]}", tee, claims))
        counts[tee] += 1
    return found


def _refused(submodule: Submodule, checks: Iterable[Check] | None) -> bool:
    """Whether a check of the verification policy failed that speaks of this submodule."""
    failed = [item.name for item in checks or () if item.outcome is Outcome.FAIL]
    # Checks named `gpu.…` speak of the devices, all others of the CPU.
    of_devices = submodule.tee_class is not TeeClass.CPU
    return any(name.startswith("gpu.") is of_devices for name in failed)


def _by_checks(
    submodule: Submodule,
    policies: Policies,
    checks: tuple[Check, ...] | None,
    *,
    refused: bool,
) -> Appraised:
    value = 0 if checks is None else CONTRADICTED if refused else _AFFIRMED
    vector = {**dict.fromkeys(CLAIMS, 0), **dict.fromkeys(_OWN, value)}
    verification = policies.verification
    return Appraised(
        submodule,
        status_of(vector),
        vector,
        NO_POLICY if verification is None else policies.id,
        "" if verification is None else verification.digest,
    )


def _by_rego(
    submodule: Submodule,
    policies: Policies,
    policy: RegoPolicy,
    references: References,
    pool: RegoPool,
) -> tuple[Appraised, Check]:
    answer = policy.evaluate(
        pool, (TRUST_CLAIMS, EXTENSIONS), data={}, claims=submodule.claims,
        references=references.values,
    )  # fmt: skip
    problem, vector = answer.problem, dict.fromkeys(CLAIMS, 0)
    extensions: tuple[Mapping[str, Any], ...] = ()
    if not problem:
        try:
            # Undefined claims nothing, which affirms nothing.
            vector = parse_vector(answer.values.get(TRUST_CLAIMS, {}))
            extensions = _extensions(answer.values.get(EXTENSIONS, []))
        except FormatError as error:
            problem = error.message
    appraised = Appraised(
        submodule, status_of(vector), vector, policies.id, policy.digest, extensions
    )
    if problem:
        appraised = _contradicted(appraised)
    outcome = check(
        f"attestation.{submodule.name}",
        passed=not problem,
        observed=problem or appraised.status,
        expected="a trustworthiness vector",
        reason="the attestation policy does not evaluate",
    )
    return appraised, outcome


def _contradicted(appraised: Appraised) -> Appraised:
    vector = {**appraised.vector, **dict.fromkeys(_OWN, CONTRADICTED)}
    return Appraised(
        appraised.submodule, CONTRAINDICATED, vector, appraised.policy_id, appraised.policy_digest
    )


def _extensions(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or len(value) > MAX_EXTENSIONS:
        raise FormatError(f"extensions is not a list of at most {MAX_EXTENSIONS}")
    for item in value:
        named = isinstance(item, dict) and set(item) == {"name", "key", "value"}
        if not named or not isinstance(item["name"], str) or type(item["key"]) is not int:
            raise FormatError("extensions: expected objects of name, key and value")
        if not item["name"].startswith("ear.trustee."):
            # Else a policy could write a token's own members.
            raise FormatError("extensions: a name must begin with ear.trustee.")
    return tuple(value)


__all__ = ["NONE", "Appraisal", "Appraised", "Submodule", "appraise", "submodules_of"]
