"""``cai collateral``: a bundle is fetched once, kept, and shown with its dates."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

FMSPC = b"SIMUL\x00".hex()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cai.attest.sim import GuestSettings, SimulatedPlatform

    directory = tmp_path_factory.mktemp("collateral")
    SimulatedPlatform.create(directory, now=datetime.now(UTC))
    guest = SimulatedPlatform.load(directory / "platform").guest(GuestSettings())
    (directory / "quote.bin").write_bytes(guest.quote(bytes(64)))
    return directory


@pytest.fixture(scope="module")
def asked() -> list[str]:
    return []


@pytest.fixture(scope="module")
def pcs(world: Path, asked: list[str]) -> Iterator[str]:
    (file,) = (world / "anchors" / "collateral").glob("*.json")
    members = json.loads(file.read_text())

    def body(name: str, part: str) -> bytes:
        return f'{{"{name}":{members[part]},"signature":"{members[part + "_signature"]}"}}'.encode()

    answers = {
        "tcb": (body("tcbInfo", "tcb_info"), "TCB-Info-Issuer-Chain", "tcb_info_issuer_chain"),
        "identity": (
            body("enclaveIdentity", "qe_identity"), "SGX-Enclave-Identity-Issuer-Chain",
            "qe_identity_issuer_chain",
        ),
        "pckcrl": (
            bytes.fromhex(members["pck_crl"]), "SGX-PCK-CRL-Issuer-Chain", "pck_crl_issuer_chain",
        ),
        "rootcacrl": (members["root_ca_crl"].encode(), "X-None", "root_ca_crl"),
    }  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            content, header, part = answers[urlsplit(self.path).path.rpartition("/")[2]]
            self.send_response(200)
            self.send_header(header, quote(members[part]))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "cai", "collateral", *map(str, arguments), "--json"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    value = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    return done.returncode, value, done.stdout + done.stderr


def fetch(world: Path, pcs: str, out: Path, *more: str | Path) -> tuple[int, dict[str, Any], str]:
    return run(
        "fetch", "--out", out, "--pcs", pcs, "--unsafe-simulated-root", world / "anchors", *more
    )


def test_fetch_keep_and_show(world: Path, pcs: str, asked: list[str], tmp_path: Path) -> None:
    out = tmp_path / "bundle.tar"
    status, value, text = fetch(world, pcs, out, "--fmspc", FMSPC.upper())
    assert status == 0, text
    assert (value["fetched"], value["kept"]) == (1, 0)
    assert value["items"][0]["state"] == "valid"
    asked.clear()
    status, value, text = fetch(world, pcs, out)
    assert (status, value["fetched"], value["kept"], asked) == (0, 0, 1, []), text
    status, value, _ = fetch(world, pcs, out, "--refresh")
    assert (status, value["fetched"], len(asked)) == (0, 1, 4)
    anchors = world / "anchors"
    status, value, _ = run("show", out, "--unsafe-simulated-root", anchors)
    assert status == 0
    (item,) = value["items"]
    assert (item["fmspc"], item["ca"], item["state"], item["days_left"]) == (
        FMSPC, "platform", "valid", 29,
    )  # fmt: skip
    # Under the vendor's root, or at another time, it does not verify; the dates are shown still.
    for more in (["--at", "2060-01-01T00:00:00Z", "--unsafe-simulated-root", str(anchors)], []):
        status, value, _ = run("show", out, *more)
        assert status == 0
        assert value["items"][0]["state"] != "valid"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.tar"]


def test_fetch_by_evidence_is_what_verify_takes(world: Path, pcs: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle.tar"
    status, _, text = fetch(world, pcs, out, "--evidence", world / "quote.bin")
    assert status == 0, text
    from cai.attest.tdx.collateral import load_collateral

    assert load_collateral(out).find(FMSPC, "platform") is not None


def test_show_a_directory_and_a_file(world: Path) -> None:
    directory = world / "anchors" / "collateral"
    (file,) = directory.glob("*.json")
    for path in (directory, file):
        status, value, _ = run("show", path, "--unsafe-simulated-root", world / "anchors")
        assert (status, len(value["items"])) == (0, 1)


def test_refusals(world: Path, pcs: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle.tar"
    for more, status in (
        ([], 2),
        (["--fmspc", "xyz"], 2),
        (["--fmspc", FMSPC, "--ca", "root"], 2),
        (["--fmspc", FMSPC, "--update", "never"], 2),
        (["--fmspc", FMSPC, "--pcs", "ftp://x"], 2),
        (["--fmspc", "00" * 6], 3),
        (["--evidence", str(tmp_path / "absent")], 3),
        (["--fmspc", FMSPC, "--pcs", "http://127.0.0.1:1"], 8),
    ):
        got, _, text = fetch(world, pcs, out, *more)
        assert got == status, (more, text)
        assert not out.exists()
    got, _, _ = run("fetch", "--out", out, "--pcs", pcs, "--fmspc", FMSPC)
    assert got == 7  # signed by a simulator, and nobody said so
    assert not out.exists()
    out.write_bytes(b"not a bundle")
    assert fetch(world, pcs, out, "--fmspc", FMSPC)[0] == 3
    assert out.read_bytes() == b"not a bundle"
