"""Files that are read again when they change, so that a certificate or collateral needs no restart.

Looking is cheap (names, sizes, times); loading happens only when something differs. What cannot be
loaded is said once and leaves the old state in use.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cai.errors import CaiError

LOG = logging.getLogger("kbs")

LOOK_SECONDS = 5.0
"""How often the files are looked at, seconds; SIGHUP looks at once."""

MAX_FILES = 20_000
"""Most files of one watched directory that are looked at."""

Fingerprint = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Watched:
    """Something that is loaded from files.

    Attributes:
        name: as the log names it.
        paths: files, and directories with everything in them.
        load: reads them again; raises a ``CaiError`` and changes nothing when they are not sound.
        here: load on the event loop's own thread, which is the one that uses what is loaded.
    """

    name: str
    paths: tuple[Path, ...]
    load: Callable[[], None]
    here: bool = False


class Watch:
    """Looks after files and loads what changed.

    Args:
        watched: what to look after; what is there now counts as loaded.
    """

    def __init__(self, watched: Iterable[Watched]) -> None:
        self._watched = tuple(watched)
        self._known = [fingerprint(item.paths) for item in self._watched]
        self._hurry = asyncio.Event()

    def hurry(self) -> None:
        """Look now."""
        self._hurry.set()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._hurry.wait()
            except TimeoutError:
                pass
            self._hurry.clear()
            await self.look()

    async def look(self) -> None:
        """Load everything whose files changed since they were last loaded, or failed to load."""
        for place, item in enumerate(self._watched):
            found = await asyncio.to_thread(fingerprint, item.paths)
            if found == self._known[place]:
                continue
            self._known[place] = found
            try:
                if item.here:
                    item.load()
                else:
                    await asyncio.to_thread(item.load)
            except CaiError as error:
                LOG.error("%s changed, but is not used: %s", item.name, error.message)
            else:
                LOG.warning("%s changed and is in use", item.name)


def fingerprint(paths: Sequence[Path]) -> Fingerprint:
    """Names, sizes, times and inodes of files; missing ones are left out."""
    found = []
    for path in paths:
        for file in _files(path):
            try:
                status = os.stat(file)  # noqa: PTH116 - follows the links of a Kubernetes secret
            except OSError:
                continue
            found.append((str(file), status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(found)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(item for item in path.rglob("*") if not item.is_dir())
    return files[:MAX_FILES]
