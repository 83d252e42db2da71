"""Answers the kernel's requests about a read-only tree.

``Dispatcher`` is a function of bytes to bytes over an index and the tree's readers; ``serve`` is
the loop that one worker runs on ``/dev/fuse``. Every error becomes an errno: authentication
failures and anything unexpected are EIO, so a reader gets authentic bytes or none.

There are no file handles: OPEN and OPENDIR are answered ENOSYS, which the protocol defines as
"not needed". So any worker can answer any request, and the page cache is kept between opens.
With pass-through there are: ``ThroughDispatcher`` answers OPEN once the file has been decrypted.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from cai.errors import CaiError, FormatError, InputMissing, Tampered
from cai.model.tree import FileReader, ModelTree
from cai.mount import protocol
from cai.mount.index import Node, TreeIndex
from cai.mount.protocol import Opcode
from cai.mount.vault import SMALL, Vault
from cai.mount.window import Window

MAX_OPEN_READERS = 32
"""Readers that one worker keeps open; the one unused for longest is closed for the next."""

MAX_OPENERS = 16
"""Files that may be waiting to be decrypted before the next open has to queue."""

MAX_REPORTED = 1024
"""Damaged places that one worker remembers, so that each is logged once."""

log = logging.getLogger("cai.mount")

Buffer = bytes | memoryview


class _Errno(Exception):
    """Answers a request with an error number; it never leaves this module."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Dispatcher:
    """Answers requests; one per worker, since it owns buffers.

    Args:
        tree: the opened model.
        index: its inodes.
    """

    def __init__(self, tree: ModelTree, index: TreeIndex) -> None:
        self._tree = tree
        self._index = index
        self._window = Window()
        self._readers: OrderedDict[int, FileReader] = OrderedDict()
        self._reported: set[str] = set()
        self._statfs = protocol.statfs_answer(index.total, len(index.nodes))
        self._handlers: dict[int, Callable[[Node, memoryview], Buffer]] = {
            Opcode.READ: self._read,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: lambda node, _: protocol.attributes_answer(node.attributes),
            Opcode.READLINK: self._readlink,
            Opcode.READDIR: lambda node, buffer: self._readdir(node, buffer, plus=False),
            Opcode.READDIRPLUS: lambda node, buffer: self._readdir(node, buffer, plus=True),
            Opcode.STATFS: lambda _node, _: self._statfs,
            Opcode.ACCESS: lambda _node, _: b"",
            Opcode.DESTROY: lambda _node, _: b"",
        }

    def answer(self, buffer: memoryview) -> Sequence[Buffer] | None:
        """The buffers to write for one request, or ``None`` when it wants no answer.

        The buffers are valid until the next call.
        """
        try:
            opcode, unique, ino = protocol.request(buffer)
        except FormatError as error:
            log.error("request ignored: %s", error.message)
            return None
        if opcode in protocol.UNANSWERED:
            return None
        return self._answered(unique, ino, opcode, lambda: self._dispatch(opcode, ino, buffer))

    def close(self) -> None:
        """Close every reader."""
        while self._readers:
            self._readers.popitem()[1].close()

    def _answered(
        self, unique: int, ino: int, opcode: int, work: Callable[[], Buffer]
    ) -> Sequence[Buffer]:
        """What ``work`` gives as an answer, or its error as one."""
        try:
            payload = work()
        except _Errno as error:
            return [protocol.refusal(unique, error.number)]
        except CaiError as error:
            self._report(ino, error)
            return [protocol.refusal(unique, errno.EIO)]
        except Exception:
            # Whatever it was, the reader must not hang and must not get bytes.
            log.exception("request %d failed", opcode)
            return [protocol.refusal(unique, errno.EIO)]
        return [protocol.answer(unique, len(payload)), payload]

    def _dispatch(self, opcode: int, ino: int, buffer: memoryview) -> Buffer:
        handler = self._handlers.get(opcode)
        if handler is None:
            raise _Errno(errno.EROFS if opcode in protocol.WRITES else errno.ENOSYS)
        node = self._index.node(ino or 1)  # STATFS may come without an inode
        if node is None:
            raise _Errno(errno.ESTALE)
        return handler(node, buffer)

    def _lookup(self, node: Node, buffer: memoryview) -> bytes:
        if not node.is_directory:
            raise _Errno(errno.ENOTDIR)
        child = self._index.child(node, protocol.lookup_name(buffer))
        return protocol.ABSENT if child is None else protocol.entry_answer(child.attributes)

    def _readlink(self, node: Node, _buffer: memoryview) -> bytes:
        if not node.target:
            raise _Errno(errno.EINVAL)
        return node.target

    def _readdir(self, node: Node, buffer: memoryview, *, plus: bool) -> bytes:
        if not node.is_directory:
            raise _Errno(errno.ENOTDIR)
        offset, size = protocol.read_arguments(buffer)
        return self._index.listing(node, offset, size, plus=plus)

    def _read(self, node: Node, buffer: memoryview) -> memoryview:
        if not node.is_file:
            raise _Errno(errno.EISDIR if node.is_directory else errno.EINVAL)
        offset, size = protocol.read_arguments(buffer)
        ino, length = node.attributes.ino, node.attributes.size
        return self._window.read(ino, self._reader(node), length, offset, size)

    def _reader(self, node: Node) -> FileReader:
        ino = node.attributes.ino
        reader = self._readers.get(ino)
        if reader is None:
            try:
                reader = self._tree.open(node.path)
            except InputMissing as error:
                raise Tampered(f"its stored object is gone: {error.message}") from error
            if len(self._readers) >= MAX_OPEN_READERS:
                self._readers.popitem(last=False)[1].close()
            self._readers[ino] = reader
        else:
            self._readers.move_to_end(ino)
        return reader

    def _report(self, ino: int, error: CaiError) -> None:
        """Log a failed read, once for each place: the kernel asks again, page by page."""
        node = self._index.node(ino)
        line = f"{node.path if node else ino}: {error.message}"
        if line not in self._reported and len(self._reported) < MAX_REPORTED:
            self._reported.add(line)
            log.error("%s", line)


