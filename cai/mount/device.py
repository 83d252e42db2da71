"""Puts ``/dev/fuse`` on a mount point: by ``mount(2)`` where allowed, else by ``fusermount3``."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cai.errors import CaiError, StorageError, from_os_error
from cai.mount import protocol, system

DEVICE = Path("/dev/fuse")
FUSE_KIND = "fuse.cai"
"""Type that our FUSE mounts have in the list of mounts."""

TMPFS_SOURCE = "cai-model"
"""Source that our tmpfs mounts have in the list of mounts."""

READ_AHEAD_KIB = 4096
"""Read-ahead of the mount, KiB. The kernel starts a FUSE mount at 128, which halves the speed."""

PASSTHROUGH_SINCE = (6, 9)
"""Linux version that brought pass-through."""

FUSERMOUNT_SECONDS = 10
"""How long ``fusermount3`` may take."""

MOUNT_REFUSED = "mount-refused"
"""Machine code of the error when FUSE looked usable but the mount did not come about."""

_IOC_CLONE = 0x8004E500  # _IOR(229, 0, uint32_t)


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use the mount: only its mounter, or everybody whom the modes admit."""

    uid: int
    gid: int
    everybody: bool


def why_unusable() -> str | None:
    """Why FUSE cannot be used here, or ``None`` when it can."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{DEVICE}: {error.strerror}"
    if not system.is_administrator() and shutil.which("fusermount3") is None:
        return "mounting needs root, or fusermount3 (Debian package fuse3)"
    return None


def why_no_passthrough() -> str | None:
    """Why FUSE pass-through cannot be used here, as far as is known before a mount, or ``None``."""
    if not system.is_administrator():
        return "pass-through needs root (CAP_SYS_ADMIN)"
    release = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < PASSTHROUGH_SINCE:
        return f"pass-through needs Linux 6.9, this is {release}"
    return None


def attach(mount_point: Path, access: Access) -> int:
    """Mount, and leave the kernel waiting for the INIT answer.

    Returns:
        Descriptor of the device.

    Raises:
        StorageError: the kernel or ``fusermount3`` refused; its code is ``MOUNT_REFUSED``.
    """
    if system.is_administrator():
        return _attach_by_syscall(mount_point, access)
    return _attach_by_fusermount(mount_point, access)


def clone(descriptor: int) -> int:
    """A device descriptor with a queue of its own on the same mount.

    When the process that has it ends, what it had not answered fails instead of hanging.
    Falls back to the descriptor itself where the device cannot be opened again.
    """
    try:
        own = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return descriptor
    try:
        fcntl.ioctl(own, _IOC_CLONE, struct.pack("=I", descriptor))
    except OSError:
        os.close(own)
        return descriptor
    return own


def raise_read_ahead(device_number: str) -> bool:
    """Let the kernel read far ahead; whether it could be set.

    Args:
        device_number: as in the list of mounts.
    """
    setting = Path("/sys/class/bdi") / device_number / "read_ahead_kb"
    try:
        setting.write_text(str(READ_AHEAD_KIB), encoding="ascii")
    except OSError:
        return False
    return True


def detach(mount_point: Path, *, lazily: bool = False, force: bool = False) -> None:
    """Unmount.

    Args:
        mount_point: exactly as in the list of mounts.
        lazily: also when it is in use; its users keep what they have open.
        force: fail the requests that are waiting.

    Raises:
        StorageError: it is in use, or not permitted.
    """
    flags = (system.MNT_DETACH if lazily else 0) | (system.MNT_FORCE if force else 0)
    if system.is_administrator():
        try:
            system.unmount(mount_point, flags)
        except OSError as error:
            raise _in_use(mount_point, error) from error
        return
    options = ["-u", "-z"] if lazily else ["-u"]
    failure = _run_fusermount([*options, "--", str(mount_point)])
    if failure is not None:
        if "busy" in failure.lower():
            raise _in_use(mount_point, OSError(errno.EBUSY, "busy"))
        raise StorageError(f"unmount {mount_point}: {failure}")


def ours(mount: system.MountInfo | None) -> bool:
    """Whether a mount is one of this package."""
    return mount is not None and (
        mount.kind == FUSE_KIND or (mount.kind == "tmpfs" and mount.source == TMPFS_SOURCE)
    )


def _attach_by_syscall(mount_point: Path, access: Access) -> int:
    try:
        descriptor = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(f"open {DEVICE}: {error.strerror}") from error
    options = (
        f"fd={descriptor},rootmode=40000,user_id={access.uid},group_id={access.gid},"
        f"default_permissions,max_read={protocol.MAX_READ}"
    )
    if access.everybody:
        options += ",allow_other"
    flags = system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV
    try:
        system.mount("cai", mount_point, FUSE_KIND, flags, options)
    except OSError as error:
        os.close(descriptor)
        raise _refused(f"mount on {mount_point}: {error.strerror}") from error
    return descriptor


def _attach_by_fusermount(mount_point: Path, access: Access) -> int:
    options = "ro,nosuid,nodev,default_permissions,fsname=cai,subtype=cai"
    options += f",max_read={protocol.MAX_READ}"
    if access.everybody:
        options += ",allow_other"
    ours_end, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours_end, its_end:
        failure = _run_fusermount(
            ["-o", options, "--", str(mount_point)], pass_descriptor=its_end.fileno()
        )
        if failure is not None:
            raise _refused(failure)
        its_end.close()
        try:
            _data, descriptors, _flags, _address = socket.recv_fds(ours_end, 1, 1)
        except OSError as error:
            raise _refused(f"fusermount3 gave no device: {error.strerror}") from error
    if len(descriptors) != 1:
        raise _refused("fusermount3 gave no device")
    os.set_inheritable(descriptors[0], False)  # noqa: FBT003 - positional only
    return descriptors[0]


def _run_fusermount(arguments: list[str], *, pass_descriptor: int | None = None) -> str | None:
    """Run it; what it complained about, or ``None``."""
    passed = () if pass_descriptor is None else (pass_descriptor,)
    environment = {**os.environ, "LC_ALL": "C"}
    if pass_descriptor is not None:
        environment["_FUSE_COMMFD"] = str(pass_descriptor)
    try:
        done = subprocess.run(
            ["fusermount3", *arguments], pass_fds=passed, env=environment, check=False,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=FUSERMOUNT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"fusermount3: {error}"
    if done.returncode == 0:
        return None
    return done.stderr.decode(errors="replace").strip() or "fusermount3 failed"


def _refused(message: str) -> StorageError:
    return StorageError(message, hint="use --kind tmpfs, or run as root", code=MOUNT_REFUSED)


def _in_use(mount_point: Path, error: OSError) -> CaiError:
    if error.errno == errno.EBUSY:
        return StorageError(
            f"unmount {mount_point}: it is in use",
            hint="stop what reads from it, or take it away with --force",
        )
    return from_os_error(error, f"unmount {mount_point}")
