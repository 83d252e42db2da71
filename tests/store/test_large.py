"""A 2 GiB model, cut off three times on its way in and three times on its way out.

OSS is our own server, which checks every signature. S3 is moto, which checks none, and which reads
a whole object for each of its ranges; so there the model comes in shards, and has 512 MiB unless
CAI_LARGE_MIB says otherwise.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path

import pytest

from cai.model import SealOptions, new_key, seal
from cai.store import StoreOptions, open_store
from tests.oss_server.server import OssServer
from tests.store.conftest import MIB, environment

pytestmark = [pytest.mark.large, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
SIZE = int(os.environ.get("CAI_LARGE_MIB", "2048")) * MIB
S3_SIZE = int(os.environ.get("CAI_LARGE_MIB", "512")) * MIB
SHARDS = 16
MOTO = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def big(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    base = tmp_path_factory.mktemp("big")
    (base / "plain").mkdir()
    size, shards = request.param
    for number in range(shards):
        with (base / "plain" / f"model-{number}.safetensors").open("wb") as file:
            file.truncate(size // shards)  # sparse; the ciphertext is not
    seal(base / "plain", base / "sealed", new_key(), options=SealOptions(workers=2))
    yield base / "sealed"
    _remove(base)


@pytest.fixture
def oss(tmp_path: Path) -> Iterator[tuple[str, dict[str, str], OssServer]]:
    with OssServer(tmp_path / "oss", buckets=["models"]) as server:
        yield "oss://models/big", environment(server), server
    _remove(tmp_path)


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    server = subprocess.Popen(
        [sys.executable, "-c", MOTO], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert server.stdout
    values = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{int(server.stdout.readline())}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REGION": "us-east-1",
    }
    boto3.client(
        "s3", endpoint_url=values["AWS_ENDPOINT_URL"], region_name="us-east-1",
        aws_access_key_id="a", aws_secret_access_key="b",
    ).create_bucket(Bucket="models")
    yield "s3://models/big", values
    server.kill()
    server.communicate()
    _remove(tmp_path)


@pytest.mark.parametrize("big", [(SIZE, 1)], indirect=True, ids=["one-file"])
def test_oss(big: Path, oss: tuple[str, dict[str, str], OssServer], tmp_path: Path) -> None:
    uri, values, server = oss
    out = tmp_path / "copy"

    def after(part: float) -> Callable[[], bool]:
        """Whether so much of the model has travelled since now."""
        start = server.faults.received + server.faults.sent
        return lambda: server.faults.received + server.faults.sent - start > part * SIZE

    for command in (["push", str(big), uri], ["pull", uri, str(out)]):
        _killed(command, values, after(0.25))
        _killed(command, values, after(0.25))
        # The third time it is the network that goes, for longer than the client is patient about.
        stop = threading.Event()
        outage = threading.Thread(target=_outage, args=(server, after(0.2), stop))
        outage.start()
        failed = subprocess.run(
            _cai(command), env=_environment(values), capture_output=True, text=True, timeout=240,
            check=False,
        )
        stop.set()
        outage.join()
        assert failed.returncode == 8, failed.stderr
        assert not out.exists()
        before = server.faults.received + server.faults.sent
        _finished(command, values)
        travelled = server.faults.received + server.faults.sent - before
        assert travelled < 0.6 * SIZE, "what had arrived before the cuts travelled again"
    assert _digests(out) == _digests(big)
    assert not open_store(uri, StoreOptions(environment=values)).pending()
    assert {path.name for path in tmp_path.iterdir()} == {"oss", "copy"}


@pytest.mark.parametrize("big", [(S3_SIZE, SHARDS)], indirect=True, ids=["shards"])
def test_s3(big: Path, s3: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    uri, values = s3
    out = tmp_path / "copy"
    store = open_store(uri, StoreOptions(environment=values))

    def objects(wanted: int) -> Callable[[], bool]:
        return lambda: len(list(store.names(recursive=True))) >= wanted

    def blocks(wanted: float) -> Callable[[], bool]:
        def there() -> bool:
            files = (out.parent / "copy.partial-pull").rglob("objects/*")
            return sum(path.stat().st_blocks * 512 for path in files) > wanted * S3_SIZE

        return there

    for wanted in (2, 6, 10):
        _killed(["push", str(big), uri], values, objects(wanted))
    _finished(["push", str(big), uri], values)
    assert not store.pending()
    for part in (0.2, 0.4, 0.6):
        _killed(["pull", uri, str(out)], values, blocks(part))
    _finished(["pull", uri, str(out)], values)
    assert _digests(out) == _digests(big)
    assert not list(tmp_path.glob("*partial*"))


def _cai(command: list[str]) -> list[str]:
    return [sys.executable, "-m", "cai", *command]


def _environment(values: dict[str, str]) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)} | values


def _killed(command: list[str], values: dict[str, str], moment: Callable[[], bool]) -> None:
    with subprocess.Popen(
        _cai(command), env=_environment(values), stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    ) as process:
        deadline = time.monotonic() + 180
        while not moment():
            assert time.monotonic() < deadline
            if process.poll() is not None:
                assert process.stderr
                pytest.fail(f"it ended before it was killed: {process.stderr.read()}")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)


def _finished(command: list[str], values: dict[str, str]) -> None:
    done = subprocess.run(
        _cai(command), env=_environment(values), capture_output=True, text=True, timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _outage(server: OssServer, moment: Callable[[], bool], stop: threading.Event) -> None:
    while not moment() and not stop.is_set():
        time.sleep(0.02)
    while not stop.is_set():
        server.faults.answer_next(50, 503, "ServiceUnavailable")
        server.drop_connections()
        time.sleep(0.1)
    server.faults.clear()


def _digests(root: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            digest = blake2b()
            with path.open("rb") as file:
                while block := file.read(MIB):
                    digest.update(block)
            digests[path.relative_to(root).as_posix()] = digest.hexdigest()
    return digests


def _remove(root: Path) -> None:
    """Several GiB are not left for pytest to keep."""
    for path in root.rglob("*"):
        if path.is_file():
            path.unlink()
