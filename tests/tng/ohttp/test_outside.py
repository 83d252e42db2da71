"""What goes outside: the path that a load balancer sees, and the fields that it may read."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import CaiError, FormatError
from cai.settings import Section
from tng.config.notes import Notes
from tng.config.transport import OhttpClient, PathRewrite, parse_transport
from tng.ohttp import fields
from tng.ohttp.rewriting import MAX_PATH, fetch_paths, outer_path
from tng.peers.destination import BadRequest


def settings(*rules: tuple[str, str], keep: bool = False) -> OhttpClient:
    rewrites = tuple(PathRewrite(re.compile(match), to) for match, to in rules)
    return OhttpClient(rewrites=rewrites, keep_path=keep)


@pytest.mark.parametrize(
    ("rules", "target", "expected"),
    [
        ([], b"/v1/models?secret=1", "/"),
        ([("/v1/(.*)", "/gw/$1")], b"/v1/a/b?q", "/gw/a/b"),
        # As TNG 2.7.3 and 2.12.0 (measured): the longest name counts, and there is no group 1x.
        ([("/v1/(.*)", "/gw/$1x")], b"/v1/a", "/gw/"),
        ([("/v1/(.*)", "/gw/${1}x")], b"/v1/a", "/gw/ax"),
        ([("/v1/(?P<rest>.*)", "/gw/${rest}")], b"/v1/a", "/gw/a"),
        ([("/v1/(?P<rest>.*)", "/gw/$rest")], b"/v1/a", "/gw/a"),
        ([("/(a)|/(b)", "/x$2")], b"/a", "/x"),
        ([("/.*", "/cost$$5")], b"/a", "/cost$5"),
        ([("/.*", "/$9")], b"/a", "/"),
        ([("/a", "/first"), ("/.*", "/second")], b"/a", "/first"),
        ([("/a", "/first"), ("/.*", "/second")], b"/b", "/second"),
        # The whole path must match.
        ([("/v1", "/gw")], b"/v1/models", "/"),
        ([("v1", "/gw")], b"/v1", "/"),
    ],
)
def test_outer_paths(rules: list[tuple[str, str]], target: bytes, expected: str) -> None:
    assert outer_path(settings(*rules), target) == expected


def test_the_original_path_goes_out_without_its_query_only_if_asked() -> None:
    assert outer_path(settings(keep=True), b"/v1/m?secret=1") == "/v1/m"


@pytest.mark.parametrize(
    ("rules", "target"),
    [
        ([("/(.*)", "$1")], b"/x"),
        ([("/.*", "")], b"/x"),
        ([("/.*", "http://other/")], b"/x"),
        ([("/.*", "/a b")], b"/x"),
        ([("/.*", "/a\r\nx: y")], b"/x"),
        ([("/.*", "/a#b")], b"/x"),
        ([("/.*", "/\u00e9")], b"/x"),
        ([], b"/" + b"a" * MAX_PATH),
        ([("/(.*)", "/$1$1")], b"/" + b"a" * (MAX_PATH - 10)),
    ],
)
def test_paths_that_cannot_be_sent_are_refused(
    rules: list[tuple[str, str]], target: bytes
) -> None:
    with pytest.raises(BadRequest):
        outer_path(settings(*rules), target)


def test_paths_of_other_bytes_are_refused_outside() -> None:
    with pytest.raises(BadRequest):
        outer_path(settings(keep=True), b"/\xff")


def test_keys_are_asked_for_where_rewrites_lead() -> None:
    found = fetch_paths(settings(("/v1/(.*)", "/gw/$1"), ("/x", "/gw/"), ("/y", "bad")))
    assert found == ("/", "/gw/")


def test_framing_and_hops_stay_behind() -> None:
    given = [
        (b"Host", b"h"), (b"Transfer-Encoding", b"chunked"), (b"Connection", b"x-hop"),
        (b"X-Hop", b"1"), (b"TE", b"trailers"), (b"Keep-Alive", b"5"), (b"Expect", b"x"),
        (b"Proxy-Authorization", b"s"), (b"Upgrade", b"h2c"), (b"X-Kept", b"1"),
    ]  # fmt: skip
    assert fields.inner(given) == [(b"host", b"h"), (b"x-kept", b"1")]


@pytest.mark.parametrize(
    "given",
    [
        [(b"host", b"a"), (b"Host", b"b")],
        [(b"content-length", b"1"), (b"content-length", b"1")],
        [(b"content-length", b"")],
        [(b"content-length", b"-1")],
        [(b"content-length", b"1 ")],
        [(b"content-length", b"1,1")],
        [(b"content-length", b"1" * 19)],
        [(b"content-length", "\u0661".encode())],
        [(b"connection", b"close, host")],
        [(b"connection", b" Content-Length ")],
    ],
)
def test_fields_that_two_parsers_would_read_differently_are_refused(
    given: list[tuple[bytes, bytes]],
) -> None:
    with pytest.raises(FormatError):
        fields.inner(given)


def test_only_named_fields_go_outside() -> None:
    given = [(b"x-a", b"1"), (b"x-b", b"2"), (b"authorization", b"s")]
    assert fields.outside(given, []) == []
    assert fields.outside(given, ["x-a"]) == [(b"x-a", b"1")]
    assert fields.outside(given, None) == given


@pytest.mark.parametrize("name", sorted(fields.NEVER_OUTSIDE))
def test_some_fields_never_go_outside(name: bytes) -> None:
    assert fields.outside([(name, b"x")], [name.decode()]) == []
    assert fields.outside([(name, b"x")], None) == []


def test_addresses_are_added_to_those_that_are_claimed() -> None:
    made = fields.forwarded(
        [(b"x-forwarded-for", b"a"), (b"x-real-ip", b"forged")],
        [(b"X-Forwarded-For", b"b")],
        "192.0.2.1",
    )
    assert made == [(b"x-forwarded-for", b"a, b, 192.0.2.1"), (b"x-real-ip", b"192.0.2.1")]
    assert fields.forwarded([(b"x-real-ip", b"own")], [], "") == [(b"x-real-ip", b"own")]


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20)), max_size=5))
def test_any_fields_end_in_our_errors(given: list[tuple[bytes, bytes]]) -> None:
    try:
        fields.inner(given)
    except CaiError:
        return


@given(st.binary(max_size=60))
def test_any_target_ends_in_our_errors(target: bytes) -> None:
    try:
        path = outer_path(settings(("/v1/(.*)", "/g/$1"), keep=True), target)
    except CaiError:
        return
    assert path.startswith("/")


@pytest.mark.parametrize(
    ("substitution", "expected"),
    [
        ("/gw/$1x", "/gw/"), ("/gw/${1}x", "/gw/ax"), (r"/gw/\1x", "/gw/ax"),
        ("/gw/$1/y", "/gw/a/y"), ("/gw/$$", "/gw/$"), ("/gw/$9", "/gw/"),
    ],
)  # fmt: skip
def test_substitutions_of_a_configuration_mean_what_they_do_to_tng(
    substitution: str, expected: str
) -> None:
    """Each measured on the binaries of 2.7.3 and 2.12.0."""
    rewrites = [{"match_regex": "/v1/(.*)", "substitution": substitution}]
    entry = Section({"ohttp": {"path_rewrites": rewrites}}, where="entry")
    transport = parse_transport(entry, Notes(), egress=False)
    assert isinstance(transport, OhttpClient)
    assert outer_path(transport, b"/v1/a") == expected
