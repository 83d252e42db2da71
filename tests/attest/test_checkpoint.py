"""Signed notes: what C2SP's tools would read and write, and what is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai import merkle
from cai.attest import checkpoint as notes
from cai.attest.checkpoint import Checkpoint, CheckpointProof
from cai.errors import CaiError, FormatError, LimitExceeded, Tampered

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key().public_bytes_raw()
INSTANCE = "ab" * 16
ORIGIN = f"cai-kbs/{INSTANCE}"
LEAVES = [merkle.leaf_hash(bytes([place])) for place in range(5)]
POINT = Checkpoint(ORIGIN, 5, merkle.root(LEAVES))
NOTE = notes.sign_checkpoint(POINT, KEY)


def test_the_form_of_a_note() -> None:
    body, signature = NOTE.decode().split("\n\n")
    assert body.split("\n") == [ORIGIN, "5", base64.b64encode(POINT.root).decode()]
    dash, name, encoded = signature.removesuffix("\n").split(" ")
    assert (dash, name) == ("\N{EM DASH}", ORIGIN)
    assert base64.b64decode(encoded)[:4] == notes.key_id(ORIGIN, PUBLIC)
    KEY.public_key().verify(base64.b64decode(encoded)[4:], f"{body}\n".encode())


def test_a_key_of_the_signed_note_specification() -> None:
    """The example of golang.org/x/mod/sumdb/note: id and key of ``PeterNeumann``."""
    text = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    public = notes.parse_verifier_key(text)
    assert notes.verifier_key("PeterNeumann", public) == text
    signed = (
        "If you think cryptography is the answer to your problem,\n"
        "then you don't know what your problem is.\n\n"
        "\N{EM DASH} PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2"
        "pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
    )
    note = notes.parse_note(signed.encode())
    assert note.signatures[0].key_id == notes.key_id("PeterNeumann", public)
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    Ed25519PublicKey.from_public_bytes(public).verify(note.signatures[0].signature, note.text)


def test_a_checkpoint_opens_under_its_key_alone() -> None:
    assert notes.open_checkpoint(NOTE, [PUBLIC], instance=INSTANCE) == POINT
    assert notes.open_checkpoint(NOTE, [OTHER, PUBLIC]) == POINT
    for keys in ([], [OTHER], [bytes(31)]):
        with pytest.raises(Tampered):
            notes.open_checkpoint(NOTE, keys)
    with pytest.raises(Tampered, match="not of key broker"):
        notes.open_checkpoint(NOTE, [PUBLIC], instance="cd" * 16)


def test_signatures_of_witnesses_beside_it_do_no_harm() -> None:
    witness = notes.signature_line(notes.NoteSignature("witness.example", b"1234", bytes(72)))
    assert notes.open_checkpoint(NOTE + witness, [PUBLIC]) == POINT
    head, tail = NOTE.split(b"\n\n")
    assert notes.open_checkpoint(head + b"\n\n" + witness + tail, [PUBLIC]) == POINT
    with pytest.raises(LimitExceeded):
        notes.parse_note(NOTE + witness * notes.MAX_SIGNATURES)


def test_no_byte_can_be_changed() -> None:
    for place in range(len(NOTE)):
        bent = NOTE[:place] + bytes([NOTE[place] ^ 1]) + NOTE[place + 1 :]
        with pytest.raises(CaiError):
            notes.open_checkpoint(bent, [PUBLIC])


def lined(*changes: tuple[int, str]) -> bytes:
    """The note's text with other lines, signed anew."""
    lines = POINT.text().decode().split("\n")
    for place, text in changes:
        lines[place] = text
    text = "\n".join(lines).encode()
    line = notes.NoteSignature(ORIGIN, notes.key_id(ORIGIN, PUBLIC), KEY.sign(text))
    return text + b"\n" + notes.signature_line(line)


