"""What a stock TNG needs around it: an attestation agent, an attestation service, its own binary.

The agent and the service are stand-ins that speak the real wire formats for TEE ``sample``; the
binary is the real one, from the wheel ``tng-sdk`` (requirements/peers.txt).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cai.attest import ttrpc

BINARIES = Path(os.environ.get("CAI_STOCK_TNG", "build/peers")).absolute()
VERSIONS = ("2.12.0", "2.7.3")
PROFILE = "tag:github.com,2024:confidential-containers/Trustee"


def binary(version: str) -> Path | None:
    """The real binary of a version, or ``None``."""
    for place in ("bin/scripts/tng", "bin/tng"):
        path = BINARIES / version / place
        if path.is_file():
            return path
    return None


def b64u(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class StockAgent:
    """The attestation agent: TEE ``sample``."""

    socket: Path
    additional: bytes = b""
    calls: list[str] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[StockAgent]:
        server = await asyncio.start_unix_server(self._serve, str(self.socket))
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                header = ttrpc.Header.decode(await reader.readexactly(ttrpc.HEADER_SIZE))
                request = ttrpc.Request.decode(await reader.readexactly(header.length))
                body = self._answer(request).encode()
                head = ttrpc.Header(len(body), header.stream, ttrpc.MessageType.RESPONSE)
                writer.write(head.encode() + body)
                await writer.drain()
        writer.close()

    def _answer(self, request: ttrpc.Request) -> ttrpc.Response:
        self.calls.append(request.method)
        if request.service != "attestation_agent.AttestationAgentService":
            return ttrpc.Response(ttrpc.Status.UNIMPLEMENTED, "no such service", b"")
        if request.method == "GetEvidence":
            data = dict(ttrpc.read_fields(request.payload))[1]
            assert isinstance(data, bytes)
            told = {"svn": "1", "report_data": base64.b64encode(data).decode()}
            payload = ttrpc.bytes_field(1, json.dumps(told).encode())
        elif request.method == "GetTeeType":
            payload = ttrpc.bytes_field(1, b"sample")
        elif request.method == "GetAdditionalEvidence":
            payload = ttrpc.bytes_field(1, self.additional)
        else:
            return ttrpc.Response(ttrpc.Status.UNIMPLEMENTED, "no such method", b"")
        return ttrpc.Response(ttrpc.Status.OK, "", payload)


@dataclass
class StockService:
    """The attestation service: certificate, challenge, attestation."""

    status: str = "affirming"
    lifetime_s: int = 300
    policies: str = "default"
    port: int = 0
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        root_key = ec.generate_private_key(ec.SECP256R1())
        self._root = _certificate("fake AS root", root_key, "fake AS root", root_key, ca=True)
        self._leaf = _certificate("fake AS", self._key, "fake AS root", root_key, ca=False)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/as/"

    @property
    def root_pem(self) -> bytes:
        return self._root.public_bytes(Encoding.PEM)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[StockService]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, ValueError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, target, _version = head.split("\r\n")[0].split(" ")
                length = 0
                for line in head.split("\r\n")[1:]:
                    name, _, value = line.partition(":")
                    if name.lower() == "content-length":
                        length = int(value)
                body = await reader.readexactly(length)
                status, answer = self._answer(method, target, body)
                writer.write(
                    f"HTTP/1.1 {status} X\r\ncontent-length: {len(answer)}\r\n\r\n".encode()
                    + answer
                )
                await writer.drain()
        writer.close()

    def _answer(self, method: str, target: str, body: bytes) -> tuple[int, bytes]:
        route = target.rsplit("/", 1)[-1]
        self.calls.append(route)
        if (method, route) == ("GET", "certificate"):
            return 200, self.root_pem
        if (method, route) == ("POST", "challenge"):
            token = self.sign({"nonce": "n", "exp": int(time.time()) + 300})
            return 200, json.dumps({"nonce": "bg==", "extra-params": {"jwt": token}}).encode()
        if (method, route) == ("POST", "attestation"):
            return self._attest(json.loads(body))
        return 404, b"{}"

    def _attest(self, request: dict[str, Any]) -> tuple[int, bytes]:
        main = request["verification_requests"][0]
        claims = main["runtime_data"].get("structured")
        evidence = json.loads(base64.urlsafe_b64decode(main["evidence"] + "=="))
        if claims is not None and main["tee"] == "sample":
            from hashlib import sha384

            from cai import jcs

            expected = base64.b64encode(sha384(jcs.canonical(claims)).digest()).decode()
            if evidence["report_data"] != expected:
                return 500, b"report data mismatch"
        now = int(time.time())
        submod = {
            "ear.status": self.status,
            "ear.trustworthiness-vector": {"hardware": 2},
            "ear.appraisal-policy-id": self.policies,
            "ear.veraison.annotated-evidence": {"runtime_data_claims": claims},
        }
        token = self.sign(
            {
                "eat_profile": PROFILE,
                "iat": now,
                "exp": now + self.lifetime_s,
                "ear.verifier-id": {"developer": "x", "build": "y"},
                "submods": {"cpu0": submod},
            }
        )
        return 200, token.encode()

    def sign(self, claims: dict[str, Any]) -> str:
        numbers = self._key.public_key().public_numbers()
        x5c = [b64u(item.public_bytes(Encoding.DER)) for item in (self._leaf, self._root)]
        jwk = {
            "alg": "ES256", "kty": "EC", "crv": "P-256",
            "x": b64u(numbers.x.to_bytes(32)), "y": b64u(numbers.y.to_bytes(32)), "x5c": x5c,
        }  # fmt: skip
        header = b64u(json.dumps({"typ": "JWT", "alg": "ES256", "jwk": jwk}).encode())
        signed = f"{header}.{b64u(json.dumps(claims).encode())}"
        r, s = decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{b64u(r.to_bytes(32) + s.to_bytes(32))}"


def _certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, by: ec.EllipticCurvePrivateKey,
    *, ca: bool,
) -> x509.Certificate:  # fmt: skip
    now = datetime.now(UTC)
    usage = [False] * 9
    usage[0] = not ca
    usage[5] = ca
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(*usage), critical=True)
        .sign(by, hashes.SHA256())
    )


@contextlib.contextmanager
def stock_tng(version: str, config: dict[str, Any], directory: Path) -> Iterator[Path]:
    """The real binary with this configuration; yields its log."""
    path = binary(version)
    assert path is not None, version
    log = directory / f"tng-{version}-{time.monotonic_ns()}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [path, "launch", "--config-content", json.dumps(config)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={"RUST_LOG": "info", "PATH": os.environ["PATH"], "HOME": str(directory)},
        )
        try:
            yield log
        finally:
            process.kill()
            process.wait()
