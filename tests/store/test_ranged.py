"""Reading a sealed model straight from a store: verified, bounded, shared by forks."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from cai.errors import InputError, LimitExceeded, PeerUnreachable, Tampered
from cai.model import open_model_files
from cai.model.layout import PIECE
from cai.model.tree import EntryType
from cai.store import StoreOptions, open_ranged, open_store, push
from cai.store.piececache import PieceCache
from cai.store.ranged import RangedFiles
from tests.oss_server.server import OssServer
from tests.store.conftest import MIB, Opener, Sealed, environment


@pytest.fixture
def ranged(sealed: Sealed, oss: Opener, server: OssServer) -> RangedFiles:
    push(sealed.path, oss())
    return opened(server)


def opened(server: OssServer, **more: int) -> RangedFiles:
    options = StoreOptions(environment=environment(server), attempts=3)
    return open_ranged("oss://models/minilm", options, **more)  # type: ignore[arg-type]


def largest(sealed: Sealed) -> Path:
    return max((sealed.path / "objects").iterdir(), key=lambda path: path.stat().st_size)


def test_a_model_opens_straight_from_the_store(sealed: Sealed, ranged: RangedFiles) -> None:
    with open_model_files(ranged, sealed.kek, expect_root=sealed.report.root) as model:
        plain = sealed.path.parent / "plain"
        for entry in model.entries.values():
            if entry.type is EntryType.FILE:
                buffer = bytearray(entry.size)
                reader = model.open(entry.path)
                assert reader.readinto(0, memoryview(buffer)) == entry.size
                assert bytes(buffer) == (plain / entry.path).read_bytes()


def test_every_range_is_the_file_s(sealed: Sealed, ranged: RangedFiles) -> None:
    path = largest(sealed)
    whole, stored = path.read_bytes(), f"objects/{path.name}"
    generator = random.Random(4)
    for _ in range(60):
        offset = generator.randrange(len(whole) + 10)
        length = generator.choice([0, 1, 4096, PIECE - 1, PIECE + 1, 9 * MIB])
        assert ranged.read_range(stored, offset, length) == whole[offset : offset + length]
    assert ranged.listing() == set(sealed.files())
    for stored in ("cai.json", "index.cai", "manifest.cai"):
        assert ranged.read(stored, limit=1 << 26) == (sealed.path / stored).read_bytes()


def test_pieces_travel_once_and_ahead(
    sealed: Sealed, ranged: RangedFiles, server: OssServer
) -> None:
    path = largest(sealed)
    stored, size = f"objects/{path.name}", path.stat().st_size
    before = server.faults.sent
    for offset in range(0, size, MIB):
        ranged.read_range(stored, offset, MIB)
    ranged.close()
    assert server.faults.sent - before == size


def test_the_cache_is_bounded(sealed: Sealed, ranged: RangedFiles, server: OssServer) -> None:
    files = opened(server, cache_bytes=1, ahead=0)
    path = largest(sealed)
    stored, whole = f"objects/{path.name}", path.read_bytes()
    for _ in range(2):
        assert files.read_range(stored, 0, len(whole)) == whole
    before = server.faults.sent
    files.read_range(stored, 0, 1)  # four slots hold the last four of six pieces
    assert server.faults.sent - before == PIECE


def test_threads_read_side_by_side(sealed: Sealed, ranged: RangedFiles) -> None:
    path = largest(sealed)
    stored, whole = f"objects/{path.name}", path.read_bytes()
    wrong: list[int] = []

    def read(seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(40):
            offset = generator.randrange(len(whole))
            if ranged.read_range(stored, offset, 70_000) != whole[offset : offset + 70_000]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("cache", [4, 64])
def test_forked_processes_share_the_cache(
    sealed: Sealed, ranged: RangedFiles, server: OssServer, cache: int
) -> None:
    files = opened(server, cache_bytes=cache * PIECE, ahead=2)
    path = largest(sealed)
    stored, whole = f"objects/{path.name}", path.read_bytes()
    before = server.faults.sent
    children = []
    for seed in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                generator = random.Random(seed)
                good = True
                for _ in range(60):
                    offset = generator.randrange(len(whole))
                    part = files.read_range(stored, offset, 300_000)
                    good = good and part == whole[offset : offset + 300_000]
                status = 0 if good else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    if cache == 64:
        assert server.faults.sent - before <= len(whole) + PIECE


def test_a_process_that_dies_while_fetching_blocks_nobody() -> None:
    cache = PieceCache(4 * PIECE)
    child = os.fork()
    if child == 0:
        cache.fill(7, lambda: os._exit(9))  # type: ignore[arg-type, return-value]
    os.waitpid(child, 0)
    assert cache.fill(7, lambda: b"piece") == b"piece"
    assert cache.fill(7, lambda: b"other") == b"piece"


def test_what_cannot_be_fetched_is_not_kept() -> None:
    cache = PieceCache(4 * PIECE)

    def fail() -> bytes:
        raise PeerUnreachable("away")

    with pytest.raises(PeerUnreachable):
        cache.fill(7, fail)
    assert not cache.has(7)
    assert cache.fill(7, lambda: b"piece") == b"piece"


def test_altered_bytes_never_leave(sealed: Sealed, tmp_path: Path) -> None:
    push(sealed.path, open_store(f"file:{tmp_path / 'shelf'}"))
    files = open_ranged(f"file:{tmp_path / 'shelf'}", ahead=0)
    victim = tmp_path / "shelf" / "objects" / largest(sealed).name
    with victim.open("r+b") as file:
        file.seek(PIECE + 5)
        byte = file.read(1)
        file.seek(PIECE + 5)
        file.write(bytes([byte[0] ^ 1]))
    stored = f"objects/{victim.name}"
    assert files.read_range(stored, 0, 100) == largest(sealed).read_bytes()[:100]
    with pytest.raises(Tampered, match="piece 1"):
        files.read_range(stored, PIECE + 4000, 10)
    victim.unlink()
    with pytest.raises(Tampered, match="missing"):
        files.read_range(stored, 3 * PIECE, 10)


def test_drops_on_the_way_are_ridden_out(
    sealed: Sealed, ranged: RangedFiles, server: OssServer
) -> None:
    path = largest(sealed)
    server.faults.cut_after(1_000_000)
    server.faults.answer_next(2, 503, "ServiceUnavailable")
    assert ranged.read_range(f"objects/{path.name}", 0, 9 * MIB) == path.read_bytes()[: 9 * MIB]


def test_a_store_that_is_gone_is_an_error(sealed: Sealed, ranged: RangedFiles) -> None:
    stored = f"objects/{largest(sealed).name}"
    ranged._here.store._attempts = 1  # type: ignore[attr-defined]
    ranged._ahead = 0
    victim = ranged._here.store._store._bucket  # type: ignore[attr-defined]
    victim._make_url.netloc = "127.0.0.1:9"
    with pytest.raises(PeerUnreachable):
        ranged.read_range(stored, 0, 10)


def test_refusals(ranged: RangedFiles, server: OssServer) -> None:
    with pytest.raises(Tampered, match="missing"):
        ranged.size("objects/" + "0" * 32)
    with pytest.raises(LimitExceeded):
        ranged.read("manifest.cai", limit=10)
    with pytest.raises(Tampered, match="expected"):
        open_ranged(
            "oss://models/minilm", StoreOptions(environment=environment(server)),
            index_sha256="0" * 64,
        )
    with pytest.raises(InputError, match="no sealed model"):
        open_ranged("oss://models/other", StoreOptions(environment=environment(server)))
