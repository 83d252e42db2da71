"""What the owner's policies make of a session's facts; slow, so outside any transaction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cai.attest.verify import hardware_identity
from kbs.policy.appraisal import Appraisal, appraise
from kbs.policy.references import References
from kbs.policy.store import Policies, digests_for_log
from kbs.protocol import token
from kbs.release.decision import judge

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from cai.attest.verdict import Verdict
    from kbs.core import Core
    from kbs.names import ResourceName
    from kbs.protocol.sessions import Established, Session


@dataclass(frozen=True, slots=True)
class Rules:
    """What was in force when it was read: plain data, good after its transaction ended.

    Attributes:
        policies: of one resource, or of one policy id.
        references: reference values.
    """

    policies: Policies
    references: References

    @property
    def digests(self) -> dict[str, str]:
        """As audit leaves and tickets name them."""
        return digests_for_log(self.policies, self.references.digest)


class Evaluator:
    """Evaluates policies for one broker.

    Args:
        core: its state.
        unsafe: names of the ``unsafe_…`` settings in force.
    """

    def __init__(self, core: Core, unsafe: tuple[str, ...]) -> None:
        self._core = core
        self.unsafe = unsafe

    def for_resource(self, connection: Connection, name: ResourceName) -> Rules:
        """The rules that a resource is released under.

        Raises:
            Tampered: a stored row is not the one that was stored.
        """
        core = self._core
        return Rules(
            core.policies.for_resource(connection, name),
            core.references.current(connection, now=core.clock(), tenant=name.repository),
        )

    def for_anybody(self, connection: Connection) -> Rules:
        """The rules that a token tells of, before any resource is asked for.

        Raises:
            Tampered: a stored row is not the one that was stored.
        """
        core = self._core
        return Rules(
            core.policies.for_id(connection),
            core.references.current(connection, now=core.clock()),
        )

    def judge(
        self, rules: Rules, session: Session, established: Established, name: ResourceName
    ) -> Verdict:
        """Every check of one request."""
        core, now = self._core, self._core.clock()
        verdict, _ = judge(
            established.facts,
            resource=name,
            realm=core.instance.realm,
            policies=rules.policies,
            references=rules.references,
            pool=core.rego,
            claims=lambda appraisal: self._claims(session, established, appraisal),
            hardware=hardware_identity(established.facts, now=now),
            now=now,
            selector=session.selector,
            runtime=_runtime(session, established),
        )
        return verdict.extended((), unsafe=(*verdict.unsafe, *self.unsafe))

    def claims(self, rules: Rules, session: Session, established: Established) -> dict[str, Any]:
        """The claims of the token that a session gets."""
        core = self._core
        appraisal = appraise(
            established.facts, rules.policies, rules.references, now=core.clock(), pool=core.rego,
            runtime=_runtime(session, established),
        )  # fmt: skip
        return self._claims(session, established, appraisal)

    def _claims(
        self, session: Session, established: Established, appraisal: Appraisal
    ) -> dict[str, Any]:
        instance = self._core.instance
        context = token.TokenContext(
            issuer=instance.realm.issuer, audience=instance.id, use=token.USE,
            issued=self._core.clock(), expires=session.expires, id=session.ref,
        )  # fmt: skip
        return token.ear_claims(
            appraisal, context, evidence=established.evidence, simulated=established.facts.simulated
        )


def _runtime(session: Session, established: Established) -> dict[str, Any]:
    return {"nonce": session.nonce, "tee-pubkey": established.tee_pubkey.to_json()}
