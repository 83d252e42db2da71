"""Collecting a TDX guest's evidence through the kernel: quotes, RTMR3, the boot event log.

Quotes come from configfs-tsm (Linux 6.7): a directory is made, 64 bytes are written to ``inblob``
and the quote is read from ``outblob``; ``generation`` proves that nobody else wrote in between.
RTMR3 is read and extended through sysfs (Linux 6.16). All access goes through ``GuestFiles``, so
that tests play the kernel.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Sequence
from hashlib import sha384
from pathlib import Path
from typing import Protocol

from cai.attest.statement import REPORT_DATA_SIZE
from cai.attest.tdx.log_records import STOP, boot_log_end, runtime_record
from cai.attest.tdx.quote import MAX_QUOTE
from cai.attest.tdx.runtime_events import replay
from cai.errors import (
    CaiError,
    FormatError,
    InputMissing,
    LimitExceeded,
    Refused,
    StorageError,
    from_os_error,
)

REPORTS = "sys/kernel/config/tsm/report"
"""Where configfs-tsm makes report entries, below the root of the file system."""

MEASUREMENTS = "sys/devices/virtual/misc/tdx_guest/measurements"
"""Where the kernel shows measurement registers, below the root of the file system."""

CCEL_TABLE = "sys/firmware/acpi/tables/CCEL"
CCEL_DATA = "sys/firmware/acpi/tables/data/CCEL"
"""ACPI table that announces the boot event log, and the whole log area, padded."""

PROVIDER = "tdx_guest"
"""What ``provider`` says of a TDX guest's report entry."""

MAX_EVENT_LOG_AREA = 1024 * 1024
"""Largest log area that is read, bytes (spec-evidence, event logs)."""

MAX_ATTRIBUTE = 4096
"""Largest text attribute that is read, bytes."""

QUOTE_TRIES = 3
"""How often a quote is asked for when another writer got in between."""

REGISTER_SIZE = 48

HINT_CONFIGFS = "needs Linux 6.7 with CONFIG_TSM_REPORTS, configfs mounted: `cai attest --doctor`"
HINT_RTMR = "needs Linux 6.16, which can extend RTMR3 through sysfs: `cai attest --doctor`"


