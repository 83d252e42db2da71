"""Random access: any range, any thread, any fork; authentic bytes or an error, nothing else."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from cai.errors import InputError, InputMissing, StorageError, Tampered
from cai.model import SealedModel, SealOptions, SealReport, new_key, open_model, seal
from cai.model.layout import PIECE
from cai.secret import Secret

SIZE = 5 * 65_536 + 123


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[SealedModel, bytes]:
    work = tmp_path_factory.mktemp("reader")
    (work / "root").mkdir()
    content = os.urandom(SIZE)
    (work / "root" / "w").write_bytes(content)
    (work / "root" / "small").write_bytes(content[:1000])
    kek = new_key()
    seal(work / "root", work / "out", kek, options=SealOptions(chunk=65_536))
    return open_model(work / "out", kek), content


RANGES = [
    (0, SIZE), (0, SIZE + 1000), (0, 1), (1, 65_535), (65_535, 2), (65_536, 65_536), (3, 200_000),
    (SIZE - 1, 1), (SIZE - 1, 10), (SIZE, 10), (SIZE + 5, 10), (5 * 65_536, 123), (0, 0),
    (5 * 65_536 - 1, 124),
]  # fmt: skip


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_ranges(offset: int, length: int, opened: tuple[SealedModel, bytes]) -> None:
    model, content = opened
    reader = model.open("w")
    buffer = bytearray(b"\xaa" * length)
    count = reader.readinto(offset, memoryview(buffer))
    expected = content[offset : offset + length]
    assert count == len(expected)
    assert bytes(buffer) == expected + b"\xaa" * (length - count)
    reader.close()


@pytest.mark.parametrize(("offset", "length"), [(0, 2000), (10, 5), (999, 5), (1000, 5), (2000, 1)])
def test_ranges_of_an_inline_file(
    offset: int, length: int, opened: tuple[SealedModel, bytes]
) -> None:
    model, content = opened
    buffer = bytearray(length)
    count = model.open("small").readinto(offset, memoryview(buffer))
    assert bytes(buffer[:count]) == content[:1000][offset : offset + length]


def read_at_random(model: SealedModel, content: bytes, seed: int) -> None:
    choose = random.Random(seed)
    reader = model.open("w")
    for _ in range(200):
        offset, length = choose.randrange(SIZE), choose.choice([1, 100, 4096, 65_536, 150_000])
        buffer = bytearray(length)
        count = reader.readinto(offset, memoryview(buffer))
        assert bytes(buffer[:count]) == content[offset : offset + length]
    reader.close()


def test_one_model_in_several_threads(opened: tuple[SealedModel, bytes]) -> None:
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            read_at_random(*opened, seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_reader_in_several_threads(opened: tuple[SealedModel, bytes]) -> None:
    model, content = opened
    reader = model.open("w")
    wrong: list[int] = []

    def run(seed: int) -> None:
        choose = random.Random(seed)
        buffer = bytearray(70_000)
        for _ in range(200):
            offset = choose.randrange(SIZE - 70_000)
            reader.readinto(offset, memoryview(buffer))
            if bytes(buffer) != content[offset : offset + 70_000]:
                wrong.append(offset)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
def test_one_reader_in_a_fork(opened: tuple[SealedModel, bytes]) -> None:
    children = []
    for seed in range(3):
        child = os.fork()
        if not child:
            status = 1
            try:
                read_at_random(*opened, seed)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_two_files_do_not_share_a_cached_chunk(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    for name in "ab":
        (tmp_path / "root" / name).write_bytes(name.encode() * 70_000)
    kek = new_key()
    seal(tmp_path / "root", tmp_path / "out", kek)
    with open_model(tmp_path / "out", kek) as model:
        for name in "abab":
            buffer = bytearray(10)
            model.open(name).readinto(5, memoryview(buffer))
            assert bytes(buffer) == name.encode() * 10


def victim(model: SealedModel, out: Path, path: str) -> tuple[Path, int]:
    stored = model.manifest.stored[path]
    return out / "objects" / stored.name, stored.shape.head


def test_a_flipped_chunk_gives_an_error_and_no_bytes(
    sealed: tuple[Path, Secret, SealReport],
) -> None:
    out, kek, _ = sealed
    with open_model(out, kek) as model:
        path, head = victim(model, out, "nested/weights.safetensors")
        reader = model.open("nested/weights.safetensors")
        data = bytearray(path.read_bytes())
        data[head + 300_000] ^= 0x10  # in the second chunk of 256 KiB
        path.write_bytes(data)
        first = bytearray(262_144)
        assert reader.readinto(0, memoryview(first)) == 262_144
        for offset, length in [(262_144, 262_144), (299_990, 20), (0, 600_000), (270_000, 1)]:
            buffer = bytearray(b"\xaa" * length)
            with pytest.raises(Tampered, match="weights") as caught:
                reader.readinto(offset, memoryview(buffer))
            assert caught.value.path == f"objects/{path.name}"
            assert not any(buffer)
        assert reader.readinto(524_288, memoryview(first)) == 600_001 - 524_288


def test_a_file_cut_after_opening(sealed: tuple[Path, Secret, SealReport]) -> None:
    out, kek, _ = sealed
    with open_model(out, kek) as model:
        path, head = victim(model, out, "nested/weights.safetensors")
        reader = model.open("nested/weights.safetensors")
        os.truncate(path, head + 262_144)
        with pytest.raises(Tampered, match="ends early"):
            reader.readinto(262_144, memoryview(bytearray(10)))


def test_a_file_replaced_after_opening_is_not_seen(
    sealed: tuple[Path, Secret, SealReport], sample: Path
) -> None:
    out, kek, _ = sealed
    with open_model(out, kek) as model:
        path, _ = victim(model, out, "nested/weights.safetensors")
        reader = model.open("nested/weights.safetensors")
        path.unlink()
        buffer = bytearray(100)
        reader.readinto(1000, memoryview(buffer))
        expected = (sample / "nested" / "weights.safetensors").read_bytes()[1000:1100]
        assert bytes(buffer) == expected
        with pytest.raises(Tampered, match="missing"):
            model.open("nested/weights.safetensors")


def test_an_io_error_is_a_storage_error(
    sealed: tuple[Path, Secret, SealReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kek, _ = sealed
    with open_model(out, kek) as model:
        reader = model.open("nested/weights.safetensors")

        def fail(*_args: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(StorageError):
            reader.readinto(0, memoryview(bytearray(10)))


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("nothing", InputMissing), ("", InputMissing), ("../sample/one", InputMissing),
        ("/etc/passwd", InputMissing), ("nested", InputError), ("nested/up", InputError),
    ],
)  # fmt: skip
def test_paths_that_are_no_files(
    path: str, error: type[Exception], sealed: tuple[Path, Secret, SealReport]
) -> None:
    with open_model(sealed[0], sealed[1]) as model, pytest.raises(error):
        model.open(path)


def test_no_descriptor_is_left_open(sealed: tuple[Path, Secret, SealReport]) -> None:
    out, kek, _ = sealed
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with open_model(out, kek) as model:
            model.open("nested/weights.safetensors").close()
        with pytest.raises(Exception, match="key"):
            open_model(out, new_key())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("name", ["gocryptfs.conf", "nothing"])
def test_a_directory_that_is_no_sealed_model(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="gocryptfs" if "conf" in name else r"cai\.json"):
        open_model(tmp_path, new_key())


def test_a_sealed_model_that_is_missing_or_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        open_model(tmp_path / "nothing", new_key())
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="not a directory"):
        open_model(tmp_path / "file", new_key())


def test_pieces_of_an_object_longer_than_one_piece(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "w").write_bytes(os.urandom(2 * PIECE + 77))
    kek = new_key()
    seal(tmp_path / "root", tmp_path / "out", kek)
    from blake3 import blake3

    from cai.model.index import parse_index

    for path, listed in parse_index((tmp_path / "out" / "index.cai").read_bytes()).items():
        data = (tmp_path / "out" / path).read_bytes()
        found = [blake3(data[at : at + PIECE]).hexdigest() for at in range(0, len(data), PIECE)]
        assert list(listed.pieces) == found
