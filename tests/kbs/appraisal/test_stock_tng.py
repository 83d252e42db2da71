"""A real stock TNG, both ends of it, that trusts this attestation service and nothing else.

Needs the binary of the wheel ``tng-sdk`` (`make peers`, or CAI_STOCK_TNG names the folder); skipped
without. Its attestation agent is a few lines here that quote by the simulated platform.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import socketserver
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cai.attest import rcar, ttrpc
from cai.attest.policy import policy_for
from cai.attest.statement import stock_report_data
from kbs.admin.tokens import make_admin_token
from kbs.instance import read_admin_key
from tests.kbs.program import Program, b64u
from tests.kbs.world import Visitor

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

TNG = Path(os.environ.get("CAI_STOCK_TNG", "build/peers")).absolute() / "2.12.0/bin/scripts/tng"
pytestmark = pytest.mark.skipif(
    not TNG.is_file(), reason=f"no stock tng at {TNG} (`make peers`, or set CAI_STOCK_TNG)"
)


def field_one(data: bytes) -> bytes:
    """Bytes of protobuf field 1, the only one of a GetEvidence request."""
    if not data:
        return b""
    assert data[0] == 0x0A
    length, at, shift = 0, 1, 0
    while True:
        length |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 0x80:
            return data[at : at + length]


def as_field_one(data: bytes) -> bytes:
    out, length = bytearray(b"\x0a"), len(data)
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes(out) + bytes([length]) + data


@contextlib.contextmanager
def agent(path: Path, platform: SimulatedPlatform, *, debug: bool = False) -> Iterator[None]:
    """A stock attestation agent on a Unix socket."""
    from cai.attest.sim import GuestSettings

    guest = platform.guest(GuestSettings(debug=debug))

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while head := self.rfile.read(ttrpc.HEADER_SIZE):
                header = ttrpc.Header.decode(head)
                call = ttrpc.Request.decode(self.rfile.read(header.length))
                payload = b""
                if call.method == "GetEvidence":
                    quote = guest.quote(stock_report_data(field_one(call.payload)))
                    evidence = json.dumps(rcar.encode_tdx_evidence(quote, None)).encode()
                    payload = as_field_one(evidence)
                elif call.method == "GetTeeType":
                    payload = as_field_one(b"tdx")
                body = ttrpc.Response(ttrpc.Status.OK, "", payload).encode()
                answer = struct.pack(">IIBB", len(body), header.stream, 2, 0)
                self.wfile.write(answer + body)

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    with Server(str(path), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def tng(directory: Path, name: str, config: dict[str, Any], port: int) -> Iterator[Path]:
    """One end; its log."""
    log = directory / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [TNG, "launch", "--config-content", json.dumps(config)], stdout=out,
            stderr=subprocess.STDOUT, cwd=directory, env={"RUST_LOG": "info", "PATH": "/usr/bin"},
        )  # fmt: skip
        try:
            until = time.monotonic() + 30
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.1)
            yield log
        finally:
            process.kill()
            process.wait(10)


class Backend(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "6")
        self.end_headers()
        self.wfile.write(b"inside")

    def log_message(self, *arguments: Any) -> None:
        del arguments


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, platform: SimulatedPlatform, platform_dir: Path
) -> Iterator[Program]:
    directory = tmp_path_factory.mktemp("kbs")
    (directory / "kbs.toml").write_text('[http]\nprefix = "/cai-test"\n')
    program = Program(
        directory, "--config", "kbs.toml", "--data", "data",
        "--unsafe-simulated-root", platform_dir / "anchors",
    )  # fmt: skip
    try:
        loose = b"unsafe_any_launch_digest = true\nunsafe_without_facts = true"
        text = policy_for(Visitor(platform, gpus=0).facts())
        body = {"policy": b64u(re.sub(rb"launch_digest = .*", loose, text))}
        key = read_admin_key(directory / "data" / "admin.key")
        token = make_admin_token(key, now=datetime.now(UTC))
        done = httpx.post(
            f"{program.ready['admin']}/kbs/v0/verification-policy", json=body, trust_env=False,
            headers={"Authorization": f"Bearer {token}"},
        )  # fmt: skip
        assert done.status_code == 200, done.text
        yield program
    finally:
        program.close()


@contextlib.contextmanager
def tunnel(
    directory: Path, served: Program, platform: SimulatedPlatform, *, debug: bool = False,
    policy: str = "default", ohttp: bool = False,
) -> Iterator[str]:  # fmt: skip
    """URL of an ingress whose egress stands before ``Backend``."""
    backend = ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    threading.Thread(target=backend.serve_forever, daemon=True).start()
    inside, outside = free_port(), free_port()
    aa = directory / "aa.sock"
    trust = {"as_addr": f"{served.url}/as/", "policy_ids": [policy]}
    extra: dict[str, Any] = {"ohttp": {}} if ohttp else {}
    egress = {
        "add_egress": [
            {
                "mapping": {
                    "in": {"host": "127.0.0.1", "port": inside},
                    "out": {"host": "127.0.0.1", "port": backend.server_address[1]},
                },
                "attest": {"aa_addr": f"unix://{aa}"},
                **extra,
            }
        ]
    }
    ingress = {
        "add_ingress": [
            {
                "mapping": {
                    "in": {"host": "127.0.0.1", "port": outside},
                    "out": {"host": "127.0.0.1", "port": inside},
                },
                "verify": trust,
                **extra,
            }
        ]
    }
    with (
        agent(aa, platform, debug=debug),
        tng(directory, "egress", egress, inside),
        tng(directory, "ingress", ingress, outside),
    ):
        yield f"http://127.0.0.1:{outside}"
    backend.shutdown()


def ask(url: str) -> httpx.Response | None:
    try:
        return httpx.get(url, trust_env=False, timeout=20)
    except httpx.HTTPError:
        return None


def logged(log: Path, text: str) -> bool:
    until = time.monotonic() + 5
    while time.monotonic() < until:
        if text in log.read_text():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("ohttp", [False, True], ids=["rats-tls", "ohttp"])
def test_both_ends_of_a_stock_tng_are_satisfied(
    served: Program, platform: SimulatedPlatform, tmp_path: Path, ohttp: bool
) -> None:
    with tunnel(tmp_path, served, platform, ohttp=ohttp) as url:
        answer = ask(url)
        told = (tmp_path / "ingress.log").read_text()[-2500:]
        assert answer is not None, told
        assert (answer.status_code, answer.text) == (200, "inside"), told


def test_a_debug_guest_is_refused_to_it(
    served: Program, platform: SimulatedPlatform, tmp_path: Path
) -> None:
    with tunnel(tmp_path, served, platform, debug=True) as url:
        answer = ask(url)
        assert answer is None or answer.status_code != 200
        # What it shows its operator is what we said.
        assert logged(tmp_path / "ingress.log", "tdx.debug")


def test_a_policy_that_is_not_there_is_refused_to_it(
    served: Program, platform: SimulatedPlatform, tmp_path: Path
) -> None:
    with tunnel(tmp_path, served, platform, policy="stricter") as url:
        answer = ask(url)
        assert answer is None or answer.status_code != 200
        assert logged(tmp_path / "ingress.log", "stricter")
