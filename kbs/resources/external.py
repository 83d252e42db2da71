"""Resources that live elsewhere: in a key service or a vault, read when they are released."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from cai.errors import FormatError, SettingError
from cai.settings import Section, suggestion
from kbs.keys.gate import Gate
from kbs.names import ResourceName
from kbs.resources.source import SecretSource, SourceSecret

LEASES: Final = ("required", "optional", "by-contents")
"""What a prefix may say about leases."""


@dataclass(frozen=True, slots=True)
class ExternalPrefix:
    """Resources that come from a source.

    Attributes:
        prefix: ``""`` for all, ``repo``, ``repo/type`` or ``repo/type/tag``.
        source: where they are read.
        lease: ``required``, ``optional``, or empty: required when the contents are a record.
        unsafe: names of its loosened settings.
        gate: how many read from it at once.
    """

    prefix: str
    source: SecretSource
    lease: str = ""
    unsafe: tuple[str, ...] = ()
    gate: Gate = field(default_factory=lambda: Gate("the place of a secret"), compare=False)

    def read(self, path: str) -> SourceSecret | None:
        """The secret of a resource; ``None`` when there is none.

        Raises:
            CaiError: as the source says.
        """
        with self.gate.passing():
            return self.source.read(ResourceName.parse(path))

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
    # Only Alibaba Cloud's tables know this word; anywhere else ``finish`` refuses it.
    plain = section.text("kind") == "aliyun-kms" and section.flag(
        "unsafe_plain_http", default=False
    )
    section.finish()
    return ExternalPrefix(
        prefix, source, "" if lease == "by-contents" else lease,
        ("unsafe_plain_http",) if plain else (),
    )  # fmt: skip


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
