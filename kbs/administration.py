"""What the broker's owner may do: store resources and policies, read the audit log.

Every change and its audit row are one transaction.
"""

from __future__ import annotations

from cai.errors import FormatError, LimitExceeded, Unauthenticated
from kbs import admin_auth
from kbs.audit import Entry, read_leaves
from kbs.core import Core
from kbs.names import ResourceName
from kbs.policy_rows import checked_digest

MAX_RESOURCE = 1024 * 1024
"""Largest resource, bytes."""


class Administration:
    """The administrator's side of one key broker."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def authenticate(self, authorization: str | None) -> str:
        """The administrator's name behind an ``Authorization`` header.

        Raises:
            Unauthenticated: none.
        """
        core = self._core
        try:
            return admin_auth.authenticate(
                authorization, core.instance.admin_key, now=core.clock()
            )
        except Unauthenticated:
            core.count_failure("admin")
            raise

    def set_resource(self, path: str, contents: bytes, *, admin: str, request: str) -> int:
        """Store the next version of a resource.

        Returns:
            Its version.

        Raises:
            FormatError, LimitExceeded: not a resource name, empty, or too long.
        """
        name = ResourceName.parse(path)
        if not contents:
            raise FormatError("a resource must not be empty")
        if len(contents) > MAX_RESOURCE:
            raise LimitExceeded(
                f"resource of {len(contents)} bytes, at most {MAX_RESOURCE} are stored"
            )
        core = self._core
        with core.database.write() as connection:
            change = core.resources.put(connection, name.path, contents)
            entry = Entry(
                "resource.set", _admin(admin), request, allowed=True, subject=name.uri,
                change=change,
            )  # fmt: skip
            core.audit.append(connection, entry, core.clock())
        return change.version

    def set_policy(self, kind: str, text: bytes, *, admin: str, request: str) -> str:
        """Store a policy, checked first.

        Args:
            kind: ``RELEASE_POLICY`` or ``VERIFICATION_POLICY``.
            text: its exact bytes.
            admin: who sets it.
            request: id of this request.

        Returns:
            SHA-256 of the text, hex.

        Raises:
            FormatError, SettingError, LimitExceeded: the policy is not sound.
        """
        digest = checked_digest(kind, text)
        core = self._core
        with core.database.write() as connection:
            change = core.policies.put(connection, kind, text)
            entry = Entry(
                f"policy.{kind}.set", _admin(admin), request, allowed=True, change=change,
                policies={kind: digest},
            )  # fmt: skip
            core.audit.append(connection, entry, core.clock())
        return digest

    def policy_text(self, kind: str) -> bytes | None:
        """A policy's exact bytes, or ``None`` when none is set."""
        with self._core.database.read() as connection:
            stored = self._core.policies.get(connection, kind)
        return None if stored is None else stored.contents

    def audit_leaves(self, *, start: int, limit: int) -> tuple[int, list[bytes]]:
        """Size of the audit log, and its leaves from ``start``."""
        return read_leaves(self._core.database, start=start, limit=limit)


def _admin(name: str) -> dict[str, str]:
    return {"kind": "admin", "name": name}