class ThroughDispatcher(Dispatcher):
    """Answers requests of a mount with pass-through; its opens are answered by other threads.

    Args:
        tree: the opened model.
        index: its inodes.
        vault: the decrypted files.
        reply: gives an answer to the kernel; called from any thread.
    """

    def __init__(
        self, tree: ModelTree, index: TreeIndex, vault: Vault,
        reply: Callable[[Sequence[Buffer]], object],
    ) -> None:  # fmt: skip
        super().__init__(tree, index)
        self._vault = vault
        self._reply = reply
        self._openers = ThreadPoolExecutor(MAX_OPENERS, thread_name_prefix="cai-open")
        self._handlers[Opcode.RELEASE] = self._release

    def answer(self, buffer: memoryview) -> Sequence[Buffer] | None:
        """As ``Dispatcher.answer``; an OPEN that takes long is answered later."""
        try:
            opcode, unique, ino = protocol.request(buffer)
        except FormatError:
            return super().answer(buffer)
        if opcode != Opcode.OPEN:
            return super().answer(buffer)

        def work() -> Sequence[Buffer]:
            return self._answered(unique, ino, opcode, lambda: self._open(ino))

        node = self._index.node(ino)
        if node is None or node.attributes.size <= SMALL:
            return work()
        self._openers.submit(self._later, work)
        return None

    def _later(self, work: Callable[[], Sequence[Buffer]]) -> None:
        try:
            self._reply(work())
        except Exception:
            log.exception("an open could not be answered")

    def _open(self, ino: int) -> bytes:
        node = self._index.node(ino)
        if node is None:
            raise _Errno(errno.ESTALE)
        if not node.is_file:
            raise _Errno(errno.EISDIR if node.is_directory else errno.EINVAL)
        return protocol.open_answer(*self._vault.open(node))

    def _release(self, _node: Node, buffer: memoryview) -> bytes:
        self._vault.release(protocol.release_handle(buffer))
        return b""


def serve(device: int, dispatcher: Dispatcher) -> None:
    """Answer requests until the file system is unmounted.

    Args:
        device: descriptor of ``/dev/fuse``, after INIT.
        dispatcher: what to answer.

    Raises:
        OSError: the device failed otherwise.
    """
    space = memoryview(bytearray(protocol.REQUEST_BUFFER))
    while True:
        try:
            length = os.readv(device, [space])
        except OSError as error:
            if error.errno == errno.ENODEV:
                return
            # ENOENT: the request was withdrawn while it was being handed over.
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                continue
            raise
        answer = dispatcher.answer(space[:length])
        if answer is not None and not send(device, answer):
            return


def send(device: int, answer: Sequence[Buffer]) -> bool:
    """Give an answer to the kernel; false when the file system was unmounted.

    Raises:
        OSError: the device failed otherwise.
    """
    try:
        os.writev(device, answer)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return False
        # The caller was killed meanwhile, nobody waits for the answer.
        if error.errno != errno.ENOENT:
            raise
    return True
