"""Buckets, objects and multipart uploads in a directory, so that they outlive the server."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.oss_server.signing import OssFault

MIN_PART = 100 * 1024


@dataclass
class Object:
    key: str
    size: int
    etag: str
    kind: str = "Normal"
    modified: float = field(default_factory=time.time)
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Upload:
    id: str
    key: str
    headers: dict[str, str]
    started: float = field(default_factory=time.time)
    parts: dict[int, Object] = field(default_factory=dict)


class Storage:
    """All buckets; ``lock`` guards the listings, never the transfer of bytes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()
        self.objects: dict[str, dict[str, Object]] = {}
        self.uploads: dict[str, dict[str, Upload]] = {}
        for bucket in sorted(path for path in root.iterdir() if path.is_dir()):
            self._load(bucket)

    def make_bucket(self, bucket: str) -> None:
        with self.lock:
            (self.root / bucket / "temporary").mkdir(parents=True, exist_ok=True)
            self.objects.setdefault(bucket, {})
            self.uploads.setdefault(bucket, {})

    def temporary(self, bucket: str) -> Path:
        return self.root / bucket / "temporary" / secrets.token_hex(8)

    def data_path(self, bucket: str, key: str) -> Path:
        return self.root / bucket / f"{hashlib.sha256(key.encode()).hexdigest()}.object"

    def part_path(self, bucket: str, upload: str, number: int) -> Path:
        return self.root / bucket / f"{upload}.{number}.part"

    def find(self, bucket: str, key: str) -> Object:
        with self.lock:
            if key not in self.objects[bucket]:
                raise OssFault(404, "NoSuchKey")
            return self.objects[bucket][key]

    def store(self, bucket: str, made: Object, data: Path) -> None:
        with self.lock:
            place = self.data_path(bucket, made.key)
            data.rename(place)
            self.objects[bucket][made.key] = made
            place.with_suffix(".json").write_text(json.dumps(asdict(made)))

    def remove(self, bucket: str, key: str) -> None:
        with self.lock:
            if self.objects[bucket].pop(key, None):
                place = self.data_path(bucket, key)
                place.unlink()
                place.with_suffix(".json").unlink()

    def begin(self, bucket: str, key: str, headers: dict[str, str]) -> Upload:
        with self.lock:
            upload = Upload(secrets.token_hex(16).upper(), key, headers)
            self.uploads[bucket][upload.id] = upload
            self._save(bucket, upload)
            return upload

    def upload(self, bucket: str, identity: str, key: str) -> Upload:
        with self.lock:
            upload = self.uploads[bucket].get(identity)
            if upload is None or upload.key != key:
                raise OssFault(404, "NoSuchUpload")
            return upload

    def add_part(self, bucket: str, upload: Upload, number: int, part: Object, data: Path) -> None:
        with self.lock:
            if upload.id not in self.uploads[bucket]:
                raise OssFault(404, "NoSuchUpload")
            data.rename(self.part_path(bucket, upload.id, number))
            upload.parts[number] = part
            self._save(bucket, upload)

    def complete(self, bucket: str, upload: Upload, asked: list[tuple[int, str]]) -> Object:
        numbers = [number for number, _ in asked]
        if not asked or numbers != sorted(set(numbers)):
            raise OssFault(400, "InvalidPartOrder")
        for number, etag in asked:
            part = upload.parts.get(number)
            if part is None or part.etag != etag.strip('"').upper():
                raise OssFault(400, "InvalidPart")
            if part.size < MIN_PART and number != numbers[-1]:
                raise OssFault(400, "EntityTooSmall")
        joined = self.temporary(bucket)
        digest, size = hashlib.md5(), 0
        with joined.open("wb") as out:
            for number in numbers:
                digest.update(bytes.fromhex(upload.parts[number].etag))
                path = self.part_path(bucket, upload.id, number)
                size += _append(path, out.fileno())
        made = Object(
            upload.key, size, f"{digest.hexdigest().upper()}-{len(numbers)}", "Multipart",
            headers=upload.headers,
        )
        with self.lock:
            if upload.id not in self.uploads[bucket]:
                joined.unlink()
                raise OssFault(404, "NoSuchUpload")
            self.store(bucket, made, joined)
            self.abort(bucket, upload)
        return made

    def abort(self, bucket: str, upload: Upload) -> None:
        with self.lock:
            self.uploads[bucket].pop(upload.id, None)
            for number in upload.parts:
                self.part_path(bucket, upload.id, number).unlink(missing_ok=True)
            (self.root / bucket / f"{upload.id}.upload").unlink(missing_ok=True)

    def _save(self, bucket: str, upload: Upload) -> None:
        (self.root / bucket / f"{upload.id}.upload").write_text(json.dumps(asdict(upload)))

    def _load(self, bucket: Path) -> None:
        shutil.rmtree(bucket / "temporary", ignore_errors=True)
        self.make_bucket(bucket.name)
        for path in bucket.glob("*.json"):
            made = Object(**json.loads(path.read_text()))
            self.objects[bucket.name][made.key] = made
        for path in bucket.glob("*.upload"):
            value = json.loads(path.read_text())
            parts = {int(n): Object(**part) for n, part in value.pop("parts").items()}
            upload = Upload(**value, parts=parts)
            self.uploads[bucket.name][upload.id] = upload


def _append(path: Path, out: int) -> int:
    total = 0
    with path.open("rb") as part:
        while count := os.sendfile(out, part.fileno(), total, 1 << 30):
            total += count
    return total
