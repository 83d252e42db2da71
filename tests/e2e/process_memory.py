"""Peak memory of process trees, as proportional set size: pages that are shared count once."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

SAMPLE_SECONDS = 0.1


class PeakPss:
    """Samples the summed PSS of some processes and all of their descendants.

    Attributes:
        peak: most bytes seen at once.
        samples: how often something was seen.
        unreadable: processes whose memory this user may not look at.
    """

    def __init__(self, *roots: int) -> None:
        self.peak = 0
        self.samples = 0
        self.unreadable: set[int] = set()
        self._roots = roots
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        total = sum(self._pss(pid) for pid in descendants(self._roots))
        self.samples += total > 0
        self.peak = max(self.peak, total)

    def _pss(self, pid: int) -> int:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except PermissionError:
            self.unreadable.add(pid)
            return 0
        except OSError:  # it ended
            return 0
        found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0


def descendants(roots: tuple[int, ...]) -> set[int]:
    """The processes themselves and everything below them."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found: set[int] = set()
    left = list(roots)
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, [])
    return found
