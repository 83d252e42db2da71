"""Leases and tickets, as the configuration says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai.settings import Section


@dataclass(frozen=True, slots=True)
class ReleaseSettings:
    """Nothing can be set yet."""

    @classmethod
    def from_table(cls, section: Section | None) -> ReleaseSettings:
        """Read ``[release]``.

        Raises:
            SettingError: an unknown member, or one out of its range.
        """
        if section is not None:
            section.finish()
        return cls()
