"""What a policy process gives up: other files, the network, other processes.

The engine is C++ and reads what guests say (event logs, names), so a fault in it must not become a
way to the broker's keys. Landlock takes the file system away but for the engine's own libraries, to
read, and one empty directory; a seccomp filter takes away sockets, new programs and other
processes. Both are the kernel's, need no privilege and cannot be undone. Where a kernel lacks one,
the process runs without it: time-out, memory limit and empty environment hold everywhere.
Layouts: landlock(7), seccomp(2), linux/filter.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULESET_VERSION, _PATH_BENEATH = 1, 1

_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS_V1: Final = (1 << 13) - 1
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_TCP_RIGHTS: Final = 0b11

_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_X32_BIT: Final = 0x40000000

# x86_64, aarch64 (0 where there is none): asm/unistd_64.h, asm-generic/unistd.h.
REFUSED_CALLS: Final = {
    "socket": (41, 198), "connect": (42, 203), "socketpair": (53, 199), "bind": (49, 200),
    "listen": (50, 201), "execve": (59, 221), "execveat": (322, 281), "fork": (57, 0),
    "vfork": (58, 0), "clone": (56, 220), "clone3": (435, 435), "ptrace": (101, 117),
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "io_uring_setup": (425, 425),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "prlimit64": (302, 261),
}  # fmt: skip
"""System calls that no evaluation makes; they answer EPERM."""

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO_EPERM = 0x7FFF0000, 0x80000000, 0x00050000 | 1


def confine(readable: Iterable[Path], writable: Path) -> tuple[str, ...]:
    """Give it all up, for this thread and whatever it becomes.

    Args:
        readable: directories that stay readable.
        writable: the one directory that can be written to.

    Returns:
        Which of ``landlock`` and ``seccomp`` the kernel took.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return ()
    taken = []
    if _landlock(libc, readable, writable):
        taken.append("landlock")
    if _seccomp(libc):
        taken.append("seccomp")
    return tuple(taken)


def _landlock(libc: ctypes.CDLL, readable: Iterable[Path], writable: Path) -> bool:
    version = libc.syscall(_CREATE_RULESET, None, 0, _RULESET_VERSION)
    if version < 1:
        return False
    rights = _FILE_RIGHTS_V1
    rights |= _REFER if version >= 2 else 0
    rights |= _TRUNCATE if version >= 3 else 0
    attributes = struct.pack("<Q", rights)
    if version >= 4:
        attributes += struct.pack("<Q", _TCP_RIGHTS)
    ruleset = libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        for path in readable:
            if not _allow(libc, ruleset, path, _READ_FILE | _READ_DIR):
                return False
        if not _allow(libc, ruleset, writable, rights):
            return False
        return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: Path, rights: int) -> bool:
    try:
        directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        rule = struct.pack("<Qi", rights, directory)
        return bool(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0) == 0)
    finally:
        os.close(directory)


def filter_program(machine: str) -> bytes:
    """The seccomp filter of a machine as ``struct sock_filter`` array; empty for an unknown one."""
    architecture = _ARCHITECTURES.get(machine)
    if architecture is None:
        return b""
    place = 0 if machine == "x86_64" else 1
    numbers = sorted({pair[place] for pair in REFUSED_CALLS.values()} - {0})
    program = [
        # The architecture, at offset 4 of seccomp_data, must be this one: numbers differ.
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        # The number, at offset 0; the x32 numbers are others again.
        (_LOAD, 0, 0, 0), (_AT_LEAST, 0, 1, _X32_BIT), (_RETURN, 0, 0, _KILL),
    ]  # fmt: skip
    for left, number in enumerate(reversed(numbers)):
        # Jumps count from the next statement; the refusal is the last but one.
        program.insert(6, (_EQUAL, left + 1, 0, number))
    program += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO_EPERM)]
    return b"".join(struct.pack("<HBBI", *statement) for statement in program)


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _seccomp(libc: ctypes.CDLL) -> bool:
    statements = filter_program(platform.machine())
    if not statements:
        return False
    program = _Program(len(statements) // 8, statements)
    return bool(
        libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0
    )
