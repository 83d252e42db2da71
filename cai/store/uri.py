"""Where a sealed model lives, as text: ``file:``, ``oss:``, ``s3:``, ``cos:``, ``http(s):``.

``bucket:/path`` is the short spelling of ``oss://bucket/path``, as in ``MODEL_OSS_BUCKET_PATH``. A
path that starts with ``/``, ``./`` or ``../`` means ``file:``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from cai.errors import FormatError, LimitExceeded, UsageError
from cai.store.base import check_path

SCHEMES = ("file", "oss", "s3", "cos", "http", "https")
"""Every scheme that has a store."""

MAX_URI = 4096
"""Longest URI that is looked at, characters."""

MAX_KEY = 1023
"""Longest key that OSS takes, bytes; S3 and COS take one more."""

_SCHEME = re.compile(r"([a-z][a-z0-9+]*):(.*)", re.DOTALL | re.IGNORECASE)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_S3_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_SHORT = re.compile(r"([a-z0-9][a-z0-9-]{1,61}[a-z0-9]):(/.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Location:
    """A parsed URI.

    Attributes:
        scheme: one of ``SCHEMES``.
        bucket: of object stores; empty elsewhere.
        path: for ``file`` a file system path; for ``http(s)`` the whole URL without its final
            slash; else the prefix of all keys, without slashes at its ends.
    """

    scheme: str
    bucket: str
    path: str

    @property
    def uri(self) -> str:
        """The URI in its long spelling."""
        if self.scheme in ("http", "https"):
            return self.path
        if self.scheme == "file":
            return f"file:{self.path}"
        return f"{self.scheme}://{self.bucket}" + (f"/{self.path}" if self.path else "")

    def key(self, path: str) -> str:
        """The key of a file in an object store.

        Raises:
            LimitExceeded: it would be longer than ``MAX_KEY`` bytes.
        """
        key = f"{self.path}/{path}" if self.path else path
        if len(key.encode("utf-8", "surrogatepass")) > MAX_KEY:
            raise LimitExceeded(
                f"{path[:80]!r}… makes a key of more than {MAX_KEY} bytes",
                hint="object stores take no longer one; choose a shorter prefix or a file: store",
            )
        return key


def parse_uri(text: str) -> Location:
    """Parse the URI of a store.

    Raises:
        UsageError: an unknown scheme, a URI with credentials, or one that cannot be meant.
    """
    if not text or len(text) > MAX_URI or any(ord(letter) < 32 for letter in text):
        raise UsageError("the store's URI is empty, too long or holds control characters")
    if text.startswith(("/", "./", "../")) or text in (".", ".."):
        return Location("file", "", text)
    match = _SCHEME.fullmatch(text)
    scheme = match[1].lower() if match else ""
    if match and scheme == "file":
        return Location("file", "", _file_path(match[2], text))
    if scheme in ("http", "https"):
        return _web(text, scheme)
    if match and scheme in SCHEMES:
        if not match[2].startswith("//"):
            raise UsageError(f"{text!r}: expected {scheme}://BUCKET/PATH")
        bucket, _, path = match[2][2:].partition("/")
        return _object(scheme, bucket, path, text)
    short = _SHORT.fullmatch(text)
    if short and not (short[2] or "").startswith("//"):
        return _object("oss", short[1], (short[2] or "/")[1:], text)
    raise UsageError(
        f"{text!r} is not the URI of a store",
        hint="file:PATH, oss://BUCKET/PATH, s3://BUCKET/PATH, cos://BUCKET/PATH, https://HOST/PATH "
        "or BUCKET:/PATH",
    )


def _file_path(rest: str, text: str) -> str:
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host not in ("", "localhost") or not slash:
            raise UsageError(f"{text!r}: files of another host", hint="file:///absolute/path")
        rest = "/" + path
    if not rest or "\x00" in unquote(rest):
        raise UsageError(f"{text!r}: the path is missing", hint="file:PATH")
    return rest


def _object(scheme: str, bucket: str, path: str, text: str) -> Location:
    if "@" in bucket:
        raise UsageError(
            "credentials do not belong into a URI",
            hint="give them by environment or configuration file (docs/stores.md)",
        )
    allowed = _BUCKET if scheme == "oss" else _S3_BUCKET
    if not allowed.fullmatch(bucket):
        raise UsageError(f"{text!r}: {bucket!r} is not the name of a bucket")
    path = path.strip("/")
    if path:
        try:
            check_path(path)
        except FormatError as error:
            raise UsageError(f"{text!r}: {error.message}") from error
    return Location(scheme, bucket, path)


def _web(text: str, scheme: str) -> Location:
    try:
        parts = urlsplit(text)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{text!r} is not a URL") from error
    if parts.username is not None or parts.password is not None:
        raise UsageError("credentials do not belong into a URI")
    if not host or parts.query or parts.fragment:
        raise UsageError(
            f"{text!r}: expected {scheme}://HOST/PATH without query or fragment",
            hint="files are found by adding their names to the path",
        )
    return Location(scheme, "", f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}")
