"""The FUSE wire format, as far as a read-only tree needs it: bytes in, bytes out.

The layouts are those of the kernel's ``include/uapi/linux/fuse.h`` (protocol 7.31, Linux 5.4), all
in the machine's own byte order. Everything here is pure, so that it is tested without a mount.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from cai.errors import FormatError

MAJOR = 7
"""The protocol's major version."""

MINOR = 31
"""The minor version that we speak, and the least that we accept (Linux 5.4)."""

MAX_READ = 1024 * 1024
"""Largest read request that the kernel may send, bytes."""

MAX_WRITE = 4096
"""Largest write request, bytes; the least that the protocol allows, since nothing is written."""

REQUEST_BUFFER = 64 * 1024
"""Buffer for one request, bytes; the kernel wants at least 8 KiB."""

MAX_BACKGROUND = 64
"""Read-ahead requests that the kernel may have waiting."""

FOREVER = 10 * 365 * 24 * 3600
"""How long the kernel may keep names and attributes, seconds: what is sealed never changes."""

BLOCK = 4096
"""Block size that ``statfs`` counts in, bytes."""

NAME_MAX = 255
"""Longest name, bytes."""


class Opcode(IntEnum):
    """Requests that are answered in a way of their own."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READLINK = 5
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    READDIRPLUS = 44


UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT})
"""Requests to which the kernel expects no answer."""

WRITES = frozenset({4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47})
"""Requests that would change something: setattr, symlink, mknod, mkdir, unlink, rmdir, rename,
link, write, setxattr, removexattr, create, fallocate, rename2, copy_file_range."""


class OpenFlag(IntFlag):
    """How the kernel treats an open file."""

    KEEP_CACHE = 1 << 1
    NOFLUSH = 1 << 5
    PASSTHROUGH = 1 << 7


class InitFlag(IntFlag):
    """Capabilities that are asked for when the kernel offers them."""

    ASYNC_READ = 1 << 0
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25


WANTED = InitFlag(sum(InitFlag))
INIT_EXT = 1 << 30
"""Flag that both sides set when the upper 32 flags are used."""

PASSTHROUGH = 1 << 5
"""Upper flag: reads may go straight to another file (Linux 6.9), bit 37 of all."""

STACK_DEPTH = 1
"""File systems under this one, at most, as pass-through needs it: tmpfs has none below it."""
REQUIRED = InitFlag.NO_OPEN_SUPPORT | InitFlag.NO_OPENDIR_SUPPORT | InitFlag.MAX_PAGES
"""Without open requests there is no handle that only one of several workers would know."""

_IN_HEADER = struct.Struct("=IIQQIIIHH")
_OUT_HEADER = struct.Struct("=IiQ")
_ATTR = struct.Struct("=6Q10I")
_ENTRY = struct.Struct("=4Q2I")
_ATTR_OUT = struct.Struct("=QII")
_STATFS = struct.Struct("=5Q4I24x")
_INIT_IN = struct.Struct("=4I")
_FLAGS_IN = struct.Struct("=II")
_INIT_OUT = struct.Struct("=4I2H2I2H2I24x")
_READ_IN = struct.Struct("=QQI")
_DIRENT = struct.Struct("=QQII")
_OPEN_OUT = struct.Struct("=QIi")
_HANDLE_IN = struct.Struct("=Q")

IN_HEADER_SIZE = _IN_HEADER.size
OUT_HEADER_SIZE = _OUT_HEADER.size


@dataclass(frozen=True, slots=True)
class Attributes:
    """What ``stat`` shows of one inode.

    Attributes:
        ino: inode number, 1 for the root.
        size: bytes.
        mode: type and permission bits.
        nlink: number of names.
        uid: owner.
        gid: group.
        time: seconds since 1970, for all three time stamps.
    """

    ino: int
    size: int
    mode: int
    nlink: int
    uid: int
    gid: int
    time: int

    def pack(self) -> bytes:
        """The 88 bytes of ``struct fuse_attr``."""
        blocks = (self.size + 511) // 512
        return _ATTR.pack(
            self.ino, self.size, blocks, self.time, self.time, self.time,
            0, 0, 0, self.mode, self.nlink, self.uid, self.gid, 0, BLOCK, 0,
        )


def request(buffer: memoryview) -> tuple[int, int, int]:
    """The head of a request.

    Returns:
        Opcode, the request's number, the inode it is about.

    Raises:
        FormatError: shorter than its header, or not as long as it says.
    """
    if len(buffer) < IN_HEADER_SIZE:
        raise FormatError(f"FUSE request of {len(buffer)} bytes")
    length, opcode, unique, node, *_rest = _IN_HEADER.unpack_from(buffer)
    if length != len(buffer):
        raise FormatError(f"FUSE request of {len(buffer)} bytes says {length}")
    return opcode, unique, node


def read_arguments(buffer: memoryview) -> tuple[int, int]:
    """Offset and size of a READ, READDIR or READDIRPLUS.

    Raises:
        FormatError: too short.
    """
    if len(buffer) < IN_HEADER_SIZE + _READ_IN.size:
        raise FormatError("FUSE read request cut short")
    _handle, offset, size = _READ_IN.unpack_from(buffer, IN_HEADER_SIZE)
    return offset, min(size, MAX_READ)


def release_handle(buffer: memoryview) -> int:
    """The handle that a RELEASE gives back.

    Raises:
        FormatError: too short.
    """
    if len(buffer) < IN_HEADER_SIZE + _HANDLE_IN.size:
        raise FormatError("FUSE release request cut short")
    handle: int = _HANDLE_IN.unpack_from(buffer, IN_HEADER_SIZE)[0]
    return handle


def lookup_name(buffer: memoryview) -> bytes:
    """The name in a LOOKUP, without its final zero byte.

    Raises:
        FormatError: not one zero-terminated name.
    """
    name = bytes(buffer[IN_HEADER_SIZE:])
    if not name or name.find(b"\0") != len(name) - 1:
        raise FormatError("FUSE name is not zero-terminated")
    return name[:-1]


def answer(unique: int, length: int) -> bytes:
    """Header of a successful answer with ``length`` bytes of payload."""
    return _OUT_HEADER.pack(OUT_HEADER_SIZE + length, 0, unique)


def refusal(unique: int, error: int) -> bytes:
    """A whole answer that says ``error`` (a positive errno)."""
    return _OUT_HEADER.pack(OUT_HEADER_SIZE, -error, unique)


def offers_passthrough(buffer: memoryview) -> bool:
    """Whether the kernel that sent this INIT request knows pass-through."""
    if len(buffer) < IN_HEADER_SIZE + _INIT_IN.size + 4:
        return False
    flags, upper = _FLAGS_IN.unpack_from(buffer, IN_HEADER_SIZE + 12)
    return bool(flags & INIT_EXT and upper & PASSTHROUGH)


def init_answer(
    buffer: memoryview, page_size: int, *, passthrough: bool = False
) -> bytes | None:
    """Agree with the kernel on version and capabilities.

    Args:
        buffer: the INIT request.
        page_size: the machine's page size, bytes.
        passthrough: ask for pass-through, which the kernel must have offered.

    Returns:
        Payload of the answer, or ``None`` when the kernel speaks a newer major version: then the
        answer is ``older_version()`` and the kernel asks again.

    Raises:
        FormatError: the kernel's FUSE is too old, or lacks what this server needs.
    """
    if len(buffer) < IN_HEADER_SIZE + _INIT_IN.size:
        raise FormatError("FUSE init request cut short")
    major, minor, read_ahead, offered = _INIT_IN.unpack_from(buffer, IN_HEADER_SIZE)
    if major > MAJOR:
        return None
    if major < MAJOR or minor < MINOR or offered & REQUIRED != REQUIRED:
        raise FormatError(
            f"the kernel speaks FUSE {major}.{minor}, this needs {MAJOR}.{MINOR} (Linux 5.4)",
            hint="use --kind tmpfs",
        )
    upper, depth = (PASSTHROUGH, STACK_DEPTH) if passthrough else (0, 0)
    return _INIT_OUT.pack(
        MAJOR, MINOR, read_ahead, offered & WANTED | (INIT_EXT if passthrough else 0),
        MAX_BACKGROUND, MAX_BACKGROUND * 3 // 4, MAX_WRITE, 1, MAX_READ // page_size, 0,
        upper, depth,
    )  # fmt: skip


def older_version() -> bytes:
    """Payload that asks a newer kernel to speak our major version."""
    return _INIT_OUT.pack(MAJOR, MINOR, *(0,) * 10)


def open_answer(handle: int, backing: int | None) -> bytes:
    """The 16 bytes of ``struct fuse_open_out``.

    Args:
        handle: number that RELEASE will name.
        backing: the kernel's number of the file that reads go to, or ``None`` when they come here.
    """
    if backing is None:
        return _OPEN_OUT.pack(handle, OpenFlag.KEEP_CACHE | OpenFlag.NOFLUSH, 0)
    return _OPEN_OUT.pack(handle, OpenFlag.PASSTHROUGH | OpenFlag.NOFLUSH, backing)


def entry_answer(attributes: Attributes) -> bytes:
    """The 128 bytes of ``struct fuse_entry_out``."""
    return _ENTRY.pack(attributes.ino, 0, FOREVER, FOREVER, 0, 0) + attributes.pack()


ABSENT = _ENTRY.pack(0, 0, FOREVER, 0, 0, 0) + bytes(_ATTR.size)
"""Answer to the lookup of a name that does not exist, which the kernel may remember."""


def attributes_answer(attributes: Attributes) -> bytes:
    """The 104 bytes of ``struct fuse_attr_out``."""
    return _ATTR_OUT.pack(FOREVER, 0, 0) + attributes.pack()


def statfs_answer(total: int, files: int) -> bytes:
    """The 80 bytes of ``struct fuse_statfs_out`` of a full file system.

    Args:
        total: bytes in all files, each rounded up to ``BLOCK``.
        files: number of inodes.
    """
    return _STATFS.pack(total // BLOCK, 0, 0, files, 0, BLOCK, NAME_MAX, BLOCK, 0)


def directory_entry(ino: int, cookie: int, kind: int, name: bytes) -> bytes:
    """One ``struct fuse_dirent`` with its padding.

    Args:
        ino: inode number.
        cookie: offset at which the listing goes on after this entry.
        kind: ``DT_…`` value, the type bits of the mode shifted right by 12.
        name: as it stands in the tree.
    """
    body = _DIRENT.pack(ino, cookie, len(name), kind) + name
    return body + bytes(-len(body) % 8)


NO_ENTRY = bytes(_ENTRY.size + _ATTR.size)
"""What stands before ``.`` and ``..`` in a READDIRPLUS answer: the kernel looks nothing up."""
