"""Resources that live elsewhere: in a key service or a vault, read when they are released."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kbs.names import ResourceName


@dataclass(frozen=True, slots=True)
class SourceSecret:
    """What a source holds under a name.

    Attributes:
        contents: the bytes.
        version: the source's own name of this version; empty when it has none.
    """

    contents: bytes
    version: str = ""

    def __repr__(self) -> str:
        return f"<secret of {len(self.contents)} bytes, version {self.version!r}>"


class SecretSource(Protocol):
    """Reads secrets of one service.

    Attributes:
        id: names the service in listings and the audit log, e.g. ``vault-kv:host/mount``.
    """

    id: str

    def read(self, name: ResourceName) -> SourceSecret | None:
        """The secret of this resource; ``None`` when the source has none.

        Raises:
            Unavailable: the source does not answer now.
            CaiError: it refuses, or holds something else than text or bytes.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExternalPrefix:
    """Resources that come from a source.

    Attributes:
        prefix: ``""`` for all, ``repo``, ``repo/type`` or ``repo/type/tag``.
        source: where they are read.
        lease: ``required``, ``optional``, or empty: required when the contents are a record.
    """

    prefix: str
    source: SecretSource
    lease: str = ""

    def covers(self, path: str) -> bool:
        """Whether a resource comes from here."""
        return not self.prefix or path == self.prefix or path.startswith(self.prefix + "/")
