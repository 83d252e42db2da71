"""Writing: what is refused, what a failure leaves, and the blocks against stock's known answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai.errors import (
    CaiError,
    FormatError,
    InputError,
    LimitExceeded,
    Refused,
    Tampered,
    UsageError,
)
from cai.model import (
    Licence,
    Manifest,
    ReleaseRecord,
    SealOptions,
    check,
    content_root_of_tree,
    open_model,
)
from cai.model.gocryptfs import blocks
from cai.model.gocryptfs.blocks import BlockCipher, encode_header, tag_digest
from cai.model.gocryptfs.entries import CipherTree, FileTags
from cai.model.gocryptfs.keys import CipherKeys, read_password_file
from cai.model.gocryptfs.layout import block_offset, plain_size, stored_size
from cai.model.gocryptfs.sealing import seal_gocryptfs
from cai.model.record import public_key_hex
from cai.model.signature import sign_root
from cai.secret import Secret
from tests.model.gocryptfs.trees import PASSWORD, Sealed


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "w").write_bytes(os.urandom(10_000))
    return tmp_path / "tree"


def test_a_known_file(kat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = kat["file"]
    plain = bytes(i % 251 for i in range(4100))
    ivs = b"".join(bytes.fromhex(iv) for iv in known["block_ivs_hex"])
    monkeypatch.setattr(blocks.os, "urandom", lambda size: ivs[:size])
    cipher = BlockCipher(CipherKeys.of(bytes.fromhex(kat["masterkey_hex"])))
    file_id = bytes.fromhex(known["file_id_hex"])
    room = memoryview(bytearray(2 * 4128))
    stored = cipher.encrypt(file_id, 0, memoryview(plain), room)
    whole = encode_header(file_id) + stored
    assert len(whole) == known["ciphertext_len"] == stored_size(4100)
    assert sha256(whole).hexdigest() == known["ciphertext_sha256"]
    assert whole.hex().endswith(known["tail_hex"])
    back = memoryview(bytearray(4100))
    cipher.decrypt(file_id, 0, stored, back)
    assert back == plain
    pairs = stored[:16].tobytes() + stored[4112:4128].tobytes() + stored[4128:4144].tobytes()
    assert tag_digest(stored) == sha256(pairs + stored[-16:].tobytes()).digest()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 1 << 20, (1 << 20) + 1, 1 << 40])
def test_sizes_go_both_ways(size: int) -> None:
    assert plain_size(stored_size(size)) == size


def test_sizes_that_no_file_has() -> None:
    assert [plain_size(n) for n in (1, 17, 18, 19, 50, 51)] == [0, 0, 0, 1, 1, 1]
    assert block_offset(2) == 18 + 2 * 4128


def test_the_content_root_is_that_of_the_plain_tree(tree: Path, tmp_path: Path) -> None:
    report = seal_gocryptfs(tree, tmp_path / "out", PASSWORD, log2_n=10)
    assert report.content_root == content_root_of_tree(tree)
    assert report.plaintext_bytes == 10_000
    assert report.stored_bytes == sum(
        path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    again = seal_gocryptfs(tree, tmp_path / "again", PASSWORD, log2_n=10)
    assert again.content_root == report.content_root
    assert again.root != report.root


def test_what_the_manifest_says_and_who_signed_it(tree: Path, tmp_path: Path) -> None:
    owner = Ed25519PrivateKey.generate()
    seen: list[Manifest] = []
    options = SealOptions(
        name="m", licence=Licence("MIT", "be kind", "text"), provenance={"source": "here"},
        allow=("pickle",), revision=3, model_id="cd" * 32,
    )
    report = seal_gocryptfs(
        tree, tmp_path / "out", PASSWORD, options=options, log2_n=10, review=seen.append,
        sign=lambda root: sign_root(root, owner),
    )
    key = public_key_hex(owner)
    assert check(tmp_path / "out", PASSWORD, owner_key=key).signature == "verified"
    with open_model(tmp_path / "out", PASSWORD, owner_key=key) as model:
        assert model.manifest.licence == options.licence
        assert (model.model_id, model.revision, model.allow) == ("cd" * 32, 3, ("pickle",))
        assert seen[0].encode() == model.manifest.encode()
    with pytest.raises(Tampered):
        open_model(tmp_path / "out", PASSWORD, owner_key="00" * 32)
    record = ReleaseRecord(
        kek=Secret(b""), model_id=report.model_id, manifest_root=report.root, min_revision=3,
        index_sha256=report.index_sha256, owner_key=key,
    ).sign(owner)
    assert b'"kek"' not in record
    parsed = ReleaseRecord.parse(record, owner_key=key, with_kek=False)
    assert parsed.manifest_root == report.root
    with pytest.raises(FormatError):
        ReleaseRecord.parse(record, owner_key=key)


def test_a_record_with_a_key_is_none_without(tree: Path) -> None:
    owner = Ed25519PrivateKey.generate()
    record = ReleaseRecord(
        kek=Secret(bytes(32)), model_id="00" * 32, manifest_root="00" * 32, min_revision=1,
        index_sha256="00" * 32, owner_key=public_key_hex(owner),
    ).sign(owner)
    with pytest.raises(FormatError, match="kek"):
        ReleaseRecord.parse(record, owner_key=public_key_hex(owner), with_kek=False)


def assert_nothing_left(folder: Path) -> None:
    assert not [path.name for path in folder.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("out", ["tree/out", "tree"])
def test_places_that_will_not_do(out: str, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        seal_gocryptfs(tree, tmp_path / out, PASSWORD)


def test_what_cannot_be_sealed(tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tree / "pipe")
    with pytest.raises(InputError, match="pipe"):
        seal_gocryptfs(tree, tmp_path / "out", PASSWORD)
    (tree / "pipe").unlink()
    (tree / "link").symlink_to("../../etc/passwd")
    with pytest.raises(InputError, match="link"):
        seal_gocryptfs(tree, tmp_path / "out", PASSWORD)
    (tree / "link").unlink()
    (tree / "evil.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(Refused) as caught:
        seal_gocryptfs(tree, tmp_path / "out", PASSWORD)
    assert caught.value.machine_code == "pickle"
    with pytest.raises(InputError):
        seal_gocryptfs(tree, tmp_path / "out", Secret(b""))
    with pytest.raises(LimitExceeded):
        seal_gocryptfs(tree, tmp_path / "out", Secret(b"x" * 3000))
    assert not (tmp_path / "out").exists()
    assert_nothing_left(tmp_path)


def test_a_file_that_changes_while_it_is_read(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = blocks.BlockCipher.encrypt

    def encrypt(self: BlockCipher, *arguments: Any) -> memoryview:
        (tree / "w").write_bytes(os.urandom(10_000))
        return original(self, *arguments)

    monkeypatch.setattr(blocks.BlockCipher, "encrypt", encrypt)
    with pytest.raises(InputError, match="changed"):
        seal_gocryptfs(tree, tmp_path / "out", PASSWORD, log2_n=10)
    assert_nothing_left(tmp_path)


def test_a_failure_at_the_end_undoes_it_all(tree: Path, tmp_path: Path) -> None:
    def refuse(_report: Any) -> None:
        raise CaiError("the key has no place")

    with pytest.raises(CaiError, match="no place"):
        seal_gocryptfs(tree, tmp_path / "out", PASSWORD, log2_n=10, before_commit=refuse)
    assert not (tmp_path / "out").exists()
    assert_nothing_left(tmp_path)


PROGRAM = """
import sys
from pathlib import Path
from cai.model.gocryptfs.sealing import seal_gocryptfs
from cai.secret import Secret
seal_gocryptfs(Path("tree"), Path("out"), Secret(b"a test's password"), log2_n=10)
"""


def test_a_killed_run_leaves_only_ciphertext_that_the_next_clears_away(
    tree: Path, tmp_path: Path
) -> None:
    marker = b"PLAINTEXT-MARKER" * 4096
    (tree / "big").write_bytes(marker * 500)
    for delay in (0.25, 0.35, 0.5, 0.7):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=tmp_path)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.1)
        for path in tmp_path.glob("out.partial-*/**/*"):
            if path.is_file():
                assert b"PLAINTEXT-MARKER" not in path.read_bytes()
        if (tmp_path / "out").exists():
            break
    if not (tmp_path / "out").exists():
        seal_gocryptfs(tree, tmp_path / "out", PASSWORD, log2_n=10)
    assert_nothing_left(tmp_path)
    assert check(tmp_path / "out", PASSWORD).content_root == content_root_of_tree(tree)


def test_password_files(tmp_path: Path) -> None:
    path = tmp_path / "pw"
    for data, expected in ((b"pw\n", b"pw"), (b"pw", b"pw"), (b"one\ntwo\n", b"one")):
        path.write_bytes(data)
        assert read_password_file(path).reveal() == expected
    for data in (b"\n", b"\nsecond"):
        path.write_bytes(data)
        with pytest.raises(FormatError):
            read_password_file(path)


def parsed(manifest: Manifest, edit: Any) -> Manifest:
    from cai import jcs

    value = jcs.parse(manifest.encode(), what="m", limit=2**26)
    edit(value)
    return Manifest.parse(jcs.canonical(value))


def entry_of(value: Any, path: str) -> Any:
    return next(entry for entry in value["entries"] if entry.get("path") == path)


EDITS: dict[str, Any] = {
    "no root iv": lambda v: v["gocryptfs"].clear(),
    "a root iv of zeros": lambda v: v["gocryptfs"].update(iv="00" * 16),
    "an unknown member": lambda v: v["gocryptfs"].update(x=1),
    "entries of two methods": lambda v: entry_of(v, "config.json").update(inline=""),
    "a directory without iv": lambda v: entry_of(v, "nested").pop("iv"),
    "a short iv": lambda v: entry_of(v, "nested").update(iv="00"),
    "too many groups": lambda v: entry_of(v, "config.json").update(groups="A" * 43 + "="),
    "too few groups": lambda v: entry_of(v, "config.json").update(groups=""),
    "groups that are no base64": lambda v: entry_of(v, "config.json").update(groups="*" * 44),
    "no file id": lambda v: entry_of(v, "config.json").update(file_id=""),
    "a file id of zeros": lambda v: entry_of(v, "config.json").update(file_id="00" * 16),
    "an empty file with an id": lambda v: entry_of(v, "empty").update(file_id="11" * 16),
    "a negative size": lambda v: entry_of(v, "config.json").update(size=-1),
    "another size": lambda v: entry_of(v, "config.json").update(size=2**21),
    "out of order": lambda v: v["entries"].reverse(),
    "twice": lambda v: v["entries"].insert(1, dict(v["entries"][0])),
    "no parent": lambda v: v["entries"].remove(entry_of(v, "nested")),
    "a path out of the tree": lambda v: entry_of(v, "config.json").update(path="../x"),
    "an escaping link": lambda v: entry_of(v, "dangling").update(target="../x"),
    "an absolute link": lambda v: entry_of(v, "dangling").update(target="/x"),
    "text as base64": lambda v: entry_of(v, "dangling").update(
        target_b64="YQ==", target=None
    ) or entry_of(v, "dangling").pop("target"),
    "text twice": lambda v: entry_of(v, "dangling").update(target_b64="/w=="),
    "another type": lambda v: entry_of(v, "dangling").update(type="socket"),
}


@pytest.mark.parametrize("name", EDITS)
def test_manifests_that_break_a_rule(name: str, sealed: Sealed) -> None:
    with open_model(sealed.out, PASSWORD) as model:
        manifest = model.manifest
    assert parsed(manifest, lambda _: None) == manifest
    edit = EDITS[name]
    if name == "too many groups":
        def edit(value: Any) -> None:
            entry_of(value, "config.json")["groups"] *= 2
    with pytest.raises(FormatError):
        parsed(manifest, edit)


def test_tags_do_not_show_themselves() -> None:
    tags = FileTags(bytes(16), b"\x07" * 32)
    assert "07" not in repr(CipherTree({"": bytes(16)}, {"w": tags})).replace("\\x00", "")
    keys = CipherKeys.of(bytes(range(32)))
    assert repr(keys) == "CipherKeys()"