@pytest.mark.parametrize("note", [
    b"", b"\n", b"\n\n", b"text\n", b"text\n\n", NOTE[:-1], NOTE.split(b"\n\n")[0] + b"\n",
    b"\xff" + NOTE, b"\x00" + NOTE, NOTE.replace(b"\n5\n", b"\n\t5\n"),
    lined((1, "05")), lined((1, "-5")), lined((1, "5 ")), lined((1, "\N{ARABIC-INDIC DIGIT FIVE}")),
    lined((1, "")), lined((1, "9" * 17)), lined((1, str(2**53))),
    lined((0, "")), lined((0, "x" * 300)), lined((2, "AAAA")), lined((2, "!")),
    lined((2, base64.b64encode(POINT.root).decode().rstrip("="))), lined((3, "extension\n")),
    NOTE.replace("\N{EM DASH}".encode(), b"-"), NOTE + b"\n", NOTE + b"x\n",
])  # fmt: skip
def test_other_forms_are_refused(note: bytes) -> None:
    with pytest.raises(FormatError):
        notes.open_checkpoint(note, [PUBLIC])


def test_a_long_note_is_not_read() -> None:
    with pytest.raises(LimitExceeded):
        notes.parse_note(NOTE + b" " * notes.MAX_NOTE)


@pytest.mark.parametrize("text", [
    "", "ab", "AB" * 32, "zz" * 32, "name", "name+00000000+AAAA", "+" * 3, "\u00e9" * 64,
    notes.verifier_key("other", PUBLIC).replace("other", "name"),
    notes.verifier_key("name", PUBLIC)[:-4],
])  # fmt: skip
def test_other_forms_of_a_key_are_refused(text: str) -> None:
    with pytest.raises(FormatError):
        notes.parse_verifier_key(text)


def test_both_forms_of_a_key() -> None:
    assert notes.parse_verifier_key(PUBLIC.hex()) == PUBLIC
    for seed in range(64):  # some of these have "+" in their base64
        public = Ed25519PrivateKey.from_private_bytes(bytes([seed] * 32)).public_key()
        raw = public.public_bytes_raw()
        assert notes.parse_verifier_key(notes.verifier_key("a/b", raw) + "\n") == raw


def proof(index: int = 2) -> CheckpointProof:
    return CheckpointProof(NOTE, index, 5, tuple(merkle.inclusion_path(LEAVES, index)))


def test_a_proof_of_a_leaf() -> None:
    for index, leaf in enumerate(LEAVES):
        again = CheckpointProof.from_json(proof(index).to_json())
        assert again.verify(leaf, [PUBLIC], instance=INSTANCE) == POINT
        with pytest.raises(Tampered):
            again.verify(LEAVES[index - 1], [PUBLIC], instance=INSTANCE)
        with pytest.raises(Tampered):
            again.verify(leaf, [OTHER], instance=INSTANCE)
    moved = CheckpointProof(NOTE, 2, 4, proof().path)
    with pytest.raises(Tampered, match="another size"):
        moved.verify(LEAVES[2], [PUBLIC], instance=INSTANCE)


@pytest.mark.parametrize("change", [
    lambda value: value.pop("path"), lambda value: value.update(more=1),
    lambda value: value.update(index=5), lambda value: value.update(index=-1),
    lambda value: value.update(index=True), lambda value: value.update(size="5"),
    lambda value: value.update(path="00"), lambda value: value.update(path=[1]),
    lambda value: value.update(path=["00"]), lambda value: value.update(path=["AB" * 32]),
    lambda value: value.update(path=["00" * 32] * 65), lambda value: value.update(checkpoint=1),
])  # fmt: skip
def test_other_forms_of_a_proof_are_refused(change: Callable[[dict[str, object]], object]) -> None:
    value = proof().to_json()
    change(value)
    with pytest.raises((FormatError, LimitExceeded)):
        CheckpointProof.from_json(value)
    with pytest.raises(FormatError):
        CheckpointProof.from_json([])


def test_consistency_of_two_checkpoints() -> None:
    old = Checkpoint(ORIGIN, 3, merkle.root(LEAVES[:3]))
    path = merkle.consistency_path(LEAVES, 3)
    notes.verify_consistency(old, POINT, path)
    notes.verify_consistency(POINT, POINT, [])
    with pytest.raises(Tampered, match="rolled back"):
        notes.verify_consistency(POINT, old, path)
    with pytest.raises(Tampered, match="does not extend"):
        notes.verify_consistency(old, POINT, path[:-1])
    with pytest.raises(Tampered, match="not the one of"):
        notes.verify_consistency(Checkpoint(f"{ORIGIN}/0011", 3, old.root), POINT, path)
    assert old.instance == Checkpoint(f"{ORIGIN}/0011", 3, old.root).instance == INSTANCE
    assert Checkpoint("example.com/log", 3, old.root).instance == ""
