"""How fast the key broker releases keys, and what its CPU time goes into.

    python -m bench.kbs [--json] [--handshakes 200] [--guests 4] [--gpus 1] [--profile]

Brokers, guests and PostgreSQL are processes on this machine; evidence is simulated in the vendors'
layouts, verified as real evidence is. A handshake is auth, attest and one resource. Handshakes per
second depend on the machine and on the guests, who sign their quotes on the same processors; the
CPU time of the broker does not. Goal: more than half of it is the verification of evidence.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from cai.attest.rcar import Attestation
from kbs.database.settings import DatabaseSettings
from kbs.server.service import ServeSettings, open_broker
from tests.kbs.postgres import Absent, Cluster
from tests.kbs.replicas import Replica
from tests.kbs.world import URI, Clock, Site, Visitor

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

MIN_SHARE = 0.5
"""Verification of evidence must be more of the broker's CPU time than this."""

TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds of one unit in /proc/PID/stat."""


@dataclass(frozen=True)
class Row:
    """One measured set-up.

    Attributes:
        database: ``sqlite`` or ``postgresql``.
        workers: processes that serve.
        per_second: handshakes.
        p50_ms, p99_ms: of the three requests of a handshake, as a guest sees them.
        cpu_ms: CPU time of the brokers for a handshake, their policy workers included.
        database_ms: CPU time of PostgreSQL for a handshake.
        share: part of ``cpu_ms`` that verification of evidence takes.
    """

    database: str
    workers: int
    per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    database_ms: float
    share: float


@dataclass
class Bench:
    """A simulated platform and a place to work in."""

    work: Path
    platform: SimulatedPlatform
    gpus: int

    @classmethod
    def create(cls, work: Path, gpus: int) -> Bench:
        from cai.attest.sim import SimulatedPlatform

        return cls(work, SimulatedPlatform.create(work / "sim", now=datetime.now(UTC)), gpus)

    @contextmanager
    def site(self, name: str, database: DatabaseSettings) -> Iterator[Site]:
        """A broker in this process whose policies name the guest."""
        settings = ServeSettings(
            self.work / name, "127.0.0.1:0", "127.0.0.1:0", database=database,
            unsafe_simulated_root=self.platform.anchors,
            rims=self.platform.anchors / "rims", ocsp=self.platform.anchors / "ocsp",
        )  # fmt: skip
        clock = Clock()
        broker = open_broker(settings, clock=clock)
        try:
            site = Site(broker, settings, clock)
            site.allow(self.visitor())
            yield site
        finally:
            broker.close()

    def visitor(self) -> Visitor:
        return Visitor(self.platform, gpus=self.gpus)

    def verification(self, site: Site, seconds: float = 2.0) -> float:
        """CPU seconds of one verification of the guest's evidence, with warm caches."""
        visitor, spent, count = self.visitor(), 0.0, 0
        while spent < seconds:
            nonce, _ = site.auth()
            attestation = Attestation.parse(visitor.body(nonce))
            start = time.thread_time()
            verified = site.broker.verifier.attestation(
                attestation, nonce=nonce, now=datetime.now(UTC), require_agreement=False
            )
            if count:  # the first one fills caches
                spent += time.thread_time() - start
            count += 1
            assert verified.facts is not None
        return spent / (count - 1)


