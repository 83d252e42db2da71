"""Addresses, rates and crowds: pure decisions about who may send how much."""

from __future__ import annotations

import ipaddress

import pytest

from kbs.server import sources
from kbs.server.sources import (
    LOCAL,
    Crowd,
    RateLimit,
    client_address,
    parse_address,
    source_of,
    within,
)

PROXIES = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))


def address(text: str) -> sources.Address:
    found = parse_address(text)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1", "192.0.2.1"), (" 192.0.2.1 ", "192.0.2.1"), ("[2001:db8::1]", "2001:db8::1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
    ],
)  # fmt: skip
def test_addresses(text: str, expected: str) -> None:
    assert str(parse_address(text)) == expected


@pytest.mark.parametrize("text", ["", "x", "192.0.2", "192.0.2.1:80", "192.0.2.1/24", "1" * 99])
def test_what_is_no_address(text: str) -> None:
    assert parse_address(text) is None


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        # Nobody in front, or nobody who is trusted: the header is the client's own invention.
        ("192.0.2.1", "", "192.0.2.1"),
        ("192.0.2.1", "198.51.100.7", "192.0.2.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        # What a trusted proxy appended.
        ("10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9, 198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9, 198.51.100.7, 10.0.0.2", "198.51.100.7"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        # Rubbish ends the belief.
        ("10.0.0.1", "203.0.113.9, rubbish", "10.0.0.1"),
        ("10.0.0.1", "203.0.113.9, rubbish, 10.0.0.2", "10.0.0.2"),
        ("fd00::1", "2001:db8::7", "2001:db8::7"),
    ],
)
def test_the_client_behind_proxies(peer: str, forwarded: str, expected: str) -> None:
    assert str(client_address(address(peer), forwarded, PROXIES)) == expected


def test_a_unix_socket_has_no_address() -> None:
    assert client_address(None, "192.0.2.1", PROXIES) is None
    assert source_of(None) == LOCAL


def test_one_site_is_one_source() -> None:
    assert source_of(address("2001:db8::1")) == source_of(address("2001:db8::ffff:1"))
    assert source_of(address("2001:db8::1")) != source_of(address("2001:db8:0:1::1"))
    assert source_of(address("192.0.2.1")) != source_of(address("192.0.2.2"))


def test_networks_of_another_family_hold_nothing() -> None:
    assert within(address("10.1.2.3"), PROXIES)
    assert not within(address("11.1.2.3"), PROXIES)
    assert not within(address("::1"), PROXIES[:1])


def test_a_bucket_fills_at_its_rate() -> None:
    limit = RateLimit(2, 3)
    assert [limit.admit("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert limit.admit("b", 0.0)
    assert not limit.admit("a", 0.4)
    assert limit.admit("a", 0.5)
    assert not limit.admit("a", 0.5)
    # Never more than the burst, however long the silence.
    assert [limit.admit("a", 1e6) for _ in range(4)] == [True, True, True, False]
    # A clock that steps back takes nothing away and gives nothing.
    assert not limit.admit("a", 0.0)


def test_forgotten_sources_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_SOURCES", 3)
    limit = RateLimit(1, 1)
    for name in "abcd":
        assert limit.admit(name, 0.0)
    assert not limit.admit("d", 0.0)
    assert limit.admit("a", 0.0)


def test_a_crowd_is_bounded_in_all_and_each() -> None:
    crowd = Crowd(3, 2)
    assert crowd.enter("a")
    assert crowd.enter("a")
    assert not crowd.enter("a")
    assert crowd.enter("b")
    assert not crowd.enter("c")
    crowd.leave("a")
    assert crowd.enter("c")
    for name in "abc":
        crowd.leave(name)
    assert [crowd.enter(LOCAL) for _ in range(4)] == [True, True, True, False]
