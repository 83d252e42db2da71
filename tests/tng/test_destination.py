"""Addresses: what a name may lead to."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.errors import CaiError, PeerUnreachable
from tng.config.filters import parse_filters
from tng.config.notes import Notes
from tng.peers.destination import (
    MAX_ADDRESSES,
    BadRequest,
    Destination,
    DestinationRefused,
    demand_address,
    parse_authority,
    resolve,
)


def check(host: str, address: str, filters: object = None, own: tuple = ()) -> None:
    demand_address(
        Destination(host, 80), ipaddress.ip_address(address),
        parse_filters(filters, where="f", notes=Notes()), own,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("a.example", "a.example", 80),
        ("A.Example.:8080", "a.example", 8080),
        ("tng_server:1", "tng_server", 1),
        ("127.0.0.1", "127.0.0.1", 80),
        ("[::1]:99", "::1", 99),
        ("[2001:DB8::0:1]", "2001:db8::1", 80),
    ],
)
def test_authorities(text: str, host: str, port: int) -> None:
    assert parse_authority(text, default_port=80) == Destination(host, port)


@given(st.text(max_size=40))
def test_no_text_raises_anything_but_a_bad_request(text: str) -> None:
    try:
        parse_authority(text, default_port=80)
    except BadRequest:
        return


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("93.184.216.34", "93.184.216.34"),
        ("a.example", "93.184.216.34"),
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "127.0.0.1"),
        ("localhost", "::1"),
        ("10.1.2.3", "10.1.2.3"),
        ("fd00::1", "fd00::1"),
    ],
)
def test_addresses_that_are_gone_to(host: str, address: str) -> None:
    check(host, address)


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("evil.example", "127.0.0.1"),
        ("evil.example", "::1"),
        ("evil.example", "10.0.0.1"),
        ("evil.example", "192.168.1.1"),
        ("evil.example", "::ffff:10.0.0.1"),
        ("evil.example", "64:ff9b::a00:1"),
        ("evil.example", "169.254.169.254"),
        ("evil.example", "fd00:ec2::254"),
        ("64:ff9b::a9fe:a9fe", "64:ff9b::a9fe:a9fe"),
        ("localhost", "10.0.0.1"),
        ("255.255.255.255", "255.255.255.255"),
        ("168.63.129.16", "168.63.129.16"),
    ],
)
def test_addresses_that_are_refused(host: str, address: str) -> None:
    with pytest.raises(DestinationRefused):
        check(host, address)


@pytest.mark.parametrize(
    "filters", [{"domain": "host.internal"}, {"ip_cidr": "10.0.0.0/8"}, {"ip": "10.0.0.1"}]
)
def test_a_private_address_behind_a_name_needs_a_mention(filters: dict[str, str]) -> None:
    check("host.internal", "10.0.0.1", filters)


@pytest.mark.parametrize(
    "filters", [{"domain": "*"}, {"domain": "*.internal"}, {"domain_regex": "host.*"}]
)
def test_a_pattern_is_no_mention(filters: dict[str, str]) -> None:
    with pytest.raises(DestinationRefused, match="private address"):
        check("host.internal", "10.0.0.1", filters)


def test_metadata_is_refused_whatever_is_mentioned() -> None:
    with pytest.raises(DestinationRefused, match="metadata"):
        check("169.254.169.254", "169.254.169.254", {"ip": "169.254.169.254"})


def answers(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    import asyncio

    asked: list[str] = []

    async def getaddrinfo(_loop: object, host: str, port: int, **_kw: object) -> list[tuple]:
        asked.append(host)
        if not addresses:
            raise socket.gaierror(-2, "unknown")
        return [(2, 1, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


@pytest.mark.anyio
async def test_a_name_is_resolved_once_and_its_allowed_addresses_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = answers(
        monkeypatch, "169.254.169.254", "fe80::1%eth0", "93.184.216.34", "2606:2800::1"
    )
    found = await resolve(Destination("a.example", 80), (), ())
    assert found == ("93.184.216.34", "2606:2800::1")
    assert asked == ["a.example"]


@pytest.mark.anyio
async def test_a_name_that_leads_to_the_gateway_among_others_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers(monkeypatch, "::1", "127.0.0.1")
    with pytest.raises(DestinationRefused, match="this gateway itself"):
        await resolve(Destination("localhost", 80), (), [("127.0.0.1", 80)])


@pytest.mark.anyio
async def test_a_name_has_a_bounded_number_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, *(f"93.184.216.{number}" for number in range(1, 40)))
    assert len(await resolve(Destination("a.example", 80), (), ())) == MAX_ADDRESSES


@pytest.mark.anyio
async def test_a_name_with_refused_addresses_only_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers(monkeypatch, "10.0.0.1", "127.0.0.1")
    with pytest.raises(DestinationRefused, match=r"10\.0\.0\.1"):
        await resolve(Destination("a.example", 80), (), ())


@pytest.mark.anyio
async def test_an_unknown_name_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    with pytest.raises(PeerUnreachable):
        await resolve(Destination("a.example", 80), (), ())


@pytest.mark.parametrize(
    ("raw", "host", "port", "matches"),
    [
        ({"domain": "A.Example"}, "a.example", 80, True),
        ({"domain": "*.example"}, "x.example", 80, True),
        ({"domain": "*.example"}, "example", 80, False),
        ({"domain": "*.example"}, "10.0.0.1", 80, False),
        ({"domain": "api*"}, "api.example", 80, True),
        ({"domain": "*"}, "10.0.0.1", 80, True),
        ({"domain_regex": "a.*"}, "ba.example", 80, False),
        ({"domain_regex": "A\\.example"}, "a.example", 80, True),
        ({"domain_regex": ".*"}, "10.0.0.1", 80, False),
        ({"ip_cidr": "2001:db8::/32"}, "2001:db8::5", 80, True),
        ({"ip": "10.0.0.1"}, "10.0.0.2", 80, False),
        ({"port": 80, "port_end": 90}, "a", 90, True),
        ({"port": 80, "port_end": 90}, "a", 91, False),
        ({"domain": "a", "port": 81}, "a", 80, False),
        ({"domain": ""}, "a", 80, False),
        ({}, "a", 80, True),
        ({"domain": "a", "domain_regex": "b"}, "b", 80, False),
    ],
)
def test_filters(raw: dict[str, object], host: str, port: int, matches: bool) -> None:
    (item,) = parse_filters(raw, where="f", notes=Notes())
    assert item.matches(host, port) is matches


@pytest.mark.parametrize(
    "raw",
    [
        {"domain": "a*b"},
        {"domain": 7},
        {"domain_regex": "("},
        {"ip": "10.0.0.0/8"},
        {"ip_cidr": "10.0.0.1/8"},
        {"ip": "example"},
        {"port_end": 5},
        {"port": 5, "port_end": 4},
        {"port": -1},
        "a.example",
        [["a"]],
        [{"domain": "a"}] * 257,
    ],
)
def test_filters_that_are_refused(raw: object) -> None:
    with pytest.raises(CaiError):
        parse_filters(raw, where="f", notes=Notes())
