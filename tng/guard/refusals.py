"""What the guard answers instead of the backend, in the error shapes of the clients it speaks to.

OpenAI's clients read ``{"error": {"message", "type", "param", "code"}}``; Anthropic's want a
``"type": "error"`` beside it. One body serves both.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from cai.errors import CaiError, PeerError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class GuardRefused(CaiError):
    """A request that the guard answers itself.

    Args:
        status: of the HTTP answer.
        code: a stable name for clients, metrics and the log.
        message: one line; it quotes no content of the request.
        param: the member of the body that it is about.
        retry_after_s: when the same request may succeed, seconds.
        allow: methods that the path takes, for 405.
    """

    code, exit_status, http_status = "guard", 7, 403

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        allow: tuple[str, ...] = (),
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.param = param
        self.retry_after_s = retry_after_s
        self.allow = allow


def as_refusal(error: CaiError) -> GuardRefused:
    """Any error of a request as an answer; what is not the client's fault tells no details."""
    if isinstance(error, GuardRefused):
        return error
    if isinstance(error, PeerError):
        return GuardRefused(502, "bad_gateway", "the backend's answer broke off")
    if error.http_status in (400, 408, 413, 431):
        return GuardRefused(error.http_status, error.machine_code, error.message)
    return GuardRefused(500, "internal_error", "the gateway failed")


def error_body(refusal: GuardRefused) -> bytes:
    """The body of the answer."""
    kind = _TYPES.get(refusal.status)
    if kind is None:
        kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    error = {
        "message": refusal.message,
        "type": kind,
        "param": refusal.param,
        "code": refusal.machine_code,
    }
    return json.dumps({"type": "error", "error": error}, ensure_ascii=False).encode() + b"\n"


def error_headers(refusal: GuardRefused, length: int) -> list[tuple[bytes, bytes]]:
    """The headers of the answer.

    Args:
        refusal: why.
        length: of the body, bytes.
    """
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(length).encode("ascii")),
        (b"cache-control", b"no-store"),
    ]
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.retry_after_s is not None:
        whole = max(1, -int(-refusal.retry_after_s // 1))
        headers.append((b"retry-after", str(whole).encode("ascii")))
    if refusal.allow:
        headers.append((b"allow", ", ".join(refusal.allow).encode("ascii")))
    return headers
