"""A FUSE mount: attach, agree with the kernel, start workers, watch over them, take it away."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import select
import signal
import threading
import time
from enum import Enum
from pathlib import Path

from cai.errors import CaiError, FormatError, StorageError, from_os_error
from cai.model.tree import ModelTree
from cai.mount import device, memory, protocol, system, vault, worker
from cai.mount.device import Access
from cai.mount.handle import Kind, Mount
from cai.mount.index import Owner, TreeIndex

WORKERS = 2
"""Processes that answer requests."""

MAX_WORKERS = 64
"""Most processes that may be asked for."""

END_SECONDS = 5.0
"""How long workers may take to end after an unmount, before they are killed."""

RESPAWNS = 5
"""Workers that are replaced within ``RESPAWN_SECONDS``; one more ends the mount."""

RESPAWN_SECONDS = 60.0
"""Time over which lost workers are counted."""

NO_PASSTHROUGH = "this kernel has no FUSE pass-through, or does not permit it"

log = logging.getLogger("cai.mount")


class Through(Enum):
    """Whether files are decrypted whole on open, for the kernel to read from (pass-through)."""

    NO = 0
    WISHED = 1
    REQUIRED = 2


def mount_fuse(
    tree: ModelTree,
    mount_point: Path,
    *,
    owner: Owner,
    everybody: bool,
    workers: int = WORKERS,
    through: Through = Through.NO,
    reason: str = "",
) -> FuseMount:
    """Show a tree through FUSE.

    Args:
        tree: the opened model; it must stay open while it is mounted.
        mount_point: as ``place.prepare`` returned it.
        owner: owner of everything in it.
        everybody: users other than the mounter may use it, as far as the modes allow.
        workers: processes that answer requests; with pass-through there is one.
        through: whether files are decrypted whole when they are opened.
        reason: why this kind was chosen.

    Raises:
        StorageError: the mount did not come about; or the kernel has no pass-through, and
            it must have.
        FormatError: the tree cannot be shown, or the kernel's FUSE is too old.
    """
    index = TreeIndex(tree, owner)
    descriptor = device.attach(mount_point, Access(os.geteuid(), os.getegid(), everybody))
    try:
        agreed = _agree(descriptor, passthrough=through is not Through.NO)
        mounted = system.mounted_at(mount_point)
        if mounted is None or mounted.kind != device.FUSE_KIND:
            raise StorageError(f"{mount_point} was mounted and is not any more")
        if not device.raise_read_ahead(mounted.device):
            log.info("read-ahead stays at the kernel's default: sysfs cannot be written")
        area = None
        if through is not Through.NO:
            area = _area(index, descriptor) if agreed else None
            if area is None and through is Through.REQUIRED:
                raise StorageError(NO_PASSTHROUGH, hint="use --kind tmpfs or --kind fuse")
            reason = reason if area else NO_PASSTHROUGH
        life, life_end = os.pipe()
        post = worker.Post(tree, index, descriptor, life, mount_point, mounted.device, area)
        return FuseMount(post, life_end, workers, reason=reason)
    except BaseException:
        with contextlib.suppress(CaiError):
            device.detach(mount_point, lazily=True)
        os.close(descriptor)
        raise


class FuseMount(Mount):
    """A tree shown through FUSE, served by forked workers. Made by ``mount_fuse``."""

    kind = Kind.FUSE

    def __init__(self, post: worker.Post, life_end: int, workers: int, *, reason: str) -> None:
        super().__init__(post.mount_point, reason=reason)
        if post.area is not None:
            self.kind = Kind.PASSTHROUGH
        self._post = post
        self._lock = threading.Lock()
        self._ending = False
        self._failure = ""
        self._own = [life_end, post.life, post.descriptor]
        worker.PRIVATE.update(self._own)
        self.pids: list[int] = []
        self._handles: dict[int, int] = {}
        try:
            if post.area is not None:
                worker.PRIVATE.add(post.area.descriptor)
            for number in range(1 if post.area else workers):
                self.pids.append(-1)
                self._start(number)
        except OSError as error:
            self._kill()
            self._close(but=post.descriptor)
            raise from_os_error(error, "start the workers of the mount") from error
        finally:
            if post.area is not None:
                worker.PRIVATE.discard(post.area.descriptor)
                post.area.close()
        self._watch = threading.Thread(target=self._watch_workers, daemon=True)
        self._watch.start()

    def unmount(self) -> None:
        """Take it away, also from those who have files of it open."""
        with self._lock:
            if self._ending:
                return
            self._ending = True
        failure = None
        try:
            self._detach()
        except CaiError as error:
            failure = error
        self._close()
        self._watch.join(END_SECONDS)
        if self._watch.is_alive():
            self._kill()
            self._watch.join()
        if failure is not None:
            raise failure

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is gone, whoever took it away."""
        self._watch.join(timeout)
        if self._watch.is_alive():
            return False
        if self._failure:
            raise StorageError(self._failure, hint="mount it again")
        self.unmount()
        return True

    def _detach(self) -> None:
        mounted = system.mounted_at(self.mount_point)
        if mounted is None or mounted.device != self._post.device_number:
            return
        try:
            device.detach(self.mount_point)
        except StorageError:
            # In use. What is waiting fails now; what is open fails at its next read.
            device.detach(self.mount_point, lazily=True, force=True)

    def _start(self, number: int) -> None:
        """Fork the worker of that number; the first clears up after a killed parent."""
        self.pids[number] = worker.start(self._post, first=number == 0)
        self._handles[os.pidfd_open(self.pids[number])] = number

    def _close(self, *, but: int = -1) -> None:
        """End the workers, and with the last descriptor the connection."""
        for descriptor in self._own:
            worker.PRIVATE.discard(descriptor)
            if descriptor != but:
                os.close(descriptor)

    def _watch_workers(self) -> None:
        """Reap the workers, and replace those that were lost, until the mount ends."""
        lost: list[float] = []
        while self._handles:
            poll = select.poll()
            for handle in self._handles:
                poll.register(handle, select.POLLIN)
            handle = poll.poll()[0][0]
            number = self._handles.pop(handle)
            failed = _exit_status(handle) != 0
            os.close(handle)
            if failed:
                now = time.monotonic()
                lost = [at for at in lost if now - at < RESPAWN_SECONDS] + [now]
                self._replace(number, len(lost))

    def _replace(self, number: int, losses: int) -> None:
        """Start a lost worker again; end the mount when that cannot be, or not any more.

        Requests that the lost one had taken have failed. With pass-through it alone knew which
        files are decrypted, so it cannot be replaced.
        """
        what = f"a process that serves {self.mount_point} was killed or failed"
        with self._lock:
            if self._ending:
                return
            if self._post.area is None and losses <= RESPAWNS:
                with contextlib.suppress(OSError):
                    self._start(number)
                    log.warning("%s; another one took its place", what)
                    return
            self._ending = True
        self._failure = what
        log.error("%s; unmounting", what)
        with contextlib.suppress(CaiError):
            self._detach()
        self._close()

    def _kill(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _area(index: TreeIndex, descriptor: int) -> system.DetachedMount | None:
    """Memory that this kernel passes reads through to, or ``None`` when it refuses."""
    area = memory.area(memory.needed(index), len(index.nodes) + 2)
    if vault.is_permitted(descriptor, area):
        return area
    area.close()
    return None


def _agree(descriptor: int, *, passthrough: bool) -> bool:
    """Answer the kernel's INIT; whether pass-through was wanted and offered.

    Raises:
        StorageError: the device failed.
        FormatError: the kernel's FUSE is too old.
    """
    buffer = memoryview(bytearray(protocol.REQUEST_BUFFER))
    try:
        while True:
            request = buffer[: os.readv(descriptor, [buffer])]
            opcode, unique, _ino = protocol.request(request)
            if opcode != protocol.Opcode.INIT:
                raise FormatError(f"the kernel began with FUSE request {opcode}")
            try:
                through = passthrough and protocol.offers_passthrough(request)
                payload = protocol.init_answer(request, mmap.PAGESIZE, passthrough=through)
            except FormatError:
                os.writev(descriptor, [protocol.refusal(unique, errno.EPROTO)])
                raise
            settled = payload is not None
            payload = payload or protocol.older_version()
            os.writev(descriptor, [protocol.answer(unique, len(payload)), payload])
            if settled:
                return through
    except OSError as error:
        raise from_os_error(error, "talk to /dev/fuse") from error


def _exit_status(handle: int) -> int:
    """Reap the process; its exit status, or -1 when it was killed."""
    try:
        result = os.waitid(os.P_PIDFD, handle, os.WEXITED)
    except ChildProcessError:
        return 0  # reaped by somebody else in this process
    if result is None or result.si_code != os.CLD_EXITED:
        return -1
    return result.si_status
