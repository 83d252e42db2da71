"""``oss://`` against a server that checks signatures: errors, resumes, drops, temporary keys."""

from __future__ import annotations

import threading
import time
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
    Refused,
    Tampered,
    Unauthenticated,
)
from cai.store import StoreOptions, open_store, pull, push
from cai.store.oss import OssStore
from tests.oss_server.server import KEY_ID, REGION, SECRET, OssServer
from tests.oss_server.signing import Account
from tests.store.conftest import MIB, Opener, Sealed, contents, environment

TOKEN = "a-temporary-token"


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[OssServer]:
    accounts = (
        Account(KEY_ID, SECRET), Account("sts", "two", token=TOKEN),
        Account("late", "three", token=TOKEN, expires=time.time() - 5),
        Account("reader", "four", writes=False, lists_uploads=False),
        Account("writer", "five", lists_uploads=False),
    )
    with OssServer(
        tmp_path / "guarded", buckets=["models", "public"], accounts=accounts, public=["public"]
    ) as server:
        yield server


def reach(
    server: OssServer, key_id: str, secret: str, token: str = "", **more: str
) -> StoreOptions:
    return StoreOptions(
        environment=environment(
            server, MODEL_OSS_ACCESS_KEY_ID=key_id, MODEL_OSS_SECRET_ACCESS_KEY=secret,
            MODEL_OSS_SESSION_TOKEN=token, **more,
        ),
        attempts=2,
    )


@pytest.mark.parametrize("region", ["", REGION], ids=["v1", "v4"])
@pytest.mark.parametrize(("key_id", "secret", "token"), [
    (KEY_ID, SECRET, ""), ("sts", "two", TOKEN), ("writer", "five", ""),
])
def test_round_trip(
    sealed: Sealed, guarded: OssServer, tmp_path: Path, region: str, key_id: str, secret: str,
    token: str,
) -> None:
    options = reach(guarded, key_id, secret, token, OSS_REGION=region)
    store = open_store("models:/deep/minilm", options)
    push(sealed.path, store)
    pull(store, tmp_path / "copy", index_sha256=sealed.report.index_sha256)
    assert contents(tmp_path / "copy") == sealed.files()
    assert {version for version, _, _ in guarded.log} == {"v4" if region else "v1"}
    assert {item.path for item in store.names(recursive=True)} == set(sealed.files())
    assert [item.path for item in open_store("oss://models", options).names(recursive=False)] == [
        "deep/"
    ]


@pytest.mark.parametrize(("key_id", "secret", "token", "error"), [
    (KEY_ID, "wrong", "", Unauthenticated),
    ("nobody", SECRET, "", Unauthenticated),
    ("sts", "two", "wrong", Unauthenticated),
    ("sts", "two", "", Unauthenticated),
    ("late", "three", TOKEN, Unauthenticated),
    ("reader", "four", "", Refused),
])
def test_refusals(
    sealed: Sealed, guarded: OssServer, key_id: str, secret: str, token: str,
    error: type[CaiError],
) -> None:
    with pytest.raises(error) as caught:
        push(sealed.path, open_store("oss://models/x", reach(guarded, key_id, secret, token)))
    assert type(caught.value) is error
    assert caught.value.exit_status == 7
    for hidden in (secret, token):
        assert not hidden or hidden not in str(caught.value) + str(caught.value.hint)


def test_anybody_may_pull_from_a_public_bucket(
    sealed: Sealed, guarded: OssServer, tmp_path: Path
) -> None:
    push(sealed.path, open_store("oss://public/x", reach(guarded, KEY_ID, SECRET)))
    nobody = StoreOptions(environment={"MODEL_OSS_ENDPOINT": guarded.endpoint})
    pull(open_store("oss://public/x", nobody), tmp_path / "copy")
    assert contents(tmp_path / "copy") == sealed.files()


def test_a_bucket_that_is_not_there(guarded: OssServer, tmp_path: Path) -> None:
    store = open_store("oss://nowhere/x", reach(guarded, KEY_ID, SECRET))
    with pytest.raises(InputError, match="bucket does not exist"):
        pull(store, tmp_path / "copy")


def test_nobody_answers(tmp_path: Path) -> None:
    values = {"MODEL_OSS_ENDPOINT": "http://127.0.0.1:9"}
    store = open_store("oss://models/x", StoreOptions(environment=values, attempts=2))
    with pytest.raises(PeerUnreachable):
        pull(store, tmp_path / "copy")


@pytest.mark.parametrize("body", [
    b"", b"<html>", b"<html></html>", b"\xff\x00", b"<a><b></a>", b"{}",
    b"<X><IsTruncated>maybe</IsTruncated></X>",
    b"<X><IsTruncated>false</IsTruncated><Contents><Size>big</Size></Contents></X>",
])
def test_answers_that_are_not_of_oss(body: bytes) -> None:
    """A web server that says yes to everything is not taken for a store."""

    class Desk(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Desk) as answering:
        thread = threading.Thread(target=answering.serve_forever, args=(0.05,))
        thread.start()
        values = {"MODEL_OSS_ENDPOINT": f"http://127.0.0.1:{answering.server_port}"}
        store = open_store("oss://models/x", StoreOptions(environment=values, attempts=1))
        for call in (
            store.pending,
            lambda: list(store.names(recursive=True)),
            lambda: store.begin("a", 5, "label"),
            lambda: store.read("a", 0, 5),
            lambda: pull(store, Path("/nonexistent/out")),
        ):
            with pytest.raises(CaiError):
                call()
        answering.shutdown()
        thread.join()


