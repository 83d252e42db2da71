"""Where an identity provider's keys come from: a file or an address, kept and renewed.

A token that names an unknown key makes the set be asked for again, at most once in a while, so that
a rotation needs no restart and a stranger cannot drive the requests. While the provider does not
answer, the last set serves on for a bounded time.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from cai.errors import CaiError, PeerUnreachable, Unavailable
from cai.settings import read_settings_file
from tng.guard.jwt import MAX_JWKS, Key, KeySet

REFRESH_S = 300.0
"""How old a set may grow before it is asked for again, seconds."""

UNKNOWN_S = 30.0
"""Shortest time between two askings because of an unknown key or a failure, seconds."""

STALE_S = 24 * 3600.0
"""How long a set serves when it cannot be renewed, seconds."""

TIMEOUT_S = 5.0
"""Longest wait for the provider, seconds."""


class KeySource:
    """The keys of one provider.

    Args:
        place: a file, or an ``https://`` address (``http://`` on loopback only).
        clock: monotonic, seconds.
    """

    def __init__(
        self, place: Path | str, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._place = place
        self._clock = clock
        self._keys: KeySet | None = None
        self._loaded = 0.0
        self._tried = float("-inf")
        self._lock = asyncio.Lock()

    async def find(self, kid: str, algorithm: str) -> Key | None:
        """The key of a token, after asking for new ones where that may help.

        Raises:
            Unavailable: there is no usable set.
        """
        await self._renew(REFRESH_S)
        key = self._usable().find(kid, algorithm)
        if key is None:
            await self._renew(UNKNOWN_S)
            key = self._usable().find(kid, algorithm)
        return key

    def _usable(self) -> KeySet:
        if self._keys is None or self._clock() - self._loaded > STALE_S:
            raise Unavailable("the keys of the identity provider cannot be had")
        return self._keys

    async def _renew(self, age_s: float) -> None:
        async with self._lock:
            now = self._clock()
            fresh = self._keys is not None and now - self._loaded < age_s
            if fresh or now - self._tried < UNKNOWN_S:
                return
            self._tried = now
            try:
                self._keys = KeySet.parse(await self._read())
                self._loaded = now
            except CaiError:
                # What was good stays in use until it is stale.
                return

    async def _read(self) -> bytes:
        if isinstance(self._place, Path):
            return await asyncio.to_thread(read_settings_file, self._place, what="key set")
        try:
            async with (
                asyncio.timeout(TIMEOUT_S),
                httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S) as client,
                client.stream("GET", self._place) as response,
            ):
                data = b""
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > MAX_JWKS:
                        break
                if response.status_code != 200:
                    raise PeerUnreachable(f"key set: HTTP {response.status_code}")
                return data
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError, UnicodeError) as error:
            raise PeerUnreachable("the identity provider does not answer") from error
