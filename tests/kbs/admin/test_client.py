"""The administrator's end: over which ways it speaks, and what it makes of the answers."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai.errors import (
    FormatError,
    InputError,
    InputMissing,
    PeerError,
    PeerUnreachable,
    Refused,
    Unauthenticated,
    Unavailable,
    Undecided,
    UsageError,
)
from kbs.admin.client import AdminClient
from kbs.admin.people import parse_key
from kbs.admin.proposal_form import Proposal

KEY = Ed25519PrivateKey.generate()
PROPOSAL = Proposal.about(
    b"x", kbs="ab", realm="simulated", action="a.b", object="o", state="", proposer="p",
    created=1, expires=2,
)  # fmt: skip


class Peer(http.server.BaseHTTPRequestHandler):
    """Answers what the test says and remembers what it was asked."""

    answers: list[tuple[int, bytes]]
    asked: list[tuple[str, str, dict[str, str], bytes]]

    def _serve(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        self.asked.append(
            (self.command, self.path, dict(self.headers), self.rfile.read(length))
        )
        status, body = self.answers.pop(0) if self.answers else (200, b"{}")
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


class UnixServer(http.server.ThreadingHTTPServer):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = self.socket.accept()
        return connection, ("unix", 0)


def running(server: http.server.ThreadingHTTPServer) -> Iterator[Any]:
    handler: Any = server.RequestHandlerClass
    handler.answers, handler.asked = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def peer() -> Iterator[Any]:
    yield from running(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Peer))


def url(server: Any, scheme: str = "http") -> str:
    return f"{scheme}://127.0.0.1:{server.server_address[1]}"


def client(address: str, **more: Any) -> AdminClient:
    return AdminClient(address, more.pop("key", KEY), clock=lambda: datetime.now(UTC), **more)


def test_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for server in running(UnixServer(str(path), Peer)):  # type: ignore[arg-type]
        for address in (f"unix:{path}", f"unix://{path}"):
            with client(address) as own:
                assert own.get("whoami") == {}
        with client(f"unix:{path}#/cai-test/") as own:
            own.get("whoami")
        asked = server.RequestHandlerClass.asked
        assert [path for _, path, _, _ in asked] == [
            "/kbs/v0/whoami", "/kbs/v0/whoami", "/cai-test/kbs/v0/whoami",
        ]  # fmt: skip
    with pytest.raises(PeerUnreachable), client(f"unix:{tmp_path / 'missing'}") as own:
        own.get("whoami")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    import ipaddress

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kbs.test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, private = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )  # fmt: skip
    return chain, private


def test_over_tls_with_a_pinned_authority(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    for _ in running(server):
        with client(url(server, "https"), ca=certificate[0]) as own:
            assert own.get("whoami") == {}
        # The system's authorities do not know it, and nobody else's name will do.
        with pytest.raises(PeerUnreachable), client(url(server, "https")) as own:
            own.get("whoami")
        other = f"https://localhost:{server.server_address[1]}"
        with pytest.raises(PeerUnreachable), client(other, ca=certificate[0]) as own:
            own.get("whoami")
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(InputError):
        client("https://127.0.0.1:1", ca=tmp_path / "junk.pem")
    with pytest.raises(InputMissing):
        client("https://127.0.0.1:1", ca=tmp_path / "missing.pem")


@pytest.mark.parametrize(
    "address", ["http://192.0.2.1:8081", "http://example.org", "ftp://127.0.0.1", "x", "", "http:"]
)
def test_a_key_never_goes_in_clear_over_a_network(address: str) -> None:
    with pytest.raises(UsageError):
        client(address)


def test_a_key_or_a_token_is_needed(peer: Any) -> None:
    with pytest.raises(UsageError):
        client(url(peer), key=None)
    with client(url(peer), key=None, token="made.else.where") as own:
        own.get("whoami")
        assert Peer.asked[0][2]["Authorization"] == "Bearer made.else.where"
        with pytest.raises(UsageError):
            own.approve({"proposal": PROPOSAL.to_json()})


def test_proxies_of_the_environment_are_not_asked(
    peer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with client(url(peer)) as own:
        assert own.get("whoami") == {}


ERRORS = [
    (400, InputError), (401, Unauthenticated), (403, Refused), (404, InputMissing),
    (409, Refused), (413, InputError), (500, PeerError), (503, Unavailable), (302, PeerError),
]  # fmt: skip


@pytest.mark.parametrize(("status", "kind"), ERRORS)
def test_refusals_become_our_errors(peer: Any, status: int, kind: type[Exception]) -> None:
    told = {"type": "https://x/errors/SerdeError", "detail": "why", "hint": "do that"}
    Peer.answers = [(status, json.dumps(told).encode()), (status, b"junk"), (status, b"[1]")]
    with client(url(peer)) as own:
        with pytest.raises(kind) as refused:
            own.get("x")
        assert (str(refused.value), refused.value.hint) == ("why", "do that")  # type: ignore[attr-defined]
        for _ in range(2):
            with pytest.raises(PeerError):
                own.get("x")


@pytest.mark.parametrize("body", [b"", b"junk", b"[]", b"1", b'"x"', b'{"a":1,"a":2}', b"\xff"])
def test_answers_of_another_form_are_refused(peer: Any, body: bytes) -> None:
    Peer.answers = [(200, body)]
    with client(url(peer)) as own, pytest.raises(FormatError):
        own.get("x")


def shown(**changes: Any) -> dict[str, Any]:
    value = {
        "id": PROPOSAL.id, "proposal": PROPOSAL.to_json(), "missing": 1, "proposer_counts": True,
    }  # fmt: skip
    return {**value, **changes}


def test_a_change_that_is_proposed_is_signed_and_not_done(peer: Any) -> None:
    Peer.answers = [(202, json.dumps(shown(missing=2)).encode()),
                    (200, json.dumps(shown()).encode())]  # fmt: skip
    with client(url(peer)) as own, pytest.raises(Undecided, match="waits for 1 more") as told:
        own.post("resource/a/b/c", b"x")
    assert told.value.machine_code == "proposed"
    assert PROPOSAL.id in str(told.value.hint)
    method, path, _, body = Peer.asked[1]
    assert (method, path) == ("POST", f"/kbs/v0/proposal/{PROPOSAL.id}/approve")
    public = parse_key(KEY.public_key().public_bytes_raw().hex())
    assert PROPOSAL.signed_by(public, json.loads(body)["signature"])


def test_a_proposer_who_does_not_count_does_not_sign(peer: Any) -> None:
    Peer.answers = [(202, json.dumps(shown(missing=2, proposer_counts=False)).encode())]
    with client(url(peer)) as own, pytest.raises(Undecided, match="waits for 2 more"):
        own.delete("resource/a/b/c")
    assert len(Peer.asked) == 1


def test_what_is_no_proposal_is_not_signed(peer: Any) -> None:
    for bent in ({}, {"proposal": None}, {"proposal": {**PROPOSAL.to_json(), "more": 1}}):
        Peer.answers = [(202, json.dumps({"proposer_counts": True, **bent}).encode())]
        with client(url(peer)) as own, pytest.raises(FormatError):
            own.post("x")
