"""Receipts: what this gateway passed between a caller and its backend, signed (decisions §7).

A caller who wants one sends ``cai-receipt-nonce`` and ``cai-receipt-salt`` with its request, 32
random bytes each in hex, and fetches ``/cai/receipts/NONCE`` afterwards, also when the answer broke
off. A receipt holds keyed digests only: without the salt, which the gateway forgets, it says
nothing about the contents, and the one who has it can show what was asked and answered.

    signature = Ed25519("cai/receipt/v1" ‖ 00 ‖ receipt), receipt canonical JSON (RFC 8785)
    line     = METHOD ‖ 20 ‖ PATH ‖ 0A
    request  = HMAC-SHA-256(salt, "request"  ‖ 00 ‖ line ‖ body as the caller sent it)
    backend  = HMAC-SHA-256(salt, "backend"  ‖ 00 ‖ line ‖ body as the backend got it)
    response = HMAC-SHA-256(salt, "response" ‖ 00 ‖ body as the caller was sent it)
"""

from __future__ import annotations

import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from cai import jcs
from cai.attest.statement import ChannelStatement
from cai.errors import CaiError, FormatError, Tampered
from tng.guard.http import Incoming
from tng.guard.refusals import GuardRefused

NONCE_HEADER = "cai-receipt-nonce"
SALT_HEADER = "cai-receipt-salt"
PATH = "/cai/receipts/"
"""Where receipts are fetched, the nonce behind it."""

SECRET_BYTES = 32
"""Length of nonce and salt."""

MAX_KEPT = 4096
"""Most receipts that wait to be fetched."""

KEPT_S = 600.0
"""How long a receipt waits to be fetched, seconds."""

MAX_RECEIPT = 16 * 1024
"""Longest signed receipt that is verified, bytes."""

_PURPOSE = b"cai/receipt/v1\x00"
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Standing:
    """What the guest had proven to the caller when it asked.

    Attributes:
        statement: SHA-256 of its channel statement, hex; empty where it gave none.
        ticket: digest of its admission ticket, hex; empty where it has none.
        model_roots: of what it serves.
    """

    statement: str = ""
    ticket: str = ""
    model_roots: tuple[str, ...] = ()

    @classmethod
    def of(cls, statement: bytes) -> Standing:
        """From the bytes of a channel statement; empty where there is none."""
        if not statement:
            return cls()
        digest = sha256(statement).hexdigest()
        try:
            read = ChannelStatement.decode(statement)
        except CaiError:
            return cls(digest)
        return cls(digest, read.ticket_digest, tuple(model.root for model in read.models))


class Record:
    """One receipt in the making.

    Args:
        nonce: of the caller, hex.
        salt: of the caller.
        line: method and path.
    """

    def __init__(self, nonce: str, salt: bytes, line: bytes) -> None:
        self.nonce = nonce
        self._line = line
        self._request = hmac.new(salt, b"request\x00" + line, sha256)
        self._backend = hmac.new(salt, b"backend\x00" + line, sha256)
        self._response = hmac.new(salt, b"response\x00", sha256)
        self.status = 0
        self.whole = False

    def asked(self, received: bytes, forwarded: bytes) -> None:
        """Take the body, as received and as forwarded."""
        self._request.update(received)
        self._backend.update(forwarded)

    def answered(self, data: bytes) -> None:
        """Take a part of the answer."""
        self._response.update(data)

    def to_json(self) -> dict[str, object]:
        """The record's members of the receipt."""
        return {
            "nonce": self.nonce,
            "request": self._request.hexdigest(),
            "backend": self._backend.hexdigest(),
            "response": self._response.hexdigest(),
            "status": self.status,
            "ending": "complete" if self.whole else "truncated",
        }


