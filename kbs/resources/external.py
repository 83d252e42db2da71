"""Resources that live elsewhere: in a key service or a vault, read when they are released."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from cai.errors import FormatError, SettingError
from cai.settings import Section, suggestion
from kbs.names import ResourceName

LEASES: Final = ("required", "optional", "by-contents")
"""What a prefix may say about leases."""


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


def external_prefix(section: Section) -> ExternalPrefix:
    """Read one table of ``[resources.external]``: ``prefix``, ``lease``, ``kind`` and its members.

    Raises:
        SettingError: an unknown member or kind, or one of another form.
    """
    prefix = section.text("prefix").strip("/")
    if prefix:
        try:
            ResourceName.parse("/".join([*prefix.split("/"), "x", "x"][:3]))
        except FormatError as error:
            raise SettingError(f"{section.where}: {prefix!r} is not a prefix of names") from error
        if prefix.count("/") > 2:
            raise SettingError(f"{section.where}: {prefix!r} is not a prefix of names")
    lease = section.text("lease", "by-contents")
    if lease not in LEASES:
        raise SettingError(
            f"{section.where}: unknown lease {lease!r}", hint=f"known are: {', '.join(LEASES)}"
        )
    source = _source(section)
    section.finish()
    return ExternalPrefix(prefix, source, "" if lease == "by-contents" else lease)


def _source(section: Section) -> SecretSource:
    # Imported here: each kind needs a package of its own.
    from kbs.resources.aliyun_secrets import AliyunSecrets
    from kbs.resources.vault_kv import VaultKv

    kinds: dict[str, Callable[[Section], SecretSource]] = {
        "vault-kv": VaultKv.from_section,
        "aliyun-kms": AliyunSecrets.from_section,
    }
    kind = section.text("kind")
    if kind not in kinds:
        raise SettingError(
            f"{section.where}: unknown kind {kind!r}",
            hint=suggestion(kind, kinds) or f"known are: {', '.join(kinds)}",
        )
    return kinds[kind](section)
