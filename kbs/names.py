"""What things are called: resources, realms, and the message kinds of the wire."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cai.errors import FormatError

MAX_SEGMENT = 128
"""Longest of the three segments of a resource name, characters."""

KBS_AUDIENCE: Final = "KBS"
"""``aud`` of an administrator's token, as Trustee spells it."""

_SEGMENT: Final = re.compile(r"[a-zA-Z0-9_-]+[a-zA-Z0-9_\-.]*", re.ASCII)


class Realm(StrEnum):
    """Fixed when a database is created: which platforms it can ever release to (decisions §1.3)."""

    PRODUCTION = "production"
    SIMULATED = "simulated"

    @property
    def issuer(self) -> str:
        """``iss`` of the tokens of this realm."""
        return "CAI-SIMULATED" if self is Realm.SIMULATED else "CAI"


@dataclass(frozen=True, slots=True)
class ResourceName:
    """``<repository>/<type>/<tag>``."""

    repository: str
    type: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> ResourceName:
        """Read ``repository/type/tag`` or ``kbs:///repository/type/tag``.

        Raises:
            FormatError: not three segments of letters, digits, ``-``, ``_`` and inner ``.``.
        """
        segments = text.removeprefix("kbs:///").split("/")
        if len(segments) != 3 or not all(
            len(segment) <= MAX_SEGMENT and _SEGMENT.fullmatch(segment) for segment in segments
        ):
            raise FormatError(
                f"{text[:64]!r} does not name a resource", hint="use kbs:///repository/type/tag"
            )
        return cls(*segments)

    @property
    def path(self) -> str:
        """The three segments with ``/`` between them."""
        return f"{self.repository}/{self.type}/{self.tag}"

    @property
    def uri(self) -> str:
        """The name as a URI."""
        return f"kbs:///{self.path}"

    def __str__(self) -> str:
        return self.path