def test_answers_and_their_errors(oss: Opener, server: OssServer) -> None:
    store = oss(attempts="1")
    for status, error in ((500, PeerUnreachable), (503, PeerUnreachable), (429, PeerUnreachable),
                          (400, PeerError), (403, Refused), (404, InputMissing)):
        server.faults.answer_next(1, status, "Something")
        with pytest.raises(error) as caught:
            store.read("cai.json", 0, 10)
        assert type(caught.value) is error


def test_a_busy_store_is_asked_again(sealed: Sealed, oss: Opener, server: OssServer) -> None:
    server.faults.answer_next(6, 503, "ServiceUnavailable")
    push(sealed.path, oss())
    assert oss().stat("cai.json")


def test_dropped_connections_are_ridden_out(
    sealed: Sealed, oss: Opener, server: OssServer, tmp_path: Path
) -> None:
    server.faults.cut_after(12 * MIB)
    push(sealed.path, oss())
    server.faults.cut_after(12 * MIB)
    pull(oss(), tmp_path / "copy", index_sha256=sealed.report.index_sha256)
    assert contents(tmp_path / "copy") == sealed.files()


def test_a_broken_push_is_continued_from_its_parts(
    sealed: Sealed, oss: Opener, server: OssServer
) -> None:
    server.faults.cut_after(17 * MIB)
    with pytest.raises(PeerUnreachable):
        push(sealed.path, oss(attempts="1"), workers=1)
    assert oss().pending()
    assert oss().stat("cai.json") is None
    done = push(sealed.path, oss())
    assert 4 * MIB < done.resumed_bytes <= 17 * MIB
    assert done.resumed_bytes + done.sent_bytes + done.present_bytes >= done.total_bytes
    assert not oss().pending()
    assert not list(server.storage.root.rglob("*.part"))
    assert push(sealed.path, oss(), verify=True).sent_bytes == 0


def test_parts_of_something_else_are_not_used(sealed: Sealed, oss: Opener) -> None:
    largest = max((sealed.path / "objects").iterdir(), key=lambda path: path.stat().st_size)
    stored = f"objects/{largest.name}"
    store = oss()
    left = store.begin(stored, largest.stat().st_size, "label")
    left.send(1, b"y" * 200_000, _md5(b"y" * 200_000), lambda _n: None)
    # The first part is right, but the upload carries the label of another file.
    labelled = store.begin(stored, largest.stat().st_size, "label of another")
    first = largest.read_bytes()[: 8 * MIB]
    labelled.send(1, first, _md5(first), lambda _n: None)
    push(sealed.path, oss(), verify=True)
    assert not oss().pending()
    assert push(sealed.path, oss()).sent_bytes == 0


def test_an_object_put_by_another_tool_is_replaced(sealed: Sealed, oss: Opener) -> None:
    push(sealed.path, oss())
    path = max(sealed.files())
    raw = oss()._store._bucket  # type: ignore[attr-defined]
    raw.put_object(f"minilm/{path}", sealed.files()[path])
    assert push(sealed.path, oss()).sent_bytes == len(sealed.files()[path])


def test_damage_in_the_store_is_noticed(
    sealed: Sealed, oss: Opener, server: OssServer, tmp_path: Path
) -> None:
    push(sealed.path, oss())
    for number, data in enumerate(sorted(server.storage.root.rglob("*.object"))):
        whole = data.read_bytes()
        data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 128]))
        with pytest.raises((Tampered, InputError)):
            pull(oss(), tmp_path / f"copy-{number}")
        data.write_bytes(whole)
        assert not (tmp_path / f"copy-{number}").exists()
    pull(oss(), tmp_path / "copy")


def test_a_limit_on_the_bandwidth(sealed: Sealed, oss: Opener, tmp_path: Path) -> None:
    push(sealed.path, oss())
    started = time.monotonic()
    pull(oss(), tmp_path / "copy", rate=20 * MIB)
    assert time.monotonic() - started > 0.9 * (sealed.report.stored_bytes / (20 * MIB)) - 0.3


def test_the_sdk_s_own_crc_is_off() -> None:
    options = StoreOptions(environment={"MODEL_OSS_ENDPOINT": "http://127.0.0.1:9"})
    store = open_store("oss://models/x", options)._store  # type: ignore[attr-defined]
    assert isinstance(store, OssStore)
    assert store._bucket.enable_crc is False


def _md5(data: bytes) -> bytes:
    import hashlib

    return hashlib.md5(data).digest()
