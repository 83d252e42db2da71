"""Files that are decrypted whole when they are opened, for FUSE pass-through (Linux 6.9).

An OPEN is answered once the whole file has been decrypted and verified into memory; the kernel then
reads from there by itself, at the speed of a tmpfs, also through ``mmap``. Nothing of a file can be
read before all of it has been authenticated.

A file stays decrypted after its last close while memory allows. Where there is no room for a file,
it is opened without pass-through: its reads are decrypted when they come, as in a plain FUSE mount.
The kernel allows only one of the two ways for an inode at a time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
from dataclasses import dataclass, field

from cai.errors import NoSpace
from cai.model.tree import Entry, ModelTree
from cai.mount import memory, system
from cai.mount.index import Node
from cai.mount.pour import Pourer

SMALL = 64 * 1024
"""Up to this size a file is not worth pass-through: one read fetches it, bytes."""

_BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
_BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)
_MAP = struct.Struct("=iIQ")

log = logging.getLogger("cai.mount")


@dataclass(slots=True)
class _File:
    """One inode that was ever opened.

    Attributes:
        lock: held while it is decrypted, and to change the rest.
        backing: the kernel's number of its plaintext, or ``None`` while it has none.
        through: open handles that read from the plaintext.
        plain: open handles that read through this server.
        used: serial number of its last open, to find the one unused for longest.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    backing: int | None = None
    through: int = 0
    plain: int = 0
    used: int = 0


def back(device: int, plain: int) -> int:
    """Let the kernel read from a file; its number for ``open_answer``.

    Raises:
        OSError: not permitted (this needs CAP_SYS_ADMIN on the machine), or not supported.
    """
    number: int = fcntl.ioctl(device, _BACKING_OPEN, bytearray(_MAP.pack(plain, 0, 0)))
    return number


def unback(device: int, backing: int) -> None:
    """Take a number back; handles that use it keep the file until they are closed.

    Raises:
        OSError: there is no such number.
    """
    fcntl.ioctl(device, _BACKING_CLOSE, bytearray(struct.pack("=I", backing)))


def is_permitted(device: int, area: system.DetachedMount) -> bool:
    """Whether the kernel takes a file of ``area``: it may know pass-through and still refuse."""
    try:
        plain = memory_file(area)
    except OSError:
        return False
    try:
        unback(device, back(device, plain))
    except OSError:
        return False
    finally:
        os.close(plain)
    return True


def memory_file(area: system.DetachedMount) -> int:
    """A new file of ``area`` that has no name.

    Raises:
        OSError: the kernel refused.
    """
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    return os.open(".", flags, 0o400, dir_fd=area.descriptor)


class Vault:
    """The decrypted files of one mount; safe to use from several threads of one process.

    Args:
        tree: the opened model.
        device: descriptor of ``/dev/fuse`` of this mount, after INIT.
        area: empty file system in memory, large enough for the whole tree.
    """

    def __init__(self, tree: ModelTree, device: int, area: system.DetachedMount) -> None:
        self._tree = tree
        self._device = device
        self._area = area
        self._pourer = Pourer(tree, large_pages=memory.has_large_pages(area))
        self._files: dict[int, _File] = {}
        self._handles: dict[int, tuple[int, bool]] = {}
        self._lock = threading.Lock()
        self._room = threading.Lock()
        self._serial = 0

    def open(self, node: Node) -> tuple[int, int | None]:
        """Open a file.

        Returns:
            A handle for ``release``, and the number of its plaintext for the kernel, or ``None``
            when reads shall come to this server.

        Raises:
            Tampered: some byte of the file does not authenticate.
            InputMissing, StorageError: it cannot be read.
        """
        ino = node.attributes.ino
        with self._lock:
            file = self._files.setdefault(ino, _File())
        with file.lock:
            # As long as one handle reads through this server, so must the others.
            through = file.plain == 0 and self._decrypted(file, node)
            with self._lock:
                self._serial += 1
                handle = file.used = self._serial
                self._handles[handle] = (ino, through)
                if through:
                    file.through += 1
                else:
                    file.plain += 1
            return handle, file.backing if through else None

    def release(self, handle: int) -> None:
        """Give a handle back; an unknown one is ignored."""
        with self._lock:
            ino, through = self._handles.pop(handle, (0, False))
            file = self._files.get(ino)
            if file is None:
                return
            if through:
                file.through -= 1
            else:
                file.plain -= 1

    def close(self) -> None:
        """End the threads, and let go of the memory."""
        self._pourer.close()
        self._area.close()

    def _decrypted(self, file: _File, node: Node) -> bool:
        """Whether the file's plaintext is there, after decrypting it if there is room."""
        if file.backing is not None:
            return True
        size = node.attributes.size
        if size <= SMALL:
            return False
        # One at a time: two that both fit alone may not fit together, and one uses all cores.
        with self._room:
            if not self._make_room(size):
                log.warning("%s: no memory for all of it; it is decrypted as it is read", node.path)
                return False
            try:
                file.backing = self._decrypt(self._tree.entries[node.path])
            except NoSpace as error:
                log.warning("%s: %s; it is decrypted as it is read", node.path, error.message)
                return False
        return True

    def _decrypt(self, entry: Entry) -> int:
        out = memory_file(self._area)
        try:
            self._pourer.pour(entry, out)
            # The kernel takes a reference of its own: the memory lives as long as that.
            return back(self._device, out)
        finally:
            os.close(out)

    def _make_room(self, size: int) -> bool:
        """Let files go that nobody has open, those unused for longest first, until it fits."""
        while not memory.fits(size):
            with self._lock:
                idle = [f for f in self._files.values() if f.backing is not None and not f.through]
                if not idle:
                    return False
                oldest = min(idle, key=lambda f: f.used)
                # An open of it that comes now waits for the lock, or has it: then try another.
                if not oldest.lock.acquire(blocking=False):
                    return False
            try:
                if not oldest.through and oldest.backing is not None:
                    unback(self._device, oldest.backing)
                    oldest.backing = None
            finally:
                oldest.lock.release()
        return True
