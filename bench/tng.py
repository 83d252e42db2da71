"""A tng pair beside the real TNG 2.12.0 and a stunnel pair, in one run and over one engine.

Every pair is two processes on loopback before the same engine process. Requests of all pairs are
interleaved, so that whatever else the machine does falls on all of them. The stock binary is the
one of the wheel ``tng-sdk`` (``CAI_STOCK_TNG``, default ``build/peers``); what is absent is left
out by name. A limit that is missed ends with exit status 1 under ``--strict``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench._engine import TOKEN_SIZE, TOKENS
from bench.gateway import Client, agent_socket, engine

REQUESTS = 400
"""Keep-alive requests of one pair in one round."""

ROUNDS = 5
NEW = 60
"""New connections of one pair in one round."""

STOCK = "2.12.0"
HOST = "127.0.0.1"
START_S = 20.0

MAPPING_LIMIT, PROXY_LIMIT, BULK_LIMIT = 1.3, 2.0, 0.5
"""Added p50 beside stock TNG's (mapping, http_proxy), and the share of its bulk throughput."""


@dataclass
class Pair:
    """One way from the client to the engine.

    Attributes:
        name: for the table.
        port: that the client connects to.
        origin: that it asks for.
        pids: of the near and the far process.
    """

    name: str
    port: int
    origin: str
    pids: tuple[int, ...] = ()
    keep_alive: list[float] = field(default_factory=list)
    fresh: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    bulk: list[float] = field(default_factory=list)
    cpu: float = 0.0
    asked: int = 0
    first: float = 0.0

    def memory(self) -> str:
        """Resident memory of each process, MB."""
        return " / ".join(f"{_resident(pid):.0f}" for pid in self.pids) or "-"


def _resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _cpu_s(pid: int) -> float:
    parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        number: int = probe.getsockname()[1]
        return number


def wait_for(port: int) -> None:
    """Until somebody listens; nobody is connected to, as that could make a first session."""
    end = time.monotonic() + START_S
    wanted = f"0100007F:{port:04X} 00000000:0000 0A"
    while wanted not in Path("/proc/net/tcp").read_text():
        if time.monotonic() > end:
            raise TimeoutError(f"nobody listens on port {port}")
        time.sleep(0.05)