class GuestFiles(Protocol):
    """The few things that a guest's kernel is asked for; paths have no leading slash."""

    def read(self, path: str, limit: int) -> bytes:
        """At most ``limit`` + 1 bytes of a file; raises ``OSError``."""

    def write(self, path: str, data: bytes) -> None:
        """All of ``data`` in one ``write``; raises ``OSError``."""

    def make_directory(self, path: str) -> None:
        """A new directory, mode 0700; raises ``OSError``."""

    def remove_directory(self, path: str) -> None:
        """The directory is gone; raises ``OSError``."""

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory."""


class LinuxFiles:
    """The running kernel's own files.

    Args:
        root: where ``sys`` is found; another root is for tests and for chroots.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root

    def read(self, path: str, limit: int) -> bytes:
        """At most ``limit`` + 1 bytes of a file."""
        with (self._root / path).open("rb", buffering=0) as file:
            parts, size = [], 0
            # Attributes of the kernel may give less than asked for at a time.
            while size <= limit and (part := file.read(limit + 1 - size)):
                parts.append(part)
                size += len(part)
        return b"".join(parts)

    def write(self, path: str, data: bytes) -> None:
        """All of ``data`` in one ``write``, never creating a file."""
        descriptor = os.open(self._root / path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(f"{written} of {len(data)} bytes were taken")

    def make_directory(self, path: str) -> None:
        """A new directory, mode 0700."""
        (self._root / path).mkdir(mode=0o700)

    def remove_directory(self, path: str) -> None:
        """The directory is gone."""
        (self._root / path).rmdir()

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory."""
        return (self._root / path).exists()


class TdxGuest:
    """This machine as a TDX guest; a ``QuoteSource``.

    Args:
        files: the kernel's files.
    """

    simulated = False

    def __init__(self, files: GuestFiles | None = None) -> None:
        self._files: GuestFiles = files or LinuxFiles()
        self._quoting = threading.Lock()
        self._events: tuple[bytes, ...] = ()

    def quote(self, report_data: bytes) -> bytes:
        """A quote over exactly these 64 bytes; one at a time, tens of milliseconds.

        Raises:
            FormatError: the report data is not 64 bytes.
            InputMissing: the kernel has no configfs-tsm.
            Refused: the report provider is not a TDX guest's.
            StorageError: the quote could not be made.
            LimitExceeded: the kernel gave more than ``MAX_QUOTE`` bytes.
        """
        if len(report_data) != REPORT_DATA_SIZE:
            raise FormatError(
                f"report data of {len(report_data)} bytes, expected {REPORT_DATA_SIZE}"
            )
        with self._quoting:
            for _attempt in range(QUOTE_TRIES):
                quote = self._ask(report_data)
                if quote is not None:
                    return quote
        raise StorageError(
            f"another program changed the quote request {QUOTE_TRIES} times",
            hint="only the attestation agent should use configfs-tsm entries named cai-*",
        )

    def event_log(self) -> bytes | None:
        """The boot event log without its padding, then the runtime events, then a stop marker.

        Returns:
            The log, or ``None`` where the firmware left none.

        Raises:
            FormatError, LimitExceeded, StorageError: the area cannot be read or walked.
        """
        if not self._files.exists(CCEL_DATA):
            return None
        area = self._read(CCEL_DATA, MAX_EVENT_LOG_AREA)
        records = b"".join(runtime_record(event) for event in self._events)
        return area[: boot_log_end(area)] + records + STOP

    def register(self, name: str) -> bytes:
        """A measurement register, 48 bytes; ``name`` as the kernel spells it, e.g. ``rtmr3``.

        Raises:
            InputMissing: the kernel does not show registers.
            FormatError: it is not 48 bytes.
        """
        value = self._read(f"{MEASUREMENTS}/{name}:sha384", MAX_ATTRIBUTE, hint=HINT_RTMR)
        if len(value) != REGISTER_SIZE:
            raise FormatError(f"register {name} has {len(value)} bytes, expected {REGISTER_SIZE}")
        return value

    def measure_launch(self, events: Sequence[bytes]) -> None:
        """Extend RTMR3 once with these events, or recognise that it was done in this boot.

        A register never goes back, so a restarted agent finds its own events there. Anything else
        in the register means that something else was launched, and only a reboot helps.

        Args:
            events: the event data in order; the SHA-384 of each extends the register.

        Raises:
            Refused: RTMR3 holds something else, or did not change as it should.
            InputMissing, StorageError: the kernel cannot extend it.
        """
        done = replay(events)
        before = self.register("rtmr3")
        if before != done:
            if any(before):
                raise Refused(
                    "RTMR3 already holds other events than this launch's",
                    hint="a changed launch needs a reboot of the guest",
                )
            for event in events:
                self._write(
                    f"{MEASUREMENTS}/rtmr3:sha384", sha384(event).digest(), hint=HINT_RTMR
                )
            if self.register("rtmr3") != done:
                raise Refused(
                    "RTMR3 is not what this launch's events make of it",
                    hint="something else extended it at the same time; reboot the guest",
                )
        self._events = tuple(events)

    def _ask(self, report_data: bytes) -> bytes | None:
        """One attempt; ``None`` when another writer got in between."""
        entry = f"{REPORTS}/cai-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self._files.make_directory(entry)
        except OSError as error:
            raise _unusable(error, "make a report entry in configfs-tsm", HINT_CONFIGFS) from error
        try:
            provider = self._read(f"{entry}/provider", MAX_ATTRIBUTE).strip()
            if provider != PROVIDER.encode("ascii"):
                raise Refused(
                    f"the report provider is {provider[:40]!r}, not {PROVIDER}",
                    hint="this machine is not a TDX guest",
                )
            before = self._generation(entry)
            self._write(f"{entry}/inblob", report_data)
            quote = self._read(f"{entry}/outblob", MAX_QUOTE)
            # The kernel counts every write to an entry: exactly one, ours.
            if self._generation(entry) != before + 1:
                return None
        finally:
            self._remove(entry)
        if not quote:
            raise StorageError("the kernel gave an empty quote", hint="is the quoting service up?")
        return quote

    def _remove(self, entry: str) -> None:
        try:
            self._files.remove_directory(entry)
        except OSError as error:
            raise from_os_error(error, "remove a report entry in configfs-tsm") from error

    def _generation(self, entry: str) -> int:
        text = self._read(f"{entry}/generation", MAX_ATTRIBUTE).strip()
        if not text.isdigit() or len(text) > 20:
            raise FormatError(f"configfs-tsm: generation {text[:40]!r} is not a number")
        return int(text)

    def _read(self, path: str, limit: int, *, hint: str | None = None) -> bytes:
        try:
            data = self._files.read(path, limit)
        except OSError as error:
            raise _unusable(error, f"read /{path}", hint) from error
        if len(data) > limit:
            raise LimitExceeded(f"/{path}: more than {limit} bytes")
        return data

    def _write(self, path: str, data: bytes, *, hint: str | None = None) -> None:
        try:
            self._files.write(path, data)
        except OSError as error:
            raise _unusable(error, f"write /{path}", hint) from error


def _unusable(error: OSError, doing: str, hint: str | None) -> CaiError:
    found = from_os_error(error, doing)
    if hint is None or not isinstance(found, InputMissing):
        return found
    return InputMissing(found.message, hint=hint)
