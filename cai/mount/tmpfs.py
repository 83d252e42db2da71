"""Materialises a model: every file decrypted into memory, verified whole before it can be seen.

The tmpfs is made detached (see ``system.DetachedMount``), filled, made read-only and only then put
on the mount point. Whatever fails or is interrupted before leaves nothing behind, since a detached
file system goes with its descriptor. What goes is overwritten first (``wipe``). No byte touches a
disk: the tmpfs is mounted ``noswap``, and where the kernel cannot promise that, a machine with swap
is refused.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from cai.errors import StorageError, from_os_error
from cai.model.tree import Entry, EntryType, ModelTree
from cai.mount import memory, system, wipe
from cai.mount.handle import Kind, Mount
from cai.mount.index import Owner, TreeIndex, read_only_mode
from cai.mount.pour import Pourer, Progress

_POLL_SECONDS = 3600.0


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
    needed = memory.needed(index)
    memory.check(needed)
    root_mode = index.nodes[0].attributes.mode & 0o777
    area = memory.area(needed, len(index.nodes) + 1)
    try:
        with Pourer(tree, progress, large_pages=memory.has_large_pages(area)) as pourer:
            _fill(tree, area.descriptor, owner, pourer)
        _own(area.descriptor, ".", root_mode, owner)
        area.make_read_only()
        area.attach(mount_point)
    except BaseException as error:
        wipe.overwrite(area.descriptor)
        if isinstance(error, OSError):
            raise from_os_error(error, "materialise the model") from error
        raise
    finally:
        area.close()
    return TmpfsMount(mount_point, reason=reason)


class TmpfsMount(Mount):
    """A materialised tree. It stays when this process ends; ``unmount`` overwrites its memory."""

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
            wipe.take_away(self.mount_point)
        except StorageError:
            wipe.take_away(self.mount_point, lazily=True)

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


def _fill(tree: ModelTree, root: int, owner: Owner, pourer: Pourer) -> None:
    """Write the whole tree; directories get their final mode last."""
    directories = []
    for entry in tree.entries.values():
        if entry.type is EntryType.DIRECTORY:
            os.mkdir(entry.path, 0o700, dir_fd=root)
            directories.append(entry)
        elif entry.type is EntryType.SYMLINK:
            os.symlink(entry.target, entry.path, dir_fd=root)
            os.chown(entry.path, owner.uid, owner.gid, dir_fd=root, follow_symlinks=False)
        else:
            _write_file(entry, root, owner, pourer)
    for entry in reversed(directories):
        _own(root, entry.path, read_only_mode(entry) & 0o777, owner)


def _write_file(entry: Entry, root: int, owner: Owner, pourer: Pourer) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    out = os.open(entry.path, flags, 0o600, dir_fd=root)
    try:
        pourer.pour(entry, out)
        os.fchown(out, owner.uid, owner.gid)
        os.fchmod(out, read_only_mode(entry) & 0o777)
    finally:
        os.close(out)


def _own(root: int, path: str, mode: int, owner: Owner) -> None:
    os.chown(path, owner.uid, owner.gid, dir_fd=root)
    os.chmod(path, mode, dir_fd=root)
