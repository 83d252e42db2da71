"""``http(s)://``: ranges from any server, nothing written, no surprises by redirects."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cai.errors import (
    CaiError,
    InputError,
    InputMissing,
    PeerError,
    PeerUnreachable,
    Tampered,
    Unauthenticated,
    UsageError,
)
from cai.store import StoreOptions, open_ranged, open_store, pull, push
from cai.store.web import WebStore
from tests.store.conftest import Sealed, contents


class Files(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.ranges, self.redirect = root, True, ""
        self.answers: list[int] = []
        self.cut = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/models/m"


class Handler(BaseHTTPRequestHandler):
    server: Files
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.server.answers:
            return self.end(self.server.answers.pop(0))
        if self.server.redirect:
            return self.end(302, Location=self.server.redirect)
        path = self.server.root / self.path.removeprefix("/models/m/")
        if not path.is_file():
            return self.end(404)
        data, status, headers = path.read_bytes(), 200, {}
        span = self.headers.get("Range")
        if span and self.server.ranges:
            start, _, last = span.removeprefix("bytes=").partition("-")
            if int(start) >= len(data):
                return self.end(416, **{"Content-Range": f"bytes */{len(data)}"})
            end = min(int(last) + 1, len(data))
            status = 206
            headers = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
            data = data[int(start) : end]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.server.cut and len(data) > 100_000:
            self.server.cut = False
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return None
        self.wfile.write(data)
        return None

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def end(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def files(sealed: Sealed) -> Iterator[Files]:
    server = Files(sealed.path)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_pull(sealed: Sealed, files: Files, tmp_path: Path) -> None:
    files.cut = True
    pull(open_store(files.url + "/"), tmp_path / "copy", index_sha256=sealed.report.index_sha256)
    assert contents(tmp_path / "copy") == sealed.files()
    assert pull(open_store(files.url), tmp_path / "copy").fetched_bytes == 0


def test_on_demand(sealed: Sealed, files: Files) -> None:
    ranged = open_ranged(files.url)
    for path in (sealed.path / "objects").iterdir():
        whole = path.read_bytes()
        stored = f"objects/{path.name}"
        assert ranged.read_range(stored, 1000, 5_000_000) == whole[1000:5_001_000]
    ranged.close()


def test_nothing_is_written(sealed: Sealed, files: Files) -> None:
    store = open_store(files.url)
    for refused in (
        lambda: push(sealed.path, store),
        lambda: store.put("a", b"", ""),
        lambda: store.begin("a", 1, ""),
        lambda: store.remove("a"),
        lambda: list(store.names(recursive=True)),
    ):
        with pytest.raises(UsageError):
            refused()


def test_a_server_without_ranges(sealed: Sealed, files: Files, tmp_path: Path) -> None:
    files.ranges = False
    store = open_store(files.url)
    assert store.read("cai.json", 0, 65_536).data == sealed.files()["cai.json"]
    with pytest.raises(InputError, match="ranges"):
        pull(store, tmp_path / "copy")


@pytest.mark.parametrize(("status", "error"), [
    (401, Unauthenticated), (403, Unauthenticated), (404, InputMissing), (410, InputMissing),
    (429, PeerUnreachable), (500, PeerUnreachable), (503, PeerUnreachable), (400, PeerError),
    (204, PeerError), (304, PeerError),
])
def test_answers(files: Files, status: int, error: type[CaiError]) -> None:
    store = WebStore(files.url)
    files.answers = [status]
    with pytest.raises(error) as caught:
        store.read("cai.json", 0, 10)
    assert type(caught.value) is error


def test_a_busy_server_is_asked_again(sealed: Sealed, files: Files) -> None:
    files.answers = [503, 500, 429]
    assert open_store(files.url).read("cai.json", 0, 5).data == sealed.files()["cai.json"][:5]
    assert open_store(files.url).stat("nothing") is None
    found = open_store(files.url).stat("index.cai")
    assert found
    assert (found.size, found.label) == (len(sealed.files()["index.cai"]), None)


def test_redirects(sealed: Sealed, files: Files) -> None:
    other = Files(sealed.path)
    other.redirect = files.url + "/cai.json"
    thread = threading.Thread(target=other.serve_forever, args=(0.05,))
    thread.start()
    try:
        assert open_store(other.url).read("cai.json", 0, 5).total
        other.redirect = other.url + "/cai.json"
        with pytest.raises(PeerError):
            open_store(other.url).read("cai.json", 0, 5)
        other.redirect = "file:///etc/passwd"
        with pytest.raises(PeerError):
            open_store(other.url).read("cai.json", 0, 5)
    finally:
        other.shutdown()
        other.server_close()
        thread.join()


def test_https_is_not_left_by_a_redirect() -> None:
    import httpx

    store = WebStore("https://models.example/m")
    with pytest.raises(PeerError, match="away from https"):
        store._refuse_downgrade(httpx.Request("GET", "http://models.example/m"))
    store._refuse_downgrade(httpx.Request("GET", "https://cdn.example/m"))


def test_nobody_answers() -> None:
    with pytest.raises(PeerUnreachable):
        WebStore("http://127.0.0.1:9/m").read("cai.json", 0, 5)
    store = open_store("http://127.0.0.1:9/m", StoreOptions(attempts=2))
    with pytest.raises(PeerUnreachable):
        store.stat("cai.json")


def test_altered_on_the_way(sealed: Sealed, files: Files, tmp_path: Path) -> None:
    copy = tmp_path / "altered"
    pull(open_store(files.url), copy)
    victim = max((copy / "objects").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[5_000_000] ^= 1
    victim.write_bytes(data)
    files.root = copy
    with pytest.raises(Tampered, match=victim.name):
        pull(open_store(files.url), tmp_path / "copy")
