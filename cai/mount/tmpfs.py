"""Materialises a model: every file decrypted into memory, verified whole before it can be seen.

The tmpfs is made detached (see ``system.DetachedMount``), filled, made read-only and only then put
on the mount point. Whatever fails or is interrupted before leaves nothing behind, since a detached
file system goes with its descriptor. No byte touches a disk: the tmpfs is mounted ``noswap``, and
where the kernel cannot promise that, a machine with swap is refused.
"""

from __future__ import annotations

import errno
import os
import re
import select
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cai.errors import NoSpace, StorageError, Tampered, from_os_error
from cai.model.tree import Entry, EntryType, FileReader, ModelTree
from cai.mount import device, system
from cai.mount.handle import Kind, Mount
from cai.mount.index import Owner, TreeIndex, read_only_mode

PIECE = 4 * 1024 * 1024
"""Bytes that one thread decrypts and writes at a time; a multiple of every chunk size."""

MAX_THREADS = 8
"""Most threads that decrypt."""

INODE_COST = 4096
"""Memory reserved for each path beside its content, bytes."""

RESERVE = 256 * 1024 * 1024
"""Memory that must stay free beside the model, bytes."""

_PAGE = 4096
_POLL_SECONDS = 3600.0

Progress = Callable[[int], None]


def mount_tmpfs(
    tree: ModelTree,
    mount_point: Path,
    *,
    owner: Owner,
    reason: str = "",
    progress: Progress | None = None,
) -> TmpfsMount:
    """Decrypt a tree into a tmpfs and mount it.

    Args:
        tree: the opened model; it is not needed any more afterwards.
        mount_point: as ``place.prepare`` returned it.
        owner: owner of everything in it.
        reason: why this kind was chosen.
        progress: called with each number of bytes done, from any thread.

    Raises:
        NoSpace: there is not enough memory.
        Tampered: some byte of the model does not authenticate.
        StorageError: it cannot be mounted, or memory could be swapped to a disk.
    """
    index = TreeIndex(tree, owner)  # refuses paths that cannot be shown
    needed = index.total + len(index.nodes) * INODE_COST
    _check_memory(needed)
    root_mode = index.nodes[0].attributes.mode & 0o777
    area = system.DetachedMount(
        "tmpfs",
        device.TMPFS_SOURCE,
        {"size": str(needed), "mode": "0700", "nr_inodes": str(len(index.nodes) + 1)},
        {"noswap": None, "huge": "within_size"},
    )
    try:
        if "noswap" in area.refused and _swap_is_on():
            raise StorageError(
                "this kernel could swap the decrypted model to a disk",
                hint="swapoff -a, or use --kind fuse",
            )
        _fill(tree, area.descriptor, owner, progress or (lambda _amount: None))
        _own(area.descriptor, ".", root_mode, owner)
        area.make_read_only()
        area.attach(mount_point)
    except OSError as error:
        raise from_os_error(error, "materialise the model") from error
    finally:
        area.close()
    return TmpfsMount(mount_point, reason=reason)


