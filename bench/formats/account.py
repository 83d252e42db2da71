"""CPU time of this process and all that come from it, servers in the background included.

On a machine that others use too, wall time says little and this says more: what takes half the CPU
time can be twice as fast where the cores are free.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


class Account:
    """A control group of its own, as a stop-watch for CPU time."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._start = 0.0
        for top, name, joining in (
            ("/sys/fs/cgroup/cpuacct", "cpuacct.usage", "cgroup.procs"),
            ("/sys/fs/cgroup", "cpu.stat", "cgroup.procs"),
        ):
            group = Path(top) / f"bench-{os.getpid()}"
            with contextlib.suppress(OSError):
                group.mkdir()
                (group / joining).write_text(str(os.getpid()))
                self._file = group / name
                self._now()
                break

    def restart(self) -> None:
        """Count from now on."""
        self._start = self._now()

    def used(self) -> float | None:
        """Seconds since ``restart``, or ``None`` where they cannot be counted."""
        return None if self._file is None else self._now() - self._start

    def close(self) -> None:
        """Leave the group and remove it, once nothing is in it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                (self._file.parent.parent / "cgroup.procs").write_text(str(os.getpid()))
                self._file.parent.rmdir()

    def _now(self) -> float:
        if self._file is None:
            return 0.0
        text = self._file.read_text()
        if self._file.name == "cpuacct.usage":
            return int(text) / 1e9
        return int(text.split()[1]) / 1e6  # usage_usec N
