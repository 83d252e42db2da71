"""What a tng pair adds to a request, beside the same request without it.

One engine process, one agent, a tng egress and a tng ingress as processes of their own, all on
loopback. Limit: the same client asking the engine directly, in the same run.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai.attest.anchors import simulated_anchors
from cai.attest.evidence import Evidence
from cai.attest.policy import policy_for
from cai.attest.statement import ServedModel
from cai.attest.tdx.collateral import load_collateral
from cai.attest.verify import verify_evidence
from cai.host.agent import Agent, now
from cai.host.agent_socket import serve_channel_socket
from cai.host.launch import Launch

REQUESTS = 2000
ROUNDS = 3
LAUNCH = Launch(b"bench", settings={}, owner_key="ab" * 32, service_id="bench")


def agent_for(work: Path, quote_seconds: float = 0.0) -> Agent:
    """An agent over a simulated guest, with ``policy.toml`` for exactly that guest."""
    from cai.attest.sim import GuestSettings, SimulatedPlatform

    SimulatedPlatform.create(work, now=datetime.now(UTC))
    platform = SimulatedPlatform.load(work / "platform")
    guest, gpus = platform.guest(GuestSettings()), platform.devices()
    slow = platform.guest(GuestSettings(quote_seconds=quote_seconds))
    agent = Agent(LAUNCH, slow, gpus)
    nonce = bytes(32)
    devices = gpus.collect(nonce)
    _verdict, facts = verify_evidence(
        Evidence(guest.quote(bytes(64)), devices), subject="guest", report_data=bytes(64),
        gpu_nonce=nonce, anchors=simulated_anchors(work / "anchors"),
        collateral=load_collateral(work / "anchors" / "collateral"), now=datetime.now(UTC),
    )
    assert facts is not None
    named = replace(facts, launch_digest=LAUNCH.digest, guest=agent.guest_facts())
    (work / "policy.toml").write_bytes(policy_for(named))
    agent.keep_devices(nonce, devices, now())
    agent.models = (ServedModel("01" * 32, "02" * 32),)
    return agent


@contextmanager
def agent_socket(work: Path) -> Iterator[None]:
    """The agent, serving its channel socket in a thread of its own."""
    agent, started = agent_for(work), threading.Event()
    loop = asyncio.new_event_loop()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve_channel_socket(agent, work / "channel.sock"))
        started.set()
        loop.run_forever()

    threading.Thread(target=serve, daemon=True).start()
    started.wait(30)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)


@contextmanager
def engine() -> Iterator[int]:
    """The HTTP engine as a process; yields its port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench._engine"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def gateway(settings: dict[str, Any], name: str) -> Iterator[int]:
    """A ``tng launch`` process; yields the port of its one entry."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tng", "launch", "--json", "--config-content", json.dumps(settings)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        yield int(ready["listen"][name][0].rpartition(":")[2])
    finally:
        process.terminate()
        process.wait(30)


class Client:
    """A keep-alive HTTP client that costs little itself."""

    def __init__(self, port: int, origin: str) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # Set before connecting: a window that grows step by step would be what is measured.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._socket.connect(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._origin = origin
        self._buffer = bytearray(1 << 18)

    def get(self, path: str) -> int:
        """Ask and read the whole answer; returns its length."""
        host = self._origin.removeprefix("http://")
        self._socket.sendall(f"GET {self._origin}{path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
        data = self._socket.recv(1 << 16)
        while b"\r\n\r\n" not in data:
            data += self._socket.recv(1 << 16)
        head, _, body = data.partition(b"\r\n\r\n")
        assert b" 200 " in head.split(b"\r\n")[0], head
        length = next(
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n")
            if line.startswith(b"content-length")
        )
        left = length - len(body)
        while left > 0:
            left -= self._socket.recv_into(self._buffer, min(left, len(self._buffer)))
        return length

    def stream(self, path: str, size: int) -> Iterator[bytes]:
        """Ask and give the answer's body as it comes, in pieces of whole 64 bytes."""
        host = self._origin.removeprefix("http://")
        self._socket.sendall(f"GET {self._origin}{path} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._socket.recv(1 << 16)
        data = data.partition(b"\r\n\r\n")[2]
        while size > 0:
            if len(data) < 64:
                data += self._socket.recv(1 << 16)
            whole = len(data) // 64 * 64
            if whole:
                yield data[:whole]
            data, size = data[whole:], size - whole

    def close(self) -> None:
        """Leave."""
        self._socket.close()


def timed(client: Client) -> tuple[float, float, float]:
    """p50 and p99 of keep-alive requests in ms, and bulk in MB/s."""
    client.get("/")
    samples = []
    for _ in range(REQUESTS):
        start = time.perf_counter()
        client.get("/")
        samples.append(time.perf_counter() - start)
    start = time.perf_counter()
    size = client.get("/bulk")
    bulk = size / (time.perf_counter() - start) / 1e6
    cuts = statistics.quantiles(samples, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3, bulk


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix="cai-bench-") as name:
        work = Path(name)
        with agent_socket(work), engine() as upstream:
            egress = {
                "add_egress": [{
                    "mapping": {"in": {"host": "127.0.0.1", "port": 0},
                                "out": {"host": "127.0.0.1", "port": upstream}},
                    "attest": {"aa_addr": f"unix://{work}/channel.sock"},
                }]
            }  # fmt: skip
            ingress = {
                "add_ingress": [{
                    "http_proxy": {"proxy_listen": {"host": "127.0.0.1", "port": 0}},
                    "verify": {
                        "as_type": "builtin", "policy": str(work / "policy.toml"),
                        "collateral": str(work / "anchors" / "collateral"),
                        "unsafe_simulated_root": str(work / "anchors"),
                    },
                }]
            }  # fmt: skip
            with gateway(egress, "egress[0]") as service, gateway(ingress, "ingress[0]") as proxy:
                report(upstream, service, proxy)


def report(upstream: int, service: int, proxy: int) -> None:
    """Interleave the two ways and print the medians of the rounds."""
    start = time.perf_counter()
    Client(proxy, f"http://127.0.0.1:{service}").get("/")
    first = (time.perf_counter() - start) * 1e3
    rounds = [
        (timed(Client(upstream, f"http://127.0.0.1:{upstream}")),
         timed(Client(proxy, f"http://127.0.0.1:{service}")))
        for _ in range(ROUNDS)
    ]  # fmt: skip
    direct = [statistics.median(row[0][column] for row in rounds) for column in range(3)]
    paired = [statistics.median(row[1][column] for row in rounds) for column in range(3)]
    print(f"first request, attestation included: {first:.1f} ms")
    print(f"keep-alive p50: direct {direct[0]:.3f} ms, through the pair {paired[0]:.3f} ms "
          f"({paired[0] / direct[0]:.1f}x, adds {paired[0] - direct[0]:.3f} ms)")  # fmt: skip
    print(f"keep-alive p99: direct {direct[1]:.3f} ms, through the pair {paired[1]:.3f} ms")
    print(f"bulk: direct {direct[2]:.0f} MB/s, through the pair {paired[2]:.0f} MB/s "
          f"({paired[2] / direct[2]:.2f}x)")  # fmt: skip


if __name__ == "__main__":
    main()
