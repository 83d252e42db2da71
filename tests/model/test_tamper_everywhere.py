"""Every kind of change, at every file of a sealed tree: found, with its own error, no wrong byte.

The rules are those of docs/spec-format.md §8: what a reader lets through is either the sealed bytes
or an error that names the stored file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai.errors import CaiError, FormatError, InputError, InputMissing, Tampered, WrongKey
from cai.model import SealOptions, check, new_key, open_model, seal, unseal
from cai.model.signature import sign_root
from cai.secret import Secret

OWNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OWNER_HEX = OWNER.public_key().public_bytes_raw().hex()
CHUNK = 65_536


@dataclass
class World:
    """Two revisions of one model, another model under the same key, and their plain content."""

    work: Path
    kek: Secret
    plain: dict[str, bytes]
    root: str
    objects: dict[str, str]
    owner: str | None = OWNER_HEX

    def copy(self, target: Path) -> Path:
        return Path(shutil.copytree(self.work / "now", target, symlinks=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    work = tmp_path_factory.mktemp("everywhere")
    (work / "tree" / "sub").mkdir(parents=True)
    plain = {
        "config.json": b'{"a":1}', "sub/weights": os.urandom(3 * CHUNK + 5),
        "twin": os.urandom(2 * CHUNK), "twin2": os.urandom(2 * CHUNK),
    }  # fmt: skip
    for name, data in plain.items():
        (work / "tree" / name).write_bytes(data)
    (work / "tree" / "link").symlink_to("config.json")
    kek, options = new_key(), SealOptions(chunk=CHUNK, workers=1, model_id="ab" * 32)

    def sealed(name: str, **more: object) -> str:
        chosen = SealOptions(**{**_fields(options), **more})  # type: ignore[arg-type]
        return seal(
            work / "tree", work / name, kek, options=chosen,
            sign=lambda root: sign_root(root, OWNER),
        ).root  # fmt: skip

    old = sealed("old")
    sealed("other", model_id="cd" * 32)
    root = sealed("now", revision=2, previous=old)
    with open_model(work / "now", kek) as model:
        objects = {path: f"objects/{s.name}" for path, s in model.manifest.stored.items()}
    return World(work, kek, plain, root, objects)


def _fields(options: SealOptions) -> dict[str, object]:
    return {name: getattr(options, name) for name in SealOptions.__dataclass_fields__}


def stored_names(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def judge(world: World, out: Path) -> CaiError:
    """The error of ``check``; and every read by itself gives sealed bytes or an error."""
    with pytest.raises(CaiError) as caught:
        check(out, world.kek, workers=1, expect_root=world.root, owner_key=world.owner)
    read_all(world, out)
    back = out.parent / "back"
    try:
        with open_model(out, world.kek, expect_root=world.root, owner_key=world.owner) as model:
            unseal(model, back, workers=1)
    except CaiError:
        assert not back.exists()
    else:
        # Only what a decryption does not need may be touched: the index, or a signature that
        # nobody asked for.
        assert caught.value.message.startswith(("index.cai", "manifest.sig"))
        assert {
            str(path.relative_to(back)): path.read_bytes()
            for path in back.rglob("*") if path.is_file() and not path.is_symlink()
        } == world.plain  # fmt: skip
    return caught.value


def read_all(world: World, out: Path) -> None:
    try:
        model = open_model(out, world.kek, expect_root=world.root)
    except CaiError:
        return
    with model:
        for path, content in world.plain.items():
            try:
                reader = model.open(path)
            except Tampered:
                continue
            for offset in range(0, len(content), CHUNK // 2):
                room = bytearray(CHUNK)
                try:
                    count = reader.readinto(offset, memoryview(room))
                except Tampered:
                    assert not any(room)
                    continue
                assert room[:count] == content[offset : offset + CHUNK]
            reader.close()


Change = Callable[[Path], None]


def flip(offset: float) -> Change:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(offset * (len(data) - 1))] ^= 0x10
        path.write_bytes(data)

    return change


def cut(part: float) -> Change:
    return lambda path: os.truncate(path, int(path.stat().st_size * part))


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def appended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def made_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def made_link(path: Path) -> None:
    aside = next(above for above in path.parents if above.name == "out").parent / "aside"
    path.rename(aside)
    path.symlink_to(aside)


def made_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES: dict[str, Change] = {
    "first byte": flip(0), "a byte in the middle": flip(0.5), "last byte": flip(1),
    "emptied": cut(0), "halved": cut(0.5), "one byte short": lambda p: os.truncate(
        p, p.stat().st_size - 1), "extended": appended, "zeroed": zeroed,
    "removed": Path.unlink, "a directory": made_directory, "a pipe": made_pipe, "a link": made_link,
}  # fmt: skip

FILES = ["cai.json", "index.cai", "manifest.cai", "manifest.sig", "sub/weights", "twin", "twin2"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", CHANGES)
def test_every_change_at_every_file(
    kind: str, file: str, world: World, tmp_path: Path
) -> None:
    out = world.copy(tmp_path / "out")
    stored = world.objects.get(file, file)
    CHANGES[kind](out / stored)
    error = judge(world, out)
    assert isinstance(error, (Tampered, FormatError, WrongKey, InputError)), error
    assert stored in error.message or isinstance(error, WrongKey) or (
        file == "manifest.sig" and error.machine_code == "unsigned"
    )
    if file not in ("cai.json", "index.cai", "manifest.sig"):
        assert isinstance(error, Tampered)
        assert error.path == stored


CODES: list[tuple[str, str, str]] = [
    ("swap two objects", "tampered", "twin"),
    ("an object of the older revision", "tampered", "twin"),
    ("chunks of one object swapped with their tags", "tampered", "sub/weights"),
    ("an additional object", "tampered", ""),
    ("an additional file", "tampered", ""),
    ("a missing object", "tampered", "twin"),
    ("the older manifest", "tampered", "manifest.cai"),
    ("the older index", "tampered", "index.cai"),
    ("the older header", "tampered", "manifest.cai"),
    ("the whole older revision", "root-mismatch", "manifest.cai"),
    ("another model of the same key", "root-mismatch", "manifest.cai"),
    ("the older revision, only a minimum named", "rollback", "cai.json"),
    ("the older signature", "signature", "manifest.sig"),
    ("no signature", "unsigned", "manifest.sig"),
    ("another's signature", "wrong-owner", "manifest.sig"),
    ("another key", "wrong-key", ""),
]


@pytest.mark.parametrize(("kind", "code", "names"), CODES, ids=[row[0] for row in CODES])
def test_each_kind_has_its_own_error(
    kind: str, code: str, names: str, world: World, tmp_path: Path
) -> None:
    out, kek, old = world.copy(tmp_path / "out"), world.kek, world.work / "old"
    root: str | None = world.root
    minimum = 0
    if kind == "swap two objects":
        one, two = (out / world.objects[name] for name in ("twin", "twin2"))
        a, b = one.read_bytes(), two.read_bytes()
        one.write_bytes(b)
        two.write_bytes(a)
    elif kind == "an object of the older revision":
        with open_model(old, kek) as model:
            older = old / "objects" / model.manifest.stored["twin"].name
        shutil.copy(older, out / world.objects["twin"])
    elif kind.startswith("chunks"):
        data = bytearray((out / world.objects["sub/weights"]).read_bytes())
        head = 8192
        for start, size in ((head, CHUNK), (4096, 16)):
            a, b = data[start : start + size], data[start + size : start + 2 * size]
            data[start : start + size], data[start + size : start + 2 * size] = b, a
        (out / world.objects["sub/weights"]).write_bytes(data)
    elif kind == "an additional object":
        (out / "objects" / ("0" * 32)).write_bytes(b"x")
    elif kind == "an additional file":
        (out / "README").write_text("x")
    elif kind == "a missing object":
        (out / world.objects["twin"]).unlink()
    elif kind in ("the older manifest", "the older index", "the older header"):
        name = {"manifest": "manifest.cai", "index": "index.cai", "header": "cai.json"}[
            kind.rpartition(" ")[2]
        ]
        shutil.copy(old / name, out / name)
    elif kind == "the whole older revision":
        out = old
    elif kind.startswith("another model"):
        out = world.work / "other"
    elif kind.startswith("the older revision, only"):
        out, root, minimum = old, None, 2
    elif kind == "the older signature":
        shutil.copy(old / "manifest.sig", out / "manifest.sig")
    elif kind == "no signature":
        (out / "manifest.sig").unlink()
    elif kind == "another's signature":
        (out / "manifest.sig").write_bytes(sign_root(world.root, Ed25519PrivateKey.generate()))
    elif kind == "another key":
        kek = new_key()
    with pytest.raises(CaiError) as caught:
        check(out, kek, workers=1, expect_root=root, min_revision=minimum, owner_key=OWNER_HEX)
    assert caught.value.machine_code == code
    if names:
        assert isinstance(caught.value, Tampered)
        stored = world.objects.get(names, names)
        # Of two swapped objects either may be met first.
        assert caught.value.path in (
            {stored, world.objects["twin2"]} if kind.startswith("swap") else {stored}
        )
    if out.parent == tmp_path and kind != "another key":
        read_all(world, out)


@settings(
    max_examples=int(os.environ.get("CAI_TAMPER_EXAMPLES", "60")), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_random_edits_of_any_file(
    data: st.DataObject, world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    work = tmp_path_factory.mktemp("edit")
    out = world.copy(work / "out")
    names = stored_names(out)
    name = data.draw(st.sampled_from(names), label="file")
    original = (out / name).read_bytes()
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3), label="edits")):
        place = data.draw(st.integers(0, len(changed)), label="place")
        kind = data.draw(
            st.sampled_from(["set", "insert", "delete", "copy from another file"]), label="kind"
        )
        if kind == "copy from another file":
            other = (out / data.draw(st.sampled_from(names), label="other")).read_bytes()
            length = data.draw(st.integers(1, 100_000), label="length")
            changed[place : place + length] = other[place : place + length]
        else:
            piece = data.draw(st.binary(min_size=1, max_size=40), label="piece")
            end = place if kind == "insert" else place + len(piece)
            changed[place:end] = b"" if kind == "delete" else piece
    if changed == original:
        return
    (out / name).write_bytes(changed)
    error = judge(world, out)
    assert name in error.message or isinstance(error, (WrongKey, InputMissing)), error
    shutil.rmtree(work)


names_strategy = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8
).filter(lambda part: part not in (".", ".."))


@settings(
    max_examples=int(os.environ.get("CAI_TAMPER_EXAMPLES", "15")), deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    tree=st.dictionaries(
        names_strategy,
        st.one_of(
            st.binary(max_size=30), st.sampled_from([65_537, 131_072, 200_001]).map(os.urandom)
        ),
        min_size=1, max_size=4,
    ),
    pad=st.booleans(), which=st.integers(0, 1000), where=st.floats(0, 1), bit=st.integers(0, 7),
)  # fmt: skip
def test_random_trees_and_a_flipped_bit(
    tree: dict[str, bytes], pad: bool, which: int, where: float, bit: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    work = tmp_path_factory.mktemp("trees")
    (work / "tree").mkdir()
    for name, content in tree.items():
        (work / "tree" / name).write_bytes(content)
    kek = new_key()
    options = SealOptions(chunk=CHUNK, workers=1, pad=pad, allow=("pickle",))
    root = seal(work / "tree", work / "out", kek, options=options).root
    assert check(work / "out", kek, expect_root=root).files == len(tree)
    out = work / "out"
    names = stored_names(out)
    path = out / names[which % len(names)]
    changed = bytearray(path.read_bytes())
    changed[int(where * (len(changed) - 1))] ^= 1 << bit
    path.write_bytes(changed)
    judge(World(work, kek, tree, root, {}, owner=None), out)
    shutil.rmtree(work)
