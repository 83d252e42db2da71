"""The broker as a program of its own, and a stock client of Trustee's protocol that talks to it.

The client is written from the protocol's description alone (reference: kbs_protocol of the guest
components): its JSON, its digests, its retries, and the way it encodes the protected header again
before it opens a JWE. It shares no code with ``cai`` but the simulated hardware.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from hashlib import sha384
from http.cookiejar import CookieJar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

ROOT = Path(__file__).parents[2]
TRIES = 3


def run_kbs(
    *arguments: str | Path, cwd: Path, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from kbs.cli import main; main()", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "http_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip


class Program:
    """``kbs serve``, running.

    Args:
        cwd: where it runs.
        arguments: options beside the two listeners, which take free ports.
    """

    def __init__(self, cwd: Path, *arguments: str | Path) -> None:
        command = [sys.executable, "-c", "from kbs.cli import main; main()", "serve", "--json"]
        for option in ("--listen", "--admin-listen"):
            if option not in arguments:
                command += [option, "127.0.0.1:0"]
        self.errors = (cwd / "errors.txt").open("a+")
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)], cwd=cwd, stdout=subprocess.PIPE, stderr=self.errors,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        self.ready: dict[str, Any] = json.loads(line)

    @property
    def url(self) -> str:
        url: str = self.ready["listening"]
        return url

    def said(self) -> str:
        self.errors.flush()
        self.errors.seek(0)
        return self.errors.read()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)
        self.errors.close()


def b64u(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64u(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Key:
    """A stock client's key: EC on either curve, or RSA."""

    def __init__(self, kind: str = "P-256") -> None:
        self.private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
        if kind.startswith("RSA"):
            bits = int(kind.partition("-")[2] or 2048)
            self.private = rsa.generate_private_key(65537, bits)
            numbers = self.private.public_key().public_numbers()
            self.jwk = {
                "kty": "RSA", "alg": "RSA-OAEP-256",
                "n": b64u(numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8)),
                "e": b64u(numbers.e.to_bytes(3)),
            }  # fmt: skip
            return
        curve, size = {"P-256": (ec.SECP256R1(), 32), "P-521": (ec.SECP521R1(), 66)}[kind]
        self.private = ec.generate_private_key(curve)
        point = self.private.public_key().public_numbers()
        self.jwk = {
            "kty": "EC", "crv": kind, "alg": "ECDH-ES+A256KW",
            "x": b64u(point.x.to_bytes(size)), "y": b64u(point.y.to_bytes(size)),
        }  # fmt: skip

    def open(self, answer: bytes) -> bytes:
        """Open a flattened JWE as stock clients do."""
        value = json.loads(answer)
        header = json.loads(unb64u(value["protected"]))
        # The header becomes a struct (alg, enc, and a sorted map of the rest) and is encoded again.
        rest = {name: header[name] for name in sorted(header) if name not in ("alg", "enc")}
        for name, item in rest.items():
            if isinstance(item, dict):
                rest[name] = dict(sorted(item.items()))
        again = {"alg": header["alg"], "enc": header["enc"], **rest}
        aad = b64u(json.dumps(again, separators=(",", ":")).encode()).encode()
        wrapped = unb64u(value["encrypted_key"])
        if isinstance(self.private, rsa.RSAPrivateKey):
            assert header["alg"] == "RSA-OAEP-256"
            oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
            content_key = self.private.decrypt(wrapped, oaep)
        else:
            content_key = aes_key_unwrap(self._agreed(header["epk"]), wrapped)
        sealed = unb64u(value["ciphertext"]) + unb64u(value["tag"])
        return AESGCM(content_key).decrypt(unb64u(value["iv"]), sealed, aad)

    def _agreed(self, epk: dict[str, str]) -> bytes:
        assert isinstance(self.private, ec.EllipticCurvePrivateKey)
        x, y = (int.from_bytes(unb64u(epk[name])) for name in ("x", "y"))
        other = ec.EllipticCurvePublicNumbers(x, y, self.private.curve).public_key()
        z = self.private.exchange(ec.ECDH(), other)
        name = b"ECDH-ES+A256KW"
        info = len(name).to_bytes(4) + name + bytes(8) + (256).to_bytes(4)
        digest = hashes.Hash(hashes.SHA256())
        digest.update((1).to_bytes(4) + z + info)
        return digest.finalize()


