"""A second reader, written from docs/spec-format.md alone: it shares no code with ``cai.model``."""

from __future__ import annotations

import base64
import hmac
import json
from hashlib import sha256
from pathlib import Path

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cai.model import SealReport
from cai.secret import Secret


def expand(prk: bytes, info: bytes) -> bytes:
    return hmac.digest(prk, info + b"\x01", "sha256")


def canonical(value: object) -> bytes:
    """RFC 8785 for values without floats and without members beyond the BMP."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()


def read_object(path: Path, key: bytes, digest: str) -> bytes:
    data = path.read_bytes()
    header = data[:4096]
    assert header[:12] == b"CAIOBJ1\n\x00\x01\x00\x01"
    assert header[13:16] == bytes(3)
    assert not any(header[56:])
    chunk, size = 1 << header[12], int.from_bytes(header[48:56], "big")
    count = -(-size // chunk)
    head = 4096 + 4096 * -(-16 * count // 4096)
    assert len(data) == head + size
    assert sha256(data[:head]).hexdigest() == digest
    aead = AESGCM(expand(key, b"cai/1 file" + sha256(header).digest()))
    plain = b""
    for i in range(count):
        part = data[head + i * chunk : head + min(size, (i + 1) * chunk)]
        last = bytes([i == count - 1])
        nonce = last + bytes(3) + i.to_bytes(8, "big")
        aad = i.to_bytes(8, "big") + len(part).to_bytes(4, "big") + last
        tag = data[4096 + 16 * i : 4096 + 16 * (i + 1)]
        plain += aead.decrypt(nonce, part + tag, aad)
    return plain


def read_manifest(out: Path, kek: bytes) -> bytes:
    raw = (out / "cai.json").read_bytes()
    header = json.loads(raw)
    assert canonical(header) == raw
    model_id = bytes.fromhex(header["model_id"])
    kp = hmac.digest(model_id, kek, "sha256")
    commitment = expand(kp, b"cai/1 kek commit").hex()
    assert commitment == header["dek"]["kek_commitment"]
    aad = canonical({
        "cai": 1, "kek_commitment": commitment, "model_id": header["model_id"], "purpose": "dek",
        "revision": header["revision"], "suite": "AES-256-GCM/HKDF-SHA256",
    })  # fmt: skip
    dek = AESGCM(expand(kp, b"cai/1 wrap")).decrypt(
        bytes.fromhex(header["dek"]["nonce"]), bytes.fromhex(header["dek"]["wrapped"]), aad
    )
    dp = hmac.digest(model_id, dek, "sha256")
    assert expand(dp, b"cai/1 commit").hex() == header["commitment"]
    mac = header.pop("mac")
    assert hmac.digest(expand(dp, b"cai/1 header"), canonical(header), "sha256").hex() == mac
    padded = read_object(
        out / "manifest.cai", expand(dp, b"cai/1 manifest"), header["manifest"]["digest"]
    )
    assert len(padded) == header["manifest"]["size"] == 2**20
    return padded.rstrip(b"\x00")


def merkle(leaves: list[bytes]) -> bytes:
    """RFC 6962 §2.1, word for word."""
    if not leaves:
        return sha256(b"").digest()
    if len(leaves) == 1:
        return sha256(b"\x00" + leaves[0]).digest()
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return sha256(b"\x01" + merkle(leaves[:k]) + merkle(leaves[k:])).digest()


def test_the_specification_is_enough(
    sealed: tuple[Path, Secret, SealReport], sample: Path
) -> None:
    out, kek, report = sealed
    text = read_manifest(out, kek.reveal())
    manifest = json.loads(text)
    assert sha256(b"cai/1 root\x00" + text).hexdigest() == report.root
    leaves = []
    for entry in manifest["entries"]:
        path = sample / entry["path"]
        if entry["type"] == "file":
            if "inline" in entry:
                content = base64.b64decode(entry["inline"])
            else:
                stored = out / "objects" / entry["object"]
                key, digest = bytes.fromhex(entry["object_key"]), entry["object_digest"]
                content = read_object(stored, key, digest)[: entry["size"]]
            assert content == path.read_bytes()
            assert sha256(content).hexdigest() == entry["sha256"]
            kind, size, hashed = b"f", len(content), sha256(content).digest()
        elif entry["type"] == "symlink":
            target = entry["target"].encode()
            assert path.is_symlink()
            kind, size, hashed = b"l", len(target), sha256(target).digest()
        else:
            assert path.is_dir()
            kind, size, hashed = b"d", 0, bytes(32)
        leaves.append(kind + size.to_bytes(8, "big") + hashed + entry["path"].encode())
    assert merkle(leaves).hex() == manifest["content_root"] == report.content_root


def test_the_index_is_what_the_specification_says(
    sealed: tuple[Path, Secret, SealReport],
) -> None:
    out, _, report = sealed
    raw = (out / "index.cai").read_bytes()
    index = json.loads(raw)
    assert canonical(index) == raw
    assert sha256(raw).hexdigest() == report.index_sha256
    listed = [item["path"] for item in index["files"]]
    assert listed == sorted(
        ["manifest.cai", *(f"objects/{path.name}" for path in (out / "objects").iterdir())]
    )
    for item in index["files"]:
        data = (out / item["path"]).read_bytes()
        pieces = [data[at : at + 2**22] for at in range(0, len(data), 2**22)]
        assert item["size"] == len(data)
        assert item["blake3"] == [blake3(piece).hexdigest() for piece in pieces]


def test_the_second_reader_can_fail(sealed: tuple[Path, Secret, SealReport]) -> None:
    out, _, _ = sealed
    with pytest.raises(AssertionError):
        read_manifest(out, bytes(32))
