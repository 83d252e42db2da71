"""How much is stored, for how long, and which resources live elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cai.errors import SettingError
from cai.settings import Section
from kbs.resources.external import ExternalPrefix, external_prefix

MAX_RESOURCE: Final = 1024 * 1024
"""Largest resource unless told otherwise, bytes."""

MOST_RESOURCE: Final = 16 * 1024 * 1024
"""Largest resource that a setting may allow, bytes."""


@dataclass(frozen=True, slots=True)
class ResourceSettings:
    """Limits and retention of resources.

    Attributes:
        max_bytes: largest resource.
        max_resources: most resources of one database.
        keep_versions: newest versions of a resource that stay, whatever their age.
        keep_days: how long older versions, and all versions of a deleted resource, stay.
        external: prefixes whose resources are read from elsewhere.
    """

    max_bytes: int = MAX_RESOURCE
    max_resources: int = 100_000
    keep_versions: int = 10
    keep_days: int = 30
    external: tuple[ExternalPrefix, ...] = ()

    @classmethod
    def from_table(cls, section: Section | None) -> ResourceSettings:
        """Read ``[resources]``.

        Raises:
            SettingError: an unknown member, or one out of its range.
        """
        if section is None:
            return cls()
        external: list[ExternalPrefix] = []
        described = section.section("external")
        if described is not None:
            for name in section.raw("external"):
                item = described.section(name)
                if item is not None:
                    external.append(external_prefix(item))
        settings = cls(
            section.integer("max_bytes", MAX_RESOURCE, least=1, most=MOST_RESOURCE, unit="bytes"),
            section.integer("max_resources", 100_000, least=1, most=10_000_000, unit="resources"),
            section.integer("keep_versions", 10, least=1, most=100_000, unit="versions"),
            section.integer("keep_days", 30, least=0, most=36_500, unit="days"),
            tuple(external),
        )
        section.finish()
        prefixes = [item.prefix for item in external]
        if len(set(prefixes)) != len(prefixes):
            raise SettingError(f"{section.where}: two external tables have the same prefix")
        return settings