def jcs_bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass
class StockClient:
    """A client of one broker.

    Attributes:
        url: ``TRUSTEE_URL``.
        platform: its simulated hardware.
        key: made for this client.
        version: protocol version.
        gpus: how many devices it has.
        handshakes: how many it made.
        statement: text of our own member in the additional evidence, if any.
    """

    url: str
    platform: SimulatedPlatform
    key: Key = field(default_factory=Key)
    version: str = "0.4.0"
    gpus: int = 1
    debug: bool = False
    statement: dict[str, Any] | None = None
    extra: Any = field(default_factory=dict)
    handshakes: int = 0
    token: str = ""
    verify: Any = True

    def __post_init__(self) -> None:
        self.http = httpx.Client(
            trust_env=False, timeout=60, verify=self.verify, cookies=CookieJar(),
            headers={"User-Agent": "attestation-agent-kbs-client/0.1.0"},
        )  # fmt: skip

    def route(self, path: str) -> str:
        return f"{self.url}/kbs/v0/{path}"

    def evidence(self, nonce: str) -> tuple[Any, str]:
        """Primary evidence and the text of the additional evidence."""
        from cai.attest.sim import GuestSettings

        guest = self.platform.guest(GuestSettings(debug=self.debug))
        device_digest = sha384(jcs_bytes({"nonce": nonce, "tee-pubkey": self.key.jwk})).digest()
        additional = ""
        if self.version == "0.4.0" and (self.gpus or self.statement is not None):
            value: dict[str, Any] = {}
            if self.gpus:
                devices = self.platform.devices(self.gpus).collect(device_digest[:32])
                value["nvidia"] = {
                    "device_evidence_list": [
                        {
                            "arch": item.arch, "uuid": "unknown",
                            "evidence": base64.b64encode(item.report).decode(),
                            "certificate": base64.b64encode(item.chain).decode(),
                        }
                        for item in devices
                    ]
                }  # fmt: skip
            if self.statement is not None:
                value["cai"] = self.statement
            additional = json.dumps(value)
        bound = device_digest
        if self.version == "0.4.0":
            runtime = {
                "additional-evidence": additional, "nonce": nonce, "tee-pubkey": self.key.jwk,
            }  # fmt: skip
            bound = sha384(jcs_bytes(runtime)).digest()
        quote = guest.quote(bound.ljust(64, b"\0"))
        return {"quote": base64.b64encode(quote).decode(), "cc_eventlog": None}, additional

    def auth(self) -> httpx.Response:
        return self.http.post(
            self.route("auth"),
            json={"version": self.version, "tee": "tdx", "extra-params": self.extra},
        )

    def message(self, nonce: str) -> dict[str, Any]:
        primary, additional = self.evidence(nonce)
        if self.version != "0.4.0":
            return {"tee-pubkey": self.key.jwk, "tee-evidence": primary}
        return {
            "init-data": None,
            "runtime-data": {"nonce": nonce, "tee-pubkey": self.key.jwk},
            "tee-evidence": {"primary_evidence": primary, "additional_evidence": additional},
        }

    def handshake(self) -> httpx.Response:
        self.handshakes += 1
        challenge = self.auth()
        if challenge.status_code != 200:
            return challenge
        value = challenge.json()
        assert "extra-params" in value
        answer = self.http.post(self.route("attest"), json=self.message(value["nonce"]))
        if answer.status_code == 200:
            self.token = answer.json()["token"]
        return answer

    def get(self, path: str) -> bytes | httpx.Response:
        """The cookie client: handshake and retry on 401 only; other answers are handed back."""
        answer = self.http.get(self.route(f"resource/{path}"))
        for _ in range(TRIES):
            if answer.status_code == 200:
                return self.key.open(answer.content)
            self.require_error(answer)
            if answer.status_code != 401:
                return answer
            attested = self.handshake()
            if attested.status_code != 200:
                return attested
            answer = self.http.get(self.route(f"resource/{path}"))
        return self.key.open(answer.content) if answer.status_code == 200 else answer

    def get_by_token(self, path: str) -> bytes | httpx.Response:
        """The token client: no cookie, a bearer token."""
        with httpx.Client(trust_env=False, timeout=60, verify=self.verify) as http:
            answer = http.get(
                self.route(f"resource/{path}"),
                headers={"Authorization": f"Bearer {self.token}"},
            )
        if answer.status_code == 200:
            return self.key.open(answer.content)
        self.require_error(answer)
        return answer

    @staticmethod
    def require_error(answer: httpx.Response) -> str:
        """Every answer but 200 must be an ``ErrorInformation``; its kind."""
        value = answer.json()
        assert isinstance(value["type"], str)
        assert isinstance(value["detail"], str)
        return str(value["type"].rpartition("/")[2])
