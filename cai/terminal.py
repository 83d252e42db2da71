"""How the three programs speak to a person and to a machine.

Rules: results go to stdout, everything else to stderr; an error is one line and a hint, without
capitals or full stops of ceremony; ``--json`` prints exactly one JSON document per result on stdout
and turns everything decorative off; secrets never come here.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from cai.errors import CaiError, Interrupted, Refused, UsageError

if TYPE_CHECKING:
    from cai.attest.verdict import Verdict

# Newer versions of typer carry a click of their own; the parent of BadParameter is the usage error
# of whichever click is in use.
_BadUsage: Any = typer.BadParameter.__base__

_MARKS = {"pass": ("✓", "green"), "fail": ("✗", "red"), "not asked": ("·", "dim")}


@dataclass
class Terminal:
    """One program's voice.

    Attributes:
        program: name that starts each error line.
        json_output: results are JSON documents and nothing decorative is printed.
        out: where results go.
        err: where everything else goes.
    """

    program: str
    json_output: bool = False
    out: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    err: Console = field(
        default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True)
    )

    def result(self, value: dict[str, Any], text: str | Text | Table | None = None) -> None:
        """Print a result: ``value`` under ``--json``, else ``text``."""
        if self.json_output:
            sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        elif text is not None:
            self.out.print(text)

    def say(self, text: str | Text) -> None:
        """Tell a person something on the way; silent under ``--json``."""
        if not self.json_output:
            self.err.print(text)

    def warn(self, message: str) -> None:
        """Warn, also under ``--json`` (stderr never carries results)."""
        self.err.print(Text.assemble((f"{self.program}: warning: ", "yellow"), message))

    def error(self, error: CaiError) -> None:
        """Print an error as one line and a hint, or as one JSON document under ``--json``."""
        if self.json_output:
            sys.stdout.write(json.dumps({"error": error.to_json()}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        self.err.print(Text.assemble((f"{self.program}: ", "bold red"), error.message))
        if error.hint:
            self.err.print(Text.assemble((f"{self.program}: hint: ", "cyan"), error.hint))
        if isinstance(error, Refused) and error.verdict is not None:
            self.verdict(error.verdict)

    def verdict(self, verdict: Verdict) -> None:
        """Show every check of a verdict as a table."""
        if not self.json_output:
            self.err.print(verdict_table(verdict))

    @contextmanager
    def progress(self, what: str, total: int | None, *, unit: str = "B") -> Iterator[Advance]:
        """A progress bar with throughput and time left, for work that takes seconds.

        Args:
            what: one or two words in front of the bar.
            total: amount of work in ``unit``; ``None`` when unknown.
            unit: ``"B"`` shows bytes a second.

        Yields:
            A function to call with each amount done; safe from any thread.
        """
        if self.json_output or not self.err.is_terminal:
            yield lambda _amount: None
            return
        columns = [TextColumn("{task.description}"), BarColumn()]
        if unit == "B":
            columns += [DownloadColumn(binary_units=True), TransferSpeedColumn()]
        with Progress(*columns, TimeRemainingColumn(), console=self.err, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda amount: bar.advance(task, amount)


JsonFlag = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead of text for people.")
]
"""The option that every command has; ``run_app`` reads it before the command starts."""

Advance = Callable[[int], None]
"""Reports an amount of work done."""


def verdict_table(verdict: Verdict) -> Table:
    """A verdict as a table: mark, check, observed, expected or reason."""
    title = verdict.subject + (" [SIMULATED]" if verdict.simulated else "")
    table = Table(title=Text(title), title_justify="left", box=None, padding=(0, 1))
    for heading in ("", "check", "observed", "expected / reason"):
        table.add_column(heading, overflow="fold")
    for item in verdict.checks:
        mark, style = _MARKS[item.outcome.value]
        table.add_row(
            Text(mark, style=style),
            Text(item.name),
            Text(_short(item.observed), style="dim"),
            Text(_short(item.reason or item.expected), style=style if item.reason else "dim"),
        )
    return table


_current: ContextVar[Terminal] = ContextVar("terminal")


def current() -> Terminal:
    """The running program's terminal."""
    return _current.get()


def run_app(program: str, app: typer.Typer) -> int:
    """Run a command line to its exit status: 0, or that of the error it ended with.

    SIGTERM and SIGINT unwind the command, so that nothing half-written is left behind.
    """

    def on_term(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(143)

    arguments = sys.argv[1:]
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    terminal = Terminal(program, json_output="--json" in own)
    _current.set(terminal)
    signal.signal(signal.SIGTERM, on_term)
    try:
        status = typer.main.get_command(app).main(
            args=arguments, prog_name=program, standalone_mode=False
        )
    except _BadUsage as error:
        if message := error.format_message():  # none where the help has just been shown
            terminal.error(UsageError(message, hint=f"{program} --help"))
        return UsageError.exit_status
    except (KeyboardInterrupt, typer.Abort):
        terminal.error(Interrupted("interrupted", hint="nothing half-written was left behind"))
        return Interrupted.exit_status
    except BrokenPipeError:
        # The reader of stdout has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except CaiError as error:
        terminal.error(error)
        return error.exit_status
    return status if isinstance(status, int) else 0


def _short(value: str | None, limit: int = 60) -> str:
    if value is None:
        return ""
    return value if len(value) <= limit else value[: limit - 1] + "…"
