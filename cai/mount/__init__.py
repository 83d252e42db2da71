"""A sealed model as an ordinary read-only folder, through FUSE or decrypted into memory.

    with open_model(sealed, key) as tree, mount(tree, Path("/tmp/model")) as mounted:
        mounted.wait()

FUSE decrypts what is read, when it is read, and keeps it in the page cache. With pass-through it
decrypts each file whole, into memory, when it is opened. tmpfs decrypts all of the model before
anything appears. In each case a reader gets authentic bytes or an I/O error, and nothing is written
in clear to a disk.
"""

from __future__ import annotations

import os
import pwd
from dataclasses import replace
from pathlib import Path

from cai.errors import StorageError, UsageError
from cai.model.tree import ModelTree
from cai.mount import device, memory, place, system, wipe
from cai.mount.fuse import MAX_WORKERS, WORKERS, Through, mount_fuse
from cai.mount.handle import Kind, Mount
from cai.mount.index import Owner, TreeIndex
from cai.mount.pour import Progress
from cai.mount.tmpfs import mount_tmpfs

__all__ = ["Kind", "Mount", "choose", "mount", "unmount"]


def choose(kind: str = Kind.AUTO, tree: ModelTree | None = None) -> tuple[Kind, str]:
    """Decide how to show a tree.

    By itself it takes the first of these that can be: FUSE pass-through, where the kernel has it
    and memory holds the model; a tmpfs, where memory holds the model; FUSE.

    Args:
        kind: ``auto``, ``fuse``, ``passthrough`` or ``tmpfs``.
        tree: the opened model; without it memory is taken to be too small for it.

    Returns:
        Any kind but ``Kind.AUTO``, and why, if it was not asked for.

    Raises:
        StorageError: this kind, or any kind, cannot be used here.
        UsageError: no such kind.
    """
    if kind not in tuple(Kind):
        known = ", ".join(Kind)
        raise UsageError(f"unknown kind of mount {kind!r}", hint=f"known are: {known}")
    obstacle = device.why_unusable() if kind != Kind.TMPFS else None
    administrator = system.is_administrator()
    if kind == Kind.TMPFS or obstacle:
        if kind in (Kind.FUSE, Kind.PASSTHROUGH):
            raise StorageError(f"FUSE cannot be used: {obstacle}", hint="use --kind tmpfs as root")
        if not administrator:
            because = f"FUSE cannot be used ({obstacle}), and " if obstacle else ""
            raise StorageError(
                f"{because}a tmpfs can be mounted by root only",
                hint="run as root, or make /dev/fuse and fusermount3 (package fuse3) available",
            )
        return Kind.TMPFS, f"FUSE cannot be used: {obstacle}" if obstacle else ""
    no_through = device.why_no_passthrough()
    if kind == Kind.PASSTHROUGH and no_through:
        raise StorageError(f"pass-through: {no_through}", hint="use --kind fuse or --kind tmpfs")
    if kind != Kind.AUTO:
        return Kind(kind), ""
    if not administrator:
        return Kind.FUSE, "only root can keep decrypted files in memory that is never swapped"
    if tree is None:
        return Kind.FUSE, "FUSE can be used here"
    size = memory.needed(TreeIndex(tree, Owner.current()))
    room = memory.available()
    if not memory.fits(size):
        return Kind.FUSE, f"memory does not hold the {size >> 20} MiB of the model"
    holds = f"{(room or 0) >> 20} MiB of memory hold the model's {size >> 20}"
    if no_through is None:
        return Kind.PASSTHROUGH, f"{holds}, and the kernel passes reads through"
    return Kind.TMPFS, f"{holds}; {no_through}"


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
        kind: ``fuse``, ``passthrough``, ``tmpfs``, or ``auto``, as ``choose`` decides.
        uid: owner of everything in it, by default this process's user. With another owner, only
            that one may enter, unless ``allow_other`` is given.
        allow_other: other users may read it, as far as the sealed modes allow.
        workers: processes that answer FUSE requests; with pass-through there is one.
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
    chosen, reason = choose(kind, tree)
    path = place.prepare(mount_point)
    owner = _owner(uid, private=not allow_other)
    # FUSE lets in its mounter or everybody. One other user means everybody, and then, as
    # in a tmpfs, the mode of the root keeps the others out.
    everybody = allow_other or owner.uid != os.geteuid()
    visible = owner if everybody else replace(owner, private=False)
    if chosen is not Kind.TMPFS:
        through = Through.NO
        if chosen is Kind.PASSTHROUGH:
            through = Through.WISHED if kind == Kind.AUTO else Through.REQUIRED
        try:
            return mount_fuse(
                tree, path, owner=visible, everybody=everybody, workers=workers, through=through,
                reason=reason,
            )  # fmt: skip
        except StorageError as error:
            refused = error.machine_code == device.MOUNT_REFUSED
            if kind != Kind.AUTO or not refused or not system.is_administrator():
                raise
            reason = f"FUSE cannot be used: {error.message}"
    return mount_tmpfs(tree, path, owner=owner, reason=reason, progress=progress)


def unmount(mount_point: Path, *, force: bool = False) -> Kind:
    """Take away a mount of ours, whichever process made it.

    Args:
        mount_point: where it is.
        force: also when it is in use; FUSE reads that are waiting fail.

    Returns:
        The kind that it was; pass-through is told as FUSE.

    Raises:
        InputMissing: nothing of ours is mounted there.
        StorageError: it is in use, or not permitted.
    """
    found = place.find_ours(mount_point)
    if found.kind != device.FUSE_KIND:
        wipe.take_away(found.mount_point, lazily=force)
        return Kind.TMPFS
    device.detach(found.mount_point, lazily=force, force=force)
    return Kind.FUSE


def _owner(uid: int | None, *, private: bool) -> Owner:
    own = Owner.current()
    if uid is None or uid == own.uid:
        return Owner(own.uid, own.gid, private)
    try:
        gid = pwd.getpwuid(uid).pw_gid
    except KeyError:
        gid = uid
    return Owner(uid, gid, private)
