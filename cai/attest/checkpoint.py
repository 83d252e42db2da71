"""Checkpoints of an append-only log, as everybody who holds one reads them. Pure.

A checkpoint is a C2SP signed note (c2sp.org/signed-note, c2sp.org/tlog-checkpoint): origin, size
and root of the log, signed with Ed25519 (docs/spec-audit.md §5). Key brokers sign them; hosts,
clients and auditors keep the last one and demand that the next one extends it (decisions §6).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cai import merkle
from cai.errors import FormatError, LimitExceeded, Tampered
from cai.jcs import MAX_INTEGER

MAX_NOTE = 16 * 1024
"""Largest note that is read, bytes."""

MAX_SIGNATURES = 32
"""Most signatures of one note: the log's, and its witnesses'."""

MAX_PATH = 64
"""Longest audit path or consistency proof, hashes; a log has fewer than 2^53 leaves."""

MAX_NAME = 256
"""Longest origin or key name, bytes."""

ORIGIN_PREFIX: Final = "cai-kbs/"
"""Origins are this and the id of the key broker's database; after a restore, more."""

KEY_SIZE = 32
"""Bytes of an Ed25519 public key."""

_ED25519 = b"\x01"
_KEY_ID = 4
_DASH = "\N{EM DASH}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a note signs.

    Attributes:
        origin: which log.
        size: its leaves.
        root: its root over them, 32 bytes.
    """

    origin: str
    size: int
    root: bytes

    def text(self) -> bytes:
        """The signed bytes (tlog-checkpoint)."""
        root = base64.b64encode(self.root).decode("ascii")
        return f"{self.origin}\n{self.size}\n{root}\n".encode()

    @property
    def instance(self) -> str:
        """Id of the key broker's database; empty for another kind of log."""
        if not self.origin.startswith(ORIGIN_PREFIX):
            return ""
        return self.origin.removeprefix(ORIGIN_PREFIX).partition("/")[0]


@dataclass(frozen=True, slots=True)
class NoteSignature:
    """One signature line of a note."""

    name: str
    key_id: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """A signed note, read but not verified."""

    text: bytes
    signatures: tuple[NoteSignature, ...]


@dataclass(frozen=True, slots=True)
class CheckpointProof:
    """That a leaf is in the log which a checkpoint names.

    Attributes:
        note: the checkpoint's signed note.
        index: place of the leaf, from 0.
        size: leaves of the log at the checkpoint.
        path: audit path, bottom up (RFC 6962 §2.1.1).
    """

    note: bytes
    index: int
    size: int
    path: tuple[bytes, ...]

    def to_json(self) -> dict[str, Any]:
        """For canonical JSON."""
        return {
            "checkpoint": self.note.decode("utf-8"),
            "index": self.index,
            "size": self.size,
            "path": [step.hex() for step in self.path],
        }

    @classmethod
    def from_json(cls, value: object) -> CheckpointProof:
        """Read ``to_json``'s form.

        Raises:
            FormatError, LimitExceeded: another form.
        """
        if not isinstance(value, dict) or set(value) != {"checkpoint", "index", "size", "path"}:
            raise FormatError("checkpoint proof: not an object of its four members")
        index, size = value["index"], value["size"]
        if type(index) is not int or type(size) is not int or not 0 <= index < size:
            raise FormatError("checkpoint proof: index and size do not fit")
        return cls(note_member(value), index, size, hashes(value["path"], what="checkpoint proof"))

    def verify(self, leaf: bytes, keys: Iterable[bytes], *, instance: str) -> Checkpoint:
        """Check that ``leaf`` is in the log.

        Args:
            leaf: hash of the leaf (``cai.merkle.leaf_hash``).
            keys: public keys of the log, 32 bytes each.
            instance: id of the key broker.

        Returns:
            The checkpoint, now authenticated.

        Raises:
            FormatError, LimitExceeded: the note has another form.
            Tampered: signature, log, size or path is not right.
        """
        checkpoint = open_checkpoint(self.note, keys, instance=instance)
        if checkpoint.size != self.size:
            raise Tampered("the checkpoint is of another size than its proof")
        found = merkle.root_from_path(leaf, self.index, self.size, self.path)
        if found != checkpoint.root:
            raise Tampered(f"leaf {self.index} is not in the log of this checkpoint")
        return checkpoint


