"""A service that holds secrets, as resources are read from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cai.errors import SettingError
from cai.settings import Section
from kbs.names import ResourceName


class Naming(StrEnum):
    """How a secret is called at its source."""

    TAG = "tag"
    PATH = "path"

    @classmethod
    def from_section(cls, section: Section) -> Naming:
        """Read the member ``name``.

        Raises:
            SettingError: neither ``tag`` nor ``path``.
        """
        text = section.text("name", Naming.TAG.value)
        try:
            return cls(text)
        except ValueError as error:
            raise SettingError(f"{section.where}: name is tag or path") from error


def secret_name(name: ResourceName, naming: Naming) -> str:
    """What a resource is called at its source."""
    return name.tag if naming is Naming.TAG else name.path


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

    def close(self) -> None:
        """Give back what it holds open."""
        ...
