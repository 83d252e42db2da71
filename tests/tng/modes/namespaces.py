"""Network namespaces with a client, a guest and a container, and real gateways in them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECRET = b"plain-words-of-a-prompt"

SERVICE = """
import http.server, socket, socketserver, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        open(sys.argv[2], "ab").write(body + b"\\n")
        answer = b"served:" + body
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *_):
        pass
class Six(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        socketserver.TCPServer.server_bind(self)
        self.server_name = self.server_port = ""
server = Six(("::", int(sys.argv[1])), Handler)
print("ready", flush=True)
server.serve_forever()
"""

ASK = """
import http.client, sys
link = http.client.HTTPConnection(sys.argv[1], int(sys.argv[2]), timeout=float(sys.argv[4]))
link.request("POST", "/v1", body=sys.argv[3].encode())
print(link.getresponse().read().decode())
"""

SNIFF = """
import socket, sys
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
tap.bind((sys.argv[1], 0))
print("ready", flush=True)
with open(sys.argv[2], "ab", buffering=0) as out:
    while True:
        out.write(tap.recv(65536))
"""


def unavailable() -> str:
    """Why these tests cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    missing = [name for name in ("ip", "nft") if shutil.which(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}"
    probe = subprocess.run(
        ["unshare", "-n", "nft", "add", "table", "inet", "probe"], capture_output=True, check=False
    )
    return "" if probe.returncode == 0 else "the kernel has no namespaces or no nftables"


@dataclass
class Space:
    """One network namespace.

    Attributes:
        name: for ``ip netns``.
        v4: its address towards the guest or client.
        v6: and the other family's.
    """

    name: str
    v4: str = ""
    v6: str = ""

    def run(self, *command: str, given: str | None = None, check: bool = True) -> str:
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    @contextlib.contextmanager
    def process(
        self, *command: str, ready: str = "ready", log: Path | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """A process in here, once it has said that it is ready."""
        with (log.open("wb") if log else contextlib.nullcontext(subprocess.DEVNULL)) as errors:
            started = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            try:
                assert started.stdout is not None
                for line in started.stdout:
                    if ready in line:
                        break
                else:
                    told = log.read_text() if log else ""
                    raise AssertionError(f"{command[:3]} did not start: {told}")
                yield started
            finally:
                started.kill()
                started.wait()
                if started.stdout:
                    started.stdout.close()

    def service(self, port: int, seen: Path) -> Any:
        return self.process(sys.executable, "-c", SERVICE, str(port), str(seen))

    def sniff(self, interface: str, seen: Path) -> Any:
        return self.process(sys.executable, "-c", SNIFF, interface, str(seen))

    def ask(self, host: str, port: int, text: str = SECRET.decode(), wait_s: float = 15) -> str:
        """A plain client; the answer, or nothing."""
        return self.run(
            sys.executable, "-c", ASK, host, str(port), text, str(wait_s), check=False
        ).strip()

    def both(self, other: Space, port: int, wait_s: float = 1.5) -> list[str]:
        """Plain answers over IPv4 and IPv6."""
        with ThreadPoolExecutor(2) as pool:
            asked = [
                pool.submit(self.ask, host, port, wait_s=wait_s) for host in (other.v4, other.v6)
            ]
            return [one.result() for one in asked]

    def tng(self, config: dict[str, Any], log: Path, *before: str) -> Any:
        """A gateway; ``before`` is a command that runs it."""
        return self.process(
            *before, sys.executable, "-m", "tng", "launch",
            "--config-content", json.dumps(config), ready="listens on", log=log,
        )  # fmt: skip

    def tables(self) -> set[str]:
        """Kinds of this product's tables."""
        names = self.run("nft", "list", "tables", "inet").split()
        return {name[:8] for name in names if name.startswith("cai_")}

    def down(self) -> None:
        """``tng netfilter down``."""
        self.run(sys.executable, "-m", "tng", "netfilter", "down")

    def without_capture(self) -> None:
        """As if somebody had flushed the capture rules of a gateway that is gone."""
        for name in self.run("nft", "list", "tables", "inet").split():
            if name.startswith("cai_tng_"):
                self.run("nft", "delete", "table", "inet", name)


@dataclass
class World:
    """``client`` -- ``guest`` -- ``container``; ``real`` when the first leads over a device."""

    client: Space
    guest: Space
    container: Space
    real: bool


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Three namespaces: 10.91.1.0/24 and fd91:1::/64 outside, …2… between guest and container."""
    tag = f"cai{os.getpid()}"
    client = Space(f"{tag}c", "10.91.1.1", "fd91:1::1")
    guest = Space(f"{tag}g", "10.91.1.2", "fd91:1::2")
    container = Space(f"{tag}k", "10.91.2.2", "fd91:2::2")
    spaces = (client, guest, container)
    try:
        for space in spaces:
            _ip("netns", "add", space.name)
            space.run("ip", "link", "set", "lo", "up")
        _ip("link", "add", "eth0", "netns", client.name, "type", "veth",
            "peer", "name", "port0", "netns", guest.name)  # fmt: skip
        # The port below the device answers for it otherwise, and has no address to turn to.
        guest.run("sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1")
        guest.run("ip", "link", "set", "port0", "up")
        # A guest's way out is a device, not one end of a pair as a container's is.
        macvlan = ("ip", "link", "add", "link", "port0", "name", "eth0", "type", "macvlan")
        guest.run(*macvlan, "mode", "bridge", check=False)
        outside = "eth0" if "eth0" in guest.run("ip", "-br", "link") else "port0"
        _up(client, "eth0", ("10.91.1.1/24", "fd91:1::1/64"))
        _up(guest, outside, ("10.91.1.2/24", "fd91:1::2/64"))
        _ip("link", "add", "eth0", "netns", container.name, "type", "veth",
            "peer", "name", "veth0", "netns", guest.name)  # fmt: skip
        _up(container, "eth0", ("10.91.2.2/24", "fd91:2::2/64"))
        _up(guest, "veth0", ("10.91.2.1/24", "fd91:2::1/64"))
        client.run("ip", "route", "add", "default", "via", "10.91.1.2")
        client.run("ip", "-6", "route", "add", "default", "via", "fd91:1::2")
        container.run("ip", "route", "add", "default", "via", "10.91.2.1")
        container.run("ip", "-6", "route", "add", "default", "via", "fd91:2::1")
        guest.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        yield World(*spaces, real=outside == "eth0")
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space.name], capture_output=True, check=False)


def _up(space: Space, interface: str, addresses: tuple[str, str]) -> None:
    space.run("ip", "address", "add", addresses[0], "dev", interface)
    space.run("ip", "-6", "address", "add", addresses[1], "dev", interface, "nodad")
    space.run("ip", "link", "set", interface, "up")


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True)


def kill(process: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    """End the gateway itself: ``ip netns exec`` has become it."""
    process.send_signal(number)
    process.wait(timeout=30)


def until(condition: Any, wait_s: float = 10) -> None:
    """Wait for a condition."""
    end = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.1)
