"""How the demo speaks: numbered acts, short sentences, one line a fact.

Every line that rests on the simulator carries the word SIMULATED; nothing that the demo shows may
be taken for a statement about hardware. What is told is kept as well, so that ``--json`` can give
the same story as one document.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cai.errors import CaiError
from cai.terminal import Terminal

SIMULATED = "SIMULATED"
"""The mark on everything that rests on the simulated platform."""


class StoryBroken(CaiError):
    """Something did not happen as the story says; for instance a refusal that did not refuse."""

    code = "story-broken"


@dataclass
class Act:
    """One act: its facts become members of the JSON document.

    Attributes:
        number: 1 to 6; 7 is the ending.
        title: what happens in it.
        facts: what was measured or decided, by name.
        simulated: some line of it rests on the simulator.
        ok: it did what the story says.
        seconds: how long it took.
    """

    number: int
    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    simulated: bool = False
    ok: bool = False
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The act as a member of the document."""
        return {
            "number": self.number,
            "title": self.title,
            "ok": self.ok,
            "simulated": self.simulated,
            "seconds": round(self.seconds, 2),
            "facts": self.facts,
        }


class Teller:
    """Tells the story to a person, and keeps it for a machine.

    Args:
        terminal: where to; under ``--json`` nothing decorative is printed.
    """

    def __init__(self, terminal: Terminal) -> None:
        self._console: Console | None = None if terminal.json_output else terminal.out
        self.acts: list[Act] = []
        self.commands: list[str] = []

    def title(self, text: str, below: str) -> None:
        """The opening."""
        self._print(Panel(Text(below), title=Text(text, style="bold"), title_align="left"))

    @contextmanager
    def act(self, number: int, title: str, sentence: str) -> Iterator[Act]:
        """Play one act; it is ``ok`` when its body ends without an error."""
        act = Act(number, title)
        self.acts.append(act)
        self._print("")
        self._print(Rule(Text.assemble((f"{number} ", "bold cyan"), (title, "bold")), align="left"))
        self._print(Padding(Text(sentence, style="italic"), (0, 0, 0, 2)))
        started = time.monotonic()
        try:
            yield act
        finally:
            act.seconds = time.monotonic() - started
        act.ok = True

    def command(self, argv: Sequence[str]) -> None:
        """A command that runs now, as a person would type it.

        ``--json`` is how the demo reads the answer; what the command does is the same without.
        """
        line = shlex.join(word for word in argv if word != "--json")
        self.commands.append(line)
        self.copyable(f"    $ {line}", style="cyan")

    def copyable(self, line: str, *, style: str = "dim") -> None:
        """A line that the terminal wraps by itself, so that it can be copied as one."""
        if self._console is not None:
            self._console.print(Text(line, style=style), soft_wrap=True)

    def did(self, text: str, *, simulated: bool = False, detail: str = "") -> None:
        """Something that happened as it should."""
        self._line("✓", "green", text, detail, simulated=simulated)

    def refused(self, text: str, reason: str, *, simulated: bool = False) -> None:
        """Something that was refused, as it should be, and why."""
        self._line("⊘", "magenta", text, "", simulated=simulated)
        line = Text(reason, style="magenta")
        self._print(Padding(_marked(line) if simulated else line, (0, 0, 0, 4)))

    def note(self, text: str) -> None:
        """An aside."""
        self._print(Padding(Text(text, style="dim"), (0, 0, 0, 4)))

    def table(self, table: Table) -> None:
        """A table."""
        self._print(Padding(table, (0, 0, 0, 2)))

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A spinner while something takes its time; nothing when not on a terminal."""
        if self._console is None or not self._console.is_terminal:
            yield
            return
        with self._console.status(Text(what)):
            yield

    def _line(self, mark: str, style: str, text: str, detail: str, *, simulated: bool) -> None:
        line = Text.assemble((f"{mark} ", style), text)
        if detail:
            line.append(f"  {detail}", style="dim")
        self._print(Padding(_marked(line) if simulated else line, (0, 0, 0, 2)))

    def _print(self, what: object) -> None:
        if self._console is not None:
            self._console.print(what, soft_wrap=False)


def _marked(line: Text) -> Text:
    return line.append(f"  {SIMULATED}", style="bold yellow")
