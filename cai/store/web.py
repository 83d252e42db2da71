"""``http:`` and ``https:``: any server that answers ranges; read only, nothing listed.

What comes over plain ``http`` is as good as over ``https`` once the index is pinned
(``--index-sha256``): the digests are what is trusted, not the channel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import quote

import httpx

from cai.errors import (
    InputError,
    InputMissing,
    PeerError,
    PeerUnreachable,
    Unauthenticated,
    UsageError,
)
from cai.store.base import (
    BLOCK,
    CONNECT_TIMEOUT_S,
    MAX_WORKERS,
    READ_TIMEOUT_S,
    Blob,
    Listed,
    Pace,
    Stat,
    Upload,
    check_path,
    unpaced,
)

MAX_REDIRECTS = 5
"""Redirects that are followed for one request."""

BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that are worth another try."""

_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


class WebStore:
    """A ``Store`` behind a web server.

    Args:
        base: URL of the directory that holds ``cai.json``, without a final slash.
    """

    writable = False

    def __init__(self, base: str) -> None:
        self.uri = base
        self._client = httpx.Client(
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            follow_redirects=True,
            max_redirects=MAX_REDIRECTS,
            limits=httpx.Limits(max_connections=MAX_WORKERS),
            headers={"Accept-Encoding": "identity", "User-Agent": "cai"},
            event_hooks={"request": [self._refuse_downgrade]},
        )

    def stat(self, path: str) -> Stat | None:
        """Size by ``HEAD``."""
        try:
            response = self._client.head(self._url(path))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._converted(error) from error
        if response.status_code in (404, 410):
            return None
        self._check(response, path)
        length = response.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit() and len(length) <= 18):
            raise PeerError(f"{self._url(path)}: the answer names no length")
        return Stat(int(length), None)

    def names(self, *, recursive: bool) -> Iterator[Listed]:
        """Not possible over HTTP."""
        del recursive
        raise UsageError(
            f"{self.uri}: a web server lists nothing", hint="name the sealed model itself"
        )

    def read(self, path: str, offset: int, length: int, pace: Pace = unpaced) -> Blob:
        """Read by a range request."""
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}"}
        try:
            with self._client.stream("GET", self._url(path), headers=wanted) as response:
                if response.status_code == 416:
                    return Blob(b"", _total_of_unsatisfied(response))
                self._check(response, path)
                start, total = _span(response, self._url(path))
                if start != offset:
                    raise InputError(
                        f"{self._url(path)}: the server does not answer ranges",
                        hint="serve the sealed model with a server that does",
                    )
                data = bytearray()
                for block in response.iter_raw(BLOCK):
                    pace(len(block))
                    data += block
                    if len(data) >= length:
                        break
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._converted(error) from error
        if len(data) < min(length, total - offset):
            raise PeerUnreachable(f"{self._url(path)}: the answer ended early")
        return Blob(bytes(data[:length]), total)

    def put(self, path: str, data: bytes, label: str, pace: Pace = unpaced) -> None:
        """Not possible over HTTP."""
        del path, data, label, pace
        raise self._read_only()

    def begin(self, path: str, size: int, label: str) -> Upload:
        """Not possible over HTTP."""
        del path, size, label
        raise self._read_only()

    def pending(self) -> Mapping[str, list[Upload]]:
        """Nothing is ever pending."""
        return {}

    def furnish(self, folders: Iterable[str], links: Mapping[str, str]) -> None:
        """Nothing: keys need no folders, and links stand in the index."""

    def remove(self, path: str) -> None:
        """Not possible over HTTP."""
        del path
        raise self._read_only()

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _url(self, path: str) -> str:
        return f"{self.uri}/{quote(check_path(path))}"

    def _read_only(self) -> UsageError:
        return UsageError(f"{self.uri} can only be read", hint="push to file:, oss:, s3: or cos:")

    def _refuse_downgrade(self, request: httpx.Request) -> None:
        if self.uri.startswith("https:") and request.url.scheme != "https":
            raise PeerError(f"{self.uri}: redirected away from https")

    def _check(self, response: httpx.Response, path: str) -> None:
        status, url = response.status_code, self._url(path)
        if status in (200, 206):
            return
        if status in (404, 410):
            raise InputMissing(f"{url} does not exist")
        if status in (401, 403, 407):
            raise Unauthenticated(f"{url}: the server answers {status}")
        if status in BUSY:
            raise PeerUnreachable(f"{url}: the server answers {status}")
        raise PeerError(f"{url}: the server answers {status}")

    def _converted(self, error: Exception) -> PeerError:
        if isinstance(error, httpx.TooManyRedirects | httpx.UnsupportedProtocol | httpx.InvalidURL):
            return PeerError(f"{self.uri}: {error}")
        reason = str(error) or type(error).__name__
        return PeerUnreachable(f"{self.uri}: {reason}", hint="check the address and the network")


def _span(response: httpx.Response, url: str) -> tuple[int, int]:
    """Where the body starts, and the length of the whole file."""
    if response.status_code == 206:
        match = _RANGE.fullmatch(response.headers.get("content-range", ""))
        if not match:
            raise PeerError(f"{url}: an answer with a range names none")
        return int(match[1]), int(match[3])
    length = response.headers.get("content-length", "")
    if not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise PeerError(f"{url}: the answer names no length")
    return 0, int(length)


def _total_of_unsatisfied(response: httpx.Response) -> int:
    text = response.headers.get("content-range", "")
    total = text.removeprefix("bytes */")
    return int(total) if total.isascii() and total.isdigit() and len(total) <= 18 else 0
