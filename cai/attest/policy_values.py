"""How members of ``policy.toml`` are read and compared (docs/spec-policy.md §1).

Shared by the modules of its tables; nothing here knows a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from cai.attest.verdict import Check, check, not_asked
from cai.errors import SettingError
from cai.settings import Section

MAX_LISTED = 256
"""Most values in one list."""


def texts(section: Section, name: str, default: list[str] | None) -> tuple[str, ...]:
    """A list of at most ``MAX_LISTED`` strings.

    Raises:
        SettingError: it is missing without a default, of another type, or too long.
    """
    values = section.texts(name, default)
    if len(values) > MAX_LISTED:
        raise SettingError(f"{section.where}: {name} lists more than {MAX_LISTED} values")
    return tuple(values)


def hexes(section: Section, name: str, size: int) -> tuple[str, ...]:
    """A list of one or more values of ``size`` bytes in lower-case hex.

    Raises:
        SettingError: it is missing, empty, or has another value.
    """
    values = texts(section, name, None)
    if not values:
        raise SettingError(
            f"{section.where}: {name} is an empty list, which no guest can pass",
            hint="list at least one value",
        )
    for value in values:
        if len(value) != 2 * size or not set(value) <= set("0123456789abcdef"):
            raise SettingError(
                f"{section.where}: {name} has {value[:100]!r}, expected {2 * size} lower-case hex"
                " digits"
            )
    return values


def optional_hexes(section: Section, name: str, size: int) -> tuple[str, ...]:
    """As ``hexes``, or empty where the member is absent."""
    return hexes(section, name, size) if section.has(name) else ()


def choices(
    section: Section,
    name: str,
    known: Iterable[str],
    default: list[str] | None,
    *,
    hints: dict[str, str] | None = None,
) -> tuple[str, ...]:
    """A list of known words.

    Args:
        section: the table.
        name: the member.
        known: the words.
        default: when it is absent; ``None`` demands it.
        hints: what to say about certain other words.

    Raises:
        SettingError: another word.
    """
    values = texts(section, name, default)
    for value in values:
        if value not in tuple(known):
            hint = (hints or {}).get(value, f"known are: {', '.join(known)}")
            raise SettingError(f"{section.where}: {name} has {value[:100]!r}", hint=hint)
    return values


def moment(section: Section, name: str) -> datetime:
    """An RFC 3339 time with its zone.

    Raises:
        SettingError: it is missing or of another form.
    """
    text = section.text(name)
    found = parse_moment(text)
    if found is None:
        raise SettingError(
            f"{section.where}: {name} is {text[:40]!r}, expected a time",
            hint="write it as 2027-01-31T00:00:00Z",
        )
    return found


def parse_moment(text: str) -> datetime | None:
    """An RFC 3339 time, or ``None`` when it is none or names no zone."""
    try:
        found = datetime.fromisoformat(text)
        return None if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def listed(name: str, observed: str, allowed: tuple[str, ...] | None, reason: str) -> Check:
    """A check that one of the listed values was observed; ``None`` is a loosening."""
    if allowed is None:
        return not_asked(name, observed, "any value is accepted")
    return check(name, passed=observed in allowed, observed=observed or "absent",
                 expected=" or ".join(allowed), reason=reason)  # fmt: skip


def optional(name: str, observed: str, allowed: tuple[str, ...]) -> Check:
    """As ``listed``, and not asked where nothing is listed."""
    if not allowed:
        return not_asked(name, observed)
    return listed(name, observed, allowed, "not among the listed values")
