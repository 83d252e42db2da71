"""Mount points: what may be mounted on, and what an earlier mount left behind."""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

from cai.errors import InputError, InputMissing, UsageError, from_os_error
from cai.mount import device, system

log = logging.getLogger("cai.mount")


def prepare(mount_point: Path) -> Path:
    """Check a mount point, and clear away a dead mount of ours.

    A server that was killed leaves a mount that answers every call with ENOTCONN.

    Returns:
        The mount point as an absolute path without symlinks, as the list of mounts has it.

    Raises:
        InputMissing: it does not exist.
        InputError: it is not a directory.
        UsageError: it is not empty, or a live mount of ours is there.
        StorageError: it cannot be looked at.
    """
    path = resolve(mount_point)
    mounted = system.mounted_at(path)
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise InputMissing(
            f"mount point {mount_point} does not exist", hint=f"mkdir {mount_point}"
        ) from error
    except OSError as error:
        # The second is what a call gets that was under way when the server died.
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED) and device.ours(mounted):
            log.warning("%s: clearing away the mount of a server that was killed", path)
            device.detach(path, lazily=True)
            return prepare(mount_point)
        if error.errno == errno.ELOOP:
            raise InputError(
                f"mount point {mount_point} is a loop of symlinks", hint="give an empty directory"
            ) from error
        raise from_os_error(error, f"look at mount point {mount_point}") from error
    if not stat.S_ISDIR(status.st_mode):
        raise InputError(
            f"mount point {mount_point} is not a directory", hint="give an empty directory"
        )
    if device.ours(mounted):
        raise UsageError(
            f"a model is mounted on {mount_point} already", hint=f"cai unmount {mount_point}"
        )
    try:
        with os.scandir(path) as entries:
            empty = next(entries, None) is None
    except OSError as error:
        raise from_os_error(error, f"look at mount point {mount_point}") from error
    if not empty:
        raise UsageError(
            f"mount point {mount_point} is not empty", hint="give an empty directory"
        )
    return path


def resolve(mount_point: Path) -> Path:
    """The path as the list of mounts has it; its last part may be a dead mount.

    Raises:
        InputError: a loop of symlinks, or no path at all.
    """
    try:
        real = os.path.realpath(mount_point)
        return Path(real)
    except (OSError, ValueError) as error:
        raise InputError(f"mount point {str(mount_point)!r}: {error}") from error


def find_ours(mount_point: Path) -> system.MountInfo:
    """The mount of ours on a mount point, dead or alive.

    Raises:
        InputMissing: nothing of ours is mounted there.
    """
    path = resolve(mount_point)
    mounted = system.mounted_at(path)
    if mounted is None or not device.ours(mounted):
        raise InputMissing(
            f"no model is mounted on {mount_point}", hint="see /proc/self/mountinfo for mounts"
        )
    return mounted
