"""Overwrites the memory of a materialised model before the kernel gets it back.

What was freed stays in memory until somebody else's data goes there, and a later owner of that
memory, a kernel fault or a dump of the machine could show it.

First the mount goes, so that nobody can open a file any more, then each file is overwritten and cut
to nothing through a mount that no path leads to. A file that somebody still has open is left alone:
its reader would get zeros for weights. The kernel frees it when its last reader lets go.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
from pathlib import Path

from cai.mount import device, system

STEP = 2 * 1024 * 1024
"""Bytes that are overwritten at once."""

_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

log = logging.getLogger("cai.mount")


def take_away(mount_point: Path, *, lazily: bool = False) -> None:
    """Unmount a tmpfs of ours, and overwrite what was in it.

    Args:
        mount_point: exactly as in the list of mounts.
        lazily: also when it is in use; its users keep what they have open.

    Raises:
        StorageError: it is in use, or not permitted.
    """
    held = -1
    try:
        held = system.writable_clone(mount_point)
    except OSError as error:
        log.warning("%s: memory cannot be overwritten: %s", mount_point, error.strerror)
    try:
        device.detach(mount_point, lazily=lazily)
        left = overwrite(held) if held >= 0 else 0
    finally:
        if held >= 0:
            os.close(held)
    if left:
        log.warning("%s: %d files are still open, and are not overwritten", mount_point, left)


def overwrite(root: int) -> int:
    """Overwrite and empty every file below a directory.

    Args:
        root: its descriptor, in a file system in memory that can be written to.

    Returns:
        Files that were left alone, because somebody has them open.
    """
    left = 0
    zeros = bytes(STEP)
    for _path, _folders, names, folder in os.fwalk(".", dir_fd=root):
        for name in names:
            try:
                file = os.open(name, _FILE, dir_fd=folder)
            except OSError:
                continue  # a symbolic link
            try:
                left += not _overwrite(file, zeros)
            finally:
                os.close(file)
    return left


def _overwrite(file: int, zeros: bytes) -> bool:
    try:
        # Granted only where nobody else has it open or mapped. Who comes now waits for the close.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        return False
    size = os.fstat(file).st_size
    for offset in range(0, size, STEP):
        os.pwrite(file, zeros[: size - offset], offset)
    os.ftruncate(file, 0)
    return True
