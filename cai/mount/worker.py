"""The processes that answer a FUSE mount's requests.

Processes and not threads, for two reasons. Decryption of small chunks scales with processes only.
And a process that reads its own mount through ``mmap`` holds the interpreter's lock while it waits
for itself; a caller of ``cai.mount`` must be able to do that. Forked and not started anew, because
the opened model with its keys cannot, and must not, be passed on in any other way.

A worker lives no longer than its parent: it holds the reading end of a pipe that nobody writes to.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

from cai.errors import CaiError
from cai.model.tree import ModelTree
from cai.mount import device, system
from cai.mount.index import TreeIndex
from cai.mount.server import Dispatcher, ThroughDispatcher, send, serve
from cai.mount.vault import Vault

log = logging.getLogger("cai.mount")

PRIVATE: set[int] = set()
"""Descriptors that a worker must not keep open: of other mounts, and of a caller that waits for
their end."""


@dataclass(frozen=True, slots=True)
class Post:
    """What a worker serves.

    Attributes:
        tree: the opened model.
        index: its inodes.
        descriptor: the device, after INIT.
        life: reading end of the pipe whose end of file says that the parent is gone.
        mount_point: to be cleared by the first worker when the parent was killed.
        device_number: of the mounted file system.
        area: memory for decrypted files, when reads pass through.
    """

    tree: ModelTree
    index: TreeIndex
    descriptor: int
    life: int
    mount_point: Path
    device_number: str
    area: system.DetachedMount | None = None


def start(post: Post, *, first: bool) -> int:
    """Fork a worker.

    Args:
        post: what it serves.
        first: it clears the mount point when the parent was killed.

    Returns:
        Its process id.

    Raises:
        OSError: no process could be made.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _run(post, first=first)
        status = 0
    except BaseException:
        # Nothing of the parent's stack may run in here.
        log.exception("a worker of the mount failed")
    finally:
        os._exit(status)


def _run(post: Post, *, first: bool) -> None:
    # Signals are the parent's: it unmounts, and that ends the worker.
    os.setsid()
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    gc.freeze()
    area = post.area
    _let_go(keep={post.descriptor, post.life, *([area.descriptor] if area else ())})
    descriptor = device.clone(post.descriptor)
    if descriptor != post.descriptor:
        os.close(post.descriptor)
    system.forbid_core_dumps()
    threading.Thread(target=_end_with_parent, args=(post, first), daemon=True).start()
    dispatcher = Dispatcher(post.tree, post.index)
    if area is not None:
        vault = Vault(post.tree, descriptor, area)
        dispatcher = ThroughDispatcher(
            post.tree, post.index, vault, lambda answer: send(descriptor, answer)
        )
    serve(descriptor, dispatcher)


def _let_go(keep: set[int]) -> None:
    """Close what belongs to the parent alone: its mounts, its sockets, its input and output."""
    for descriptor in PRIVATE - keep:
        os.close(descriptor)
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - numbers, not paths
        descriptor = int(name)
        with contextlib.suppress(OSError):
            is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
            if descriptor not in keep and (is_socket or descriptor in (0, 1)):
                # Replaced, not closed: the number still belongs to an object in memory.
                os.dup2(nothing, descriptor, inheritable=False)


def _end_with_parent(post: Post, first: bool) -> None:  # noqa: FBT001 - a thread's target
    with contextlib.suppress(OSError):
        os.read(post.life, 1)
    if first:
        with contextlib.suppress(CaiError):
            mounted = system.mounted_at(post.mount_point)
            if mounted is not None and mounted.device == post.device_number:
                device.detach(post.mount_point, lazily=True)
    os._exit(0)
