"""Answers outside the encapsulation: JSON, refusals in stock TNG's words, CORS."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from http import HTTPStatus

import h11

from cai.errors import CaiError, LimitExceeded
from tng.config.transport import Cors
from tng.ingress.http1 import ClientConnection
from tng.ohttp.fields import Field
from tng.ohttp.messages import API_CHALLENGE, API_KEY_CONFIG, API_VERIFY, MAX_JSON
from tng.ohttp.request import OuterBody

MAX_DRAINED = 16 * 1024 * 1024
"""Most of a refused request that is read so that its sender sees the answer, bytes."""

DRAIN_S = 10.0
"""How long that may take, seconds."""

API_FAILED = {
    API_KEY_CONFIG: (
        "GenServerHpkeConfigurationResponseFailed", "no evidence for this request can be had",
    ),
    API_CHALLENGE: ("ServerVerifyClientGetChallengeTokenFailed", "no challenge can be had"),
    API_VERIFY: ("ServerVerifyClientFailed", "the evidence was not appraised"),
}  # fmt: skip
"""What a client is told when an API cannot be served; why, is in the journal."""


class OuterError(CaiError):
    """An answer outside, in stock TNG's shape.

    Args:
        status: HTTP status.
        name: TNG's code.
        message: what happened.
    """

    code, exit_status = "ohttp", 8

    def __init__(self, status: int, name: str, message: str) -> None:
        super().__init__(message, code=name)
        self.status = status
        self.name = name


async def whole_body(body: OuterBody) -> bytes:
    """The body of a request with a JSON message.

    Raises:
        LimitExceeded: it is longer than ``MAX_JSON``.
        CaiError: the client stalls, leaves or breaks HTTP.
    """
    data = bytearray()
    while part := await body.some():
        data += part
        if len(data) > MAX_JSON:
            raise LimitExceeded(f"a message of more than {MAX_JSON} bytes")
    return bytes(data)


async def drain(body: OuterBody) -> None:
    """Read what is left of a request, so that closing does not take the answer away."""
    drained = 0
    with contextlib.suppress(CaiError, TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while (part := await body.some()) and drained < MAX_DRAINED:
                drained += len(part)


async def send_json(
    client: ClientConnection, status: int, value: bytes | dict[str, str], extra: Sequence[Field]
) -> None:
    """Send a whole answer.

    Raises:
        ClientGone: the client takes nothing any more.
    """
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode("ascii")),
        (b"cache-control", b"no-store"),
        *extra,
    ]
    reason = HTTPStatus(status).phrase.encode("ascii")
    await client.send(h11.Response(status_code=status, headers=headers, reason=reason))
    await client.send(h11.Data(data=body))
    await client.send(h11.EndOfMessage())


def plain_error(status: int, message: str) -> bytes:
    """An answer to what was no HTTP request."""
    body = json.dumps({"code": "BadRequest", "message": message}).encode()
    head = (
        f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def header_of(request: h11.Request, name: bytes) -> bytes:
    """The first value of a header; empty without one."""
    return next((bytes(value) for key, value in request.headers if key == name), b"")


def cors_headers(settings: Cors | None, request: h11.Request) -> list[Field]:
    """CORS headers of an answer (Fetch standard §3.2); none for an origin that is not named."""
    origin = header_of(request, b"origin")
    if settings is None or not origin:
        return []
    named = origin.decode("ascii", "replace") in settings.origins
    if not named and "*" not in settings.origins:
        return []
    headers = [(b"access-control-allow-origin", origin if named else b"*"), (b"vary", b"Origin")]
    # A wildcard with credentials would let every site speak as the user.
    if named and settings.credentials:
        headers.append((b"access-control-allow-credentials", b"true"))
    for name, values in (
        (b"access-control-allow-methods", settings.methods),
        (b"access-control-allow-headers", settings.headers),
        (b"access-control-expose-headers", settings.expose),
    ):
        if values:
            headers.append((name, ", ".join(values).encode("ascii", "replace")))
    return headers
