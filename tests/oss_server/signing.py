"""Checks the signatures of OSS requests: V1 and V4, in headers and in URLs, with STS tokens.

Written from the public description of the protocol ("Include signatures in the Authorization
header", "Signature version 4", "Add signatures to URLs"), not from a client's source, so that a
client's mistake is noticed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import quote

MAX_SKEW_S = 15 * 60

SUBRESOURCES = frozenset({
    "acl", "append", "bucketInfo", "callback", "callback-var", "cname", "comp",
    "continuation-token", "cors", "delete", "encryption", "endTime", "group", "inventory",
    "inventoryId", "lifecycle", "link", "live", "location", "logging", "objectInfo",
    "objectMeta", "partNumber", "policy", "position", "qos", "referer", "replication",
    "replicationLocation", "replicationProgress", "requestPayment", "response-cache-control",
    "response-content-disposition", "response-content-encoding", "response-content-language",
    "response-content-type", "response-expires", "restore", "security-token", "sequential",
    "startTime", "stat", "status", "style", "styleName", "symlink", "tagging",
    "transferAcceleration", "uploadId", "uploads", "versionId", "versioning", "versions",
    "vod", "website", "worm", "wormExtend", "wormId", "x-oss-process", "x-oss-request-payer",
    "x-oss-traffic-limit",
})
"""Query parameters that a V1 signature covers."""


class OssFault(Exception):
    """An answer other than success."""

    def __init__(self, status: int, code: str, message: str = "") -> None:
        super().__init__(code)
        self.status, self.code, self.message = status, code, message or code


@dataclass
class Account:
    """Who may come in.

    Attributes:
        key_id, secret: the access key.
        token: for a temporary (STS) credential; it must then come with every request.
        expires: when the token ends, seconds since the epoch.
        writes: may change anything.
        lists_uploads: may list multipart uploads.
    """

    key_id: str
    secret: str = field(repr=False)
    token: str = field(default="", repr=False)
    expires: float = float("inf")
    writes: bool = True
    lists_uploads: bool = True


@dataclass(frozen=True)
class Asked:
    """A request as far as signatures cover it; header names in lower case."""

    method: str
    bucket: str
    key: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


def authenticate(asked: Asked, accounts: Mapping[str, Account], region: str) -> tuple[str, Account]:
    """Which signature version and account a request proves.

    Raises:
        OssFault: with OSS's own code.
    """
    given = asked.headers.get("authorization", "")
    if given.startswith("OSS4-HMAC-SHA256 "):
        return "v4", _v4_header(asked, given, accounts, region)
    if given.startswith("OSS "):
        return "v1", _v1_header(asked, given, accounts)
    if asked.query.get("x-oss-signature-version") == "OSS4-HMAC-SHA256":
        return "v4-url", _v4_url(asked, accounts, region)
    if "Signature" in asked.query:
        return "v1-url", _v1_url(asked, accounts)
    if given:
        raise OssFault(400, "InvalidArgument", "an unknown kind of authorization")
    raise OssFault(403, "AccessDenied", "anonymous access is forbidden here")


def _v1_header(asked: Asked, given: str, accounts: Mapping[str, Account]) -> Account:
    key_id, colon, signature = given.removeprefix("OSS ").partition(":")
    if not colon:
        raise OssFault(400, "InvalidArgument")
    account = _account(key_id, accounts)
    date = asked.headers.get("x-oss-date") or asked.headers.get("date", "")
    try:
        sent = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        raise OssFault(403, "AccessDenied", "a request without a date") from None
    if abs(sent - time.time()) > MAX_SKEW_S:
        raise OssFault(403, "RequestTimeTooSkewed")
    _compare(_v1(asked, date, account), signature)
    _check_token(account, asked.headers.get("x-oss-security-token", ""))
    return account


def _v1_url(asked: Asked, accounts: Mapping[str, Account]) -> Account:
    account = _account(asked.query.get("OSSAccessKeyId", ""), accounts)
    expires = asked.query.get("Expires", "")
    if not expires.isdigit() or int(expires) < time.time():
        raise OssFault(403, "AccessDenied", "request has expired")
    _compare(_v1(asked, expires, account), asked.query["Signature"])
    _check_token(account, asked.query.get("security-token", ""))
    return account


def _v1(asked: Asked, date: str, account: Account) -> str:
    headers = "".join(
        f"{name}:{value.strip()}\n"
        for name, value in sorted(asked.headers.items()) if name.startswith("x-oss-")
    )
    covered = sorted((n, v) for n, v in asked.query.items() if n in SUBRESOURCES)
    query = "&".join(f"{name}={value}" if value else name for name, value in covered)
    resource = f"/{asked.bucket}/{asked.key}" if asked.bucket else "/"
    text = "\n".join((
        asked.method, asked.headers.get("content-md5", ""), asked.headers.get("content-type", ""),
        date, headers + resource + (f"?{query}" if query else ""),
    ))
    digest = hmac.digest(account.secret.encode(), text.encode(), hashlib.sha1)
    return base64.b64encode(digest).decode()


def _v4_header(
    asked: Asked, given: str, accounts: Mapping[str, Account], region: str
) -> Account:
    members = dict(
        part.strip().partition("=")[::2]
        for part in given.removeprefix("OSS4-HMAC-SHA256 ").split(",")
    )
    date = asked.headers.get("x-oss-date", "")
    extra = members.get("AdditionalHeaders", "")
    account = _v4(
        asked, members.get("Credential", ""), date, extra, members.get("Signature", ""),
        dict(asked.query), asked.headers.get("x-oss-content-sha256", ""), accounts, region,
    )
    if abs(_v4_time(date) - time.time()) > MAX_SKEW_S:
        raise OssFault(403, "RequestTimeTooSkewed")
    _check_token(account, asked.headers.get("x-oss-security-token", ""))
    return account


def _v4_url(asked: Asked, accounts: Mapping[str, Account], region: str) -> Account:
    query = dict(asked.query)
    signature = query.pop("x-oss-signature", "")
    date, expires = query.get("x-oss-date", ""), query.get("x-oss-expires", "")
    account = _v4(
        asked, query.get("x-oss-credential", ""), date,
        query.get("x-oss-additional-headers", ""), signature, query, "UNSIGNED-PAYLOAD",
        accounts, region,
    )
    if not expires.isdigit() or _v4_time(date) + int(expires) < time.time():
        raise OssFault(403, "AccessDenied", "request has expired")
    _check_token(account, query.get("x-oss-security-token", ""))
    return account


def _v4(
    asked: Asked, credential: str, date: str, extra: str, signature: str,
    query: Mapping[str, str], payload: str, accounts: Mapping[str, Account], region: str,
) -> Account:
    key_id, _, scope = credential.partition("/")
    if scope != f"{date[:8]}/{region}/oss/aliyun_v4_request":
        raise OssFault(400, "InvalidArgument", f"the credential's scope is {scope!r}")
    if payload != "UNSIGNED-PAYLOAD":
        raise OssFault(400, "InvalidArgument", "x-oss-content-sha256 must be UNSIGNED-PAYLOAD")
    account = _account(key_id, accounts)
    additional = [name for name in extra.split(";") if name]
    covered = sorted(
        (name, value) for name, value in asked.headers.items()
        if name.startswith("x-oss-") or name in ("content-type", "content-md5")
        or name in additional
    )
    pairs = sorted((quote(n, safe="-_.~"), quote(v, safe="-_.~")) for n, v in query.items())
    resource = f"/{asked.bucket}/{asked.key}" if asked.bucket else "/"
    canonical = "\n".join((
        asked.method,
        quote(resource, safe="/-_.~"),
        "&".join(f"{name}={value}" if value else name for name, value in pairs),
        "".join(f"{name}:{value.strip()}\n" for name, value in covered),
        ";".join(sorted(additional)),
        payload,
    ))
    text = "\n".join((
        "OSS4-HMAC-SHA256", date, scope, hashlib.sha256(canonical.encode()).hexdigest()
    ))
    key = f"aliyun_v4{account.secret}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), hashlib.sha256)
    _compare(hmac.digest(key, text.encode(), hashlib.sha256).hex(), signature)
    return account


def _v4_time(text: str) -> float:
    try:
        return datetime.strptime(text, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise OssFault(400, "InvalidArgument", "x-oss-date is not a date") from None


def _account(key_id: str, accounts: Mapping[str, Account]) -> Account:
    if key_id not in accounts:
        raise OssFault(403, "InvalidAccessKeyId")
    return accounts[key_id]


def _compare(expected: str, given: str) -> None:
    if not hmac.compare_digest(expected, given):
        raise OssFault(403, "SignatureDoesNotMatch")


def _check_token(account: Account, given: str) -> None:
    if given != account.token:
        raise OssFault(403, "InvalidSecurityToken")
    if account.expires < time.time():
        raise OssFault(403, "SecurityTokenExpired")
