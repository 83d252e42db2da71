"""The two policies that decide releases, as stored and as in force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import Connection

from cai.attest.policy import VerificationPolicy
from cai.errors import InputMissing
from kbs.policy.rego import ReleasePolicy
from kbs.rows import SealedRows

RELEASE_POLICY: Final = "release"
"""Row of the Rego policy."""

VERIFICATION_POLICY: Final = "verification"
"""Row of ``policy.toml``."""


@dataclass(frozen=True, slots=True)
class Policies:
    """The policies in force in one transaction."""

    verification: VerificationPolicy | None = None
    release: ReleasePolicy | None = None

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each policy's exact bytes, hex; empty text where none is set."""
        return {
            VERIFICATION_POLICY: self.verification.digest if self.verification else "",
            RELEASE_POLICY: self.release.digest if self.release else "",
        }


def current_policies(rows: SealedRows, connection: Connection) -> Policies:
    """The policies in force.

    Raises:
        Tampered: a stored row is not the one that was stored.
    """
    verification = rows.get(connection, VERIFICATION_POLICY)
    release = rows.get(connection, RELEASE_POLICY)
    return Policies(
        None
        if verification is None
        else VerificationPolicy.parse(verification.contents, where="policy.toml"),
        None if release is None else ReleasePolicy.stored(release.contents),
    )


def checked_digest(kind: str, text: bytes) -> str:
    """Check a policy before it is stored.

    Returns:
        SHA-256 of its exact bytes, hex.

    Raises:
        FormatError, SettingError, LimitExceeded: the policy is not sound.
        InputMissing: there is no such kind of policy.
    """
    if kind == RELEASE_POLICY:
        return ReleasePolicy.parse(text).digest
    if kind == VERIFICATION_POLICY:
        return VerificationPolicy.parse(text, where="policy.toml").digest
    raise InputMissing(f"there is no policy {kind[:32]!r}")
