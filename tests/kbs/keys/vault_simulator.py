"""The HTTP shape of Vault's transit and key-value engines, as its API pages describe them."""

from __future__ import annotations

import base64
import json
import os
from http.server import BaseHTTPRequestHandler
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tests.kbs.keys.http_simulator import Fault, Simulator, as_json


def errors(status: int, *texts: str) -> Fault:
    return Fault(status, as_json({"errors": list(texts)}))


class VaultSimulator(Simulator):
    """Transit at ``transit``, KV 1 at ``kv1``, KV 2 at ``secret``."""

    def __init__(self, token: str = "s.token") -> None:
        self.token = token
        self.keys: dict[str, list[bytes]] = {"kek": [os.urandom(32)]}
        self.least: dict[str, int] = {}
        self.kv1: dict[str, dict[str, Any]] = {}
        self.kv2: dict[str, list[dict[str, Any] | None]] = {}
        self.namespaces: set[str] = set()
        self.lies = False
        super().__init__()

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def rotate(self, key: str = "kek") -> None:
        self.keys[key].append(os.urandom(32))

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> bytes:
        if request.headers.get("X-Vault-Token") != self.token:
            raise errors(403, "permission denied")
        self.namespaces.add(request.headers.get("X-Vault-Namespace", ""))
        parts = request.path.partition("?")[0].removeprefix("/v1/").split("/")
        match [request.command, *parts]:
            case ["POST", "transit", "encrypt", key]:
                return self._encrypt(key, json.loads(body))
            case ["POST", "transit", "decrypt", key]:
                return self._decrypt(key, json.loads(body))
            case ["GET", "kv1", *path] if "/".join(path) in self.kv1:
                return as_json({"data": self.kv1["/".join(path)]})
            case ["GET", "secret", "data", *path] if "/".join(path) in self.kv2:
                return self._newest("/".join(path))
            case _:
                raise errors(404)

    def _encrypt(self, key: str, order: dict[str, Any]) -> bytes:
        # Vault makes a missing key when the token may; this token may not.
        if key not in self.keys:
            raise errors(403, "permission denied")
        version, nonce = len(self.keys[key]), os.urandom(12)
        plaintext = base64.b64decode(order["plaintext"])
        sealed = AESGCM(self.keys[key][-1]).encrypt(nonce, plaintext, None)
        text = f"vault:v{version}:{base64.b64encode(nonce + sealed).decode()}"
        return as_json({"data": {"ciphertext": text, "key_version": version}})

    def _decrypt(self, key: str, order: dict[str, Any]) -> bytes:
        if key not in self.keys:
            raise errors(400, "encryption key not found")
        _, version, text = order["ciphertext"].split(":", 2)
        try:
            number = int(version[1:])
            if number < self.least.get(key, 1):
                raise errors(400, "ciphertext or signature version is disallowed by policy")
            data = base64.b64decode(text)
            plain = AESGCM(self.keys[key][number - 1]).decrypt(data[:12], data[12:], None)
        except (InvalidTag, ValueError, IndexError):
            raise errors(400, "cipher: message authentication failed") from None
        if self.lies:
            plain = os.urandom(32) + plain[32:]
        return as_json({"data": {"plaintext": base64.b64encode(plain).decode()}})

    def _newest(self, path: str) -> bytes:
        versions = self.kv2[path]
        metadata = {"version": len(versions), "created_time": "2026-01-01T00:00:00Z",
                    "deletion_time": "", "destroyed": False}
        if versions[-1] is None:
            metadata["deletion_time"] = "2026-01-02T00:00:00Z"
            raise Fault(404, as_json({"data": {"data": None, "metadata": metadata}}))
        return as_json({"data": {"data": versions[-1], "metadata": metadata}})
