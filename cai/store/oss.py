"""``oss://``: Alibaba Cloud OSS by its own SDK, ``oss2``.

Requests are signed with V4 where a region is known (given, or read from the endpoint's host name),
else with V1. The SDK's own CRC is off: without its C extension it runs at 8 MB/s, and our digests
verify every byte. Parts carry ``Content-MD5``, so that the store refuses what arrives damaged.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit
from xml.etree import ElementTree as ET

import oss2
import requests
import urllib3

from cai.errors import (
    CaiError,
    InputError,
    InputMissing,
    LimitExceeded,
    PeerError,
    PeerUnreachable,
    Refused,
    SettingError,
    Unauthenticated,
)
from cai.store.access import Access
from cai.store.base import (
    BLOCK,
    CONNECT_TIMEOUT_S,
    LABEL,
    MAX_LISTED,
    MAX_WORKERS,
    READ_TIMEOUT_S,
    Blob,
    FoundPart,
    Listed,
    Pace,
    Stat,
    Upload,
    check_path,
    unpaced,
)
from cai.store.retry import NO_UPLOAD
from cai.store.uri import Location

_LABEL_HEADER = f"x-oss-meta-{LABEL}"
_REGION = re.compile(
    r"(?:[a-z0-9-]+\.)*oss-((?!accelerate)[a-z]{2}[a-z0-9-]*?)(?:-internal)?\.aliyuncs\.com(?:\.cn)?"
)
_VPC = re.compile(r"(?:[a-z0-9-]+\.)*vpc100-oss-([a-z]{2}[a-z0-9-]*)\.aliyuncs\.com")
_RANGE = re.compile(r"bytes \d{1,18}-\d{1,18}/(\d{1,18})")
_BUSY_CODES = ("RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "BadDigest")
_BAD_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "SecurityTokenExpired",
            "InvalidSecurityToken", "RequestTimeTooSkewed")

_Result = TypeVar("_Result")


def region_of(endpoint: str) -> str:
    """The region that an endpoint's host name holds, internal and VPC ones too; or ``""``."""
    host = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
    match = _VPC.fullmatch(host) or _REGION.fullmatch(host)
    return match[1] if match else ""


