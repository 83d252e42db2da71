"""The attestation service, as the configuration says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai.settings import Section

TOKEN_SECONDS = 300
"""How long an appraisal is valid unless told otherwise, seconds (Trustee's default)."""

MAX_TOKEN_SECONDS = 24 * 3600
"""Longest validity that can be configured, seconds."""


@dataclass(frozen=True, slots=True)
class AppraisalSettings:
    """The attestation service under ``/as/``.

    Attributes:
        enabled: whether it is served at all.
        require_challenge: refuse evidence that answers no challenge of this service. Stock TNG
            asks for none before RATS-TLS, so it is off; the token says which it was.
        token_seconds: how long an appraisal is valid, seconds.
        audience: ``aud`` of its tokens; empty is ``cai-as/<instance>``.
        verbose: put the evidence into the token instead of its digests.
    """

    enabled: bool = True
    require_challenge: bool = False
    token_seconds: int = TOKEN_SECONDS
    audience: str = ""
    verbose: bool = False

    @classmethod
    def from_table(cls, section: Section | None) -> AppraisalSettings:
        """Read ``[attestation]``.

        Raises:
            SettingError: an unknown member, or one out of its range.
        """
        if section is None:
            return cls()
        settings = cls(
            enabled=section.flag("enabled", default=True),
            require_challenge=section.flag("require_challenge", default=False),
            token_seconds=section.integer(
                "token_seconds", TOKEN_SECONDS, least=10, most=MAX_TOKEN_SECONDS, unit="seconds"
            ),
            audience=section.text("audience", ""),
            verbose=section.flag("verbose", default=False),
        )
        section.finish()
        return settings
