"""The mount system calls, by ctypes, and the kernel's list of mounts.

``fsopen`` … ``move_mount`` (Linux 5.2) make a file system that is nowhere in the tree until it is
moved there, and that vanishes with its last descriptor: a half-filled one cannot be seen, nor left
behind. ``mount_setattr`` needs Linux 5.12.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cai.errors import StorageError, from_os_error

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_FSOPEN_CLOEXEC = 1
_FSMOUNT_CLOEXEC = 1
_OPEN_TREE_CLONE = 1
_FSCONFIG_SET_FLAG = 0
_FSCONFIG_SET_STRING = 1
_FSCONFIG_CMD_CREATE = 6
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOUNT_ATTR_RDONLY = 1
_MOUNT_ATTR_NOSUID = 2
_MOUNT_ATTR_NODEV = 4
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429  # these numbers are the same on every architecture
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_MOUNT_SETATTR = 442
_PR_SET_DUMPABLE = 4
_CAP_SYS_ADMIN = 1 << 21
_MADV_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    """``struct mount_attr``."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of ``/proc/self/mountinfo``.

    Attributes:
        device: major and minor number of the file system, e.g. ``"0:42"``.
        mount_point: where it is.
        kind: file system type, with its subtype, e.g. ``"fuse.cai"``.
        source: what the mounter called it.
    """

    device: str
    mount_point: Path
    kind: str
    source: str


def mounts() -> list[MountInfo]:
    """Every mount of this process's namespace, later ones after those they cover.

    Raises:
        StorageError: ``/proc`` is not there.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError as error:
        raise from_os_error(error, "read /proc/self/mountinfo") from error
    found = []
    for line in lines:
        left, _dash, right = line.partition(b" - ")
        before, after = left.split(b" "), right.split(b" ")
        where = Path(os.fsdecode(_unescaped(before[4])))
        device, kind = before[2].decode(), os.fsdecode(after[0])
        found.append(MountInfo(device, where, kind, os.fsdecode(_unescaped(after[1]))))
    return found


def mounted_at(path: Path) -> MountInfo | None:
    """The topmost mount whose mount point is exactly ``path``; looks at nothing but the list."""
    at = [mount for mount in mounts() if mount.mount_point == path]
    return at[-1] if at else None


def is_administrator() -> bool:
    """Whether this process may mount: it has CAP_SYS_ADMIN."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return os.geteuid() == 0
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return bool(found and int(found[1], 16) & _CAP_SYS_ADMIN)


def forbid_core_dumps() -> None:
    """Keep this process's memory out of core dumps and from other processes of its user."""
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def populate(address: int, length: int) -> None:
    """Take the pages of a writable mapping now, and learn of it where there are none (Linux 5.14).

    Args:
        address: of the first byte, on a page boundary.
        length: bytes.

    Raises:
        OSError: there is no room for them, or the kernel is older.
    """
    start, size = ctypes.c_void_p(address), ctypes.c_size_t(length)
    while _libc.madvise(start, size, _MADV_POPULATE_WRITE) < 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def mount(source: str, target: Path, kind: str, flags: int, options: str) -> None:
    """``mount(2)``.

    Raises:
        OSError: the kernel refused.
    """
    _check(
        _libc.mount(
            source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags),
            options.encode(),
        )
    )  # fmt: skip


def unmount(target: Path, flags: int = 0) -> None:
    """``umount2(2)``.

    Raises:
        OSError: the kernel refused.
    """
    _check(_libc.umount2(os.fsencode(target), flags | UMOUNT_NOFOLLOW))


class DetachedMount:
    """A file system that no path leads to, until ``attach``.

    Args:
        kind: file system type.
        source: its name in the list of mounts.
        required: parameters that must be taken.
        wished: parameters that may be refused by an older kernel.

    Attributes:
        descriptor: its root directory, for calls with ``dir_fd``.
        refused: names of wished parameters that the kernel did not take.

    Raises:
        StorageError: the kernel refused.
    """

    def __init__(
        self, kind: str, source: str, required: dict[str, str], wished: dict[str, str | None]
    ) -> None:
        self.descriptor = -1
        self.refused: list[str] = []
        context = -1
        try:
            context = _syscall(_SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
            for name, value in {"source": source, **required}.items():
                _configure(context, name, value)
            for name, wish in wished.items():
                try:
                    _configure(context, name, wish)
                except OSError:
                    self.refused.append(name)
            _syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
            attributes = _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
            self.descriptor = _syscall(_SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
        except OSError as error:
            raise _refused(error, f"make a {kind}") from error
        finally:
            if context >= 0:
                os.close(context)

    def make_read_only(self) -> None:
        """Let nobody write through this mount any more.

        Raises:
            StorageError: the kernel refused.
        """
        try:
            _set_attributes(self.descriptor, _MountAttr(attr_set=_MOUNT_ATTR_RDONLY))
        except OSError as error:
            raise _refused(error, "make the mount read-only") from error

    def attach(self, target: Path) -> None:
        """Put it at ``target``, in one step.

        Raises:
            StorageError: the kernel refused.
        """
        try:
            _syscall(
                _SYS_MOVE_MOUNT, self.descriptor, b"", _AT_FDCWD, os.fsencode(target),
                _MOVE_MOUNT_F_EMPTY_PATH,
            )  # fmt: skip
        except OSError as error:
            raise _refused(error, f"mount on {target}") from error

    def close(self) -> None:
        """Let go; what was not attached is gone."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def writable_clone(mount_point: Path) -> int:
    """The root of a mounted file system through a mount of its own, which may be written to.

    No path leads to it. It keeps the file system, and does not keep it from being unmounted.

    Raises:
        OSError: the kernel refused.
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    descriptor = _syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(mount_point), flags)
    try:
        _set_attributes(descriptor, _MountAttr(attr_clr=_MOUNT_ATTR_RDONLY))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _set_attributes(descriptor: int, attributes: _MountAttr) -> None:
    _syscall(
        _SYS_MOUNT_SETATTR, descriptor, b"", _AT_EMPTY_PATH,
        ctypes.byref(attributes), ctypes.c_size_t(ctypes.sizeof(attributes)),
    )  # fmt: skip


def _configure(context: int, name: str, value: str | None) -> None:
    if value is None:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, name.encode(), None, 0)
    else:
        _syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, name.encode(), value.encode(), 0)


def _refused(error: OSError, doing: str) -> StorageError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return StorageError(f"{doing}: not permitted", hint="mounting needs root (CAP_SYS_ADMIN)")
    if error.errno == errno.ENOSYS:
        return StorageError(f"{doing}: the kernel is too old", hint="Linux 5.12 or later is needed")
    return StorageError(f"{doing}: {error.strerror}")


def _syscall(number: int, *arguments: object) -> int:
    wide = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *wide))


def _check(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _unescaped(field: bytes) -> bytes:
    """A field of mountinfo, whose blanks and backslashes are written in octal."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), field)