class OssStore:
    """A ``Store`` under a prefix of a bucket.

    Args:
        location: bucket and prefix.
        access: endpoint and credentials.

    Raises:
        SettingError: no endpoint, or one that cannot be meant.
    """

    writable = True

    def __init__(self, location: Location, access: Access) -> None:
        self._location = location
        self.uri = location.uri
        endpoint = _endpoint(access.endpoint)
        region = access.region or region_of(endpoint)
        self.signature = _signature(access, region)
        try:
            self._bucket = oss2.Bucket(
                _auth(access, self.signature), endpoint, location.bucket,
                session=oss2.Session(pool_size=MAX_WORKERS),
                connect_timeout=(CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
                enable_crc=False, region=region or None, is_path_style=access.path_style,
            )
        except oss2.exceptions.OssError as error:
            raise SettingError(f"{self.uri}: {_reason(error)}") from error

    def stat(self, path: str) -> Stat | None:
        """Size and label by ``HEAD``."""
        try:
            found = self._call(lambda: self._bucket.head_object(self._key(path)), path)
        except InputMissing:
            return None
        return Stat(int(found.content_length or 0), found.headers.get(_LABEL_HEADER, ""))

    def names(self, *, recursive: bool) -> Iterator[Listed]:
        """Keys below the prefix."""
        prefix = f"{self._location.path}/" if self._location.path else ""
        token, count = "", 0
        while True:
            page = self._page(prefix, "" if recursive else "/", token)
            names: list[tuple[str, int | None]] = [(key, None) for key in page.prefix_list]
            names += [(item.key, int(item.size)) for item in page.object_list]
            for key, size in sorted(names):
                if key != prefix:
                    yield Listed(key.removeprefix(prefix), size)
            count += len(names)
            if count > MAX_LISTED:
                raise LimitExceeded(f"{self.uri} holds more than {MAX_LISTED} names")
            token = page.next_continuation_token
            if not page.is_truncated or not token:
                return

    def read(self, path: str, offset: int, length: int, pace: Pace = unpaced) -> Blob:
        """Read by a range request, which OSS shall refuse, not ignore, when it cannot be met."""
        strict = {"x-oss-range-behavior": "standard"}
        try:
            found = self._call(
                lambda: self._bucket.get_object(
                    self._key(path), byte_range=(offset, offset + length - 1), headers=strict
                ),
                path,
            )
        except _Unsatisfiable:
            return Blob(b"", self._size(path))
        match = _RANGE.fullmatch(found.headers.get("content-range", ""))
        if not match:
            found.resp.response.close()
            raise PeerError(f"{self.uri}/{path}: an answer without a range")
        data = self._call(lambda: _body(found.resp.response, length, pace), path)
        total = int(match[1])
        if len(data) < min(length, total - offset):
            raise PeerUnreachable(f"{self.uri}/{path}: the answer ended early")
        return Blob(data, total)

    def put(self, path: str, data: bytes, label: str, pace: Pace = unpaced) -> None:
        """Write one object at once."""
        headers = {_LABEL_HEADER: label, "Content-MD5": _md5_of(data)}
        pace(len(data))
        self._call(lambda: self._bucket.put_object(self._key(path), data, headers=headers), path)

    def begin(self, path: str, size: int, label: str) -> Upload:
        """Initiate a multipart upload."""
        del size
        key = self._key(path)
        headers = {_LABEL_HEADER: label}
        begun = self._call(lambda: self._bucket.init_multipart_upload(key, headers=headers), path)
        return _OssUpload(self, self._bucket, key, begun.upload_id)

    def pending(self) -> Mapping[str, list[Upload]]:
        """Multipart uploads below the prefix; none where the credentials may not list them."""
        prefix = f"{self._location.path}/" if self._location.path else ""
        found: dict[str, list[Upload]] = {}
        try:
            listed = self._call(
                lambda: list(oss2.MultipartUploadIterator(self._bucket, prefix=prefix))
            )
        except Unauthenticated:
            raise
        except Refused:
            return found
        for item in listed:
            upload = _OssUpload(self, self._bucket, item.key, item.upload_id)
            found.setdefault(item.key.removeprefix(prefix), []).append(upload)
        return found

    def furnish(self, folders: Iterable[str], links: Mapping[str, str]) -> None:
        """Nothing: keys need no folders, and links stand in the index."""

    def remove(self, path: str) -> None:
        """Delete an object."""
        self._call(lambda: self._bucket.delete_object(self._key(path)), path)

    def close(self) -> None:
        """Close the connections."""
        self._bucket.session.session.close()

    def call(self, action: Callable[[], Any], path: str) -> Any:
        """As ``_call``, for uploads."""
        return self._call(action, path)

    def _page(self, prefix: str, delimiter: str, token: str) -> Any:
        return self._call(
            lambda: self._bucket.list_objects_v2(
                prefix=prefix, delimiter=delimiter, continuation_token=token, max_keys=1000
            )
        )

    def _size(self, path: str) -> int:
        found = self.stat(path)
        return found.size if found else 0

    def _key(self, path: str) -> str:
        return self._location.key(check_path(path))

    def _call(self, action: Callable[[], _Result], path: str = "") -> _Result:
        where = f"{self.uri}/{path}" if path else self.uri
        try:
            return action()
        except oss2.exceptions.OssError as error:
            raise _converted(error, where) from error
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            raise PeerUnreachable(f"{where}: no answer ({type(error).__name__})") from error
        except (ET.ParseError, RuntimeError, ValueError, TypeError) as error:
            raise PeerError(
                f"{where}: an answer that is not of OSS ({type(error).__name__})",
                hint="check the endpoint",
            ) from error


class _OssUpload:
    def __init__(self, store: OssStore, bucket: Any, key: str, upload_id: str) -> None:
        self._store, self._bucket = store, bucket
        self._key, self._id = key, upload_id
        self._etags: dict[int, str] = {}

    def found(self, size: int, part: int) -> Mapping[int, FoundPart]:
        del size, part
        parts: dict[int, FoundPart] = {}
        listed = self._call(lambda: list(oss2.PartIterator(self._bucket, self._key, self._id)))
        for item in listed:
            parts[item.part_number] = FoundPart(int(item.size), item.etag.lower())
            self._etags[item.part_number] = item.etag
        return parts

    def send(self, number: int, data: bytes, md5: bytes, pace: Pace) -> None:
        headers = {"Content-MD5": base64.b64encode(md5).decode()}
        pace(len(data))
        sent = self._call(
            lambda: self._bucket.upload_part(self._key, self._id, number, data, headers=headers)
        )
        self._etags[number] = sent.etag

    def complete(self, count: int) -> None:
        parts = [oss2.models.PartInfo(n, self._etags[n]) for n in range(1, count + 1)]
        self._call(
            lambda: self._bucket.complete_multipart_upload(self._key, self._id, parts)
        )

    def abort(self) -> None:
        try:
            self._call(lambda: self._bucket.abort_multipart_upload(self._key, self._id))
        except InputMissing:
            return

    def _call(self, action: Callable[[], Any]) -> Any:
        return self._store.call(action, self._key)


class _Unsatisfiable(InputError):
    """The range lies behind the end of the file."""


def _endpoint(text: str) -> str:
    if not text:
        raise SettingError(
            "no OSS endpoint is set", hint="set MODEL_OSS_ENDPOINT, or give --endpoint"
        )
    # The token of a temporary credential travels in a header, so TLS unless plain HTTP was asked.
    url = text if "://" in text else f"https://{text}"
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise SettingError(f"{text!r} is not an endpoint") from error
    bare = parts.path in ("", "/") and not parts.query and parts.username is None
    if parts.scheme not in ("http", "https") or not host or not bare:
        raise SettingError(
            f"{text!r} is not an endpoint", hint="for example https://oss-cn-hangzhou.aliyuncs.com"
        )
    return url.rstrip("/")


def _signature(access: Access, region: str) -> str:
    if access.signature == "v4" and not region:
        raise SettingError("signature v4 needs a region", hint="set OSS_REGION")
    if access.signature != "auto":
        return access.signature
    return "v4" if region else "v1"


def _auth(access: Access, signature: str) -> Any:
    if not access.key_id:
        return oss2.AnonymousAuth()
    secret, token = access.key_secret.reveal().decode(), access.token.reveal().decode()
    version = oss2.AUTH_VERSION_4 if signature == "v4" else oss2.AUTH_VERSION_1
    if token:
        return oss2.StsAuth(access.key_id, secret, token, auth_version=version)
    return (oss2.AuthV4 if signature == "v4" else oss2.Auth)(access.key_id, secret)


def _body(response: Any, length: int, pace: Pace) -> bytes:
    data = bytearray()
    try:
        while len(data) < length:
            block = response.raw.read(min(BLOCK, length - len(data)), decode_content=False)
            if not block:
                break
            pace(len(block))
            data += block
    except BaseException:
        response.close()
        raise
    response.raw.release_conn()
    return bytes(data)


def _converted(error: oss2.exceptions.OssError, where: str) -> CaiError:
    status, code = error.status, error.code
    if isinstance(error, oss2.exceptions.RequestError):
        return PeerUnreachable(
            f"{where}: {_reason(error)}", hint="check the endpoint and the network"
        )
    if code == "NoSuchUpload":
        return InputMissing(f"{where}: the store does not know this upload", code=NO_UPLOAD)
    if code == "NoSuchBucket":
        return InputError(f"{where}: the bucket does not exist", hint="check bucket and endpoint")
    if status == 404:
        return InputMissing(f"{where} does not exist")
    if status == 416:
        return _Unsatisfiable(f"{where}: range behind the end")
    if status in (408, 429) or status >= 500 or code in _BUSY_CODES:
        return PeerUnreachable(f"{where}: the store answers {status} {code}".rstrip())
    if code in _BAD_KEY or status == 401:
        return Unauthenticated(
            f"{where}: the store does not accept these credentials ({code or status})",
            hint="check key id, secret, session token, endpoint and the clock",
        )
    if status == 403:
        return Refused(
            f"{where}: the store refuses ({code or status})",
            hint="these credentials need rights on this bucket and prefix",
        )
    return PeerError(f"{where}: {_reason(error)}")


def _reason(error: oss2.exceptions.OssError) -> str:
    """Words without anything that a server or a header said at length."""
    if isinstance(error, oss2.exceptions.RequestError):
        return f"no answer ({type(error.exception).__name__})"
    if isinstance(error, oss2.exceptions.ClientError):
        return str(error.body).removeprefix("ClientError: ")[:200]
    return f"the store answers {error.status} {error.code}".rstrip()


def _md5_of(data: bytes) -> str:
    import hashlib

    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
