"""A server that speaks OSS as far as real clients need it: oss2, ossfs and ours.

It checks every signature (``signing``), serves ranges, multipart uploads, listings and STS, keeps
everything in a directory, and can be told to fail::

    with OssServer(tmp_path, buckets=["models"]) as server:
        server.endpoint                      # http://127.0.0.1:PORT, path style
        server.faults.cut_after(5_000_000)   # then drop the connection, once
        server.faults.answer_next(3, 503, "ServiceUnavailable")

``python -m tests.oss_server --help`` runs it as a process.
"""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import threading
from collections.abc import Callable, Iterable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import gmtime, sleep, strftime
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

from tests.oss_server.signing import Account, Asked, OssFault, authenticate
from tests.oss_server.storage import Object, Storage

KEY_ID, SECRET = "LTAItestkeyid", "test-secret-of-the-oss-server"
REGION = "cn-hangzhou"
BLOCK = 256 * 1024

_KEPT = ("content-type", "content-encoding", "content-disposition", "cache-control", "expires")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Cut(Exception):
    """The connection ends here, as a fault demands."""


class Faults:
    """What shall go wrong; counts the bytes that have travelled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cut_at: int | None = None
        self._answers: list[tuple[int, str]] = []
        self.pause_s = 0.0
        self.received = 0
        self.sent = 0

    def cut_after(self, amount: int) -> None:
        """Drop the connection that carries the byte after ``amount`` more, once."""
        with self._lock:
            self._cut_at = self.received + self.sent + amount

    def answer_next(self, count: int, status: int, code: str) -> None:
        """Answer the next requests with an error."""
        with self._lock:
            self._answers += [(status, code)] * count

    def clear(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._answers, self._cut_at = [], None

    def request(self) -> None:
        with self._lock:
            answer = self._answers.pop(0) if self._answers else None
        if answer:
            raise OssFault(*answer)

    def count(self, *, received: int = 0, sent: int = 0) -> None:
        if self.pause_s:
            sleep(self.pause_s)
        with self._lock:
            self.received += received
            self.sent += sent
            if self._cut_at is not None and self.received + self.sent > self._cut_at:
                self._cut_at = None
                raise Cut


class OssServer(ThreadingHTTPServer):
    """The server; starts in a thread of its own when entered as a context manager.

    Args:
        root: directory that keeps the buckets.
        buckets: made if missing.
        accounts: who may come in; one with ``KEY_ID`` and ``SECRET`` if none is given.
        region: that V4 signatures must name.
        port: 0 for any.
        public: buckets that anybody may read.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, root: Path, *, buckets: Iterable[str] = (), accounts: Iterable[Account] = (),
        region: str = REGION, port: int = 0, public: Iterable[str] = (),
    ) -> None:
        super().__init__(("127.0.0.1", port), _Desk)
        root.mkdir(parents=True, exist_ok=True)
        self.storage = Storage(root)
        for bucket in buckets:
            self.storage.make_bucket(bucket)
        known = list(accounts) or [Account(KEY_ID, SECRET)]
        self.accounts = {account.key_id: account for account in known}
        self.region = region
        self.public = set(public)
        self.faults = Faults()
        self.log: list[tuple[str, str, str]] = []
        """Every request that proved itself: (signature version, method, path and query)."""
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def drop_connections(self) -> None:
        """End every open connection at once."""
        for opened in list(self._open):
            _shut(opened)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        del request, client_address  # connections that end are what the tests are about

    def __enter__(self) -> OssServer:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.shutdown()
        self.drop_connections()
        self.server_close()
        self._thread.join()


