"""``netfilter`` in network namespaces: what passes, and that nothing passes in clear, ever."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tng.modes.namespaces import (
    SECRET,
    SERVICE,
    Space,
    World,
    kill,
    unavailable,
    until,
    world,
)

WHY_NOT = unavailable()
pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-"),
    # One set of namespaces for all of them.
    pytest.mark.xdist_group("netfilter"),
]

PORT = 8080
ANSWER = f"served:{SECRET.decode()}"
REFUSED = "this port answers attested TLS"
GROUP = f"cai-test-{os.getpid()}"
EGRESS = {"add_egress": [{"netfilter": {"capture_dst": {"port": PORT}}, "no_ra": True}]}
INGRESS = {"add_ingress": [{"netfilter": {"capture_dst": [{"port": PORT}]}, "no_ra": True}]}

# As Docker publishes a port: translated on its way in, and for local processes on its way out.
PUBLISH = """
table inet published {
  chain in {
    type nat hook prerouting priority dstnat; policy accept;
    fib daddr type local tcp dport 8080 meta nfproto ipv4 dnat ip to 10.91.2.2:80
    fib daddr type local tcp dport 8080 meta nfproto ipv6 dnat ip6 to [fd91:2::2]:80
  }
  chain out {
    type nat hook output priority -100; policy accept;
    fib daddr type local tcp dport 8080 meta nfproto ipv4 dnat ip to 10.91.2.2:80
    fib daddr type local tcp dport 8080 meta nfproto ipv6 dnat ip6 to [fd91:2::2]:80
  }
}
"""


@pytest.fixture(scope="module")
def net() -> Iterator[World]:
    with world() as made:
        yield made


@pytest.fixture(autouse=True)
def clean(net: World) -> Iterator[None]:
    yield
    for space in (net.client, net.guest, net.container):
        space.run("nft", "flush", "ruleset")


@contextlib.contextmanager
def service(space: Space, directory: Path, port: int = PORT) -> Iterator[Path]:
    seen = directory / f"seen-{space.name}"
    seen.touch()
    with space.service(port, seen):
        yield seen


def test_a_pair_that_captures_carries_both_families_and_shows_no_plain_byte(
    net: World, tmp_path: Path
) -> None:
    tap = tmp_path / "tap"
    with (
        service(net.guest, tmp_path) as seen,
        net.guest.tng(EGRESS, tmp_path / "g.log"),
        net.client.tng(INGRESS, tmp_path / "c.log"),
        net.client.sniff("eth0", tap),
    ):
        assert net.client.both(net.guest, PORT, wait_s=15) == [ANSWER, ANSWER]
        until(lambda: tap.stat().st_size > 1000)
    assert seen.read_bytes() == (SECRET + b"\n") * 2
    assert SECRET not in tap.read_bytes()


def test_a_plain_client_reaches_the_gateway_and_not_the_service(
    net: World, tmp_path: Path
) -> None:
    with service(net.guest, tmp_path) as seen, net.guest.tng(EGRESS, tmp_path / "g.log"):
        assert all(REFUSED in told for told in net.client.both(net.guest, PORT, wait_s=15))
        # Loopback is the backend's own way, and is not captured unless the entry says so.
        assert net.guest.ask("127.0.0.1", PORT, "own") == "served:own"
    assert seen.read_bytes() == b"own\n"


def test_nothing_passes_after_the_egress_was_killed(net: World, tmp_path: Path) -> None:
    with service(net.guest, tmp_path) as seen:
        with net.guest.tng(EGRESS, tmp_path / "g.log") as gateway:
            kill(gateway)
            assert net.client.both(net.guest, PORT) == ["", ""]
        assert net.guest.tables() == {"cai_guar", "cai_tng_"}
        net.guest.without_capture()
        assert net.client.both(net.guest, PORT) == ["", ""]
        assert seen.read_bytes() == b""
        # The same gateway takes its place again, whatever is left of the one before.
        with (
            net.guest.tng(EGRESS, tmp_path / "g2.log"),
            net.client.tng(INGRESS, tmp_path / "c.log"),
        ):
            assert net.client.both(net.guest, PORT, wait_s=15) == [ANSWER, ANSWER]


def test_an_orderly_stop_takes_the_capture_away_and_leaves_the_guard(
    net: World, tmp_path: Path
) -> None:
    with service(net.guest, tmp_path) as seen:
        with net.guest.tng(EGRESS, tmp_path / "g.log") as gateway:
            kill(gateway, signal.SIGTERM)
        assert gateway.returncode == 143
        assert net.guest.tables() == {"cai_guar"}
        assert net.client.both(net.guest, PORT) == ["", ""]
        assert net.guest.ask("::1", PORT, "own") == "served:own"
        assert seen.read_bytes() == b"own\n"
        net.guest.down()
        assert net.guest.tables() == set()
        assert net.client.both(net.guest, PORT, wait_s=15) == [ANSWER, ANSWER]


def test_the_guard_stands_before_the_gateway_does(net: World, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tng", "netfilter", "guard"]
    with service(net.guest, tmp_path) as seen:
        net.guest.run(*command, "--config-content", json.dumps(EGRESS))
        assert net.client.both(net.guest, PORT) == ["", ""]
        net.guest.down()
        net.guest.run(*command, "--port", str(PORT))
        assert net.client.both(net.guest, PORT) == ["", ""]
        assert "drop" in net.guest.run(sys.executable, "-m", "tng", "netfilter", "show")
    assert seen.read_bytes() == b""


def test_the_gateway_does_not_start_where_the_guard_cannot_be_set(
    net: World, tmp_path: Path
) -> None:
    launch = [sys.executable, "-m", "tng", "launch", "--config-content", json.dumps(EGRESS)]
    for before, word in (
        (["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"], "CAP_NET_ADMIN"),
        (["env", f"PATH={tmp_path}"], "install nftables"),
    ):
        if shutil.which(before[0]) is None:
            continue
        found = [shutil.which(before[0]) or "", *before[1:]]
        done = subprocess.run(
            ["ip", "netns", "exec", net.guest.name, *found, *launch],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode not in (0, 1), before
        assert word in done.stderr
        assert "Traceback" not in done.stderr


def test_datagrams_to_a_captured_port_do_not_pass_either(net: World, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.touch()
    hear = (
        "import socket, sys; s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM);"
        "s.setsockopt(41, 26, 0); s.bind(('::', 8080)); print('ready', flush=True)\n"
        "while True: open(sys.argv[1], 'ab').write(s.recv(99) + b'.')"
    )
    tell = (
        "import socket, sys, time\n"
        "for host in sys.argv[1:]:\n"
        "    s = socket.socket(socket.AF_INET6 if ':' in host else 2, socket.SOCK_DGRAM)\n"
        "    s.sendto(b'x', (host, 8080))\n"
        "time.sleep(0.3)"
    )
    say = (sys.executable, "-c", tell, net.guest.v4, net.guest.v6)
    with net.guest.process(sys.executable, "-c", hear, str(seen)):
        with net.guest.tng(EGRESS, tmp_path / "g.log"):
            net.client.run(*say)
            assert seen.read_bytes() == b""
        net.guest.run("nft", "flush", "ruleset")
        with net.client.tng(INGRESS, tmp_path / "c.log"):
            net.client.run(*say, check=False)
            assert seen.read_bytes() == b""
        net.client.run("nft", "flush", "ruleset")
        net.client.run(*say)
        until(lambda: seen.read_bytes() == b"x.x.")


def test_several_workers_share_what_is_captured(net: World, tmp_path: Path) -> None:
    with service(net.guest, tmp_path) as seen:
        with (
            net.guest.tng({**EGRESS, "workers": 2}, tmp_path / "g.log") as gateway,
            net.client.tng({**INGRESS, "workers": 2}, tmp_path / "c.log"),
        ):
            for _ in range(4):
                assert net.client.both(net.guest, PORT, wait_s=15) == [ANSWER, ANSWER]
            net.client.run("nft", "flush", "ruleset")
            kill(gateway)
            until(lambda: net.client.both(net.guest, PORT) == ["", ""])
        net.guest.without_capture()
        assert net.client.both(net.guest, PORT) == ["", ""]
    assert len(seen.read_bytes().splitlines()) == 8


def test_local_traffic_is_captured_where_the_entry_says_so(net: World, tmp_path: Path) -> None:
    mode = {"capture_dst": {"port": PORT}, "capture_local_traffic": True, "listen_port": 40077}
    config = {"add_egress": [{"netfilter": mode, "no_ra": True}]}
    with service(net.guest, tmp_path) as seen, net.guest.tng(config, tmp_path / "g.log"):
        for host in ("127.0.0.1", "::1", net.guest.v4):
            assert REFUSED in net.guest.ask(host, PORT)
        # The gateway's own way to the backend carries its mark and is not captured again.
        with net.client.tng(INGRESS, tmp_path / "c.log"):
            assert net.client.both(net.guest, PORT, wait_s=15) == [ANSWER, ANSWER]
    assert len(seen.read_bytes().splitlines()) == 2


def test_the_listener_itself_is_no_destination(net: World, tmp_path: Path) -> None:
    mode = {"capture_dst": {"port": PORT}, "listen_port": 40078}
    config = {"add_egress": [{"netfilter": mode, "no_ra": True}]}
    log = tmp_path / "g.log"
    with service(net.guest, tmp_path) as seen, net.guest.tng(config, log) as gateway:
        assert net.client.both(net.guest, 40078) == ["", ""]
        kill(gateway, signal.SIGTERM)
    assert "refused" in log.read_text()
    assert seen.read_bytes() == b""
    mode = {"capture_dst": [{"port": 40079}, {"port": PORT}], "listen_port": 40079}
    inside = {"add_ingress": [{"netfilter": mode, "no_ra": True}]}
    launch = [sys.executable, "-m", "tng", "launch", "--config-content", json.dumps(inside)]
    done = subprocess.run(launch, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "captured ports" in done.stderr


def test_the_control_interface_is_no_service(net: World, tmp_path: Path) -> None:
    mode = {"capture_dst": {"port": PORT}}
    outside = {
        "control_interface": {"restful": {"host": "0.0.0.0", "port": PORT}},
        "add_egress": [{"netfilter": mode, "no_ra": True}],
    }
    with (
        net.guest.tng(outside, tmp_path / "g.log") as gateway,
        net.client.tng(INGRESS, tmp_path / "c.log"),
    ):
        assert "error" in net.client.ask(net.guest.v4, PORT)
        kill(gateway, signal.SIGTERM)
    assert "this gateway itself" in (tmp_path / "g.log").read_text()


def test_link_local_is_no_destination_of_an_ingress(net: World, tmp_path: Path) -> None:
    log = tmp_path / "c.log"
    mode = {"capture_dst": [{"host": "169.254.0.0/16"}, {"host": "fd00:ec2::254"}]}
    config = {"add_ingress": [{"netfilter": mode, "no_ra": True}]}
    with net.client.tng(config, log) as gateway:
        assert "link-local" in net.client.ask("169.254.10.10", 80)
        assert "metadata" in net.client.ask("169.254.169.254", 80)
        assert "metadata" in net.client.ask("fd00:ec2::254", 80)
        kill(gateway, signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_leaves_in_clear_after_the_ingress_ended(
    net: World, tmp_path: Path, number: signal.Signals
) -> None:
    # The service itself takes plain requests here: only the client's own rules keep them in.
    with service(net.guest, tmp_path) as seen, net.client.sniff("eth0", tmp_path / "tap"):
        with net.client.tng(INGRESS, tmp_path / "c.log") as gateway:
            assert all("no-evidence" in told for told in net.client.both(net.guest, PORT, 15))
            kill(gateway, number)
            assert net.client.both(net.guest, PORT) == ["", ""]
        net.client.without_capture()
        assert net.client.both(net.guest, PORT) == ["", ""]
        assert seen.read_bytes() == b""
        assert SECRET not in (tmp_path / "tap").read_bytes()
        net.client.down()
        assert net.client.both(net.guest, PORT, wait_s=15) == [ANSWER, ANSWER]


def test_what_containers_send_is_captured_too(net: World, tmp_path: Path) -> None:
    with (
        service(net.client, tmp_path) as seen,
        net.client.tng(EGRESS, tmp_path / "c.log"),
        net.client.sniff("eth0", tmp_path / "tap"),
    ):
        with net.guest.tng(INGRESS, tmp_path / "g.log") as gateway:
            assert net.container.both(net.client, PORT, wait_s=15) == [ANSWER, ANSWER]
            kill(gateway)
            assert net.container.both(net.client, PORT) == ["", ""]
        net.guest.without_capture()
        assert net.container.both(net.client, PORT) == ["", ""]
        assert len(seen.read_bytes().splitlines()) == 2
        assert SECRET not in (tmp_path / "tap").read_bytes()


def test_a_published_port_of_a_container_is_captured_and_guarded(
    net: World, tmp_path: Path
) -> None:
    net.guest.run("nft", "-f", "-", given=PUBLISH)
    with service(net.container, tmp_path, 80) as seen:
        assert net.client.both(net.guest, PORT, wait_s=15) == [ANSWER, ANSWER]
        with net.guest.tng(EGRESS, tmp_path / "g.log") as gateway:
            assert all(REFUSED in told for told in net.client.both(net.guest, PORT, wait_s=15))
            with net.client.tng(INGRESS, tmp_path / "c.log"):
                assert net.client.both(net.guest, PORT, wait_s=15) == [ANSWER, ANSWER]
            net.client.run("nft", "flush", "ruleset")
            kill(gateway)
            assert net.client.both(net.guest, PORT) == ["", ""]
        net.guest.without_capture()
        assert net.client.both(net.guest, PORT) == ["", ""]
    assert len(seen.read_bytes().splitlines()) == 4


def test_a_container_may_ask_elsewhere_on_the_same_port(net: World, tmp_path: Path) -> None:
    if not net.real:
        pytest.skip("the kernel has no macvlan")
    with service(net.client, tmp_path), net.guest.tng(EGRESS, tmp_path / "g.log"):
        assert net.container.both(net.client, PORT, wait_s=15) == [ANSWER, ANSWER]


def test_a_service_elsewhere_needs_to_be_said(net: World, tmp_path: Path) -> None:
    captures = [{"host": net.container.v4, "port": 80}, {"host": net.container.v6, "port": 80}]
    entry = {"netfilter": {"capture_dst": captures}, "no_ra": True}
    inside = {"add_ingress": [{"netfilter": {"capture_dst": captures}, "no_ra": True}]}
    with (
        service(net.container, tmp_path, 80) as seen,
        net.client.tng(inside, tmp_path / "c.log"),
    ):
        with net.guest.tng({"add_egress": [entry]}, tmp_path / "g.log"):
            assert not any(
                told.startswith("served") for told in net.client.both(net.container, 80)
            )
        assert seen.read_bytes() == b""
        net.guest.run("nft", "flush", "ruleset")
        entry["unsafe_remote_upstream"] = True
        with net.guest.tng({"add_egress": [entry]}, tmp_path / "g2.log"):
            assert net.client.both(net.container, 80, wait_s=15) == [ANSWER, ANSWER]


def test_members_of_an_ipset_are_captured_also_when_they_come_later(
    net: World, tmp_path: Path
) -> None:
    members = tmp_path / "members"
    program = tmp_path / "ipset"
    program.write_text(f"#!/bin/sh\ntest $1 = save && cat {members}-$2\n")
    program.chmod(0o755)
    (tmp_path / "members-four").write_text(
        f"create four hash:ip family inet hashsize 1024 maxelem 65536\nadd four {net.guest.v4}\n"
    )
    (tmp_path / "members-six").write_text("create six hash:net family inet6 hashsize 1024\n")
    captures = [{"ipset": "four", "port": PORT}, {"ipset": "six", "port": PORT}]
    config = {"add_ingress": [{"netfilter": {"capture_dst": captures}, "no_ra": True}]}
    search = f"PATH={tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin"
    with (
        service(net.guest, tmp_path),
        net.client.tng(config, tmp_path / "c.log", "env", search),
    ):
        four, six = net.client.both(net.guest, PORT, wait_s=15)
        assert "no-evidence" in four
        assert six == ANSWER
        with (tmp_path / "members-six").open("a") as out:
            out.write("add six fd91:1::/64\n")
        until(
            lambda: "no-evidence" in net.client.ask(net.guest.v6, PORT, wait_s=5), wait_s=20
        )


@pytest.fixture
def cgroups() -> Iterator[Path]:
    for line in Path("/proc/mounts").read_text().splitlines():
        _device, place, kind, *_ = line.split(" ")
        if kind == "cgroup2":
            break
    else:
        pytest.skip("there is no cgroup v2")
    root = Path(place)
    top = root / GROUP
    made = [top, top / "in", top / "out"]
    try:
        for path in made:
            path.mkdir()
    except OSError as error:
        pytest.skip(f"cgroups cannot be made: {error}")
    try:
        yield made[0]
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir()


def test_only_processes_of_a_cgroup_are_captured(
    net: World, tmp_path: Path, cgroups: Path
) -> None:
    mode = {
        "capture_dst": {"port": PORT},
        "capture_cgroup": [f"/{GROUP}"],
        "nocapture_cgroup": [f"/sys/fs/cgroup/{GROUP}/out"],
    }
    config = {"add_ingress": [{"netfilter": mode, "no_ra": True}]}
    mounted = ("sh", "-c", 'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"', "sh")

    def ask_from(group: Path) -> str:
        join = f'echo $$ > {group}/cgroup.procs && exec ip netns exec {net.client.name} "$@"'
        done = subprocess.run(
            ["sh", "-c", join, "sh", sys.executable, "-c", ASK_ONE, net.guest.v6, str(PORT)],
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        return done.stdout

    with service(net.guest, tmp_path):
        with net.client.tng(config, tmp_path / "c.log", *mounted) as gateway:
            assert "no-evidence" in ask_from(cgroups / "in")
            assert "served" in ask_from(cgroups / "out")
            assert "served" in net.client.ask(net.guest.v6, PORT)
            kill(gateway, signal.SIGTERM)
        assert "served" not in ask_from(cgroups / "in")
        assert "served" in net.client.ask(net.guest.v6, PORT)


def test_services_of_a_cgroup_are_captured_whatever_their_port(
    net: World, tmp_path: Path, cgroups: Path
) -> None:
    mode = {"capture_cgroup": [f"/{GROUP}"], "nocapture_cgroup": [f"/{GROUP}/out"]}
    config = {"add_egress": [{"netfilter": mode, "no_ra": True}]}
    mounted = ("sh", "-c", 'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"', "sh")
    into = 'mount -t cgroup2 none /sys/fs/cgroup && echo $$ > /sys/fs/cgroup/$1/cgroup.procs'
    ports = {f"{GROUP}/in": 8091, f"{GROUP}/out": 8092, ".": 8093}
    with contextlib.ExitStack() as stack:
        for group, port in ports.items():
            stack.enter_context(net.guest.process(
                "sh", "-c", f'{into} && shift && exec "$@"', "sh", group,
                sys.executable, "-c", SERVICE, str(port), str(tmp_path / "seen"),
            ))  # fmt: skip
        with net.guest.tng(config, tmp_path / "g.log", *mounted) as gateway:
            assert all(REFUSED in told for told in net.client.both(net.guest, 8091, wait_s=15))
            for port in (8092, 8093):
                assert net.client.both(net.guest, port, wait_s=15) == [ANSWER, ANSWER]
            kill(gateway)
        assert net.client.both(net.guest, 8091) == ["", ""]
        net.guest.without_capture()
        assert net.client.both(net.guest, 8091) == ["", ""]
        assert net.client.both(net.guest, 8092, wait_s=15) == [ANSWER, ANSWER]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--port", "0"],
        ["--port", "65536"],
        ["--port", "80", "--config-content", json.dumps(EGRESS)],
        ["--config-content", '{"add_ingress":[{"http_proxy":{"proxy_listen":{"port":1}},'
         '"no_ra":true}]}'],
    ],
)  # fmt: skip
def test_a_guard_of_nothing_is_a_usage_error(net: World, options: list[str]) -> None:
    command = [sys.executable, "-m", "tng", "netfilter", "guard", *options]
    done = subprocess.run(
        ["ip", "netns", "exec", net.guest.name, *command], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert net.guest.tables() == set()


ASK_ONE = """
import http.client, sys
link = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=5)
link.request("POST", "/v1", body="x")
print(link.getresponse().read().decode())
"""


def test_cgroups_of_version_1_are_a_clear_start_error(net: World, tmp_path: Path) -> None:
    # `ip netns exec` shows a /sys without any cgroup mount.
    mode = {"capture_cgroup": ["/some.slice"]}
    config = {"add_ingress": [{"netfilter": mode, "no_ra": True}]}
    done = subprocess.run(
        ["ip", "netns", "exec", net.client.name, sys.executable, "-m", "tng", "launch",
         "--config-content", json.dumps(config)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "cgroup v2" in done.stderr
    assert net.client.tables() == set()
