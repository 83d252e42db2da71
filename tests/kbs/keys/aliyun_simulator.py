"""The HTTP shapes of Alibaba Cloud KMS: the public API, and a KMS instance's own address.

The first is signed with ACS3-HMAC-SHA256, the second with an RSA client key over protobuf messages;
both signatures are checked here, so that a client which did not sign would fail its tests.
"""

from __future__ import annotations

import base64
import hmac
import json
import os
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qsl, quote, urlsplit

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, pkcs12

from tests.kbs.keys.http_simulator import Fault, Simulator, as_json

KEY_ID = "key-hzz62f1cb66fa42qo"


class Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code


class Keeper:
    """Keys and secrets, whatever the shape of the messages."""

    def __init__(self) -> None:
        self.keys = {KEY_ID: os.urandom(32)}
        self.secrets: dict[str, tuple[str, str, str]] = {}
        self.lies = False

    def encrypt(self, key: str, plaintext: bytes) -> tuple[bytes, bytes]:
        if key not in self.keys:
            raise Refusal(404, "Forbidden.KeyNotFound")
        iv = os.urandom(12)
        return AESGCM(self.keys[key]).encrypt(iv, plaintext, None), iv

    def decrypt(self, key: str, blob: bytes, iv: bytes) -> bytes:
        if key not in self.keys:
            raise Refusal(404, "Forbidden.KeyNotFound")
        try:
            plain = AESGCM(self.keys[key]).decrypt(iv, blob, None)
        except (InvalidTag, ValueError):
            raise Refusal(400, "InvalidParameter") from None
        return os.urandom(32) + plain[32:] if self.lies else plain

    def secret(self, name: str) -> tuple[str, str, str]:
        if name not in self.secrets:
            raise Refusal(404, "Forbidden.ResourceNotFound")
        return self.secrets[name]


class OpenApiSimulator(Simulator):
    """KMS over its public API."""

    key_id, key_secret = "LTAI-test", "access-key-secret-9d1e"

    def __init__(self) -> None:
        self.keeper = Keeper()
        super().__init__()

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> bytes:
        query = dict(parse_qsl(urlsplit(request.path).query, keep_blank_values=True))
        try:
            self._authenticate(request, query, body)
            return as_json(self._do(request.headers["x-acs-action"], query) | {"RequestId": "r"})
        except Refusal as refusal:
            told = {"Code": refusal.code, "Message": "no", "RequestId": "r", "HostId": "h"}
            raise Fault(refusal.status, as_json(told)) from None

    def _do(self, action: str, query: dict[str, str]) -> dict[str, str]:
        match action:
            case "Encrypt":
                key, plaintext = query["KeyId"], base64.b64decode(query["Plaintext"])
                blob, iv = self.keeper.encrypt(key, plaintext)
                text = base64.b64encode(as_json([key, iv.hex(), blob.hex()])).decode()
                return {"CiphertextBlob": text, "KeyId": key, "KeyVersionId": "v1"}
            case "Decrypt":
                try:
                    key, iv, blob = json.loads(base64.b64decode(query["CiphertextBlob"]))
                    plain = self.keeper.decrypt(key, bytes.fromhex(blob), bytes.fromhex(iv))
                except (ValueError, TypeError):
                    raise Refusal(400, "InvalidParameter") from None
                return {"Plaintext": base64.b64encode(plain).decode(), "KeyId": key}
            case "GetSecretValue":
                data, kind, version = self.keeper.secret(query["SecretName"])
                return {"SecretData": data, "SecretDataType": kind, "VersionId": version,
                        "SecretName": query["SecretName"]}
            case _:
                raise Refusal(404, "InvalidAction.NotFound")

    def _authenticate(
        self, request: BaseHTTPRequestHandler, query: dict[str, str], body: bytes
    ) -> None:
        kind, _, rest = request.headers["authorization"].partition(" ")
        members = dict(item.split("=", 1) for item in rest.split(","))
        names = members["SignedHeaders"].split(";")
        signed = "".join(f"{name}:{request.headers[name].strip()}\n" for name in names)
        canonical_query = "&".join(
            f"{quote(name, safe='~')}={quote(query[name], safe='~')}" for name in sorted(query)
        )
        content = sha256(body).hexdigest()
        canonical = "\n".join(
            [request.command, "/", canonical_query, signed, ";".join(names), content]
        )
        to_sign = f"{kind}\n{sha256(canonical.encode()).hexdigest()}"
        expected = hmac.digest(self.key_secret.encode(), to_sign.encode(), "sha256").hex()
        if members["Credential"] != self.key_id or members["Signature"] != expected:
            raise Refusal(403, "SignatureDoesNotMatch")


