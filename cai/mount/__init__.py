"""A sealed model as an ordinary read-only folder, through FUSE or decrypted into memory.

    with open_model(sealed, key) as tree, mount(tree, Path("/tmp/model")) as mounted:
        mounted.wait()

FUSE decrypts what is read, when it is read, and keeps it in the page cache; tmpfs decrypts all of
it before anything appears. Either way a reader gets authentic bytes or an I/O error, and nothing is
written in clear to a disk.
"""

from __future__ import annotations

import os
import pwd
from dataclasses import replace
from pathlib import Path

from cai.errors import StorageError, UsageError
from cai.model.tree import ModelTree
from cai.mount import device, place, system
from cai.mount.fuse import MAX_WORKERS, WORKERS, mount_fuse
from cai.mount.handle import Kind, Mount
from cai.mount.index import Owner
from cai.mount.tmpfs import Progress, mount_tmpfs

__all__ = ["Kind", "Mount", "choose", "mount", "unmount"]


def choose(kind: str = Kind.AUTO) -> tuple[Kind, str]:
    """Decide how to show a tree.

    Args:
        kind: ``auto``, ``fuse`` or ``tmpfs``.

    Returns:
        ``Kind.FUSE`` or ``Kind.TMPFS``, and why, if it was not asked for.

    Raises:
        StorageError: this kind, or either kind, cannot be used here.
        UsageError: no such kind.
    """
    if kind not in tuple(Kind):
        raise UsageError(f"unknown kind of mount {kind!r}", hint="known are: auto, fuse, tmpfs")
    obstacle = device.why_unusable() if kind != Kind.TMPFS else None
    if kind == Kind.FUSE and obstacle:
        raise StorageError(f"FUSE cannot be used: {obstacle}", hint="use --kind tmpfs as root")
    if kind == Kind.FUSE or (kind == Kind.AUTO and obstacle is None):
        return Kind.FUSE, "" if kind == Kind.FUSE else "FUSE can be used here"
    if not system.is_administrator():
        because = f"FUSE cannot be used ({obstacle}), and " if obstacle else ""
        raise StorageError(
            f"{because}a tmpfs can be mounted by root only",
            hint="run as root, or make /dev/fuse and fusermount3 (package fuse3) available",
        )
    return Kind.TMPFS, f"FUSE cannot be used: {obstacle}" if obstacle else ""


def mount(
    tree: ModelTree,
    mount_point: Path,
    *,
    kind: str = Kind.AUTO,
    uid: int | None = None,
    allow_other: bool = False,
    workers: int = WORKERS,
    progress: Progress | None = None,
) -> Mount:
    """Mount a tree read-only; it can be read when this returns.

    Args:
        tree: the opened model; it must stay open until it is unmounted.
        mount_point: an existing, empty directory. A dead mount of ours on it is cleared away.
        kind: ``fuse``, ``tmpfs``, or ``auto``: FUSE where it can be used, else tmpfs.
        uid: owner of everything in it, by default this process's user. With another owner, only
            that one may enter, unless ``allow_other`` is given.
        allow_other: other users may read it, as far as the sealed modes allow.
        workers: processes that answer FUSE requests.
        progress: for tmpfs, called with each number of bytes done, from any thread.

    Returns:
        The mount, which ends with its ``with`` block, or, if it is FUSE, with this process.

    Raises:
        InputMissing, InputError, UsageError: the mount point will not do.
        StorageError: it cannot be mounted.
        NoSpace: for tmpfs, not enough memory.
        Tampered: for tmpfs, some byte does not authenticate.
    """
    if not 1 <= workers <= MAX_WORKERS:
        raise UsageError(f"{workers} workers, expected 1 to {MAX_WORKERS}")
    chosen, reason = choose(kind)
    path = place.prepare(mount_point)
    owner = _owner(uid, private=not allow_other)
    # FUSE lets in its mounter or everybody. One other user means everybody, and then, as
    # in a tmpfs, the mode of the root keeps the others out.
    everybody = allow_other or owner.uid != os.geteuid()
    visible = owner if everybody else replace(owner, private=False)
    if chosen is Kind.FUSE:
        try:
            return mount_fuse(
                tree, path, owner=visible, everybody=everybody, workers=workers, reason=reason
            )
        except StorageError as error:
            refused = error.machine_code == device.MOUNT_REFUSED
            if kind == Kind.FUSE or not refused or not system.is_administrator():
                raise
            reason = f"FUSE cannot be used: {error.message}"
    return mount_tmpfs(tree, path, owner=owner, reason=reason, progress=progress)


def unmount(mount_point: Path, *, force: bool = False) -> Kind:
    """Take away a mount of ours, whichever process made it.

    Args:
        mount_point: where it is.
        force: also when it is in use; FUSE reads that are waiting fail.

    Returns:
        The kind that it was.

    Raises:
        InputMissing: nothing of ours is mounted there.
        StorageError: it is in use, or not permitted.
    """
    found = place.find_ours(mount_point)
    device.detach(found.mount_point, lazily=force, force=force)
    return Kind.FUSE if found.kind == device.FUSE_KIND else Kind.TMPFS


def _owner(uid: int | None, *, private: bool) -> Owner:
    own = Owner.current()
    if uid is None or uid == own.uid:
        return Owner(own.uid, own.gid, private)
    try:
        gid = pwd.getpwuid(uid).pw_gid
    except KeyError:
        gid = uid
    return Owner(uid, gid, private)
