from __future__ import annotations

import errno
import logging
import struct

import pytest

from cai.mount import server
from cai.mount.index import Owner, TreeIndex
from cai.mount.server import Dispatcher
from tests.mount.fake_tree import CHUNK, FakeTree
from tests.mount.test_protocol import request

CONTENT = {"a": None, "a/big": bytes(range(256)) * 1024, "link": "-> a/big", "one": b"x"}
ROOT, DIR, BIG, LINK, ONE = range(1, 6)


@pytest.fixture
def tree() -> FakeTree:
    return FakeTree(CONTENT)


@pytest.fixture
def dispatcher(tree: FakeTree) -> Dispatcher:
    return Dispatcher(tree, TreeIndex(tree, Owner(0, 0)))


def ask(dispatcher: Dispatcher, opcode: int, body: bytes = b"", node: int = ROOT) -> bytes | int:
    """The payload, or the error number."""
    answer = dispatcher.answer(request(opcode, body, node))
    assert answer is not None
    raw = b"".join(answer)
    length, error, unique = struct.unpack_from("=IiQ", raw)
    assert (length, unique) == (len(raw), 7)
    return -error if error else raw[16:]


def read(dispatcher: Dispatcher, node: int, offset: int, size: int) -> bytes | int:
    return ask(dispatcher, 15, struct.pack("=QQI", 0, offset, size) + bytes(20), node)


def test_lookup_and_attributes(dispatcher: Dispatcher) -> None:
    entry = ask(dispatcher, 1, b"one\0")
    assert isinstance(entry, bytes)
    assert struct.unpack_from("=Q", entry)[0] == ONE
    attributes = ask(dispatcher, 3, bytes(16), ONE)
    assert isinstance(attributes, bytes)
    assert attributes[16:] == entry[40:]


def test_an_absent_name_is_node_zero(dispatcher: Dispatcher) -> None:
    entry = ask(dispatcher, 1, b"two\0")
    assert isinstance(entry, bytes)
    assert struct.unpack_from("=Q", entry)[0] == 0


def test_reads(dispatcher: Dispatcher) -> None:
    data = CONTENT["a/big"]
    assert read(dispatcher, BIG, 100, 5000) == data[100:5100]
    assert read(dispatcher, BIG, len(data) - 3, 4096) == data[-3:]
    assert read(dispatcher, BIG, len(data), 4096) == b""
    assert read(dispatcher, BIG, 1 << 62, 4096) == b""


def test_readlink(dispatcher: Dispatcher) -> None:
    assert ask(dispatcher, 5, node=LINK) == b"a/big"


@pytest.mark.parametrize(
    ("opcode", "node", "body", "error"),
    [
        (1, ONE, b"x\0", errno.ENOTDIR),
        (1, ROOT, b"no end", errno.EIO),
        (1, 99, b"x\0", errno.ESTALE),
        (3, 99, b"", errno.ESTALE),
        (5, ONE, b"", errno.EINVAL),
        (15, DIR, bytes(40), errno.EISDIR),
        (15, LINK, bytes(40), errno.EINVAL),
        (15, BIG, bytes(3), errno.EIO),
        (28, ONE, bytes(40), errno.ENOTDIR),
        (44, ONE, bytes(40), errno.ENOTDIR),
        (14, BIG, bytes(8), errno.ENOSYS),
        (27, ROOT, bytes(8), errno.ENOSYS),
        (22, BIG, bytes(8), errno.ENOSYS),
        (4000, ROOT, b"", errno.ENOSYS),
        *((write, ROOT, bytes(64), errno.EROFS) for write in (4, 6, 8, 9, 10, 11, 12, 13, 16, 35)),
    ],
)
def test_refusals(
    dispatcher: Dispatcher, opcode: int, node: int, body: bytes, error: int
) -> None:
    assert ask(dispatcher, opcode, body, node) == error


@pytest.mark.parametrize("opcode", [2, 36, 42])
def test_some_requests_want_no_answer(dispatcher: Dispatcher, opcode: int) -> None:
    assert dispatcher.answer(request(opcode, bytes(16))) is None


def test_garbage_is_ignored(dispatcher: Dispatcher) -> None:
    assert dispatcher.answer(memoryview(b"garbage")) is None


def test_tampering_is_eio_and_logged_once(
    tree: FakeTree, dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    tree.bad.add(("a/big", 2))
    with caplog.at_level(logging.ERROR, "cai.mount"):
        assert read(dispatcher, BIG, 0, 4 * CHUNK) == errno.EIO
        assert read(dispatcher, BIG, 2 * CHUNK, 4096) == errno.EIO
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("a/big: chunk 2 does not authenticate")
    assert read(dispatcher, BIG, 0, CHUNK) == CONTENT["a/big"][:CHUNK]


def test_a_missing_object_is_eio(
    tree: FakeTree, dispatcher: Dispatcher, caplog: pytest.LogCaptureFixture
) -> None:
    tree.gone.add("one")
    assert read(dispatcher, ONE, 0, 1) == errno.EIO
    assert "one: its stored object is gone" in caplog.text


def test_an_unexpected_exception_is_eio(
    tree: FakeTree, dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "open", lambda _path: 1 / 0)
    assert read(dispatcher, ONE, 0, 1) == errno.EIO


def test_readers_are_reused_and_bounded() -> None:
    many = {f"f{n}": b"content" for n in range(server.MAX_OPEN_READERS + 5)}
    tree = FakeTree(many)
    dispatcher = Dispatcher(tree, TreeIndex(tree, Owner(0, 0)))
    for node in range(2, 2 + len(many)):
        assert read(dispatcher, node, 0, 3) == b"con"
        assert read(dispatcher, node, 3, 4) == b"tent"
    assert len(tree.readers) == len(many)
    assert sum(not reader.closed for reader in tree.readers) == server.MAX_OPEN_READERS
    dispatcher.close()
    assert all(reader.closed for reader in tree.readers)