def cpu_of(process: int) -> float:
    """CPU seconds of a process and of all below it, the ended ones included."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        threads = Path(f"/proc/{process}/task").iterdir()
        for thread in threads:
            children += (thread / "children").read_text().split()
    except OSError:
        return 0.0
    own = sum(int(value) for value in fields[11:15]) * TICK
    return own + sum(cpu_of(int(child)) for child in set(children))


def measure(
    bench: Bench, site: Site, workers: int, handshakes: int, guests: int, *,
    arguments: list[str], env: dict[str, str], cluster: Cluster | None, verification: float,
) -> Row:  # fmt: skip
    """Serve with some workers and let guests come."""
    root = site.settings.unsafe_simulated_root
    served = [
        "--kek", str(site.settings.data) + "-kek/kek", "--unsafe-simulated-root", str(root),
        "--rims", str(site.settings.rims), "--ocsp", str(site.settings.ocsp), *arguments,
    ]  # fmt: skip
    with ExitStack() as stack:
        replicas = []
        for number in range(workers):
            name = f"{site.settings.data.name}-{workers}-{number}"
            replica = Replica(bench.work / name, *served, env=env)
            stack.callback(replica.stop)
            replicas.append(replica)
        for replica in replicas:
            replica.wait()
        each = handshakes // guests
        visitors = [
            stack.enter_context(guest(bench, each, [
                replicas[(number + step) % workers].url for step in range(workers)
            ]))
            for number in range(guests)
        ]  # fmt: skip
        brokers = [replica.process.pid for replica in replicas]
        before = sum(map(cpu_of, brokers))
        database = cpu_of(cluster.process.pid) if cluster else 0.0
        start = time.perf_counter()
        times = [item for visitor in visitors for item in []]
        for visitor in visitors:
            assert visitor.stdin is not None
            visitor.stdin.write("go\n")
            visitor.stdin.flush()
        for visitor in visitors:
            assert visitor.stdout is not None
            times += json.loads(visitor.stdout.readline())
        wall = time.perf_counter() - start
        spent = (sum(map(cpu_of, brokers)) - before) / len(times)
        database = ((cpu_of(cluster.process.pid) if cluster else 0.0) - database) / len(times)
    cuts = statistics.quantiles(times, n=100)
    return Row(
        "postgresql" if cluster else "sqlite", workers, len(times) / wall, cuts[49] * 1e3,
        cuts[98] * 1e3, spent * 1e3, database * 1e3, verification / spent,
    )  # fmt: skip


@contextmanager
def guest(bench: Bench, count: int, urls: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process of guests, warmed up and waiting."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench._guests", bench.work / "sim" / "platform", str(count),
         str(bench.gpus), *urls],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.terminate()
        process.wait(30)


def profile(bench: Bench, site: Site, handshakes: int) -> None:
    """Where the CPU time of one broker goes, function by function."""
    visitor, watch = bench.visitor(), cProfile.Profile()
    stages = dict.fromkeys(("auth", "attest", "release"), 0.0)
    for number in range(handshakes):
        watch.enable() if number else None

        def timed(stage: str, start: float) -> None:
            stages[stage] += time.thread_time() - start

        start = time.thread_time()
        challenge, cookie = site.broker.auth(
            b'{"version":"0.4.0","tee":"tdx","extra-params":{}}'
        )
        timed("auth", start)
        watch.disable()
        body = visitor.body(challenge["nonce"])
        watch.enable() if number else None
        start = time.thread_time()
        site.broker.attest(cookie, body, request=f"{number:032x}")
        timed("attest", start)
        start = time.thread_time()
        site.broker.release(URI, cookie=cookie, bearer=None, request=f"{number:032x}")
        timed("release", start)
        watch.disable()
    for stage, spent in stages.items():
        print(f"{stage:<10}{spent / handshakes * 1e3:>8.2f} ms of CPU under the profiler")
    pstats.Stats(watch, stream=sys.stdout).sort_stats("tottime").print_stats(40)
    pstats.Stats(watch, stream=sys.stdout).sort_stats("cumulative").print_stats(60)


def run(options: argparse.Namespace, work: Path) -> tuple[list[Row], float]:
    """Every row, and the milliseconds of one verification."""
    bench, rows = Bench.create(work, options.gpus), []
    with bench.site("sqlite", DatabaseSettings()) as site:
        verification = bench.verification(site)
        if options.profile:
            profile(bench, site, options.handshakes)
            return [], verification * 1e3
        arguments = ["--data", str(site.settings.data)]
        rows += [
            measure(
                bench, site, workers, options.handshakes, options.guests, arguments=arguments,
                env={}, cluster=None, verification=verification,
            )
            for workers in (1, 2)
        ]  # fmt: skip
    try:
        cluster = Cluster.start(durable=True)
    except Absent as error:
        print(f"no rows of PostgreSQL: {error}", file=sys.stderr)
        return rows, verification * 1e3
    try:
        name = cluster.create()
        with bench.site("postgresql", cluster.settings(name)) as site:
            rows += [
                measure(
                    bench, site, workers, options.handshakes, options.guests,
                    arguments=["--database", cluster.url(name)], env=cluster.environment,
                    cluster=cluster, verification=verification,
                )
                for workers in (1, 2)
            ]  # fmt: skip
    finally:
        cluster.stop()
    return rows, verification * 1e3


def main() -> int:
    """Print the rows; exit status 1 if verification is not the larger part."""
    parser = argparse.ArgumentParser(prog="python -m bench.kbs", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--handshakes", type=int, default=200, help="of each row")
    parser.add_argument("--guests", type=int, default=4, help="guests at once")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of a guest")
    parser.add_argument("--profile", action="store_true", help="profile one broker instead")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="cai-bench-") as directory:
        rows, verification = run(options, Path(directory))
    passed = all(row.share > MIN_SHARE for row in rows)
    if options.json:
        body = {
            "gpus": options.gpus, "verification_ms": verification, "passed": passed,
            "rows": [asdict(row) for row in rows],
        }  # fmt: skip
        print(json.dumps(body))
        return 0 if passed else 1
    print(f"verification of TDX and {options.gpus} GPU: {verification:.2f} ms of CPU")
    print(f"{'database':<12}{'workers':>8}{'per second':>12}{'p50 ms':>9}{'p99 ms':>9}"
          f"{'broker CPU ms':>15}{'server CPU ms':>15}{'verification':>14}")  # fmt: skip
    for row in rows:
        print(f"{row.database:<12}{row.workers:>8}{row.per_second:>12.1f}{row.p50_ms:>9.1f}"
              f"{row.p99_ms:>9.1f}{row.cpu_ms:>15.2f}{row.database_ms:>15.2f}"
              f"{row.share:>13.0%} {'pass' if row.share > MIN_SHARE else 'FAIL'}")  # fmt: skip
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
