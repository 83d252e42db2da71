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
from pathlib import Path

from cai.errors import CaiError, FormatError, StorageError, from_os_error
from cai.model.tree import ModelTree
from cai.mount import device, protocol, system, worker
from cai.mount.device import Access
from cai.mount.handle import Kind, Mount
from cai.mount.index import Owner, TreeIndex

WORKERS = 2
"""Processes that answer requests."""

MAX_WORKERS = 64
"""Most processes that may be asked for."""

END_SECONDS = 5.0
"""How long workers may take to end after an unmount, before they are killed."""

log = logging.getLogger("cai.mount")


def mount_fuse(
    tree: ModelTree,
    mount_point: Path,
    *,
    owner: Owner,
    everybody: bool,
    workers: int = WORKERS,
    reason: str = "",
) -> FuseMount:
    """Show a tree through FUSE.

    Args:
        tree: the opened model; it must stay open while it is mounted.
        mount_point: as ``place.prepare`` returned it.
        owner: owner of everything in it.
        everybody: users other than the mounter may use it, as far as the modes allow.
        workers: processes that answer requests.
        reason: why this kind was chosen.

    Raises:
        StorageError: the mount did not come about.
        FormatError: the tree cannot be shown, or the kernel's FUSE is too old.
    """
    index = TreeIndex(tree, owner)
    descriptor = device.attach(mount_point, Access(os.geteuid(), os.getegid(), everybody))
    try:
        _agree(descriptor)
        mounted = system.mounted_at(mount_point)
        if mounted is None or mounted.kind != device.FUSE_KIND:
            raise StorageError(f"{mount_point} was mounted and is not any more")
        if not device.raise_read_ahead(mounted.device):
            log.info("read-ahead stays at the kernel's default: sysfs cannot be written")
        return FuseMount(
            tree, index, mount_point, descriptor, mounted.device, workers, reason=reason
        )
    except BaseException:
        with contextlib.suppress(CaiError):
            device.detach(mount_point, lazily=True)
        os.close(descriptor)
        raise


class FuseMount(Mount):
    """A tree shown through FUSE, served by forked workers. Made by ``mount_fuse``."""

    kind = Kind.FUSE

    def __init__(
        self, tree: ModelTree, index: TreeIndex, mount_point: Path, descriptor: int,
        device_number: str, workers: int, *, reason: str,
    ) -> None:  # fmt: skip
        super().__init__(mount_point, reason=reason)
        self._descriptor = descriptor
        self._device_number = device_number
        self._lock = threading.Lock()
        self._ending = False
        self._failure = ""
        life, self._life = os.pipe()
        own = {descriptor, life, self._life}
        worker.PRIVATE.update(own)
        post = worker.Post(tree, index, descriptor, life, mount_point, device_number)
        self.pids: list[int] = []
        self._handles: list[int] = []
        try:
            for number in range(workers):
                self.pids.append(worker.start(post, first=number == 0))
                self._handles.append(os.pidfd_open(self.pids[-1]))
        except OSError as error:
            self._kill()
            os.close(self._life)
            worker.PRIVATE.difference_update(own)
            raise from_os_error(error, "start the workers of the mount") from error
        finally:
            os.close(life)
            worker.PRIVATE.discard(life)
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
        if mounted is None or mounted.device != self._device_number:
            return
        try:
            device.detach(self.mount_point)
        except StorageError:
            # In use. What is waiting fails now; what is open fails at its next read.
            device.detach(self.mount_point, lazily=True, force=True)

    def _close(self) -> None:
        """End the workers, and with the last descriptor the connection."""
        for descriptor in (self._life, self._descriptor):
            worker.PRIVATE.discard(descriptor)
            os.close(descriptor)

    def _watch_workers(self) -> None:
        """Reap the workers; when one failed, end the mount rather than let readers hang."""
        poll = select.poll()
        for handle in self._handles:
            poll.register(handle, select.POLLIN)
        for _worker in self._handles:
            handle = poll.poll()[0][0]
            poll.unregister(handle)
            failed = _exit_status(handle) != 0
            os.close(handle)
            with self._lock:
                unexpected = failed and not self._ending
                self._ending = self._ending or unexpected
            if unexpected:
                self._failure = f"a process that serves {self.mount_point} was killed or failed"
                log.error("%s; unmounting", self._failure)
                with contextlib.suppress(CaiError):
                    self._detach()
                self._close()

    def _kill(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _agree(descriptor: int) -> None:
    """Answer the kernel's INIT.

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
                payload = protocol.init_answer(request, mmap.PAGESIZE)
            except FormatError:
                os.writev(descriptor, [protocol.refusal(unique, errno.EPROTO)])
                raise
            settled = payload is not None
            payload = payload or protocol.older_version()
            os.writev(descriptor, [protocol.answer(unique, len(payload)), payload])
            if settled:
                return
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