class _Desk(BaseHTTPRequestHandler):
    server: OssServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    rbufsize = BLOCK

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        del format, args

    def _handle(self) -> None:
        self._unread = int(self.headers.get("content-length") or 0)
        try:
            self._answer()
        except OssFault as fault:
            try:
                self._drain()
                self._fail(fault)
            except Cut:
                self._cut()
        except Cut:
            self._cut()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815 - http.server's names

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        bucket, key = self._target(unquote(parts.path))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.faults.request()
        asked = Asked(self.command, bucket, key, query, headers)
        if not (bucket in self.server.public and self.command in ("GET", "HEAD")):
            version, account = authenticate(asked, self.server.accounts, self.server.region)
            writes = self.command not in ("GET", "HEAD")
            if (writes and not account.writes) or (
                "uploads" in query and not writes and not account.lists_uploads
            ):
                raise OssFault(403, "AccessDenied")
            self.server.log.append((version, self.command, self.path))
        if bucket and bucket not in self.server.storage.objects:
            if self.command == "PUT" and not key:
                self.server.storage.make_bucket(bucket)
                return self._send(200)
            raise OssFault(404, "NoSuchBucket")
        return self._operation(asked)(asked)

    def _target(self, path: str) -> tuple[str, str]:
        host = (self.headers.get("host") or "").partition(":")[0]
        label = host.partition(".")[0]
        if "." in host and label in self.server.storage.objects:
            return label, path.removeprefix("/")
        bucket, _, key = path.removeprefix("/").partition("/")
        return bucket, key

    def _operation(self, asked: Asked) -> Callable[[Asked], None]:
        method, query = asked.method, asked.query
        if not asked.bucket:
            table = {"GET": self._list_buckets}
        elif not asked.key:
            table = {"PUT": lambda _asked: self._send(200), "HEAD": lambda _asked: self._send(200)}
            table["GET"] = self._list_uploads if "uploads" in query else self._list_objects
            if "location" in query:
                table["GET"] = self._location
            if "bucketInfo" in query:
                table["GET"] = self._location
            table["POST"] = self._delete_many
        elif "uploadId" in query:
            table = {
                "PUT": self._put_part, "POST": self._complete, "GET": self._list_parts,
                "DELETE": self._abort,
            }
        elif "uploads" in query:
            table = {"POST": self._begin}
        else:
            table = {
                "GET": self._get, "HEAD": self._get, "PUT": self._put, "DELETE": self._delete
            }
        if method not in table:
            raise OssFault(405, "MethodNotAllowed")
        return table[method]

    # objects

    def _get(self, asked: Asked) -> None:
        found = self.server.storage.find(asked.bucket, asked.key)
        start, end = 0, found.size
        status, extra = 200, {}
        span = _span(asked.headers.get("range", ""), found.size)
        if span == "unsatisfiable":
            # OSS ignores such a range, unless the client asks for the standard's behaviour.
            if asked.headers.get("x-oss-range-behavior") == "standard":
                raise OssFault(416, "InvalidRange")
        elif span:
            start, end = span
            status, extra = 206, {"Content-Range": f"bytes {start}-{end - 1}/{found.size}"}
        headers = found.headers | extra | {
            "ETag": f'"{found.etag}"', "x-oss-object-type": found.kind, "Accept-Ranges": "bytes",
            "Last-Modified": formatdate(found.modified, usegmt=True),
        }
        data = self.server.storage.data_path(asked.bucket, asked.key)
        with data.open("rb") as file:
            self._head(status, end - start, headers)
            if self.command == "HEAD":
                return
            file.seek(start)
            while start < end:
                block = file.read(min(BLOCK, end - start))
                self.server.faults.count(sent=len(block))
                self.wfile.write(block)
                start += len(block)

    def _put(self, asked: Asked) -> None:
        data, digest, size = self._receive(asked)
        headers = _kept_headers(asked.headers)
        self.server.storage.store(
            asked.bucket, Object(asked.key, size, digest, headers=headers), data
        )
        self._send(200, headers={"ETag": f'"{digest}"'})

    def _delete(self, asked: Asked) -> None:
        self.server.storage.remove(asked.bucket, asked.key)
        self._send(204)

    def _delete_many(self, asked: Asked) -> None:
        if "delete" not in asked.query:
            raise OssFault(405, "MethodNotAllowed")
        removed = []
        for node in _xml(self._body()).findall("Object/Key"):
            self.server.storage.remove(asked.bucket, node.text or "")
            removed.append(f"<Deleted><Key>{escape(node.text or '')}</Key></Deleted>")
        self._send_xml("DeleteResult", "".join(removed))

    # multipart uploads

    def _begin(self, asked: Asked) -> None:
        upload = self.server.storage.begin(asked.bucket, asked.key, _kept_headers(asked.headers))
        self._send_xml(
            "InitiateMultipartUploadResult",
            f"<Bucket>{asked.bucket}</Bucket><Key>{escape(asked.key)}</Key>"
            f"<UploadId>{upload.id}</UploadId>",
        )

    def _put_part(self, asked: Asked) -> None:
        upload = self.server.storage.upload(asked.bucket, asked.query["uploadId"], asked.key)
        number = asked.query.get("partNumber", "")
        if not number.isdigit() or not 1 <= int(number) <= 10_000:
            raise OssFault(400, "InvalidArgument")
        data, digest, size = self._receive(asked)
        part = Object("", size, digest)
        self.server.storage.add_part(asked.bucket, upload, int(number), part, data)
        self._send(200, headers={"ETag": f'"{digest}"'})

    def _complete(self, asked: Asked) -> None:
        upload = self.server.storage.upload(asked.bucket, asked.query["uploadId"], asked.key)
        parts = [
            (int(node.findtext("PartNumber") or 0), node.findtext("ETag") or "")
            for node in _xml(self._body()).findall("Part")
        ]
        made = self.server.storage.complete(asked.bucket, upload, parts)
        self._send_xml(
            "CompleteMultipartUploadResult",
            f"<Bucket>{asked.bucket}</Bucket><Key>{escape(asked.key)}</Key>"
            f"<ETag>{made.etag}</ETag>",
            headers={"ETag": f'"{made.etag}"'},
        )

    def _abort(self, asked: Asked) -> None:
        upload = self.server.storage.upload(asked.bucket, asked.query["uploadId"], asked.key)
        self.server.storage.abort(asked.bucket, upload)
        self._send(204)

    def _list_parts(self, asked: Asked) -> None:
        upload = self.server.storage.upload(asked.bucket, asked.query["uploadId"], asked.key)
        after = int(asked.query.get("part-number-marker") or 0)
        most = int(asked.query.get("max-parts") or 1000)
        with self.server.storage.lock:
            rest = sorted((n, part) for n, part in upload.parts.items() if n > after)
        page = rest[:most]
        body = "".join(
            f"<Part><PartNumber>{number}</PartNumber><LastModified>{_iso(part.modified)}"
            f'</LastModified><ETag>"{part.etag}"</ETag><Size>{part.size}</Size></Part>'
            for number, part in page
        )
        last = page[-1][0] if page else after
        self._send_xml(
            "ListPartsResult",
            f"<Bucket>{asked.bucket}</Bucket><Key>{escape(asked.key)}</Key>"
            f"<UploadId>{upload.id}</UploadId><NextPartNumberMarker>{last}</NextPartNumberMarker>"
            f"<MaxParts>{most}</MaxParts><IsTruncated>{_flag(len(rest) > most)}</IsTruncated>"
            + body,
        )

    def _list_uploads(self, asked: Asked) -> None:
        prefix, most = asked.query.get("prefix", ""), int(asked.query.get("max-uploads") or 1000)
        after = (asked.query.get("key-marker", ""), asked.query.get("upload-id-marker", ""))
        with self.server.storage.lock:
            known = self.server.storage.uploads[asked.bucket].values()
            rest = sorted(
                (item.key, item.id, item.started) for item in known
                if item.key.startswith(prefix) and _follows((item.key, item.id), after)
            )
        page, encode = rest[:most], _encoder(asked)
        body = "".join(
            f"<Upload><Key>{encode(key)}</Key><UploadId>{identity}</UploadId>"
            f"<Initiated>{_iso(started)}</Initiated></Upload>"
            for key, identity, started in page
        )
        key, identity = (page[-1][0], page[-1][1]) if len(rest) > most else ("", "")
        self._send_xml(
            "ListMultipartUploadsResult",
            f"<Bucket>{asked.bucket}</Bucket>{_encoding(asked)}<NextKeyMarker>{encode(key)}"
            f"</NextKeyMarker><NextUploadIdMarker>{identity}</NextUploadIdMarker>"
            f"<MaxUploads>{most}</MaxUploads><IsTruncated>{_flag(len(rest) > most)}</IsTruncated>"
            f"{body}",
        )

    # listings

    def _list_objects(self, asked: Asked) -> None:
        query, encode = asked.query, _encoder(asked)
        second = query.get("list-type") == "2"
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token" if second else "marker", "")
        after = max(after, query.get("start-after", ""))
        most = int(query.get("max-keys") or 100)
        found = self._names(asked.bucket, prefix, delimiter)
        rest = [item for item in found if item[0] > after]
        page, truncated = rest[:most], len(rest) > most
        body = "".join(
            f"<CommonPrefixes><Prefix>{encode(name)}</Prefix></CommonPrefixes>" if item is None
            else f"<Contents><Key>{encode(name)}</Key><LastModified>{_iso(item.modified)}"
            f'</LastModified><ETag>"{item.etag}"</ETag><Type>{item.kind}</Type>'
            f"<Size>{item.size}</Size><StorageClass>Standard</StorageClass></Contents>"
            for name, item in page
        )
        following = ""
        if truncated:
            name = "NextContinuationToken" if second else "NextMarker"
            following = f"<{name}>{encode(page[-1][0])}</{name}>"
        self._send_xml(
            "ListBucketResult",
            f"<Name>{asked.bucket}</Name><Prefix>{encode(prefix)}</Prefix>{_encoding(asked)}"
            f"<MaxKeys>{most}</MaxKeys><Delimiter>{escape(delimiter)}</Delimiter>"
            f"<KeyCount>{len(page)}</KeyCount><IsTruncated>{_flag(truncated)}</IsTruncated>"
            f"{following}{body}",
        )

    def _names(self, bucket: str, prefix: str, delimiter: str) -> list[tuple[str, Object | None]]:
        names: dict[str, Object | None] = {}
        with self.server.storage.lock:
            for key, item in self.server.storage.objects[bucket].items():
                if not key.startswith(prefix):
                    continue
                rest = key.removeprefix(prefix)
                if delimiter and delimiter in rest:
                    names[prefix + rest.partition(delimiter)[0] + delimiter] = None
                else:
                    names[key] = item
        return sorted(names.items(), key=lambda pair: pair[0])

    def _list_buckets(self, asked: Asked) -> None:
        del asked
        listed = "".join(
            f"<Bucket><Name>{name}</Name><Location>oss-{self.server.region}</Location>"
            "<CreationDate>2026-01-01T00:00:00.000Z</CreationDate>"
            "<ExtranetEndpoint>x</ExtranetEndpoint><IntranetEndpoint>x</IntranetEndpoint>"
            "<StorageClass>Standard</StorageClass></Bucket>"
            for name in sorted(self.server.storage.objects)
        )
        self._send_xml("ListAllMyBucketsResult", f"<Buckets>{listed}</Buckets>")

    def _location(self, asked: Asked) -> None:
        del asked
        self._send_xml("LocationConstraint", f"oss-{self.server.region}")

    # the wire

    def _receive(self, asked: Asked) -> tuple[Path, str, int]:
        """The body in a temporary file, its MD5 and size; refused when it is not what it says."""
        path = self.server.storage.temporary(asked.bucket)
        digest, size = hashlib.md5(), 0
        try:
            with path.open("wb") as out:
                while self._unread:
                    block = self._read()
                    digest.update(block)
                    out.write(block)
                    size += len(block)
            promised = asked.headers.get("content-md5")
            if promised and base64.b64decode(promised) != digest.digest():
                raise OssFault(400, "BadDigest")
        except BaseException:
            path.unlink()
            raise
        return path, digest.hexdigest().upper(), size

    def _read(self) -> bytes:
        block = self.rfile.read(min(BLOCK, self._unread))
        if not block:
            raise Cut
        self._unread -= len(block)
        self.server.faults.count(received=len(block))
        return block

    def _body(self) -> bytes:
        data = b""
        while self._unread:
            data += self._read()
        return data

    def _drain(self) -> None:
        while self._unread:
            self._read()

    def _cut(self) -> None:
        self.close_connection = True
        _shut(self.connection)

    def _fail(self, fault: OssFault) -> None:
        body = (
            f"<Error><Code>{fault.code}</Code><Message>{escape(fault.message)}</Message>"
            "<RequestId>test</RequestId></Error>"
        )
        self._send(fault.status, body.encode(), {"Content-Type": "application/xml"})

    def _send_xml(self, root: str, body: str, headers: dict[str, str] | None = None) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><{root}>{body}</{root}>'
        self._send(200, text.encode(), {"Content-Type": "application/xml"} | (headers or {}))

    def _send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self._drain()
        self._head(status, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("x-oss-request-id", "test")
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()


def _shut(opened: socket.socket) -> None:
    try:
        opened.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def _span(text: str, size: int) -> tuple[int, int] | str | None:
    match = _RANGE.fullmatch(text)
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        return (max(0, size - int(match[2])), size) if int(match[2]) and size else "unsatisfiable"
    start, last = int(match[1]), int(match[2]) if match[2] else size - 1
    if start >= size or last < start:
        return "unsatisfiable"
    return start, min(last + 1, size)


def _kept_headers(headers: Any) -> dict[str, str]:
    return {
        name: value for name, value in headers.items()
        if name in _KEPT or name.startswith("x-oss-meta-")
    }


def _xml(data: bytes) -> ET.Element:
    try:
        return ET.fromstring(data)
    except ET.ParseError:
        raise OssFault(400, "MalformedXML") from None


def _follows(item: tuple[str, str], after: tuple[str, str]) -> bool:
    return item > after if after[1] else not after[0] or item[0] > after[0]


def _encoder(asked: Asked) -> Callable[[str], str]:
    return quote if asked.query.get("encoding-type") == "url" else escape


def _encoding(asked: Asked) -> str:
    return "<EncodingType>url</EncodingType>" if "encoding-type" in asked.query else ""


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _iso(seconds: float) -> str:
    return strftime("%Y-%m-%dT%H:%M:%S.000Z", gmtime(seconds))