@contextmanager
def process(command: list[str | Path], **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A program for the time of the run."""
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **more
    )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(15)
        except subprocess.TimeoutExpired:
            started.kill()


@contextmanager
def ours(settings: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """One of our gateways; port of its only entry, and pid."""
    text = json.dumps(settings)
    command: list[str | Path] = [
        sys.executable, "-m", "tng", "launch", "--json", "--config-content", text
    ]  # fmt: skip
    with process(command) as started:
        assert started.stdout is not None
        listen = json.loads(started.stdout.readline())["listen"]
        (where,) = next(iter(listen.values()))
        yield int(where.rpartition(":")[2]), started.pid


@contextmanager
def stock(settings: dict[str, Any], port: int) -> Iterator[int]:
    """The real binary; its pid."""
    from tests.tng.stock_peers import binary

    path = binary(STOCK)
    assert path is not None
    environment = {"RUST_LOG": "error", "PATH": os.environ["PATH"], "HOME": tempfile.gettempdir()}
    command: list[str | Path] = [path, "launch", "--config-content", json.dumps(settings)]
    with process(command, env=environment) as started:
        wait_for(port)
        yield started.pid


def mapping(near: int, far: int) -> dict[str, Any]:
    """The mode of a port that leads to another one."""
    return {"mapping": {"in": {"host": HOST, "port": near}, "out": {"host": HOST, "port": far}}}


def proxy(port: int) -> dict[str, Any]:
    """The mode of a proxy."""
    return {"http_proxy": {"proxy_listen": {"host": HOST, "port": port}}}


def our_verify(work: Path) -> dict[str, Any]:
    """Verification in the process, against the bench's simulated platform."""
    return {
        "as_type": "builtin", "policy": str(work / "policy.toml"),
        "collateral": str(work / "anchors" / "collateral"),
        "unsafe_simulated_root": str(work / "anchors"),
    }  # fmt: skip


@contextmanager
def our_pairs(work: Path, upstream: int) -> Iterator[list[Pair]]:
    """Ours by mapping and by proxy."""
    attest = {"aa_addr": f"unix://{work}/channel.sock"}
    with ExitStack() as stack:
        far, far_pid = stack.enter_context(
            ours({"add_egress": [{**mapping(0, upstream), "attest": attest}]})
        )
        pairs = []
        for name, mode in (("ours mapping", mapping(0, far)), ("ours http_proxy", proxy(0))):
            entry = {"add_ingress": [{**mode, "verify": our_verify(work)}]}
            near, near_pid = stack.enter_context(ours(entry))
            pairs.append(Pair(name, near, f"http://{HOST}:{far}", (near_pid, far_pid)))
        yield pairs


@contextmanager
def stock_pairs(work: Path, upstream: int) -> Iterator[list[Pair]]:
    """The real TNG by mapping and by proxy; its agent and service are stand-ins."""
    from tests.tng.stock_peers import binary

    if binary(STOCK) is None:
        print(f"no tng {STOCK}: left out (set CAI_STOCK_TNG)")
        yield []
        return
    with stand_ins(work) as (agent, service), ExitStack() as stack:
        far = free_port()
        attest = {"aa_addr": f"unix://{agent}"}
        verify = {"as_addr": service, "policy_ids": ["default"]}
        egress = {"add_egress": [{**mapping(far, upstream), "attest": attest}]}
        far_pid = stack.enter_context(stock(egress, far))
        pairs = []
        for name in ("stock mapping", "stock http_proxy"):
            near = free_port()
            mode = mapping(near, far) if "mapping" in name else proxy(near)
            entry = {"add_ingress": [{**mode, "verify": verify}]}
            near_pid = stack.enter_context(stock(entry, near))
            pairs.append(Pair(name, near, f"http://{HOST}:{far}", (near_pid, far_pid)))
        yield pairs


@contextmanager
def stand_ins(work: Path) -> Iterator[tuple[Path, str]]:
    """The stand-in agent and service, in a thread with a loop of its own."""
    from tests.tng.stock_peers import StockAgent, StockService

    agent, service = StockAgent(work / "aa.sock"), StockService()
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with agent.running(), service.running():
            started.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    started.wait(10)
    try:
        yield agent.socket, service.address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


@contextmanager
def stunnel_pairs(work: Path, upstream: int) -> Iterator[list[Pair]]:
    """Plain TLS 1.3 at its cheapest, without attestation."""
    program = shutil.which("stunnel4") or shutil.which("stunnel")
    if program is None:
        print("no stunnel: left out")
        yield []
        return
    key, near, far = work / "stunnel.pem", free_port(), free_port()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-keyout", work / "k.pem", "-out", work / "c.pem", "-subj", "/CN=bench",
         "-days", "2"],
        check=True, capture_output=True,
    )  # fmt: skip
    key.write_text((work / "k.pem").read_text() + (work / "c.pem").read_text())
    common = "foreground = quiet\npid =\nsslVersion = TLSv1.3\nTIMEOUTclose = 0\n"
    (work / "far.conf").write_text(
        f"{common}[s]\naccept = {HOST}:{far}\nconnect = {HOST}:{upstream}\ncert = {key}\n"
    )
    (work / "near.conf").write_text(
        f"{common}[c]\nclient = yes\naccept = {HOST}:{near}\nconnect = {HOST}:{far}\n"
        f"CAfile = {work}/c.pem\nverifyPeer = yes\n"
    )
    commands = [[program, work / name] for name in ("far.conf", "near.conf")]
    with process(commands[0]) as one, process(commands[1]) as two:
        wait_for(far)
        wait_for(near)
        yield [Pair("stunnel", near, f"http://{HOST}:{far}", (two.pid, one.pid))]


