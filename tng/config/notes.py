"""What reading a configuration found worth telling, besides its contents.

Stock TNG ignores many keys silently and lets traffic through in clear where no filter matches; here
each such thing becomes a note, which ``tng launch`` warns about and ``tng config check`` explains.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from cai.settings import Section, suggestion


class NoteKind(StrEnum):
    """What a note is about."""

    IGNORED = "ignored"
    """A key that has no effect, here or in TNG."""

    CLEAR = "clear"
    """Something that would let traffic through unprotected."""

    VERSION = "version"
    """Something that versions of TNG read differently."""

    REFUSED = "refused"
    """A setting of TNG that this gateway does not do; ``tng launch`` ends because of it."""


@dataclass(frozen=True, slots=True)
class Note:
    """One thing to tell.

    Attributes:
        kind: what it is about.
        where: names the place in the configuration.
        text: one sentence.
    """

    kind: NoteKind
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class Notes:
    """Collects notes while a configuration is read."""

    def __init__(self) -> None:
        self._notes: list[Note] = []

    def add(self, kind: NoteKind, where: str, text: str) -> None:
        """Keep one note."""
        self._notes.append(Note(kind, where, text))

    def refuse(self, where: str, what: str, instead: str = "") -> None:
        """Keep a refusal of something that is read but not done."""
        text = f"{what} is not done by this gateway"
        self.add(NoteKind.REFUSED, where, f"{text}; {instead}" if instead else text)

    def ignore_unknown(self, section: Section, known: Iterable[str] = ()) -> None:
        """Note every member that nobody read, where TNG ignores unknown keys."""
        names = section.unread(known)
        for name in names:
            near = suggestion(name, section.read_names | set(known))
            self.add(
                NoteKind.IGNORED,
                section.where,
                f"{name!r} has no effect" + (f" ({near})" if near else ""),
            )

    def all(self) -> tuple[Note, ...]:
        """Every note, in order."""
        return tuple(self._notes)
