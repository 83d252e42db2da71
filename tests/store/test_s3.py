"""``s3://`` and ``cos://`` against moto's server.

moto checks no signature: these tests show that the API is used rightly, not that signing works.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cai.errors import InputError, InputMissing, PeerUnreachable, SettingError, Tampered
from cai.store import Store, StoreOptions, open_store, pull, push
from tests.store.conftest import MIB, Sealed, contents

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")

NAMES = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"),
    "cos": ("COS_SECRET_ID", "COS_SECRET_KEY", "COS_ENDPOINT"),
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    client.create_bucket(Bucket="models")
    yield url
    server.stop()


@pytest.fixture(params=["s3", "cos"])
def store(
    request: pytest.FixtureRequest, endpoint: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Store:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    key_id, secret, address = NAMES[request.param]
    values = {key_id: "id", secret: "secret", address: endpoint}
    if request.param == "cos":
        values["COS_REGION"] = "ap-shanghai"
    name = request.node.name.replace("[", "-").replace("]", "")
    return open_store(
        f"{request.param}://models/{name}/minilm", StoreOptions(environment=values, attempts=2)
    )


def test_round_trip(sealed: Sealed, store: Store, tmp_path: Path) -> None:
    sent = push(sealed.path, store, verify=True)
    assert sent.sent_bytes > sent.total_bytes
    assert push(sealed.path, store).sent_bytes == 0
    pull(store, tmp_path / "copy", index_sha256=sealed.report.index_sha256)
    assert contents(tmp_path / "copy") == sealed.files()
    assert {item.path for item in store.names(recursive=True)} == set(sealed.files())
    top = [(item.path, item.size) for item in store.names(recursive=False)]
    assert ("objects/", None) in top
    assert len(top) == 4
    assert not store.pending()


def test_a_broken_push_is_continued_from_its_parts(sealed: Sealed, store: Store) -> None:
    import hashlib

    largest = max((sealed.path / "objects").iterdir(), key=lambda path: path.stat().st_size)
    from cai.model.index import parse_index
    from cai.store.publication import label_of

    stored = f"objects/{largest.name}"
    file = parse_index((sealed.path / "index.cai").read_bytes())[stored]
    upload = store.begin(stored, file.size, label_of(file))
    for number, data in ((1, largest.read_bytes()[: 8 * MIB]), (2, b"w" * (8 * MIB))):
        upload.send(number, data, hashlib.md5(data).digest(), lambda _n: None)
    assert list(store.pending()) == [stored]
    done = push(sealed.path, store, verify=True)
    assert done.resumed_bytes == 8 * MIB
    assert not store.pending()


def test_ranges_and_what_is_not_there(sealed: Sealed, store: Store) -> None:
    push(sealed.path, store)
    index = sealed.files()["index.cai"]
    blob = store.read("index.cai", 5, 10)
    assert (blob.data, blob.total) == (index[5:15], len(index))
    assert store.read("index.cai", len(index) - 3, 100).data == index[-3:]
    assert store.read("index.cai", len(index) + 5, 10).data == b""
    assert store.stat("nothing") is None
    with pytest.raises(InputMissing):
        store.read("nothing", 0, 5)
    store.remove("nothing")


def test_prune(sealed: Sealed, store: Store) -> None:
    push(sealed.path, store)
    store.put("objects/" + "0" * 32, b"old", "x")
    store.begin("objects/" + "1" * 32, 100, "x")
    assert push(sealed.path, store, prune=True).removed == ("objects/" + "0" * 32,)
    assert not store.pending()


def test_damage_is_noticed(sealed: Sealed, store: Store, tmp_path: Path) -> None:
    push(sealed.path, store)
    path = min(name for name in sealed.files() if name.startswith("objects/"))
    data = sealed.files()[path]
    store.put(path, data[:-1] + bytes([data[-1] ^ 1]), "label")
    with pytest.raises(Tampered, match=path):
        pull(store, tmp_path / "copy")
    assert push(sealed.path, store).sent_bytes == len(data)
    pull(store, tmp_path / "copy")


def test_a_bucket_that_is_not_there(endpoint: str, tmp_path: Path) -> None:
    values = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": endpoint}
    store = open_store("s3://nowhere/x", StoreOptions(environment=values))
    with pytest.raises(InputError, match="bucket does not exist"):
        pull(store, tmp_path / "copy")


def test_nobody_answers() -> None:
    values = {
        "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
    }
    store = open_store("s3://models/x", StoreOptions(environment=values, attempts=1))
    with pytest.raises(PeerUnreachable):
        store.stat("cai.json")


@pytest.mark.parametrize("endpoint", ["ftp://host", "http://", "http://a b"])
def test_endpoints_refused(endpoint: str) -> None:
    values = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    with pytest.raises(SettingError):
        open_store("s3://models/x", StoreOptions(endpoint=endpoint, environment=values))


def test_the_region_of_cos_makes_its_endpoint() -> None:
    values = {"COS_SECRET_ID": "a", "COS_SECRET_KEY": "b", "COS_REGION": "ap-shanghai"}
    store = open_store("cos://models-125/x", StoreOptions(environment=values))
    client = store._store._client  # type: ignore[attr-defined]
    assert client.meta.endpoint_url == "https://cos.ap-shanghai.myqcloud.com"


def test_credentials_of_aws_do_not_go_to_cos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-aws")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-aws")
    store = open_store("cos://models-125/x", StoreOptions(environment={"COS_REGION": "ap-x1"}))
    client = store._store._client  # type: ignore[attr-defined]
    url = client.generate_presigned_url("get_object", {"Bucket": "models-125", "Key": "k"})
    assert "of-aws" not in url
