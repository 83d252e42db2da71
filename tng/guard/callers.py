"""Who asks: the subject of a token, else the attested key of the client, else its session.

The name of a caller is what limits, prompt caches and receipts are kept by, so every kind has its
own prefix and no name of one kind can be made to look like another's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cai.errors import CaiError, Unauthenticated
from cai.settings import read_settings_file
from tng.config.guard import Guard
from tng.guard.http import Incoming
from tng.guard.jwt import Jwt, KeySet
from tng.guard.keysource import KeySource
from tng.guard.limits import NO_LIMITS, Limits
from tng.guard.refusals import GuardRefused
from tng.guard.tokens import PREFIX, TokenFile, read_tokens
from tng.streams import Caller


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller that may ask.

    Attributes:
        name: ``token:NAME``, ``jwt:SUBJECT``, ``key:HEX`` or ``session:HEX``.
        limits: what it may ask for.
    """

    name: str
    limits: Limits

    @property
    def label(self) -> str:
        """The caller in metrics: sessions and keys come and go, so they are counted together."""
        kind = self.name.partition(":")[0]
        return kind if kind in ("session", "key") else self.name


class Authenticator:
    """Decides who a request is from.

    Args:
        guard: settings.
        clock: Unix time, seconds.

    Raises:
        CaiError: a file that the settings name is missing or malformed.
    """

    def __init__(self, guard: Guard, clock: Callable[[], float] = time.time) -> None:
        self._guard = guard
        self._clock = clock
        self._tokens = TokenFile(guard.tokens) if guard.tokens else None
        self._keys = KeySource(guard.jwt.keys) if guard.jwt else None
        # What is missing at the start is a mistake; what goes missing later lets nobody in.
        if guard.tokens is not None:
            read_tokens(guard.tokens)
        if guard.jwt is not None and isinstance(guard.jwt.keys, Path):
            KeySet.parse(read_settings_file(guard.jwt.keys, what="key set"))

    async def identify(self, request: Incoming, caller: Caller) -> Identity:
        """The caller of a request.

        Raises:
            GuardRefused: 401 when it shows no valid token and one is asked for, 503 when tokens
                cannot be checked now.
        """
        if self._tokens is None and self._keys is None:
            kind, value = ("key", caller.client_key) if caller.client_key else (
                "session", caller.session
            )  # fmt: skip
            return Identity(f"{kind}:{value}", self._guard.limits)
        shown = _bearer(request)
        if self._tokens is not None and (shown.startswith(PREFIX) or self._keys is None):
            return self._by_token(self._tokens, shown)
        assert self._keys is not None  # noqa: S101 - one of the two is there
        return await self._by_jwt(self._keys, shown)

    def _by_token(self, tokens: TokenFile, shown: str) -> Identity:
        try:
            found = tokens.find(shown, now=self._clock())
        except CaiError as error:
            raise GuardRefused(
                503, "tokens_unavailable", "tokens cannot be checked now", retry_after_s=30
            ) from error
        if found is None:
            raise GuardRefused(401, "invalid_api_key", "this token is not known")
        row, state = found
        if state != "valid":
            raise GuardRefused(401, f"{state}_api_key", f"this token is {state}")
        limits = row.limits if row.limits != NO_LIMITS else self._guard.limits
        return Identity(f"token:{row.name}", limits)

    async def _by_jwt(self, keys: KeySource, shown: str) -> Identity:
        settings = self._guard.jwt
        assert settings is not None  # noqa: S101 - the keys come from it
        try:
            token = Jwt.parse(shown)
            key = await keys.find(token.kid, token.algorithm)
            if key is None:
                raise Unauthenticated("the token is signed by an unknown key")
            subject = token.verify(
                key, issuer=settings.issuer, audience=settings.audience, now=self._clock()
            )
        except Unauthenticated as error:
            raise GuardRefused(401, "invalid_token", error.message) from error
        except CaiError as error:
            raise GuardRefused(
                503, "tokens_unavailable", "tokens cannot be checked now", retry_after_s=30
            ) from error
        limits = settings.limits if settings.limits != NO_LIMITS else self._guard.limits
        return Identity(f"jwt:{subject}", limits)


def _bearer(request: Incoming) -> str:
    value = request.header("authorization")
    if value is None:
        # Anthropic's clients send the same token under another name.
        value = request.header("x-api-key")
        if value is None:
            raise GuardRefused(401, "missing_api_key", "this egress asks for a bearer token")
        return value.strip()
    scheme, _, token = value.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise GuardRefused(401, "missing_api_key", "this egress asks for a bearer token")
    return token.strip()
