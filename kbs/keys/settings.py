"""Where keys lie and who wraps them, as the configuration says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cai.settings import Section


@dataclass(frozen=True, slots=True)
class KeySettings:
    """Nothing can be set yet."""

    @classmethod
    def from_table(cls, section: Section | None) -> KeySettings:
        """Read ``[keys]``.

        Raises:
            SettingError: an unknown member, or one out of its range.
        """
        if section is not None:
            section.finish()
        return cls()