class Receipts:
    """Makes, signs and keeps receipts.

    Args:
        key: of this boot.
        clock: monotonic, seconds.
    """

    def __init__(
        self, key: Ed25519PrivateKey, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._key = key
        self._clock = clock
        self._counter = 0
        self._kept: OrderedDict[tuple[str, str], tuple[float, bytes]] = OrderedDict()

    @property
    def public_key(self) -> str:
        """The key that verifies them, 64 hex digits."""
        return self._key.public_key().public_bytes_raw().hex()

    def begin(self, request: Incoming) -> Record | None:
        """A record of a request, when its caller asks for one.

        Raises:
            GuardRefused: it asks in another form.
        """
        nonce, salt = request.header(NONCE_HEADER), request.header(SALT_HEADER)
        if nonce is None and salt is None:
            return None
        if not (nonce and salt and _HEX.fullmatch(nonce) and _HEX.fullmatch(salt)):
            raise GuardRefused(
                400, "bad_receipt_request",
                f"a receipt takes {NONCE_HEADER} and {SALT_HEADER}, 64 lower-case hex digits each",
            )  # fmt: skip
        return Record(nonce, bytes.fromhex(salt), f"{request.method} {request.path}\n".encode())

    def keep(self, record: Record, caller: str, standing: Standing) -> None:
        """Sign a record, and keep it for its caller."""
        now = self._clock()
        self._counter += 1
        receipt = {
            "cai-receipt": 1,
            **record.to_json(),
            "model_roots": list(standing.model_roots),
            "statement": standing.statement,
            "ticket": standing.ticket,
            "counter": self._counter,
            "key": self.public_key,
        }
        signature = self._key.sign(_PURPOSE + jcs.canonical(receipt)).hex()
        signed = jcs.canonical({"receipt": receipt, "signature": signature})
        self._kept.pop((caller, record.nonce), None)
        self._kept[caller, record.nonce] = (now + KEPT_S, signed)
        while self._kept and (
            len(self._kept) > MAX_KEPT or next(iter(self._kept.values()))[0] <= now
        ):
            self._kept.popitem(last=False)

    def fetch(self, path: str, caller: str) -> bytes | None:
        """A kept receipt; ``None`` when there is none for this caller."""
        expires, signed = self._kept.get((caller, path.removeprefix(PATH)), (0.0, b""))
        return signed if expires > self._clock() else None


def verify_receipt(signed: bytes, *, key: str, salt: bytes, line: bytes) -> ReceiptChecker:
    """Check the signature of a receipt; what it says of contents is checked with the result.

    Args:
        signed: as fetched.
        key: the gateway's receipt key, hex, known from elsewhere.
        salt: given with the request.
        line: method, space and path.

    Raises:
        FormatError: it is no receipt.
        Tampered: the signature does not verify.
    """
    value = jcs.parse_canonical(signed, what="receipt", limit=MAX_RECEIPT)
    receipt = value.get("receipt") if isinstance(value, dict) else None
    if not isinstance(receipt, dict) or not isinstance(value.get("signature"), str):
        raise FormatError("receipt: members are missing")
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(value["signature"]), _PURPOSE + jcs.canonical(receipt))
    except (InvalidSignature, ValueError) as error:
        raise Tampered("the receipt is not signed by this gateway") from error
    return ReceiptChecker(receipt, salt, line + b"\n")


@dataclass(frozen=True, slots=True)
class ReceiptChecker:
    """A receipt with a good signature.

    Attributes:
        receipt: its members.
        salt: of the caller.
        line: method and path, with its line end.
    """

    receipt: dict[str, Any]
    salt: bytes
    line: bytes

    def shows_request(self, body: bytes) -> bool:
        """Whether it is about this request, as it was sent."""
        return self._equal("request", b"request\x00" + self.line + body)

    def shows_response(self, body: bytes) -> bool:
        """Whether it is about this answer, as it was received."""
        return self._equal("response", b"response\x00" + body)

    def _equal(self, name: str, data: bytes) -> bool:
        digest = hmac.new(self.salt, data, sha256).hexdigest()
        found = self.receipt.get(name)
        return isinstance(found, str) and hmac.compare_digest(found, digest)
