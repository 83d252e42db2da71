"""The OSS server of the tests, against oss2 as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import oss2
import pytest
import requests

from tests.oss_server.server import KEY_ID, REGION, SECRET, OssServer
from tests.oss_server.signing import Account

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "CAIS-token-of-a-temporary-credential"
ACCOUNTS = (
    Account(KEY_ID, SECRET),
    Account("STS.temporary", "secret-2", token=TOKEN),
    Account("STS.expired", "secret-3", token=TOKEN, expires=time.time() - 1),
    Account("reader", "secret-4", writes=False, lists_uploads=False),
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OssServer]:
    with OssServer(
        tmp_path / "oss", buckets=["bucket", "other"], accounts=ACCOUNTS, public=["other"]
    ) as running:
        yield running


def bucket(
    server: OssServer, auth: object = None, *, v4: bool = False, name: str = "bucket",
    region: str = REGION,
) -> oss2.Bucket:
    if auth is None:
        auth = (oss2.AuthV4 if v4 else oss2.Auth)(KEY_ID, SECRET)
    return oss2.Bucket(auth, server.endpoint, name, enable_crc=False, region=region)


KEYS = ["plain", "with space/ünï+%25&?=~.bin", "a/b/c"]


@pytest.mark.parametrize("v4", [False, True], ids=["v1", "v4"])
@pytest.mark.parametrize("key", KEYS)
def test_objects(server: OssServer, v4: bool, key: str) -> None:
    client = bucket(server, v4=v4)
    data = os.urandom(100_000)
    client.put_object(key, data, headers={"x-oss-meta-cai-pieces": "abc", "Content-Type": "x/y"})
    assert client.get_object(key).read() == data
    assert client.get_object(key, byte_range=(10, 19)).read() == data[10:20]
    assert client.get_object(key, byte_range=(99_990, None)).read() == data[99_990:]
    assert client.get_object(key, byte_range=(None, 7)).read() == data[-7:]
    found = client.head_object(key)
    assert (found.content_length, found.headers["x-oss-meta-cai-pieces"]) == (100_000, "abc")
    assert found.content_type == "x/y"
    assert server.log[0][0] == ("v4" if v4 else "v1")
    client.delete_object(key)
    with pytest.raises(oss2.exceptions.NoSuchKey):
        client.get_object(key)
    with pytest.raises(oss2.exceptions.NotFound):
        client.head_object(key)


@pytest.mark.parametrize("v4", [False, True], ids=["v1", "v4"])
def test_multipart_uploads(server: OssServer, v4: bool) -> None:
    client, key = bucket(server, v4=v4), "m/ö"
    parts = [os.urandom(200_000), os.urandom(150_000), b"end"]
    upload = client.init_multipart_upload(key, headers={"x-oss-meta-a": "b"}).upload_id
    sent = [
        oss2.models.PartInfo(number, client.upload_part(key, upload, number, data).etag)
        for number, data in enumerate(parts, start=1)
    ]
    client.upload_part(key, upload, 2, parts[1])
    listed = list(oss2.PartIterator(client, key, upload, max_parts=2))
    assert [(item.part_number, item.size) for item in listed] == [
        (1, 200_000), (2, 150_000), (3, 3)
    ]
    pending = oss2.MultipartUploadIterator(client, prefix="m/")
    assert [item.upload_id for item in pending] == [upload]
    assert not list(oss2.ObjectIterator(client))
    client.complete_multipart_upload(key, upload, sent)
    assert client.get_object(key).read() == b"".join(parts)
    assert client.head_object(key).headers["x-oss-meta-a"] == "b"
    assert not list(oss2.MultipartUploadIterator(client))
    with pytest.raises(oss2.exceptions.NoSuchUpload):
        client.upload_part(key, upload, 1, b"x")
    abandoned = client.init_multipart_upload(key).upload_id
    client.upload_part(key, abandoned, 1, b"x")
    client.abort_multipart_upload(key, abandoned)
    assert not list(oss2.MultipartUploadIterator(client))
    assert not list(server.storage.root.rglob("*.part"))


def test_parts_that_do_not_fit_are_refused(server: OssServer) -> None:
    client = bucket(server)
    upload = client.init_multipart_upload("k").upload_id
    first = client.upload_part("k", upload, 1, b"small").etag
    second = client.upload_part("k", upload, 2, b"last").etag
    info = oss2.models.PartInfo
    for parts in (
        [info(1, "0" * 32)], [info(1, first), info(2, second)], [info(3, first)],
    ):
        with pytest.raises(oss2.exceptions.ServerError):
            client.complete_multipart_upload("k", upload, parts)
    of_nothing = {"Content-MD5": "1B2M2Y8AsgTpgAmY7PhCfg=="}
    with pytest.raises(oss2.exceptions.ServerError, match="BadDigest"):
        client.upload_part("k", upload, 1, b"x", headers=of_nothing)


@pytest.mark.parametrize("v4", [False, True], ids=["v1", "v4"])
def test_listings(server: OssServer, v4: bool) -> None:
    client = bucket(server, v4=v4)
    for key in ("a/1", "a/2", "b", "c d/ü", "d"):
        client.put_object(key, b"x")
    for iterator in (oss2.ObjectIterator, oss2.ObjectIteratorV2):
        names = [item.key for item in iterator(client, max_keys=2)]
        assert names == ["a/1", "a/2", "b", "c d/ü", "d"]
        top = [item.key for item in iterator(client, delimiter="/", max_keys=2)]
        assert top == ["a/", "b", "c d/", "d"]
        assert [item.key for item in iterator(client, prefix="a/", delimiter="/")] == ["a/1", "a/2"]
    client.batch_delete_objects(["a/1", "b"])
    assert [item.key for item in oss2.ObjectIterator(client)] == ["a/2", "c d/ü", "d"]


@pytest.mark.parametrize("version", ["v1", "v4"])
def test_temporary_credentials(server: OssServer, version: str) -> None:
    def sts(key_id: str, secret: str, token: str) -> oss2.Bucket:
        return bucket(server, oss2.StsAuth(key_id, secret, token, auth_version=version))

    good = sts("STS.temporary", "secret-2", TOKEN)
    good.put_object("k", b"x")
    assert good.get_object("k").read() == b"x"
    without = (oss2.AuthV4 if version == "v4" else oss2.Auth)("STS.temporary", "secret-2")
    for wrong, code in (
        (sts("STS.temporary", "secret-2", "another"), "InvalidSecurityToken"),
        (bucket(server, without), "InvalidSecurityToken"),
        (sts(KEY_ID, SECRET, TOKEN), "InvalidSecurityToken"),
        (sts("STS.expired", "secret-3", TOKEN), "SecurityTokenExpired"),
    ):
        with pytest.raises(oss2.exceptions.ServerError) as caught:
            wrong.get_object("k")
        assert caught.value.code == code


@pytest.mark.parametrize("version", ["v1", "v4"])
def test_signed_urls(server: OssServer, version: str) -> None:
    client = bucket(server, v4=version == "v4")
    client.put_object("a b/ü", b"content")
    url = client.sign_url("GET", "a b/ü", 60, slash_safe=True)
    assert requests.get(url, timeout=10).content == b"content"
    assert requests.get(url.replace("http", "http", 1), headers={"Range": "bytes=0-2"},
                        timeout=10).content == b"con"
    assert requests.get(url.replace("%C3%BC", "u"), timeout=10).status_code == 403
    assert requests.delete(url, timeout=10).status_code == 403
    expired = client.sign_url("GET", "a b/ü", -1, slash_safe=True)
    assert requests.get(expired, timeout=10).status_code == 403
    assert server.log[-1][0] == f"{version}-url"


def test_wrong_credentials(server: OssServer) -> None:
    bucket(server).put_object("k", b"x")
    for auth, code in (
        (oss2.Auth(KEY_ID, "wrong"), "SignatureDoesNotMatch"),
        (oss2.AuthV4(KEY_ID, "wrong"), "SignatureDoesNotMatch"),
        (oss2.Auth("nobody", SECRET), "InvalidAccessKeyId"),
        (oss2.AuthV4("nobody", SECRET), "InvalidAccessKeyId"),
        (oss2.AnonymousAuth(), "AccessDenied"),
    ):
        with pytest.raises(oss2.exceptions.ServerError) as caught:
            bucket(server, auth).get_object("k")
        assert (caught.value.status, caught.value.code) == (403, code)
    with pytest.raises(oss2.exceptions.ServerError) as caught:
        bucket(server, v4=True, region="cn-beijing").get_object("k")
    assert caught.value.status == 400


def test_every_covered_part_of_a_request_is_covered(server: OssServer) -> None:
    """A captured V1 and V4 request with one thing changed is refused."""
    for v4 in (False, True):
        client = bucket(server, v4=v4)
        client.put_object("k", b"x")
        request = oss2.http.Request(
            "GET", f"{server.endpoint}/bucket/k", params={"x-oss-process": "a"},
            headers={"x-oss-meta-z": "1", "Content-Type": "t"}, region=REGION, product="oss",
        )
        client.auth._sign_request(request, "bucket", "k")

        def status(
            method: str = "GET", path: str = "/bucket/k", process: str = "a", **headers: str,
        ) -> int:
            changed = dict(request.headers) | {n.replace("_", "-"): v for n, v in headers.items()}  # noqa: B023
            return requests.request(
                method, server.endpoint + path, params={"x-oss-process": process},
                headers=changed, timeout=10,
            ).status_code

        assert status() == 200
        assert status(method="DELETE") == 403
        assert status(path="/bucket/j") == 403
        assert status(path="/other2/k") == 403
        assert status(process="b") == 403
        assert status(x_oss_meta_z="2") == 403
        assert status(x_oss_more="2") == 403
        assert status(Content_Type="u") == 403
        assert status(**{"x-oss-date" if v4 else "date": "20200101T000000Z"}) in (400, 403)


def test_rights(server: OssServer) -> None:
    bucket(server).put_object("k", b"x")
    reader = bucket(server, oss2.Auth("reader", "secret-4"))
    assert reader.get_object("k").read() == b"x"
    for refused in (
        lambda: reader.put_object("k", b"y"),
        lambda: reader.delete_object("k"),
        lambda: reader.list_multipart_uploads(),
    ):
        with pytest.raises(oss2.exceptions.AccessDenied):
            refused()
    bucket(server, name="other").put_object("k", b"public")
    anybody = bucket(server, oss2.AnonymousAuth(), name="other")
    assert anybody.get_object("k").read() == b"public"
    with pytest.raises(oss2.exceptions.AccessDenied):
        anybody.put_object("k", b"y")
    with pytest.raises(oss2.exceptions.NoSuchBucket):
        bucket(server, name="nowhere").get_object("k")


def test_what_is_stored_outlives_the_server(tmp_path: Path) -> None:
    with OssServer(tmp_path, buckets=["bucket"]) as first:
        client = bucket(first)
        client.put_object("ü", b"x" * 1000)
        upload = client.init_multipart_upload("m").upload_id
        etag = client.upload_part("m", upload, 1, b"y" * 1000).etag
    with OssServer(tmp_path) as second:
        client = bucket(second)
        assert client.get_object("ü").read() == b"x" * 1000
        client.complete_multipart_upload("m", upload, [oss2.models.PartInfo(1, etag)])
        assert client.get_object("m").read() == b"y" * 1000


def test_it_runs_as_a_process(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.oss_server", str(tmp_path), "--bucket", "bucket"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OSS_SERVER_KEY_ID": "mine", "OSS_SERVER_SECRET": "my-secret"},
    ) as process:
        try:
            assert process.stdout
            endpoint = json.loads(process.stdout.readline())["endpoint"]
            client = oss2.Bucket(oss2.Auth("mine", "my-secret"), endpoint, "bucket")
            client.put_object("k", b"x")
            assert client.get_object("k").read() == b"x"
        finally:
            process.terminate()
        assert process.wait(10) == 0
