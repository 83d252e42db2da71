"""A small sealed model with several objects, and stores to carry it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cai.model import SealOptions, SealReport, new_key, seal
from cai.secret import Secret
from cai.store import Store, StoreOptions, open_store
from tests.oss_server.server import KEY_ID, SECRET, OssServer

MIB = 1024 * 1024


@dataclass(frozen=True)
class Sealed:
    path: Path
    kek: Secret
    report: SealReport

    def files(self) -> dict[str, bytes]:
        return contents(self.path)


def contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*")) if path.is_file()
    }


def write_model(root: Path, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.urandom(size))


@pytest.fixture(scope="session")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Sealed:
    """Objects of one part, of one piece, and of several parts."""
    base = tmp_path_factory.mktemp("model")
    write_model(
        base / "plain",
        {"config.json": 300, "a.safetensors": 21 * MIB + 5, "b.safetensors": 5 * MIB, "c": 70_000},
    )
    kek = new_key()
    report = seal(base / "plain", base / "sealed", kek, options=SealOptions(workers=2))
    return Sealed(base / "sealed", kek, report)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OssServer]:
    with OssServer(tmp_path / "oss", buckets=["models"]) as running:
        yield running


def environment(server: OssServer, **more: str) -> dict[str, str]:
    """What a process needs to reach the server, under the names of ``cai.env``."""
    return {
        "MODEL_OSS_ENDPOINT": server.endpoint, "MODEL_OSS_ACCESS_KEY_ID": KEY_ID,
        "MODEL_OSS_SECRET_ACCESS_KEY": SECRET, **more,
    }


Opener = Callable[..., Store]


@pytest.fixture
def oss(server: OssServer) -> Iterator[Opener]:
    opened: list[Store] = []

    def opener(path: str = "minilm", **more: str) -> Store:
        attempts = int(more.pop("attempts", "7"))
        options = StoreOptions(environment=environment(server, **more), attempts=attempts)
        opened.append(open_store(f"oss://models/{path}", options))
        return opened[-1]

    yield opener
    for store in opened:
        store.close()
