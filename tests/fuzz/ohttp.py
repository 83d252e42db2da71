"""Fuzz targets of OHTTP: what a stranger can send to an egress, and an origin to an ingress."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tng.ohttp.bhttp import (
    MessageReader,
    encode_content,
    encode_end,
    encode_request,
    encode_response,
)
from tng.ohttp.chunked import HEADER_SIZE, Header, RequestReceiver, RequestSender
from tng.ohttp.hpke import KEY_SIZE, Aead
from tng.ohttp.keyconfig import KeyConfig, base64_text, choose, encode_key_list
from tng.ohttp.messages import KeyAnswer, KeyRequest, Metadata
from tng.stock.certificate import CocoEvidence

_KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))
_PUBLIC = _KEY.public_key().public_bytes_raw()
_FIELDS = ((b"host", b"h"), (b"x-a", b"1"))


def binary_request(data: bytes) -> object:
    """A request, in two pieces."""
    return _message(data, request=True)


def binary_response(data: bytes) -> object:
    """A response, in two pieces."""
    return _message(data, request=False)


def encapsulated(data: bytes) -> object:
    """What follows the metadata of a tunnel request."""
    header = Header.decode(data[:HEADER_SIZE])
    rest = data[HEADER_SIZE:]
    receiver = RequestReceiver(header, rest[:KEY_SIZE], _KEY)
    plain = b"".join(receiver.opener.feed(rest[KEY_SIZE:])) + receiver.opener.finish()
    return list(MessageReader(request=True).feed(plain))


def _message(data: bytes, *, request: bool) -> object:
    reader, half = MessageReader(request=request), len(data) // 2
    return [*reader.feed(data[:half]), *reader.feed(data[half:])]


def _encapsulated_seed() -> bytes:
    sender = RequestSender(Header(0, Aead.AES_128_GCM), _PUBLIC)
    plain = encode_request(b"POST", b"/p", _FIELDS) + encode_content(b"body") + encode_end()
    return sender.head + sender.sealer.chunk(plain) + sender.sealer.final()


_CONFIG = KeyConfig(2_000_000_000, base64_text(encode_key_list(0, _PUBLIC)))

OHTTP: Mapping[str, tuple[Callable[[bytes], object], tuple[bytes, ...]]] = {
    "ohttp-request": (encapsulated, (_encapsulated_seed(),)),
    "ohttp-key-list": (choose, (encode_key_list(0, _PUBLIC),)),
    "ohttp-key-request": (
        KeyRequest.decode, (KeyRequest("background_check", "t").encode(), b"{}"),
    ),
    "ohttp-key-answer": (
        KeyAnswer.decode,
        (
            KeyAnswer(_CONFIG, CocoEvidence("sample", b"e", b"{}", "{}")).encode(),
            KeyAnswer(_CONFIG, token="a.b.c").encode(),
        ),
    ),
    "ohttp-metadata": (
        Metadata.decode,
        (Metadata(_PUBLIC).encode()[4:], Metadata(_PUBLIC, "a.b.c", _PUBLIC).encode()[4:]),
    ),
    "binary-request": (
        binary_request,
        (encode_request(b"POST", b"/p?q", _FIELDS) + encode_content(b"body") + encode_end(),),
    ),
    "binary-response": (
        binary_response, (encode_response(200, _FIELDS) + encode_content(b"b") + encode_end(),),
    ),
}  # fmt: skip
"""Targets with their seeds, by name."""
