"""What the protocol and the administration of one key broker share: database, clock, audit log."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Connection

from kbs.audit.checkpoint import Checkpoints
from kbs.audit.leaf import Entry
from kbs.audit.log import FAILURE_SECONDS, AuditLog, FailureCount, seconds_since_failures
from kbs.database.tables import POLICY, REFERENCE
from kbs.instance import Instance
from kbs.keys.signing import KeyName
from kbs.policy.pool import RegoPool
from kbs.policy.reference_store import ReferenceStore
from kbs.policy.settings import PolicySettings
from kbs.policy.store import PolicyStore
from kbs.protocol.sessions import SessionStore
from kbs.resources.rotation import Rotation
from kbs.resources.settings import ResourceSettings
from kbs.resources.store import ResourceStore
from kbs.rows import VersionedRows


class Core:
    """An open broker's state.

    Args:
        instance: its open database and keys.
        clock: the time; nobody outside can give it.
        resources: limits and retention of resources, and which live elsewhere.
        policy: limits of Rego evaluations, and life of reference values.
    """

    def __init__(
        self,
        instance: Instance,
        clock: Callable[[], datetime],
        *,
        resources: ResourceSettings | None = None,
        policy: PolicySettings | None = None,
    ) -> None:
        self.instance = instance
        self.clock = clock
        self.database = instance.database
        self.audit = AuditLog(instance.id, instance.realm.value)
        realm, sealer = instance.realm.value, instance.sealer
        self.signing = instance.signing
        self.resources = ResourceStore(
            instance.database, instance.keyring, instance=instance.id, realm=realm, clock=clock,
            settings=resources or ResourceSettings(),
        )  # fmt: skip
        self.policy_settings = policy or PolicySettings()
        self.rego = RegoPool(self.policy_settings)
        self.rotation = Rotation(
            instance.database, instance.keyring, instance=instance.id, realm=realm
        )
        self.policies = PolicyStore(
            VersionedRows(POLICY, instance=instance.id, realm=realm, sealer=sealer),
            self.policy_settings,
        )
        self.references = ReferenceStore(
            VersionedRows(REFERENCE, instance=instance.id, realm=realm, sealer=sealer)
        )
        self.sessions = SessionStore(instance=instance.id, realm=realm, sealer=sealer)
        self.checkpoints = Checkpoints(
            self.database, instance=instance.id, signers=self._checkpoint_keys
        )
        self._failures = FailureCount()

    def record(self, entry: Entry) -> None:
        """Write one audit row in a transaction of its own."""
        with self.database.decide() as connection:
            self.audit.append(connection, entry, self.clock())

    def count_failure(self, kind: str) -> None:
        """Count a failure that anybody could cause; at most one audit row a minute."""
        now = self.clock()
        counts = self._failures.note(kind, now)
        if not counts:
            return
        with self.database.decide() as connection:
            # One leaf a minute for all replicas together.
            age = seconds_since_failures(connection, now)
            if age is not None and abs(age) < FAILURE_SECONDS:
                self._failures.put_back(counts, now - timedelta(seconds=age))
            else:
                self.audit.append(connection, _counted(counts), now)

    def close(self) -> None:
        """Write what is not written yet and close the database."""
        rest = self._failures.rest()
        if rest:
            self.record(_counted(rest))
        self.rego.close()
        self.resources.close()
        self.instance.keyring.close()
        self.database.close()

    def _checkpoint_keys(self, connection: Connection) -> list[Ed25519PrivateKey]:
        living = self.signing.living(connection, KeyName.CHECKPOINT, self.clock())
        return [key.ed25519 for key in living]


def _counted(counts: dict[str, int]) -> Entry:
    return Entry(
        "unauthenticated", {"kind": "unknown"}, uuid.uuid4().hex, allowed=False,
        reason="no session, token or signature that this broker knows", details=counts,
    )  # fmt: skip