def key_id(name: str, public: bytes) -> bytes:
    """Key id of an Ed25519 key under a name (signed-note, "Signatures")."""
    return sha256(name.encode() + b"\n" + _ED25519 + public).digest()[:_KEY_ID]


def verifier_key(name: str, public: bytes) -> str:
    """The key as C2SP tools take it: ``name+id+base64``."""
    encoded = base64.b64encode(_ED25519 + public).decode("ascii")
    return f"{name}+{key_id(name, public).hex()}+{encoded}"


def parse_verifier_key(text: str) -> bytes:
    """The public key in 64 lower-case hex digits, or in C2SP's form.

    Raises:
        FormatError: neither.
    """
    text = text.strip()
    if len(text) == 2 * KEY_SIZE and set(text) <= set("0123456789abcdef"):
        return bytes.fromhex(text)
    # The base64 may itself hold "+": the first two separate name, id and key.
    name, _, rest = text.partition("+")
    identity, _, encoded = rest.partition("+")
    decoded = _base64(encoded, what="log key")
    public = decoded[1:]
    if decoded[:1] != _ED25519 or len(public) != KEY_SIZE or not name:
        raise FormatError("log key: expected 64 hex digits or name+id+base64 of an Ed25519 key")
    if key_id(name, public).hex() != identity:
        raise FormatError("log key: its id is not the one of name and key")
    return public


