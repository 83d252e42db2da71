"""Where a sealed model lives, as text."""

from __future__ import annotations

import threading
import time

import pytest

from cai.errors import FormatError, Interrupted, LimitExceeded, UsageError
from cai.store.base import MAX_PARTS, PART, check_path, part_size
from cai.store.throttle import Throttle, parse_rate
from cai.store.uri import Location, parse_uri


@pytest.mark.parametrize(("text", "expected"), [
    ("file:/srv/m", Location("file", "", "/srv/m")),
    ("file:///srv/m", Location("file", "", "/srv/m")),
    ("file://localhost/srv/m", Location("file", "", "/srv/m")),
    ("file:here/m", Location("file", "", "here/m")),
    ("/srv/m", Location("file", "", "/srv/m")),
    ("./m", Location("file", "", "./m")),
    ("../m", Location("file", "", "../m")),
    ("oss://bucket/a/b", Location("oss", "bucket", "a/b")),
    ("OSS://bucket/a/b/", Location("oss", "bucket", "a/b")),
    ("oss://bucket", Location("oss", "bucket", "")),
    ("s3://my.bucket/a", Location("s3", "my.bucket", "a")),
    ("cos://b-1250000000/a", Location("cos", "b-1250000000", "a")),
    ("bucket:/a/b", Location("oss", "bucket", "a/b")),
    ("bucket:/", Location("oss", "bucket", "")),
    ("https://host/a/", Location("https", "", "https://host/a")),
    ("http://host:81/a", Location("http", "", "http://host:81/a")),
])
def test_places(text: str, expected: Location) -> None:
    assert parse_uri(text) == expected


@pytest.mark.parametrize("text", [
    "", "model", "model.sealed", "a:b", "ftp://host/x", "oss:bucket/x", "oss://", "oss:///x",
    "oss://Bucket/x", "oss://b/x", "oss://id:secret@bucket/x", "s3://id@bucket/x",
    "https://user:word@host/x", "https://user@host/x", "https:///x", "https://host/x?y=1",
    "https://host/x#y", "https://host:port/x", "file:", "file://host/x", "file:/a%00b",
    "oss://bucket/../x", "oss://bucket/a//b", "oss://bucket/a\x00b", "oss://bucket/a\nb",
    "bucket://x", "-bucket:/x", "x" * 5000,
])
def test_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_uri(text)


def test_a_refusal_does_not_repeat_credentials() -> None:
    for text in ("oss://id:tellnobody@bucket/x", "https://user:tellnobody@host/x"):
        with pytest.raises(UsageError) as caught:
            parse_uri(text)
        assert "tellnobody" not in str(caught.value)


@pytest.mark.parametrize("text", [
    "oss://bucket/a/b", "file:/srv/m", "https://host/a", "oss://bucket", "cos://bucket/x",
])
def test_uris_read_as_they_were_written(text: str) -> None:
    assert parse_uri(text).uri == text
    assert parse_uri(parse_uri(text).uri) == parse_uri(text)


def test_keys() -> None:
    assert parse_uri("oss://bucket/a").key("cai.json") == "a/cai.json"
    assert parse_uri("oss://bucket").key("cai.json") == "cai.json"
    with pytest.raises(LimitExceeded):
        parse_uri("oss://bucket").key("ü" * 512)


@pytest.mark.parametrize("path", [
    "", "/a", "a/", "a//b", ".", "a/./b", "..", "a/../b", "a\x00", "a\n", "\x7f", "a" * 70_000,
])
def test_paths_that_leave_their_place(path: str) -> None:
    with pytest.raises(FormatError):
        check_path(path)


@pytest.mark.parametrize("size", [1, PART, PART * MAX_PARTS, PART * MAX_PARTS + 1, 2**41])
def test_part_sizes(size: int) -> None:
    part = part_size(size)
    assert -(-size // part) <= MAX_PARTS
    assert part % PART == 0
    assert part == PART or -(-size // (part // 2)) > MAX_PARTS


@pytest.mark.parametrize(("text", "rate"), [
    ("2048", 2048), ("20M", 20_000_000), ("512Ki", 524_288), ("512KiB", 524_288),
    ("1G/s", 10**9), ("3k", 3000), ("1MiB/s", 1_048_576),
])
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "0", "1", "-5M", "1.5M", "20T", "M", "10i", "1e9", "9" * 13])
def test_rates_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rate(text)


def test_a_throttle_keeps_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], [0.0]

    def sleep(seconds: float) -> None:
        slept[0] += seconds
        now[0] += seconds

    monkeypatch.setattr("cai.store.throttle.time.monotonic", lambda: now[0])
    throttle = Throttle(1000)
    monkeypatch.setattr(throttle._stopped, "wait", sleep)
    for _ in range(50):
        throttle(100)
    assert slept[0] == pytest.approx(4.9)
    now[0] += 60
    throttle(5000)  # nothing was saved up meanwhile but the right to start
    throttle(1)
    assert slept[0] == pytest.approx(9.9)
    Throttle()(10**12)


def test_a_stopped_throttle_lets_nothing_through() -> None:
    for throttle in (Throttle(), Throttle(1024)):
        throttle(1)
        throttle.stop()
        with pytest.raises(Interrupted):
            throttle(1)


def test_who_waits_for_a_throttle_is_woken() -> None:
    throttle, ended = Throttle(1024), threading.Event()
    throttle(10**6)

    def wait() -> None:
        with pytest.raises(Interrupted):
            throttle(1)
        ended.set()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    throttle.stop()
    thread.join(5)
    assert ended.is_set()
