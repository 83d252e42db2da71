"""Listeners: TLS that is exchanged while running, Unix sockets, slow and too many clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cai.errors import CaiError, InputMissing, ListenerFailed, SettingError, UsageError
from kbs.admin.settings import AdminSettings
from kbs.admin.tokens import make_admin_token
from kbs.instance import read_admin_key
from kbs.server import connection
from kbs.server.config import ServeSettings
from kbs.server.listeners import Address, bind_unix, close_listener, open_listener, url_of
from kbs.server.service import open_certificates
from kbs.server.settings import TlsSettings
from kbs.server.tls import Certificate
from kbs.server.watch import Watch, Watched, fingerprint
from tests.kbs.program import Program, StockClient

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform


def make_pair(directory: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    import ipaddress

    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
        .public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    chain, private = directory / "tls.pem", directory / "tls.key"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )  # fmt: skip
    return chain, private


def served_name(url: str) -> str:
    """Common name of the certificate that a listener shows now."""
    parts = httpx.URL(url)
    pem = ssl.get_server_certificate((parts.host, parts.port or 443))
    (name,) = x509.load_pem_x509_certificate(pem.encode()).subject
    return str(name.value)


@pytest.fixture
def secure(tmp_path: Path, platform_dir: Path) -> Iterator[Program]:
    make_pair(tmp_path, "first")
    (tmp_path / "kbs.toml").write_text(
        '[tls]\ncertificate = "tls.pem"\nkey = "tls.key"\n'
        '[admin]\nlisten = "unix:admin.sock"\n'
    )
    program = Program(
        tmp_path, "--config", "kbs.toml", "--unsafe-simulated-root", platform_dir / "anchors",
        "--admin-listen", "unix:admin.sock",
    )  # fmt: skip
    yield program
    program.close()


# TLS.


def test_a_stock_client_over_tls(
    secure: Program, tmp_path: Path, platform: SimulatedPlatform
) -> None:
    assert secure.url.startswith("https://")
    context = ssl.create_default_context(cafile=tmp_path / "tls.pem")
    client = StockClient(secure.url, platform, verify=context)
    cookie = client.auth().headers["set-cookie"].lower()
    assert "secure" in cookie
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.handshake().status_code == 200
    with pytest.raises(httpx.HTTPError):
        httpx.get(secure.url.replace("https", "http") + "/healthz", trust_env=False)


def test_a_certificate_is_exchanged_while_running(secure: Program, tmp_path: Path) -> None:
    assert served_name(secure.url) == "first"
    make_pair(tmp_path, "second")
    secure.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: served_name(secure.url) == "second")
    # Half of a pair, or rubbish, changes nothing and is said.
    (tmp_path / "tls.pem").write_text("rubbish")
    secure.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: "not used" in secure.said())
    assert served_name(secure.url) == "second"
    make_pair(tmp_path, "third")
    secure.process.send_signal(signal.SIGHUP)
    assert eventually(lambda: served_name(secure.url) == "third")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_of_tls_are_refused(secure: Program) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    parts = httpx.URL(secure.url)
    with (
        pytest.raises((ssl.SSLError, ConnectionError)),
        socket.create_connection((parts.host, parts.port or 0), 5) as plain,
        context.wrap_socket(plain),
    ):
        pass


@pytest.mark.parametrize("bend", ["missing", "swapped", "rubbish", "other", "encrypted"])
def test_pairs_that_do_not_belong_together(tmp_path: Path, bend: str) -> None:
    chain, key = make_pair(tmp_path, "x")
    if bend == "missing":
        key.unlink()
    elif bend == "swapped":
        chain, key = key, chain
    elif bend == "rubbish":
        chain.write_bytes(b"\xff")
    elif bend == "other":
        (tmp_path / "o").mkdir()
        key = make_pair(tmp_path / "o", "y")[1]
    else:
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        key.write_bytes(
            private.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
                serialization.BestAvailableEncryption(b"x"),
            )
        )  # fmt: skip
    with pytest.raises((SettingError, InputMissing)):
        Certificate(chain, key)


# The admin listener.


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "kbs.example:0"])
def test_administration_beyond_loopback_needs_tls(tmp_path: Path, listen: str) -> None:
    address = Address.parse(listen, "--admin-listen")
    with pytest.raises(UsageError, match="TLS"):
        open_certificates(ServeSettings(), address)
    chain, key = make_pair(tmp_path, "x")
    # Its own certificate, or the main one.
    own = ServeSettings(admin=AdminSettings(certificate=chain, private_key=key))
    assert open_certificates(own, address)[0] is None
    assert open_certificates(own, address)[1] is not None
    main, admin = open_certificates(ServeSettings(tls=TlsSettings(chain, key)), address)
    assert main is admin is not None


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0", "localhost:0", "unix:/x"])
def test_nobody_else_reaches_loopback(listen: str) -> None:
    address = Address.parse(listen, "--admin-listen")
    assert open_certificates(ServeSettings(), address) == (None, None)


def test_administration_over_a_unix_socket(secure: Program, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secure.ready["admin"] == "unix:admin.sock"
    key = read_admin_key(tmp_path / "kbs-data" / "admin.key")
    token = make_admin_token(key, now=datetime.now(UTC))
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://kbs") as http:
        headers = {"Authorization": f"Bearer {token}"}
        assert http.get("/kbs/v0/whoami", headers=headers).status_code == 200
        assert http.get("/kbs/v0/whoami").status_code == 401
        assert http.get("/kbs/v0/auth").status_code == 404
    assert secure.stop() == 143
    assert not path.exists()


# Sockets.


def test_a_dead_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = bind_unix(path)
    with pytest.raises(ListenerFailed, match="already"):
        bind_unix(path)
    first.close()  # as a process that was killed
    second = open_listener(Address(path=path))
    assert url_of(second, tls=False) == f"unix:{path}"
    close_listener(second, path)
    assert not path.exists()


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ListenerFailed):
        bind_unix(path)
    assert path.read_text() == "precious"
    with pytest.raises(ListenerFailed):
        bind_unix(tmp_path / "missing" / "s")
    with pytest.raises(ListenerFailed):
        bind_unix(tmp_path / ("x" * 200))


@pytest.mark.parametrize("text", ["unix:", "unix:a\x00b", "x", "127.0.0.1"])
def test_addresses_of_another_form(text: str) -> None:
    with pytest.raises(UsageError):
        Address.parse(text, "--listen")


# Connections.


def eventually(found: object, seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            if callable(found) and found():
                return True
        time.sleep(0.1)
    return False


async def spoken_to(limit: int, speak: list[bytes]) -> list[bytes]:
    """What clients hear, one each, that speak at once to a listener with few places."""
    import uvicorn

    async def app(_scope: object, _receive: object, send: object) -> None:
        assert callable(send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"heard"})

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=connection.bounded_connections(limit), lifespan="off", log_config=None, ws="none",
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    running = asyncio.create_task(server.serve([listener]))
    while not server.started:
        await asyncio.sleep(0.01)
    opened = [await asyncio.open_connection(*listener.getsockname()) for _ in speak]
    heard = []
    try:
        for (_, writer), text in zip(opened, speak, strict=True):
            writer.write(text)
        for reader, _ in opened:
            try:
                heard.append(await asyncio.wait_for(reader.read(4096), 5))
            except ConnectionError:
                heard.append(b"")
    finally:
        for _, writer in opened:
            writer.close()
        server.should_exit = True
        await running
    return heard


GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


def test_only_so_many_connections() -> None:
    heard = asyncio.run(spoken_to(2, [GET, GET, GET, GET]))
    assert sorted(bool(item) for item in heard) == [False, False, True, True]


def test_a_slow_head_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    began = time.monotonic()
    silent, slow, quick = asyncio.run(spoken_to(9, [b"", b"GET / HTTP/1.1\r\nHost:", GET]))
    assert time.monotonic() - began < 4
    assert (silent, slow) == (b"", b"")
    assert b"heard" in quick


@pytest.mark.parametrize("text", [b"\x16\x03\x01\x02\x00", b"GET", b"\x00" * 64])
def test_what_is_no_http_is_told_in_the_usual_form(text: bytes) -> None:
    (heard,) = asyncio.run(spoken_to(9, [text + b"\r\n\r\n"]))
    assert heard.startswith(b"HTTP/1.1 400 ")
    value = json.loads(heard.partition(b"\r\n\r\n")[2])
    assert value["type"].endswith("/HTTPFailed")


# Files that are looked after.


def test_what_changed_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, directory = tmp_path / "f", tmp_path / "d"
    directory.mkdir()
    file.write_text("1")
    loaded: list[str] = []

    def load() -> None:
        text = file.read_text()
        if text == "bad":
            raise SettingError("cannot be used")
        loaded.append(text)

    async def story() -> None:
        watch = Watch([Watched("thing", (file, directory), load)])
        await watch.look()
        assert loaded == []
        file.write_text("22")
        await watch.look()
        await watch.look()
        assert loaded == ["22"]
        (directory / "new").write_text("x")
        await watch.look()
        assert loaded == ["22", "22"]
        file.write_text("bad")
        await watch.look()
        await watch.look()
        assert caplog.text.count("cannot be used") == 1
        file.write_text("4444")
        await watch.look()
        assert loaded[-1] == "4444"

    asyncio.run(story())


def test_a_link_that_is_turned_is_a_change(tmp_path: Path) -> None:
    # How mounted secrets are exchanged: a link to another directory.
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tls.pem").write_text("same")
        os.utime(tmp_path / name / "tls.pem", (1, 1))
    (tmp_path / "now").symlink_to("one")
    before = fingerprint([tmp_path / "now" / "tls.pem"])
    (tmp_path / "now").unlink()
    (tmp_path / "now").symlink_to("two")
    assert fingerprint([tmp_path / "now" / "tls.pem"]) != before
    assert fingerprint([tmp_path / "missing"]) == ()


def test_collateral_is_exchanged_while_running(
    tmp_path: Path, platform_dir: Path, platform: SimulatedPlatform
) -> None:
    from kbs.server.service import load_endorsements, open_broker

    collateral = tmp_path / "collateral"
    collateral.mkdir()
    settings = ServeSettings(
        tmp_path / "data", collateral=collateral, unsafe_simulated_root=platform_dir / "anchors"
    )
    broker = open_broker(settings)
    try:
        from tests.kbs.world import Clock, Site, Visitor

        site = Site(broker, settings, Clock())
        visitor = Visitor(platform)
        nonce, cookie = site.auth()
        refused = site.attest(cookie, visitor.body(nonce))
        assert refused.status_code == 403
        for file in (platform_dir / "anchors" / "collateral").iterdir():
            (collateral / file.name).write_bytes(file.read_bytes())
        broker.verifier.exchange(load_endorsements(settings))
        visitor.attested(site)
        (collateral / "rubbish.json").write_text("{")
        with pytest.raises(CaiError):
            load_endorsements(replace(settings, collateral=collateral / "rubbish.json"))
    finally:
        broker.close()
