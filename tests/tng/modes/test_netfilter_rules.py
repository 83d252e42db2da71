"""The parts of ``netfilter`` that need no kernel: rules as text, sets, original destinations."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from cai.errors import SettingError
from tng.config.addresses import TcpUpstream
from tng.config.entries import parse
from tng.config.modes import Netfilter
from tng.netfilter import kernel
from tng.netfilter.capture import Captures
from tng.netfilter.original import demand_captured, original_destination
from tng.netfilter.ruleset import (
    Cgroup,
    Entry,
    capture_rules,
    capture_table,
    guard_rules,
    port_guard,
)
from tng.netfilter.sets import parse_ipset
from tng.operation.journal import Journal
from tng.peers.destination import DestinationRefused

MARKS = frozenset({565})


def entry(side: str = "ingress", **mode: Any) -> Entry:
    """A netfilter entry of a configuration, its listener on port 40000."""
    config = parse({f"add_{side}": [{"netfilter": mode, "no_ra": True}]}, where="t")
    found = (config.ingress if side == "ingress" else config.egress)[0]
    assert isinstance(found.mode, Netfilter)
    return Entry(found.name, found.mode, egress=side == "egress", port=40000)


def test_both_families_and_a_range_of_ports() -> None:
    rules = capture_rules(
        (entry(capture_dst=[{"host": "10.0.0.0/8", "port": 80, "port_end": 90},
                            {"host": "fd00::/8"}, {"port": 7}]),), MARKS,
    )  # fmt: skip
    assert "ip daddr 10.0.0.0/8 tcp dport 80-90 redirect to :40000" in rules
    assert "ip6 daddr fd00::/8 meta l4proto tcp redirect to :40000" in rules
    assert "meta nfproto" not in rules
    assert "\ntcp dport 7 redirect to :40000" in rules


def test_own_sockets_are_let_pass_before_anything_is_captured() -> None:
    rules = capture_rules((entry(capture_dst={"port": 7}),), frozenset({565, 9}))
    for chain in rules.split("chain ")[1:]:
        first = chain.splitlines()[2]
        assert first == "meta mark { 9, 565 } return"


def test_an_egress_captures_its_own_machine_only() -> None:
    egress = entry("egress", capture_dst={"port": 7})
    rules = capture_rules((egress,), MARKS)
    assert "fib daddr type local tcp dport 7 redirect" in rules
    assert "hook output" not in rules
    local = entry("egress", capture_dst={"port": 7}, capture_local_traffic=True)
    after = capture_rules((local,), MARKS).partition("hook output")[2]
    assert "fib daddr type local tcp dport 7 redirect" in after


def test_an_old_table_of_the_same_configuration_is_replaced_in_one_step() -> None:
    one, other = entry(capture_dst={"port": 7}), entry(capture_dst={"port": 8})
    rules = capture_rules((one,), MARKS).splitlines()
    name = capture_table((one,))
    assert rules[:3] == [
        f"add table inet {name}", f"delete table inet {name}", f"table inet {name} {{",
    ]  # fmt: skip
    assert capture_table((one,)) != capture_table((other,))


@pytest.mark.parametrize("side", ["ingress", "egress"])
def test_the_guard_drops_what_is_captured_and_lets_the_mark_pass(side: str) -> None:
    rules = guard_rules((entry(side, capture_dst={"port": 7}),), MARKS)
    hooks = ("output", "forward") if side == "ingress" else ("input", "forward")
    for hook in hooks:
        lines = [line for line in rules.splitlines() if f" {hook}_" in line]
        assert lines[0].endswith("policy accept; }")
        assert any("meta mark { 565 } accept" in line for line in lines)
        tcp, udp = ("reject with tcp reset", "reject") if hook == "output" else ("drop", "drop")
        assert lines[-2].endswith(f" tcp dport 7 {tcp}")
        assert lines[-1].endswith(f" udp dport 7 {udp}")
    assert "delete" not in rules


def test_only_a_guarded_service_lets_loopback_pass() -> None:
    loopback = 'iifname "lo" accept'
    assert loopback in guard_rules((entry("egress", capture_dst={"port": 7}),), MARKS)
    assert loopback not in guard_rules((entry(capture_dst={"port": 7}),), MARKS)
    assert loopback in port_guard([9000], 565)


def test_cgroups_select_and_except() -> None:
    plain = entry(capture_dst={"port": 7})
    chosen = Entry(
        plain.name, plain.mode, egress=False, port=1,
        cgroups=(Cgroup("a/b", 2),), not_cgroups=(Cgroup("c", 1),),
    )  # fmt: skip
    rules = capture_rules((chosen,), MARKS)
    assert 'socket cgroupv2 level 1 "c" return' in rules
    assert 'tcp dport 7 socket cgroupv2 level 2 "a/b" redirect to :1' in rules
    # What is only passed on belongs to no process.
    assert "prerouting" not in rules


def test_the_guard_does_not_forget_a_cgroup_without_destinations() -> None:
    plain = entry(capture_cgroup=["/a"])
    chosen = Entry(plain.name, plain.mode, egress=False, port=1, cgroups=(Cgroup("a", 1),))
    assert 'meta l4proto tcp socket cgroupv2 level 1 "a" reject' in guard_rules((chosen,), MARKS)


@pytest.mark.parametrize("port", [7, 8])
def test_a_listener_within_what_it_captures_is_refused(port: int) -> None:
    mode = {"capture_dst": {"port": 7, "port_end": 8}, "listen_port": port}
    config = parse({"add_egress": [{"netfilter": mode, "no_ra": True}]}, where="t")
    with pytest.raises(SettingError, match="captured ports"):
        Captures(config, Journal())


def v2(root: Path) -> Path:
    (root / "a" / "b").mkdir(parents=True)
    (root / "cgroup.controllers").touch()
    return root


def test_a_cgroup_is_named_below_the_root(tmp_path: Path) -> None:
    root = v2(tmp_path)
    assert kernel.cgroup("/a/b", "t", root) == Cgroup("a/b", 2)
    assert kernel.cgroup(f"{root}/a", "t", root) == Cgroup("a", 1)


@pytest.mark.parametrize("text", ["", "/", "/../etc", "/a/../b", '/a"', "/a\nb", "/none"])
def test_what_is_no_cgroup(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingError, match="cgroup"):
        kernel.cgroup(text, "t", v2(tmp_path))


def test_cgroup_version_1_is_named_as_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(SettingError, match="cgroup v1"):
        kernel.cgroup("/a", "t", tmp_path)


SAVED = """create s hash:net family inet hashsize 1024 maxelem 65536 bucketsize 12
add s 10.1.0.0/16
add s 10.0.0.1
add s 10.0.0.1 timeout 5
"""


def test_members_of_an_ipset() -> None:
    found = parse_ipset("s", SAVED)
    assert (found.version, found.members) == (4, ("10.0.0.1/32", "10.1.0.0/16"))
    six = parse_ipset("s", "create s hash:ip family inet6\nadd s fd00::1\n")
    assert (six.version, six.members) == (6, ("fd00::1/128",))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "create other hash:net family inet\n",
        "create s hash:ip,port family inet\nadd s 10.0.0.1,tcp:80\n",
        "create s list:set size 8\nadd s t\n",
        "create s hash:net family inet\nadd s 10.0.0.0/8 nomatch\n",
        "create s hash:net family inet\nadd t 10.0.0.1\n",
        "create s hash:net family inet\nadd s fd00::1\n",
        "create s hash:net family inet\nadd s 10.0.0.1;drop\n",
        "create s hash:net family inet\nadd s\n",
    ],
)
def test_sets_that_cannot_be_copied(text: str) -> None:
    with pytest.raises(SettingError, match="ipset s"):
        parse_ipset("s", text)


class Writer:
    """A connection whose kernel says this."""

    def __init__(self, family: int, answer: bytes | OSError) -> None:
        self.family = family
        self._answer = answer

    def get_extra_info(self, _name: str) -> Writer:
        return self

    def getsockopt(self, _level: int, _option: int, _size: int) -> bytes:
        if isinstance(self._answer, OSError):
            raise self._answer
        return self._answer


def test_original_destinations_of_both_families() -> None:
    four = struct.pack("!HH4s8x", 2, 8080, bytes([10, 0, 0, 1]))
    six = struct.pack("!HHI16sI", 10, 443, 0, socket.inet_pton(socket.AF_INET6, "fd00::1"), 0)
    assert original_destination(Writer(socket.AF_INET, four)) == TcpUpstream(  # type: ignore[arg-type]
        "10.0.0.1", 8080
    )
    assert original_destination(Writer(socket.AF_INET6, six)) == TcpUpstream(  # type: ignore[arg-type]
        "fd00::1", 443
    )


@pytest.mark.parametrize("answer", [OSError(2, "no entry"), b"", b"short"])
def test_a_connection_that_was_not_captured(answer: bytes | OSError) -> None:
    with pytest.raises(DestinationRefused, match="not captured"):
        original_destination(Writer(socket.AF_INET, answer))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["10.0.0.1:81", "11.0.0.1:80", "10.0.0.1:40000", "[fd00::1]:80"])
def test_what_no_rule_names_is_refused_again_in_the_gateway(target: str) -> None:
    mode = entry(capture_dst={"host": "10.0.0.0/8", "port": 80}, listen_port=40000).mode
    host, _, port = target.rpartition(":")
    with pytest.raises(DestinationRefused):
        demand_captured(mode, TcpUpstream(host.strip("[]"), int(port)))
    demand_captured(mode, TcpUpstream("10.9.9.9", 80))
