"""The parties of the demo: each is a process, started by the command a person would type.

All of them run in one working directory, so the commands that are shown are short and work as they
stand after ``--keep``. Whatever ends the demo, every process is ended and every mount under the
working directory is taken away, the last started first.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from cai.errors import CaiError, InputMissing, PeerUnreachable, from_os_error

START_S = 60.0
"""Longest time a party may take until it is ready, seconds."""

RUN_S = 120.0
"""Longest time a command that ends by itself may take, seconds."""

STOP_S = 15.0
"""Longest time a party may take to end after SIGTERM, seconds; then it is killed."""

MAX_OUTPUT = 4 * 1024 * 1024
"""Most bytes of a party's output that are looked at."""

_POLL_S = 0.05

T = TypeVar("T")


class PartyEnded(CaiError):
    """A party ended before it was ready, or a command failed."""

    code = "party-ended"


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended.

    Attributes:
        status: its exit status.
        out: its stdout.
        err: its stderr.
    """

    status: int
    out: str
    err: str

    def document(self) -> dict[str, Any]:
        """The last JSON document on stdout.

        Raises:
            PartyEnded: there is none.
        """
        for line in reversed(self.out.splitlines()):
            value = _json_object(line)
            if value is not None:
                return value
        raise PartyEnded("a command printed no JSON document", hint=_last_words(self.err))


class Party:
    """One long-running process.

    Attributes:
        name: what the story calls it.
        argv: its command as a person would type it.
        process: the process.
    """

    def __init__(
        self, name: str, argv: Sequence[str], process: subprocess.Popen[bytes], logs: Path
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.process = process
        self._logs = logs

    @property
    def out(self) -> str:
        """What it has printed on stdout so far."""
        return _tail(self._logs / f"{self.name}.out")

    @property
    def err(self) -> str:
        """What it has printed on stderr so far."""
        return _tail(self._logs / f"{self.name}.err")

    def wait_document(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait for a JSON document on its stdout.

        Args:
            wanted: says whether a document is the one.

        Raises:
            PartyEnded: it ended first.
            PeerUnreachable: it took longer than ``START_S``.
        """

        def look() -> dict[str, Any] | None:
            for line in self.out.splitlines():
                value = _json_object(line)
                if value is not None and wanted(value):
                    return value
            return None

        return self.wait(look)

    def wait(self, look: Callable[[], T | None], *, seconds: float | None = None) -> T:
        """Wait until ``look`` finds something.

        Args:
            look: gives what is waited for, or ``None`` while it is not there.
            seconds: how long to wait; by default ``START_S``.

        Raises:
            PartyEnded: the process ended first.
            PeerUnreachable: it took longer.
        """
        longest = START_S if seconds is None else seconds
        deadline = time.monotonic() + longest
        while True:
            status = self.process.poll()
            found = look()
            if found is not None:
                return found
            if status is not None:
                raise PartyEnded(
                    f"{self.name} ended with status {status}", hint=_last_words(self.err)
                )
            if time.monotonic() > deadline:
                raise PeerUnreachable(
                    f"{self.name} was not ready in {longest:.0f} s", hint=_last_words(self.err)
                )
            time.sleep(_POLL_S)

    def stop(self) -> int:
        """End it by SIGTERM, by SIGKILL after ``STOP_S``; returns its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


class Parties:
    """All processes of one demo; as a context manager it leaves none behind.

    Args:
        work: working directory of every process.
    """

    def __init__(self, work: Path) -> None:
        self.work = work
        self.logs = work / "logs"
        self._parties: list[Party] = []

    def __enter__(self) -> Parties:
        self.logs.mkdir(mode=0o700, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, name: str, argv: Sequence[str]) -> Party:
        """Start a party that runs until the demo ends.

        Args:
            name: what the story calls it; also the stem of its log files.
            argv: its command, its first word one of our programs.

        Raises:
            InputMissing: the program is not installed.
            StorageError: it cannot be started.
        """
        try:
            # A signal between its start and its entry in the list would leave it behind.
            with (self.logs / f"{name}.out").open("wb") as out, \
                    (self.logs / f"{name}.err").open("wb") as err, _undisturbed():
                # A session of its own: Ctrl-C reaches the demo only, which ends all in order.
                process = subprocess.Popen(
                    _resolved(argv), cwd=self.work, stdin=subprocess.DEVNULL, stdout=out,
                    stderr=err, env=_environment(), start_new_session=True,
                )
                party = Party(name, argv, process, self.logs)
                self._parties.append(party)
        except OSError as error:
            raise from_os_error(error, f"start {argv[0]}") from error
        return party

    def run(self, name: str, argv: Sequence[str]) -> Finished:
        """Run a command that ends by itself.

        Raises:
            PartyEnded: it took longer than ``RUN_S``.
            InputMissing, StorageError: as ``start``.
        """
        party = self.start(name, argv)
        try:
            status = party.process.wait(RUN_S)
        except subprocess.TimeoutExpired as error:
            raise PartyEnded(
                f"{' '.join(argv[:2])} did not end in {RUN_S:.0f} s", hint=_last_words(party.err)
            ) from error
        finally:
            self.stop(party)
        return Finished(status, party.out, party.err)

    def require(self, name: str, argv: Sequence[str]) -> Finished:
        """Run a command that must succeed.

        Raises:
            PartyEnded: its exit status is not 0.
        """
        finished = self.run(name, argv)
        if finished.status != 0:
            raise PartyEnded(
                f"{' '.join(argv[:2])} ended with status {finished.status}",
                hint=_last_words(finished.err),
            )
        return finished

    def stop(self, party: Party) -> None:
        """End one party before the others."""
        party.stop()
        self._parties.remove(party)

    def require_running(self) -> None:
        """Demand that every party still runs.

        Raises:
            PartyEnded: naming the first that does not, with its last words.
        """
        for party in self._parties:
            status = party.process.poll()
            if status is not None:
                raise PartyEnded(
                    f"{party.name} ended with status {status}", hint=_last_words(party.err)
                )

    def close(self) -> None:
        """End every party, the last started first, then take away mounts that are left."""
        with _undisturbed():
            while self._parties:
                self._parties.pop().stop()
            for place in reversed(mounts_under(self.work)):
                unmount(place)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until what must not be left half-way is done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread, so they do not disturb this one
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
    if held:
        signal.raise_signal(held[0])


def mounts_under(directory: Path) -> list[Path]:
    """Mount points below a directory, outer ones first (proc(5), mountinfo, field 5)."""
    root = str(directory.resolve())
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    places = []
    for line in lines.splitlines():
        place = line.split(" ")[4]
        for escaped, plain in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            place = place.replace(escaped, plain)
        if place.startswith(root + os.sep):
            places.append(Path(place))
    return places


def unmount(place: Path) -> None:
    """Take a mount away, even a dead one; quiet when it is gone already."""
    for command in (["fusermount3", "-u", "-z"], ["fusermount", "-u", "-z"], ["umount", "-l"]):
        if shutil.which(command[0]) is None:
            continue
        ended = subprocess.run(
            [*command, str(place)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            check=False,
        )
        if ended.returncode == 0:
            return


def _resolved(argv: Sequence[str]) -> list[str]:
    """The command with its program looked up where this interpreter's programs are."""
    program = argv[0]
    if program == "python":
        return [sys.executable, *argv[1:]]
    beside = Path(sys.executable).parent / program
    found = str(beside) if beside.is_file() else shutil.which(program)
    if found is None:
        raise InputMissing(f"{program} is not installed", hint="make demo installs everything")
    return [found, *argv[1:]]


def _environment() -> dict[str, str]:
    """The environment without proxies, which would carry loopback requests elsewhere.

    An engine must not ask a model hub for files or report its use to its makers.
    """
    return {
        name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")
    } | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_OUTPUT).decode("utf-8", errors="replace")
    except OSError:
        return ""


def _json_object(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _last_words(text: str) -> str | None:
    """The end of a party's stderr on one line: its error, and the hint that may stand below it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kept = 2 if len(lines) > 1 and ": hint: " in lines[-1] else 1
    return " / ".join(lines[-kept:])[:400] or None
