"""The administrator's end of the admin listener."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

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
    Unavailable,
    Undecided,
    UsageError,
    from_os_error,
)
from kbs.admin.proposal_form import Proposal
from kbs.admin.tokens import make_admin_token

TIMEOUT_SECONDS = 30
"""How long one call may take, seconds."""

UNIX: Final = "unix:"
"""In front of the path of a Unix socket."""

PROPOSED: Final = 202
"""Status of a change that waits for further persons."""

MAX_ANSWER = 64 * 1024 * 1024
"""Largest answer that is read, bytes; a thousand audit rows are about 5 MB."""


class AdminClient:
    """Calls the admin listener with a fresh token each time.

    Args:
        url: of the admin listener: ``https://…``, ``unix:PATH`` (``unix:PATH#/prefix`` where the
            broker has a path prefix), or plain HTTP to a loopback address.
        key: the administrator's private key; signs tokens, and proposals.
        clock: the time that tokens are made at.
        ca: PEM file of the authority behind the listener's certificate; by default the system's.
        token: a token made elsewhere, instead of a key.

    Raises:
        UsageError: the address would carry a key in clear over a network, or neither key nor token
            is given.
        InputError: the authority's file cannot be used.
    """

    def __init__(
        self,
        url: str,
        key: Ed25519PrivateKey | None,
        *,
        clock: Callable[[], datetime],
        ca: Path | None = None,
        token: str | None = None,
    ) -> None:
        if key is None and token is None:
            raise UsageError("no administrator's key", hint="give --admin-key or --admin-token")
        self._shown = url
        self._key = key
        self._token = token
        self._clock = clock
        # A proxy from the environment must never see these calls.
        if url.startswith(UNIX):
            path, _, prefix = url.removeprefix(UNIX).removeprefix("//").partition("#")
            self._base = "http://kbs.invalid" + prefix.rstrip("/")
            transport = httpx.HTTPTransport(uds=path)
            self._http = httpx.Client(
                timeout=TIMEOUT_SECONDS, trust_env=False, transport=transport
            )
        else:
            self._base = url.rstrip("/")
            _require_private(self._base)
            self._http = httpx.Client(
                timeout=TIMEOUT_SECONDS, trust_env=False, verify=_tls(self._base, ca)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def post(self, route: str, body: bytes = b"") -> dict[str, Any]:
        """POST to ``/kbs/v0/<route>``.

        Raises:
            Undecided: the change is now a proposal, signed by this administrator, that waits for
                others.
            CaiError: the listener's refusal, or ``PeerUnreachable``.
        """
        return self.call("POST", route, body)

    def delete(self, route: str) -> dict[str, Any]:
        """DELETE ``/kbs/v0/<route>``.

        Raises:
            Undecided: as for ``post``.
            CaiError: the listener's refusal, or ``PeerUnreachable``.
        """
        return self.call("DELETE", route)

    def get(self, route: str) -> dict[str, Any]:
        """GET ``/kbs/v0/<route>``.

        Raises:
            CaiError: the listener's refusal, or ``PeerUnreachable``.
        """
        return self.call("GET", route)

    def get_value(self, route: str) -> Any:
        """GET ``/kbs/v0/<route>`` whose answer is any JSON value, as some of Trustee's are.

        Raises:
            CaiError: the listener's refusal, or ``PeerUnreachable``.
        """
        return self._exchange("GET", route, None)[1]

    def get_or_none(self, route: str) -> dict[str, Any] | None:
        """GET ``/kbs/v0/<route>``; ``None`` when it is not there."""
        try:
            return self.get(route)
        except InputMissing:
            return None

    def approve(self, shown: dict[str, Any]) -> dict[str, Any]:
        """Sign a proposal as it was shown; exactly its members are signed.

        Raises:
            UsageError: there is no key to sign with.
            CaiError: the listener's refusal, or ``PeerUnreachable``.
        """
        if self._key is None:
            raise UsageError("a token cannot sign a proposal", hint="give --admin-key")
        proposal = Proposal.from_json(shown.get("proposal"))
        body = jcs.canonical({"signature": proposal.sign(self._key)})
        return self.call("POST", f"proposal/{proposal.id}/approve", body)

    def call(self, method: str, route: str, body: bytes | None = None) -> dict[str, Any]:
        """Call ``/kbs/v0/<route>`` and read its answer.

        Raises:
            Undecided: the change is now a proposal that waits for others.
            CaiError: the listener's refusal, or ``PeerUnreachable``.
        """
        status, value = self._exchange(method, route, body)
        if not isinstance(value, dict):
            raise FormatError("admin answer: expected an object")
        if status == PROPOSED:
            raise self._propose(value)
        return value

    def _exchange(self, method: str, route: str, body: bytes | None) -> tuple[int, Any]:
        try:
            answer = self._http.request(
                method, f"{self._base}/kbs/v0/{route}", content=body,
                headers={"Authorization": f"Bearer {self._bearer()}"},
            )  # fmt: skip
        except httpx.HTTPError as error:
            raise PeerUnreachable(
                f"no key broker answers at {self._shown}: {type(error).__name__}",
                hint="start it with `kbs serve`, or give --admin-url",
            ) from error
        if answer.status_code not in (200, PROPOSED):
            raise _refusal(answer)
        return answer.status_code, jcs.parse(
            answer.content, what="admin answer", limit=MAX_ANSWER
        )

    def _bearer(self) -> str:
        if self._token is not None:
            return self._token
        assert self._key is not None  # noqa: S101 - the constructor saw to it
        return make_admin_token(self._key, now=self._clock())

    def _propose(self, shown: dict[str, Any]) -> Undecided:
        identifier = str(shown.get("id", ""))
        if self._key is not None and shown.get("proposer_counts") is True:
            shown = self.approve(shown)
        missing = shown.get("missing")
        return Undecided(
            f"nothing has changed yet: proposal {identifier} waits for {missing} more"
            f" {'signature' if missing == 1 else 'signatures'}",
            hint=f"another administrator: kbs proposal approve {identifier}",
            code="proposed",
        )


def _refusal(answer: httpx.Response) -> CaiError:
    try:
        detail = ErrorInformation.parse(answer.content).detail
        hint = answer.json().get("hint")
    except (CaiError, ValueError, AttributeError):
        return PeerError(f"the admin listener answers {answer.status_code}")
    hint = hint if isinstance(hint, str) else None
    kinds: dict[int, type[CaiError]] = {
        400: InputError, 401: Unauthenticated, 403: Refused, 404: InputMissing, 409: Refused,
        413: InputError, 503: Unavailable,
    }  # fmt: skip
    return kinds.get(answer.status_code, PeerError)(detail, hint=hint)


def _tls(url: str, ca: Path | None) -> ssl.SSLContext | bool:
    if not url.startswith("https:"):
        return False  # nothing to verify with; _require_private has seen that it is loopback
    try:
        context = ssl.create_default_context(cafile=None if ca is None else str(ca))
    except ssl.SSLError as error:
        raise FormatError(f"--admin-ca {ca}: not a PEM certificate") from error
    except OSError as error:
        raise from_os_error(error, f"read --admin-ca {ca}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


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
            hint="use https, a Unix socket, or ssh -L",
        )
