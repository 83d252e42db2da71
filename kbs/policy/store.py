"""The policies of one broker: every version kept, and what is in force for one resource.

Rows are named as ``kbs.policy.names`` says. The most specific resource policy wins; a tenant's
verification or attestation policy wins over the one of the same id that is everybody's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

from sqlalchemy import Connection

from cai.attest.policy import VerificationPolicy
from cai.errors import FormatError, LimitExceeded
from kbs.audit.log import Change
from kbs.names import ResourceName
from kbs.policy.names import (
    DEFAULT_ID,
    PolicyKind,
    PolicyName,
    TeeClass,
    is_segment,
    prefixes,
    require_id,
)
from kbs.policy.pool import RegoPool
from kbs.policy.rego import RegoPolicy
from kbs.policy.settings import PolicySettings
from kbs.rows import Stored, VersionedRows, VersionNote

MAX_BINDING = 256
"""Largest text of a binding, bytes."""

_PARSED: Final = 64
"""How many parsed verification policies are kept."""


@dataclass(frozen=True, slots=True)
class Policies:
    """The policies that apply to one request: plain data, good after its transaction ended.

    Attributes:
        id: policy id that the resource is bound to.
        tenant: whose policies these are; empty for everybody's.
        verification: layer 2; ``None`` when there is none.
        attestation: class of a submodule to its attestation policy, where there is one.
        release: the resource policy; ``None`` when there is none.
        digests: row name without ``policy/`` to SHA-256 of the exact text, hex.
        unsafe_rego_only: an attestation policy may stand in for a missing verification policy.
    """

    id: str = DEFAULT_ID
    tenant: str = ""
    verification: VerificationPolicy | None = None
    attestation: Mapping[TeeClass, RegoPolicy] = field(default_factory=dict)
    release: RegoPolicy | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    unsafe_rego_only: bool = False


class PolicyStore:
    """Reads and writes policies inside the caller's transactions.

    Args:
        rows: of the table ``policy``.
        settings: what an owner loosened.
    """

    def __init__(self, rows: VersionedRows, settings: PolicySettings | None = None) -> None:
        self._rows = rows
        self._settings = settings or PolicySettings()

    def for_resource(self, connection: Connection, name: ResourceName) -> Policies:
        """The policies that decide about one resource.

        Raises:
            Tampered: a stored row is not the one that was stored.
            FormatError: a stored text is not what was checked before it was stored.
        """
        places = prefixes(name)
        rows = self._rows.get_many(
            connection,
            [f"{kind}/{place}" for kind in (PolicyKind.RESOURCE, PolicyKind.BINDING)
             for place in places],
        )  # fmt: skip
        bound = _first(rows, [f"{PolicyKind.BINDING}/{place}" for place in places])
        release = _first(rows, [f"{PolicyKind.RESOURCE}/{place}" for place in places])
        digests = {path: _digest(stored) for path, stored in (*bound, *release)}
        policy_id = parse_binding(bound[0][1].contents) if bound else DEFAULT_ID
        found = self._appraising(connection, policy_id, name.repository)
        return Policies(
            id=policy_id,
            tenant=name.repository,
            verification=found.verification,
            attestation=found.attestation,
            release=RegoPolicy.stored(release[0][1].contents) if release else None,
            digests={**digests, **found.digests},
            unsafe_rego_only=self._settings.unsafe_rego_only,
        )

    def for_id(
        self, connection: Connection, policy_id: str = DEFAULT_ID, *, tenant: str = ""
    ) -> Policies:
        """The policies that appraise evidence under one id; none for a release.

        Raises:
            FormatError: not a policy id, or a stored text that was not checked.
            Tampered: a stored row is not the one that was stored.
        """
        return self._appraising(connection, require_id(policy_id), tenant)

    def known_ids(self, connection: Connection, *, tenant: str = "") -> list[str]:
        """Policy ids that have a verification or attestation policy."""
        ids = set()
        for path in self._rows.paths(connection):
            name = PolicyName.parse(path)
            if name.tenant not in ("", tenant):
                continue
            last = name.rest.rpartition("/")[2]
            if name.kind is PolicyKind.VERIFICATION:
                ids.add(last)
            elif name.kind is PolicyKind.ATTESTATION:
                ids.add(last.rpartition("_")[0])
        return sorted(ids)

    def text(
        self, connection: Connection, name: PolicyName, version: int | None = None
    ) -> Stored | None:
        """A policy's exact text; the newest version, or an older one.

        Raises:
            InputMissing: there is no such version.
            Tampered: a stored row is not the one that was stored.
        """
        if version is None:
            return self._rows.get(connection, name.path)
        return self._rows.version(connection, name.path, version)

    def names(self, connection: Connection) -> list[PolicyName]:
        """Every policy that is set, in order."""
        return [PolicyName.parse(path) for path in self._rows.paths(connection)]

    def history(self, connection: Connection, name: PolicyName) -> list[VersionNote]:
        """Every version of a policy, oldest first."""
        return self._rows.history(connection, name.path)

    def put(self, connection: Connection, name: PolicyName, text: bytes) -> Change:
        """Store the next version of a policy that ``check_policy`` accepted."""
        return self._rows.put(connection, name.path, text)

    def remove(self, connection: Connection, name: PolicyName) -> Change:
        """Take a policy away; its versions stay readable.

        Raises:
            InputMissing: there is none.
        """
        return self._rows.remove(connection, name.path)

    def _appraising(self, connection: Connection, policy_id: str, tenant: str) -> Policies:
        owners = (f"{tenant}/", "") if is_segment(tenant) else ("",)
        verification_paths = [f"{PolicyKind.VERIFICATION}/{owner}{policy_id}" for owner in owners]
        attestation_paths = {
            tee: [f"{PolicyKind.ATTESTATION}/{owner}{policy_id}_{tee}" for owner in owners]
            for tee in TeeClass
        }
        wanted = list(verification_paths)
        for paths in attestation_paths.values():
            wanted += paths
        rows = self._rows.get_many(connection, wanted)
        digests: dict[str, str] = {}
        verification = _first(rows, verification_paths)
        digests.update((path, _digest(stored)) for path, stored in verification)
        attestation: dict[TeeClass, RegoPolicy] = {}
        for tee, paths in attestation_paths.items():
            for path, stored in _first(rows, paths):
                attestation[tee] = RegoPolicy.stored(stored.contents)
                digests[path] = _digest(stored)
        return Policies(
            id=policy_id,
            tenant=tenant,
            verification=_parsed(verification[0][1].contents) if verification else None,
            attestation=attestation,
            digests=digests,
            unsafe_rego_only=self._settings.unsafe_rego_only,
        )


def check_policy(name: PolicyName, text: bytes, pool: RegoPool) -> str:
    """Check a policy before it is stored.

    Returns:
        SHA-256 of its exact bytes, hex.

    Raises:
        FormatError, SettingError, LimitExceeded: the policy is not sound.
    """
    if name.kind is PolicyKind.RESOURCE:
        return RegoPolicy.checked_resource(text, pool).digest
    if name.kind is PolicyKind.ATTESTATION:
        return RegoPolicy.checked_attestation(text, pool).digest
    if name.kind is PolicyKind.BINDING:
        parse_binding(text)
        return sha256(text).hexdigest()
    return VerificationPolicy.parse(text, where="policy.toml").digest


def parse_binding(text: bytes) -> str:
    """The policy id that a binding names: its whole text, with or without a final newline.

    Raises:
        LimitExceeded, FormatError: it is none.
    """
    if len(text) > MAX_BINDING:
        raise LimitExceeded(f"binding: {len(text)} bytes, at most {MAX_BINDING} are accepted")
    try:
        return require_id(text.decode("ascii").removesuffix("\n"))
    except UnicodeDecodeError as error:
        raise FormatError("binding: not a policy id") from error


@lru_cache(maxsize=_PARSED)
def _parsed(text: bytes) -> VerificationPolicy:
    return VerificationPolicy.parse(text, where="policy.toml")


def _first(rows: Mapping[str, Stored], paths: list[str]) -> list[tuple[str, Stored]]:
    """The first of these that exists, as a list of at most one."""
    return [(path, rows[path]) for path in paths if path in rows][:1]


def _digest(stored: Stored) -> str:
    return sha256(stored.contents).hexdigest()


def digests_for_log(policies: Policies, references: str = "") -> dict[str, Any]:
    """The digests in force as audit leaves carry them: of each policy, and of reference values."""
    return {**policies.digests, **({"reference": references} if references else {})}