class TmpfsMount(Mount):
    """A materialised tree. It stays when this process ends; its memory is freed by ``unmount``."""

    kind = Kind.TMPFS

    def __init__(self, mount_point: Path, *, reason: str = "") -> None:
        super().__init__(mount_point, reason=reason)
        mounted = system.mounted_at(mount_point)
        self._device_number = mounted.device if mounted else ""

    def unmount(self) -> None:
        """Take it away, also from those who have files of it open."""
        if not self._is_there():
            return
        try:
            device.detach(self.mount_point)
        except StorageError:
            device.detach(self.mount_point, lazily=True)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is gone, whoever took it away."""
        end = None if timeout is None else time.monotonic() + timeout
        with Path("/proc/self/mountinfo").open("rb") as changes:
            poll = select.poll()
            poll.register(changes, select.POLLPRI)
            while self._is_there():
                left = _POLL_SECONDS if end is None else end - time.monotonic()
                if left <= 0:
                    return False
                poll.poll(left * 1000)
        return True

    def _is_there(self) -> bool:
        mounted = system.mounted_at(self.mount_point)
        return mounted is not None and mounted.device == self._device_number


def _fill(tree: ModelTree, root: int, owner: Owner, progress: Progress) -> None:
    """Write the whole tree; directories get their final mode last."""
    directories = []
    writer = _Writer(progress)
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        for entry in tree.entries.values():
            if entry.type is EntryType.DIRECTORY:
                os.mkdir(entry.path, 0o700, dir_fd=root)
                directories.append(entry)
            elif entry.type is EntryType.SYMLINK:
                os.symlink(entry.target, entry.path, dir_fd=root)
                os.chown(entry.path, owner.uid, owner.gid, dir_fd=root, follow_symlinks=False)
            else:
                _write_file(tree, entry, root, owner, pool, writer)
    for entry in reversed(directories):
        _own(root, entry.path, read_only_mode(entry) & 0o777, owner)


def _write_file(
    tree: ModelTree,
    entry: Entry,
    root: int,
    owner: Owner,
    pool: ThreadPoolExecutor,
    writer: _Writer,
) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    out = os.open(entry.path, flags, 0o600, dir_fd=root)
    try:
        # The final size first: only then are huge pages used inside it.
        os.ftruncate(out, entry.size)
        # An empty file is opened too: its object must be there and be the sealed one.
        reader = tree.open(entry.path)
        try:
            for _done in pool.map(writer.job(entry, reader, out), range(0, entry.size, PIECE)):
                pass
        finally:
            reader.close()
        os.fchown(out, owner.uid, owner.gid)
        os.fchmod(out, read_only_mode(entry) & 0o777)
    finally:
        os.close(out)


class _Writer:
    """Decrypts pieces into the tmpfs, with one reused buffer a thread."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._local = threading.local()

    def job(self, entry: Entry, reader: FileReader, out: int) -> Callable[[int], None]:
        """The work of one file: a function of the piece's offset."""

        def write(offset: int) -> None:
            if not hasattr(self._local, "buffer"):
                self._local.buffer = memoryview(bytearray(PIECE))
            piece = self._local.buffer[: min(PIECE, entry.size - offset)]
            filled = reader.readinto(offset, piece)
            if filled != len(piece):
                raise Tampered(f"{entry.path} is shorter than it was sealed")
            _write_all(out, piece, offset)
            self._progress(len(piece))

        return write


def _write_all(out: int, piece: memoryview, offset: int) -> None:
    done = 0
    while done < len(piece):
        try:
            done += os.pwrite(out, piece[done:], offset + done)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise NoSpace("memory is full", hint="use --kind fuse") from error
            raise


def _own(root: int, path: str, mode: int, owner: Owner) -> None:
    os.chown(path, owner.uid, owner.gid, dir_fd=root)
    os.chmod(path, mode, dir_fd=root)


def _check_memory(needed: int) -> None:
    available = memory_available()
    if available is not None and needed + RESERVE > available:
        raise NoSpace(
            f"the model needs {needed >> 20} MiB of memory beside a reserve of {RESERVE >> 20}, "
            f"{available >> 20} MiB are available",
            hint="use --kind fuse, which keeps only what is being read",
        )


def memory_available() -> int | None:
    """Bytes that this process may still take: the machine's, or its control group's if less."""
    bounds = []
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    if found:
        bounds.append(int(found[1]) * 1024)
    group = re.search(r"^0::(/.*)$", _text("/proc/self/cgroup"), re.MULTILINE)
    if group:
        folder = f"/sys/fs/cgroup{group[1].rstrip('/')}"
        limit, used = _text(f"{folder}/memory.max").strip(), _text(f"{folder}/memory.current")
        if limit.isdigit() and used.strip().isdigit():
            bounds.append(max(0, int(limit) - int(used)))
    return min(bounds, default=None)


def _swap_is_on() -> bool:
    return len(_text("/proc/swaps").splitlines()) > 1


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
