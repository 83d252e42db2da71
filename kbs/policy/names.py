"""What policies are called: ``<kind>/<rest>``.

``resource/<prefix>``, ``binding/<prefix>`` with a prefix of a resource path, empty for all; and
``verification/[<tenant>/]<id>``, ``attestation/[<tenant>/]<id>_<class>``. A tenant is a repository.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from cai.errors import FormatError
from kbs.names import MAX_SEGMENT, ResourceName

DEFAULT_ID: Final = "default"
"""Policy id that is used where nothing is bound."""

_SEGMENT: Final = re.compile(r"[a-zA-Z0-9_-]+[a-zA-Z0-9_\-.]*", re.ASCII)


class PolicyKind(StrEnum):
    """What a policy decides."""

    RESOURCE = "resource"
    VERIFICATION = "verification"
    ATTESTATION = "attestation"
    BINDING = "binding"


class TeeClass(StrEnum):
    """Classes of a token's submodules that have attestation policies of their own."""

    CPU = "cpu"
    GPU = "gpu"
    SWITCH = "switch"


@dataclass(frozen=True, slots=True)
class PolicyName:
    """The name of one policy.

    Attributes:
        kind: what it decides.
        rest: prefix of resource paths, or ``[<tenant>/]<id>[_<class>]``.
    """

    kind: PolicyKind
    rest: str

    @classmethod
    def parse(cls, text: str) -> PolicyName:
        """Read ``<kind>/<rest>``.

        Raises:
            FormatError: it has another form.
        """
        kind, slash, rest = text.partition("/")
        if kind not in list(PolicyKind) or not slash:
            raise FormatError(
                f"{text[:64]!r} does not name a policy",
                hint="resource/PREFIX, verification/ID, attestation/ID_cpu, binding/PREFIX",
            )
        name = cls(PolicyKind(kind), rest)
        segments = rest.split("/") if rest else []
        prefixed = name.kind in (PolicyKind.RESOURCE, PolicyKind.BINDING)
        least, most = (0, 3) if prefixed else (1, 2)
        if not least <= len(segments) <= most or not all(is_segment(item) for item in segments):
            raise FormatError(f"{text[:64]!r} does not name a policy")
        if name.kind is PolicyKind.ATTESTATION and name.tee_class is None:
            raise FormatError(
                f"attestation policy {rest[:64]!r}: its id must end in a class",
                hint="_cpu, _gpu or _switch",
            )
        return name

    @property
    def path(self) -> str:
        """``<kind>/<rest>``."""
        return f"{self.kind.value}/{self.rest}"

    @property
    def tenant(self) -> str:
        """The repository that it belongs to; empty when it is everybody's."""
        first, slash, _ = self.rest.partition("/")
        if self.kind in (PolicyKind.RESOURCE, PolicyKind.BINDING):
            return first
        return first if slash else ""

    @property
    def tee_class(self) -> TeeClass | None:
        """Class of an attestation policy."""
        _, _, last = self.rest.rpartition("_")
        known = self.kind is PolicyKind.ATTESTATION and last in list(TeeClass)
        return TeeClass(last) if known and not self.rest.startswith("_") else None


def is_segment(text: str) -> bool:
    """Whether this is one segment of a name: letters, digits, ``-``, ``_`` and inner ``.``."""
    return len(text) <= MAX_SEGMENT and _SEGMENT.fullmatch(text) is not None


def require_id(text: str) -> str:
    """A policy id.

    Raises:
        FormatError: it is none.
    """
    if not is_segment(text):
        raise FormatError(f"{text[:64]!r} is no policy id", hint="letters, digits, - and _")
    return text


def prefixes(resource: ResourceName) -> tuple[str, ...]:
    """The prefixes of a resource's path, the most specific first, down to the empty one."""
    return (
        resource.path, f"{resource.repository}/{resource.type}", resource.repository, "",
    )  # fmt: skip