def sign_checkpoint(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> bytes:
    """The checkpoint as a note with one signature; the key's name is the origin."""
    text = checkpoint.text()
    identity = key_id(checkpoint.origin, key.public_key().public_bytes_raw())
    return text + b"\n" + signature_line(
        NoteSignature(checkpoint.origin, identity, key.sign(text))
    )


def signature_line(signature: NoteSignature) -> bytes:
    """One signature as it stands in a note."""
    encoded = base64.b64encode(signature.key_id + signature.signature).decode("ascii")
    return f"{_DASH} {signature.name} {encoded}\n".encode()


def parse_note(note: bytes) -> Note:
    """Read a signed note.

    Raises:
        FormatError, LimitExceeded: another form.
    """
    if len(note) > MAX_NOTE:
        raise LimitExceeded(f"note of {len(note)} bytes, at most {MAX_NOTE} are read")
    try:
        text = note.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("note: not UTF-8") from error
    if any(ord(char) < 0x20 and char != "\n" for char in text):
        raise FormatError("note: a control character")
    body, blank, tail = text.rpartition("\n\n")
    if not blank or not tail.endswith("\n"):
        raise FormatError("note: no signatures")
    lines = tail[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise LimitExceeded(f"note with more than {MAX_SIGNATURES} signatures")
    return Note((body + "\n").encode(), tuple(_signature(line) for line in lines))


def read_checkpoint(note: bytes) -> Checkpoint:
    """What a note says, without any check of its signatures.

    Raises:
        FormatError, LimitExceeded: not a checkpoint.
    """
    lines = parse_note(note).text.decode("utf-8").split("\n")
    if len(lines) != 4 or not lines[0] or len(lines[0].encode()) > MAX_NAME:
        raise FormatError("checkpoint: expected origin, size and root, a line each")
    size, root = lines[1], _base64(lines[2], what="checkpoint root")
    if not (size.isascii() and size.isdigit() and len(size) <= 16 and str(int(size)) == size):
        raise FormatError("checkpoint: the size is no number")
    if int(size) > MAX_INTEGER or len(root) != merkle.HASH_SIZE:
        raise FormatError("checkpoint: size or root of another size")
    return Checkpoint(lines[0], int(size), root)


def open_checkpoint(note: bytes, keys: Iterable[bytes], *, instance: str = "") -> Checkpoint:
    """Authenticate a checkpoint.

    Args:
        note: as it came.
        keys: public keys of the log, 32 bytes each; a signature under any of them will do.
        instance: id of the key broker that it must be of; empty does not ask.

    Raises:
        FormatError, LimitExceeded: not a checkpoint.
        Tampered: no signature of these keys, or another broker's.
    """
    checkpoint, read = read_checkpoint(note), parse_note(note)
    if instance and checkpoint.instance != instance:
        raise Tampered(f"the checkpoint is of {checkpoint.origin}, not of key broker {instance}")
    for public in keys:
        identity = key_id(checkpoint.origin, public)
        for line in read.signatures:
            if line.name == checkpoint.origin and line.key_id == identity:
                _verify(public, line.signature, read.text)
                return checkpoint
    raise Tampered("no signature of this checkpoint is by a known key of the log")


def verify_consistency(old: Checkpoint, new: Checkpoint, path: Sequence[bytes]) -> None:
    """Check that the log of ``new`` extends that of ``old``; both are authenticated.

    Raises:
        Tampered: another log, a smaller one, or one that was rewritten.
    """
    if old.origin != new.origin:
        raise Tampered(
            f"the log of {new.origin} is not the one of {old.origin}",
            hint="after a restore a log starts a new origin; accept it only if that was announced",
        )
    if new.size < old.size:
        raise Tampered(f"the log was rolled back from {old.size} to {new.size} leaves")
    if not merkle.consistent(old.size, old.root, new.size, new.root, path):
        raise Tampered(f"the log of {new.size} leaves does not extend the one of {old.size}")


def hashes(value: object, *, what: str) -> tuple[bytes, ...]:
    """A list of hashes in hex.

    Raises:
        FormatError, LimitExceeded: another form.
    """
    if not isinstance(value, list):
        raise FormatError(f"{what}: expected a list of hashes")
    if len(value) > MAX_PATH:
        raise LimitExceeded(f"{what}: more than {MAX_PATH} hashes")
    for step in value:
        if not isinstance(step, str) or len(step) != 2 * merkle.HASH_SIZE:
            raise FormatError(f"{what}: a hash has another size")
        if not set(step) <= set("0123456789abcdef"):
            raise FormatError(f"{what}: a hash is not lower-case hex")
    return tuple(bytes.fromhex(step) for step in value)


def note_member(value: Mapping[str, Any], name: str = "checkpoint") -> bytes:
    """A note that stands in JSON as text.

    Raises:
        FormatError: it is missing or no text.
    """
    note = value.get(name)
    if not isinstance(note, str):
        raise FormatError(f"{name} is missing or no text")
    return note.encode("utf-8", "surrogatepass")


def _verify(public: bytes, signature: bytes, text: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
    except (InvalidSignature, ValueError) as error:
        raise Tampered("the signature of the checkpoint is wrong") from error


def _signature(line: str) -> NoteSignature:
    dash, _, rest = line.partition(" ")
    name, _, encoded = rest.partition(" ")
    if dash != _DASH or not name or len(name.encode()) > MAX_NAME or "+" in name:
        raise FormatError("note: a signature line has another form")
    decoded = _base64(encoded, what="note signature")
    if len(decoded) <= _KEY_ID:
        raise FormatError("note: a signature is too short")
    return NoteSignature(name, decoded[:_KEY_ID], decoded[_KEY_ID:])


def _base64(text: str, *, what: str) -> bytes:
    try:
        decoded = base64.b64decode(text.encode("ascii"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{what}: not base64") from error
    if base64.b64encode(decoded).decode("ascii") != text:
        raise FormatError(f"{what}: not canonical base64")
    return decoded
