"""The administrator's end of the admin listener."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai import jcs
from cai.attest.rcar import ErrorInformation
from cai.errors import (
    CaiError,
    FormatError,
    InputError,
    InputMissing,
    PeerError,
    PeerUnreachable,
    Refused,
    Unauthenticated,
    UsageError,
)
from kbs.admin.tokens import make_admin_token

TIMEOUT_SECONDS = 30
"""How long one call may take, seconds."""

MAX_ANSWER = 64 * 1024 * 1024
"""Largest answer that is read, bytes; a thousand audit rows are about 5 MB."""


class AdminClient:
    """Calls the admin listener with a fresh token each time.

    Args:
        url: of the admin listener; plain HTTP only to a loopback address.
        key: the administrator's private key.
        clock: the time that tokens are made at.

    Raises:
        UsageError: the address would carry a key in clear over a network.
    """

    def __init__(
        self, url: str, key: Ed25519PrivateKey, *, clock: Callable[[], datetime]
    ) -> None:
        self._base = url.rstrip("/")
        _require_private(self._base)
        self._key = key
        self._clock = clock
        # A proxy from the environment must never see these calls.
        self._http = httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def post(self, route: str, body: bytes) -> dict[str, Any]:
        """POST to ``/kbs/v0/<route>``.

        Raises:
            CaiError: the listener's refusal, or ``PeerUnreachable``.
        """
        return self._call("POST", route, body)

    def get(self, route: str) -> dict[str, Any]:
        """GET ``/kbs/v0/<route>``.

        Raises:
            CaiError: the listener's refusal, or ``PeerUnreachable``.
        """
        return self._call("GET", route, None)

    def get_or_none(self, route: str) -> dict[str, Any] | None:
        """GET ``/kbs/v0/<route>``; ``None`` when it is not there."""
        try:
            return self.get(route)
        except InputMissing:
            return None

    def _call(self, method: str, route: str, body: bytes | None) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {make_admin_token(self._key, now=self._clock())}"}
        try:
            answer = self._http.request(
                method, f"{self._base}/kbs/v0/{route}", content=body, headers=headers
            )
        except httpx.HTTPError as error:
            raise PeerUnreachable(
                f"no key broker answers at {self._base}: {type(error).__name__}",
                hint="start it with `kbs serve`, or give --admin-url",
            ) from error
        if answer.status_code != 200:
            raise _refusal(answer)
        value = jcs.parse(answer.content, what="admin answer", limit=MAX_ANSWER)
        if not isinstance(value, dict):
            raise FormatError("admin answer: expected an object")
        return value


def _refusal(answer: httpx.Response) -> CaiError:
    try:
        detail = ErrorInformation.parse(answer.content).detail
        hint = answer.json().get("hint")
    except (CaiError, ValueError, AttributeError):
        return PeerError(f"the admin listener answers {answer.status_code}")
    hint = hint if isinstance(hint, str) else None
    kinds: dict[int, type[CaiError]] = {
        400: InputError, 401: Unauthenticated, 403: Refused, 404: InputMissing, 413: InputError,
    }  # fmt: skip
    return kinds.get(answer.status_code, PeerError)(detail, hint=hint)


def _require_private(url: str) -> None:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise UsageError(f"--admin-url {url!r} is not a URL") from error
    if parsed.scheme == "https" and parsed.host:
        return
    try:
        loopback = parsed.host == "localhost" or ipaddress.ip_address(parsed.host).is_loopback
    except ValueError:
        loopback = False
    if parsed.scheme != "http" or not loopback:
        raise UsageError(
            f"--admin-url {url!r}: plain HTTP only to a loopback address",
            hint="reach the broker through ssh -L",
        )
