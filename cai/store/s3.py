"""``s3://`` and ``cos://``: the S3 API by ``boto3``, the extra ``cai-confidential[s3]``.

Nothing here depends on checksums that only AWS has: parts carry ``Content-MD5``, which every server
of this API knows, and our digests verify what is read.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

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
    UsageError,
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

try:
    import boto3
    import botocore.config
    import botocore.exceptions
    import urllib3.exceptions
except ImportError as missing:  # the extra is not installed; ``open_store`` says so
    raise UsageError(
        "s3:// and cos:// need boto3", hint="pip install 'cai-confidential[s3]'"
    ) from missing

_RANGE = re.compile(r"bytes \d{1,18}-\d{1,18}/(\d{1,18})")
_COS_HOST = re.compile(r"(?:[a-z0-9-]+\.)?cos(?:-internal)?\.([a-z]{2}[a-z0-9-]*)\.")
_BUSY_CODES = ("RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "BadDigest",
               "Throttling", "ThrottlingException", "TooManyRequests")
_BAD_KEY = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken",
            "RequestTimeTooSkewed", "InvalidClientTokenId")

_Result = TypeVar("_Result")


class S3Store:
    """A ``Store`` under a prefix of a bucket.

    Args:
        location: scheme, bucket and prefix.
        access: endpoint and credentials; without a key id, what the AWS SDK finds by itself.

    Raises:
        SettingError: endpoint, region or profile cannot be meant.
    """

    writable = True

    def __init__(self, location: Location, access: Access) -> None:
        self._location = location
        self.uri = location.uri
        try:
            self._client = _client(location.scheme, access)
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise SettingError(f"{self.uri}: {error}") from error
        self._bucket = location.bucket

    def stat(self, path: str) -> Stat | None:
        """Size and label by ``HEAD``."""
        try:
            found = self._call(
                lambda: self._client.head_object(Bucket=self._bucket, Key=self._key(path)), path
            )
        except InputMissing:
            return None
        return Stat(int(found["ContentLength"]), found.get("Metadata", {}).get(LABEL, ""))

    def names(self, *, recursive: bool) -> Iterator[Listed]:
        """Keys below the prefix."""
        prefix = f"{self._location.path}/" if self._location.path else ""
        rest: dict[str, str] = {} if recursive else {"Delimiter": "/"}
        count = 0
        while True:
            page = self._page(Prefix=prefix, **rest)
            names: list[tuple[str, int | None]] = [
                (item["Prefix"], None) for item in page.get("CommonPrefixes", [])
            ]
            names += [(item["Key"], int(item["Size"])) for item in page.get("Contents", [])]
            for key, size in sorted(names):
                if key != prefix:
                    yield Listed(key.removeprefix(prefix), size)
            count += len(names)
            if count > MAX_LISTED:
                raise LimitExceeded(f"{self.uri} holds more than {MAX_LISTED} names")
            if not page.get("IsTruncated") or not page.get("NextContinuationToken"):
                return
            rest = rest | {"ContinuationToken": page["NextContinuationToken"]}

    def read(self, path: str, offset: int, length: int, pace: Pace = unpaced) -> Blob:
        """Read by a range request."""
        try:
            found = self._call(
                lambda: self._client.get_object(
                    Bucket=self._bucket, Key=self._key(path),
                    Range=f"bytes={offset}-{offset + length - 1}",
                ),
                path,
            )
        except _Unsatisfiable:
            known = self.stat(path)
            return Blob(b"", known.size if known else 0)
        body = found["Body"]
        match = _RANGE.fullmatch(found.get("ContentRange", ""))
        if not match:
            body.close()
            raise PeerError(f"{self.uri}/{path}: an answer without a range")
        data = self._call(lambda: _body(body, length, pace), path)
        total = int(match[1])
        if len(data) < min(length, total - offset):
            raise PeerUnreachable(f"{self.uri}/{path}: the answer ended early")
        return Blob(data, total)

    def put(self, path: str, data: bytes, label: str, pace: Pace = unpaced) -> None:
        """Write one object at once."""
        digest = hashlib.md5(data, usedforsecurity=False).digest()
        pace(len(data))
        self._call(
            lambda: self._client.put_object(
                Bucket=self._bucket, Key=self._key(path), Body=data, Metadata={LABEL: label},
                ContentMD5=base64.b64encode(digest).decode(),
            ),
            path,
        )

    def begin(self, path: str, size: int, label: str) -> Upload:
        """Create a multipart upload."""
        del size
        key = self._key(path)
        begun = self._call(
            lambda: self._client.create_multipart_upload(
                Bucket=self._bucket, Key=key, Metadata={LABEL: label}
            ),
            path,
        )
        return _S3Upload(self, self._client, self._bucket, key, begun["UploadId"])

    def pending(self) -> Mapping[str, list[Upload]]:
        """Multipart uploads below the prefix; none where the credentials may not list them."""
        prefix = f"{self._location.path}/" if self._location.path else ""
        found: dict[str, list[Upload]] = {}
        try:
            listed = self._call(lambda: self._pages("list_multipart_uploads", Prefix=prefix))
        except Unauthenticated:
            raise
        except Refused:
            return found
        for page in listed:
            for item in page.get("Uploads", []):
                upload = _S3Upload(self, self._client, self._bucket, item["Key"], item["UploadId"])
                found.setdefault(item["Key"].removeprefix(prefix), []).append(upload)
        return found

    def furnish(self, folders: Iterable[str], links: Mapping[str, str]) -> None:
        """Nothing: keys need no folders, and links stand in the index."""

    def remove(self, path: str) -> None:
        """Delete an object."""
        self._call(
            lambda: self._client.delete_object(Bucket=self._bucket, Key=self._key(path)), path
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def call(self, action: Callable[[], Any], path: str) -> Any:
        """As ``_call``, for uploads."""
        return self._call(action, path)

    def _page(self, **arguments: str) -> Any:
        return self._call(
            lambda: self._client.list_objects_v2(Bucket=self._bucket, **arguments)
        )

    def _pages(self, operation: str, **arguments: str) -> list[Any]:
        pages = self._client.get_paginator(operation).paginate(Bucket=self._bucket, **arguments)
        return list(pages)

    def _key(self, path: str) -> str:
        return self._location.key(check_path(path))

    def _call(self, action: Callable[[], _Result], path: str = "") -> _Result:
        where = f"{self.uri}/{path}" if path else self.uri
        try:
            return action()
        except botocore.exceptions.ClientError as error:
            raise _converted(error, where) from error
        except (
            botocore.exceptions.NoCredentialsError,
            botocore.exceptions.PartialCredentialsError,
        ) as error:
            raise Unauthenticated(
                f"{where}: no credentials were found", hint="docs/stores.md lists where they may be"
            ) from error
        except (
            botocore.exceptions.ConnectionError,
            botocore.exceptions.HTTPClientError,
            botocore.exceptions.IncompleteReadError,
            botocore.exceptions.ResponseStreamingError,
            urllib3.exceptions.HTTPError,
            OSError,
        ) as error:
            raise PeerUnreachable(
                f"{where}: no answer ({type(error).__name__})",
                hint="check the endpoint and the network",
            ) from error
        except botocore.exceptions.BotoCoreError as error:
            raise PeerError(f"{where}: {type(error).__name__}") from error


class _S3Upload:
    def __init__(self, store: S3Store, client: Any, bucket: str, key: str, upload_id: str) -> None:
        self._store, self._client = store, client
        self._of: dict[str, str] = {"Bucket": bucket, "Key": key, "UploadId": upload_id}
        self._etags: dict[int, str] = {}

    def found(self, size: int, part: int) -> Mapping[int, FoundPart]:
        del size, part
        parts: dict[int, FoundPart] = {}
        paginator = self._client.get_paginator("list_parts")
        pages = self._call(lambda: list(paginator.paginate(**self._of)))
        for page in pages:
            for item in page.get("Parts", []):
                etag = item["ETag"]
                parts[item["PartNumber"]] = FoundPart(int(item["Size"]), etag.strip('"').lower())
                self._etags[item["PartNumber"]] = etag
        return parts

    def send(self, number: int, data: bytes, md5: bytes, pace: Pace) -> None:
        pace(len(data))
        sent = self._call(
            lambda: self._client.upload_part(
                **self._of, PartNumber=number, Body=data,
                ContentMD5=base64.b64encode(md5).decode(),
            )
        )
        self._etags[number] = sent["ETag"]

    def complete(self, count: int) -> None:
        parts = [{"PartNumber": n, "ETag": self._etags[n]} for n in range(1, count + 1)]
        self._call(
            lambda: self._client.complete_multipart_upload(
                **self._of, MultipartUpload={"Parts": parts}
            )
        )

    def abort(self) -> None:
        try:
            self._call(lambda: self._client.abort_multipart_upload(**self._of))
        except InputMissing:
            return

    def _call(self, action: Callable[[], Any]) -> Any:
        return self._store.call(action, self._of["Key"])


class _Unsatisfiable(InputError):
    """The range lies behind the end of the file."""


def _client(scheme: str, access: Access) -> Any:
    endpoint, region = access.endpoint, access.region
    if scheme == "cos":
        match = _COS_HOST.search(endpoint)
        region = region or (match[1] if match else "")
        if not endpoint and region:
            endpoint = f"https://cos.{region}.myqcloud.com"
        if not endpoint:
            raise SettingError("no COS endpoint is set", hint="set COS_REGION or COS_ENDPOINT")
    if endpoint and "://" not in endpoint:
        endpoint = f"https://{endpoint}"
    if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
        raise SettingError(f"{endpoint!r} is not an endpoint")
    session = boto3.session.Session(profile_name=access.aws_profile or None)
    # Credentials that were found in AWS's own places never go to another provider.
    anonymous = not access.key_id and (scheme == "cos" or session.get_credentials() is None)
    return session.client(
        "s3",
        endpoint_url=endpoint or None,
        region_name=region or session.region_name or "us-east-1",
        **_credentials(access),
        config=_config(access, anonymous=anonymous, host=urlsplit(endpoint).hostname or ""),
    )


def _credentials(access: Access) -> dict[str, str | None]:
    if not access.key_id:
        return {}
    return {
        "aws_access_key_id": access.key_id,
        "aws_secret_access_key": access.key_secret.reveal().decode(),
        "aws_session_token": access.token.reveal().decode() or None,
    }


def _config(access: Access, *, anonymous: bool, host: str) -> Any:
    numeric = host == "localhost" or ":" in host or host.replace(".", "").isdigit()
    signing = {"signature_version": botocore.UNSIGNED} if anonymous else {}
    return botocore.config.Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        max_pool_connections=MAX_WORKERS,
        retries={"total_max_attempts": 1},  # ours, in cai.store.retry
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if access.path_style or numeric else "auto"},
        **signing,
    )


def _body(body: Any, length: int, pace: Pace) -> bytes:
    data = bytearray()
    try:
        while len(data) < length:
            block = body.read(min(BLOCK, length - len(data)))
            if not block:
                break
            pace(len(block))
            data += block
    finally:
        body.close()
    return bytes(data)


def _converted(error: botocore.exceptions.ClientError, where: str) -> CaiError:
    code = str(error.response.get("Error", {}).get("Code", ""))[:64]
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchUpload":
        return InputMissing(f"{where}: the store does not know this upload", code=NO_UPLOAD)
    if code == "NoSuchBucket":
        return InputError(f"{where}: the bucket does not exist", hint="check bucket and endpoint")
    if status == 404:
        return InputMissing(f"{where} does not exist")
    if status == 416:
        return _Unsatisfiable(f"{where}: range behind the end")
    if status in (408, 429) or status >= 500 or code in _BUSY_CODES:
        return PeerUnreachable(f"{where}: the store answers {status} {code}")
    if code in _BAD_KEY or status == 401:
        return Unauthenticated(
            f"{where}: the store does not accept these credentials ({code})",
            hint="check key id, secret, session token, endpoint and the clock",
        )
    if status == 403:
        return Refused(
            f"{where}: the store refuses ({code})",
            hint="these credentials need rights on this bucket and prefix",
        )
    return PeerError(f"{where}: the store answers {status} {code}")