def seconds(what: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def fresh(pair: Pair) -> None:
    """One request on a connection of its own."""
    with contextlib.closing(Client(pair.port, pair.origin)) as client:
        client.get("/")


def tokens(client: Client) -> list[float]:
    """How long each piece of a stream was on its way, seconds."""
    found: list[float] = []
    for data in client.stream("/stream", TOKENS * TOKEN_SIZE):
        now = time.monotonic_ns()
        sent = [int(data[at : at + TOKEN_SIZE]) for at in range(0, len(data), TOKEN_SIZE)]
        found += [(now - each) / 1e9 for each in sent]
    return found


def measure(pairs: list[Pair]) -> None:
    """Every pair, interleaved."""
    for pair in pairs:
        pair.first = seconds(lambda pair=pair: fresh(pair))  # type: ignore[misc]
    clients = {pair.name: Client(pair.port, pair.origin) for pair in pairs}
    for pair in pairs:
        for _ in range(50):
            clients[pair.name].get("/")
    for _ in range(ROUNDS):
        for pair in pairs:
            client = clients[pair.name]
            before = sum(map(_cpu_s, pair.pids))
            pair.keep_alive += [seconds(lambda c=client: c.get("/")) for _ in range(REQUESTS)]  # type: ignore[misc]
            pair.cpu += sum(map(_cpu_s, pair.pids)) - before
            pair.asked += REQUESTS
        for pair in pairs:
            pair.fresh += [seconds(lambda p=pair: fresh(p)) for _ in range(NEW)]  # type: ignore[misc]
        for pair in pairs:
            pair.tokens += tokens(clients[pair.name])
        for pair in pairs:
            client = clients[pair.name]
            start = time.perf_counter()
            size = client.get("/bulk")
            pair.bulk.append(size / (time.perf_counter() - start) / 1e6)


def table(pairs: list[Pair]) -> None:
    """Print what was measured."""
    heads = ("pair", "first ms", "p50 ms", "p99 ms", "added ms", "new p50 ms", "chunk p50 ms",
             "bulk MB/s", "CPU us/req", "RSS MB near/far")  # fmt: skip
    rows = [heads]
    direct = statistics.median(pairs[0].keep_alive)
    for pair in pairs:
        cuts = statistics.quantiles(pair.keep_alive, n=100)
        rows.append(
            (
                pair.name, f"{pair.first * 1e3:.1f}", f"{cuts[49] * 1e3:.3f}",
                f"{cuts[98] * 1e3:.3f}", f"{(cuts[49] - direct) * 1e3:.3f}",
                f"{statistics.median(pair.fresh) * 1e3:.3f}",
                f"{statistics.median(pair.tokens) * 1e3:.3f}",
                f"{statistics.median(pair.bulk):.0f}",
                f"{pair.cpu / pair.asked * 1e6:.0f}" if pair.pids else "-", pair.memory(),
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))


def limits(pairs: list[Pair]) -> bool:
    """Print every target and whether it is met."""
    by_name = {pair.name: pair for pair in pairs}
    direct = statistics.median(by_name["direct"].keep_alive)
    met = True
    for mode, limit in (("mapping", MAPPING_LIMIT), ("http_proxy", PROXY_LIMIT)):
        near, far = by_name.get(f"ours {mode}"), by_name.get(f"stock {mode}")
        if near is None or far is None:
            continue
        added = [statistics.median(pair.keep_alive) - direct for pair in (near, far)]
        met &= _told(f"{mode}: added per keep-alive request", added[0] / added[1], limit)
        met &= _told(f"{mode}: first attested connection", near.first / far.first, 1.0)
        share = statistics.median(far.bulk) / statistics.median(near.bulk)
        met &= _told(f"{mode}: bulk, stock beside ours", share, 1 / BULK_LIMIT)
    return met


def _told(what: str, found: float, limit: float) -> bool:
    good = found <= limit
    print(f"{what}: {found:.2f}x, limit {limit:g}x: {'met' if good else 'MISSED'}")
    return good


def main() -> None:
    """Measure and print."""
    from bench.sessions import main as sessions

    with tempfile.TemporaryDirectory(prefix="cai-bench-") as name, ExitStack() as stack:
        work = Path(name)
        upstream = stack.enter_context(engine())
        stack.enter_context(agent_socket(work))
        pairs = [Pair("direct", upstream, f"http://{HOST}:{upstream}")]
        pairs += stack.enter_context(our_pairs(work, upstream))
        pairs += stack.enter_context(stock_pairs(work, upstream))
        pairs += stack.enter_context(stunnel_pairs(work, upstream))
        measure(pairs)
        table(pairs)
        met = limits(pairs)
    sessions()
    if "--strict" in sys.argv and not met:
        sys.exit(1)


if __name__ == "__main__":
    main()