class InstanceSimulator(Simulator):
    """A KMS instance: protobuf messages, signed by an RSA client key."""

    content_type = "application/x-protobuf"
    password = "client-key-password-51c0"

    def __init__(self) -> None:
        self.keeper = Keeper()
        self._key = rsa.generate_private_key(65537, 2048)
        super().__init__()

    @property
    def client_key(self) -> str:
        """The client key file as the application access point gives it."""
        bundle = pkcs12.serialize_key_and_certificates(
            b"client", self._key, None, None, BestAvailableEncryption(self.password.encode())
        )
        return json.dumps(
            {"KeyId": "KAAP.test", "PrivateKeyData": base64.b64encode(bundle).decode()}
        )

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> bytes:
        try:
            self._authenticate(request, body)
            return self._do(request.headers["x-kms-apiname"], parse_message(body))
        except Refusal as refusal:
            error = message({2: refusal.code.encode(), 3: b"no", 4: b"r"})
            raise Fault(refusal.status, error) from None

    def _do(self, name: str, members: dict[int, bytes]) -> bytes:
        match name:
            case "Encrypt":
                blob, iv = self.keeper.encrypt(members[1].decode(), members[2])
                return message({1: members[1], 2: blob, 3: iv, 4: b"r", 5: b"AES_GCM"})
            case "Decrypt":
                plain = self.keeper.decrypt(members[2].decode(), members[1], members[5])
                return message({1: members[2], 2: plain, 3: b"r", 4: b"AES_GCM"})
            case "GetSecretValue":
                data, kind, version = self.keeper.secret(members[1].decode())
                return message({1: members[1], 3: data.encode(), 4: kind.encode(),
                                6: version.encode(), 8: b"r"})
            case _:
                raise Refusal(404, "InvalidAction.NotFound")

    def _authenticate(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        headers = {name.lower(): value for name, value in request.headers.items()}
        lines = [request.command, headers["content-sha256"], headers["content-type"],
                 headers["date"]]
        lines += [f"{name}:{headers[name].strip()}" for name in sorted(headers)
                  if name.startswith("x-kms-")]
        signature = base64.b64decode(headers["authorization"].removeprefix("Bearer "))
        try:
            self._key.public_key().verify(
                signature, "\n".join([*lines, "/"]).encode(), padding.PKCS1v15(), hashes.SHA256()
            )
        except InvalidSignature:
            raise Refusal(403, "Forbidden.SignatureInvalid") from None
        if headers["content-sha256"] != sha256(body).hexdigest().upper():
            raise Refusal(400, "InvalidParameter")


def message(members: dict[int, bytes]) -> bytes:
    """A protobuf message of length-delimited members."""
    return b"".join(
        varint(number << 3 | 2) + varint(len(value)) + value
        for number, value in members.items() if value
    )


def parse_message(data: bytes) -> dict[int, bytes]:
    members: dict[int, bytes] = {}
    place = 0
    while place < len(data):
        tag, place = read_varint(data, place)
        length, place = read_varint(data, place)
        if tag & 7 == 2:
            members[tag >> 3] = data[place:place + length]
            place += length
    return members


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
