"""push and pull between a directory and every kind of store: whole, resumed, refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cai.errors import InputError, Tampered, UsageError
from cai.model import SealOptions, check, new_key, seal
from cai.secret import Secret
from cai.store import Store, open_store, pull, push
from tests.oss_server.server import OssServer
from tests.store.conftest import Opener, Sealed, contents


@pytest.fixture(params=["file", "oss"])
def store(request: pytest.FixtureRequest, tmp_path: Path, oss: Opener) -> Store:
    if request.param == "oss":
        return oss()
    return open_store(f"file:{tmp_path / 'shelf'}")


def test_push_and_pull_give_the_same_files(sealed: Sealed, store: Store, tmp_path: Path) -> None:
    sent = push(sealed.path, store)
    assert sent.index_sha256 == sealed.report.index_sha256
    assert sent.sent_bytes > sent.total_bytes
    assert (sent.resumed_bytes, sent.present_bytes) == (0, 0)
    got = pull(store, tmp_path / "copy", index_sha256=sealed.report.index_sha256)
    assert got.authenticated
    assert got.fetched_bytes == got.total_bytes
    assert contents(tmp_path / "copy") == sealed.files()
    assert check(tmp_path / "copy", sealed.kek).root == sealed.report.root
    assert {path.name for path in tmp_path.iterdir()} <= {"copy", "oss", "shelf"}


def test_what_is_there_does_not_travel(sealed: Sealed, store: Store, tmp_path: Path) -> None:
    push(sealed.path, store)
    again = push(sealed.path, store)
    assert (again.sent_bytes, again.present_bytes) == (0, again.total_bytes)
    pull(store, tmp_path / "copy")
    before = (tmp_path / "copy").stat().st_ino
    twice = pull(store, tmp_path / "copy")
    assert twice.fetched_bytes == 0
    assert not twice.authenticated
    assert (tmp_path / "copy").stat().st_ino == before
    assert not list(tmp_path.glob("*partial*"))


def test_a_damaged_copy_is_mended_by_its_pieces(
    sealed: Sealed, store: Store, tmp_path: Path
) -> None:
    push(sealed.path, store)
    pull(store, tmp_path / "copy")
    largest = max((tmp_path / "copy" / "objects").iterdir(), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(9_000_000)
        file.write(b"damage")
    mended = pull(store, tmp_path / "copy")
    assert mended.fetched_bytes == 4 * 1024 * 1024
    assert contents(tmp_path / "copy") == sealed.files()


def test_a_cut_off_copy_is_mended(sealed: Sealed, store: Store, tmp_path: Path) -> None:
    push(sealed.path, store)
    pull(store, tmp_path / "copy")
    largest = max((tmp_path / "copy" / "objects").iterdir(), key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(5_000_000)
    (tmp_path / "copy" / "manifest.cai").unlink()
    pull(store, tmp_path / "copy")
    assert contents(tmp_path / "copy") == sealed.files()


def test_a_damaged_store_is_noticed_and_mended(
    sealed: Sealed, tmp_path: Path
) -> None:
    store = open_store(f"file:{tmp_path / 'shelf'}")
    push(sealed.path, store)
    for path in sorted((tmp_path / "shelf" / "objects").iterdir()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(Tampered, match=path.name):
            pull(store, tmp_path / f"copy-{path.name}")
        assert not (tmp_path / f"copy-{path.name}").exists()
        mended = push(sealed.path, store)
        assert mended.sent_bytes == len(whole)
        assert path.read_bytes() == whole


@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "swapped"])
def test_every_other_change_in_the_store_is_noticed(
    sealed: Sealed, tmp_path: Path, change: str
) -> None:
    store = open_store(f"file:{tmp_path / 'shelf'}")
    push(sealed.path, store)
    first, second = sorted((tmp_path / "shelf" / "objects").iterdir())[:2]
    data = first.read_bytes()
    if change == "shorter":
        first.write_bytes(data[:-1])
    elif change == "longer":
        first.write_bytes(data + b"\x00")
    elif change == "missing":
        first.unlink()
    else:
        first.write_bytes(second.read_bytes())
        second.write_bytes(data)
    with pytest.raises(Tampered) as caught:
        pull(store, tmp_path / "copy")
    assert caught.value.path in {f"objects/{first.name}", f"objects/{second.name}"}
    assert not (tmp_path / "copy").exists()


def test_another_index_is_refused(sealed: Sealed, store: Store, tmp_path: Path) -> None:
    push(sealed.path, store)
    with pytest.raises(Tampered) as caught:
        pull(store, tmp_path / "copy", index_sha256="0" * 64)
    assert caught.value.machine_code == "index-mismatch"
    with pytest.raises(Tampered):
        push(sealed.path, store, index_sha256="0" * 64)
    assert not list(tmp_path.glob("copy*"))


def test_an_index_that_does_not_fit_the_header_is_refused(
    sealed: Sealed, tmp_path: Path
) -> None:
    store = open_store(f"file:{tmp_path / 'shelf'}")
    push(sealed.path, store)
    index = tmp_path / "shelf" / "index.cai"
    index.write_bytes(index.read_bytes().replace(b'"cai-index":1', b'"cai-index":2'))
    with pytest.raises(Tampered, match=r"index\.cai"):
        pull(store, tmp_path / "copy")


def test_a_damaged_model_is_never_pushed(sealed: Sealed, oss: Opener, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    pull(open_store(f"file:{sealed.path}"), broken)
    victim = max((broken / "objects").iterdir(), key=lambda p: p.stat().st_size)
    with victim.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(Tampered, match=victim.name):
        push(broken, oss())
    assert oss().stat("cai.json") is None


def test_nothing_is_pulled_over_something_else(
    sealed: Sealed, store: Store, tmp_path: Path
) -> None:
    push(sealed.path, store)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cai.json").write_text('{"model_id":"other"}')
    with pytest.raises(UsageError, match="something else"):
        pull(store, tmp_path / "mine")
    assert (tmp_path / "mine" / "cai.json").read_text() == '{"model_id":"other"}'
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not a directory"):
        pull(store, tmp_path / "file")


def test_a_place_without_a_model(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sealed model"):
        pull(store, tmp_path / "copy")
    with pytest.raises(InputError, match="no sealed model"):
        push(tmp_path, store)
    assert not (tmp_path / "copy").exists()


def test_verify_reads_everything_back(
    sealed: Sealed, oss: Opener, server: OssServer
) -> None:
    before = server.faults.sent
    push(sealed.path, oss(), verify=True)
    assert server.faults.sent - before >= sum(
        path.stat().st_size for path in (sealed.path / "objects").iterdir()
    )


def test_prune_removes_what_no_revision_here_needs(
    sealed: Sealed, store: Store, tmp_path: Path
) -> None:
    push(sealed.path, store)
    store.put("objects/" + "0" * 32, b"old", "x")
    left = store.begin("objects/" + "1" * 32, 100, "e" * 64)
    assert left
    assert push(sealed.path, store).removed == ()
    assert push(sealed.path, store, prune=True).removed == ("objects/" + "0" * 32,)
    assert {item.path for item in store.names(recursive=True)} == set(sealed.files())
    assert not store.pending()


def test_the_manifest_and_the_header_travel_last(
    sealed: Sealed, oss: Opener, server: OssServer
) -> None:
    push(sealed.path, oss())
    written = [
        path.partition("?")[0].rpartition("minilm%2F")[2] for _, method, path in server.log
        if method == "PUT"
    ]
    assert written[-3:] == ["manifest.cai", "index.cai", "cai.json"]


def test_a_gocryptfs_model_keeps_its_links_and_empty_files(
    tmp_path: Path, store: Store
) -> None:
    from cai.model.gocryptfs.sealing import seal_gocryptfs

    plain = tmp_path / "plain"
    (plain / "sub" / "void").mkdir(parents=True)
    (plain / "weights.bin").write_bytes(os.urandom(9_000_000))
    (plain / "empty").write_bytes(b"")
    (plain / "sub" / ("n" * 200)).write_bytes(b"long name")
    (plain / "sub" / "link").symlink_to("../weights.bin")
    (plain / "dangling").symlink_to("nowhere")
    seal_gocryptfs(plain, tmp_path / "sealed", Secret(b"7" * 64))
    sent = push(tmp_path / "sealed", store, verify=True)
    assert push(tmp_path / "sealed", store).sent_bytes == 0
    pull(store, tmp_path / "copy", index_sha256=sent.index_sha256)
    assert tree(tmp_path / "copy") == tree(tmp_path / "sealed")
    assert check(tmp_path / "copy", Secret(b"7" * 64)).index_sha256 == sent.index_sha256
    assert pull(store, tmp_path / "copy").fetched_bytes == 0
    victim = next(path for path in (tmp_path / "copy").rglob("*") if path.is_symlink())
    victim.unlink()
    victim.symlink_to("elsewhere")
    assert pull(store, tmp_path / "copy").fetched_bytes == 0
    assert tree(tmp_path / "copy") == tree(tmp_path / "sealed")
    source = next(path for path in (tmp_path / "sealed").rglob("*") if path.is_symlink())
    source.unlink()
    source.symlink_to("elsewhere")
    with pytest.raises(Tampered, match="symbolic link"):
        push(tmp_path / "sealed", store)
    if store.uri.startswith("file:"):
        assert tree(tmp_path / "shelf") == tree(tmp_path / "copy")


def test_an_empty_model_keeps_its_folder(tmp_path: Path, store: Store) -> None:
    (tmp_path / "plain").mkdir()
    kek = new_key()
    seal(tmp_path / "plain", tmp_path / "sealed", kek)
    push(tmp_path / "sealed", store)
    pull(store, tmp_path / "copy")
    assert (tmp_path / "copy" / "objects").is_dir()
    assert check(tmp_path / "copy", kek).files == 0


def test_a_signature_is_carried(sealed: Sealed, store: Store, tmp_path: Path) -> None:
    pull(open_store(f"file:{sealed.path}"), tmp_path / "signed")
    (tmp_path / "signed" / "manifest.sig").write_bytes(b"signature")
    push(sealed.path, store)
    assert push(tmp_path / "signed", store).sent_bytes == len(b"signature")
    pull(store, tmp_path / "copy")
    assert (tmp_path / "copy" / "manifest.sig").read_bytes() == b"signature"
    (tmp_path / "copy" / "manifest.sig").write_bytes(b"another..")
    (tmp_path / "copy" / "stray").write_bytes(b"?")
    pull(store, tmp_path / "copy")
    assert contents(tmp_path / "copy") == contents(tmp_path / "signed")


def test_a_signature_of_another_revision_does_not_stay(
    sealed: Sealed, store: Store, tmp_path: Path
) -> None:
    plain = sealed.path.parent / "plain"
    options = SealOptions(model_id=sealed.report.model_id, revision=2)
    seal(plain, tmp_path / "second", sealed.kek, options=options)
    store.put("manifest.sig", b"over revision 1", "x")
    push(tmp_path / "second", store)
    assert store.stat("manifest.sig") is None


def tree(root: Path) -> dict[str, bytes | str]:
    return {
        path.relative_to(root).as_posix(): str(path.readlink()) if path.is_symlink()
        else path.read_bytes() if path.is_file() else "folder"
        for path in root.rglob("*")
    }
