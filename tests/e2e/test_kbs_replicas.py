"""Two key brokers on one PostgreSQL under load, one of them killed half way."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import select

from cai import jcs
from cai.attest import rcar
from cai.attest.checkpoint import open_checkpoint
from cai.merkle import leaf_hash
from kbs.audit import tree
from kbs.audit.log import read_head
from kbs.audit.report import require_sound
from kbs.database.tables import AUDIT
from kbs.keys.signing import KeyName
from kbs.logged import verify_log
from kbs.server.service import ServeSettings, open_broker
from tests.kbs.postgres import Absent, Cluster
from tests.kbs.replicas import Client, Replica
from tests.kbs.world import SECRET_TEXT, Clock, Site, Visitor

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

pytestmark = [pytest.mark.timeout(280), pytest.mark.xdist_group("replicas")]

HANDSHAKES = int(os.environ.get("CAI_HANDSHAKES", "400"))
AT_ONCE = 16
MAX_LEAF = 1024 * 1024


@pytest.fixture(scope="module")
def postgres() -> Iterator[Cluster]:
    try:
        cluster = Cluster.start(durable=True)
    except Absent as error:
        pytest.skip(f"PostgreSQL: {error}")
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    from cai.attest.sim import SimulatedPlatform

    directory = tmp_path_factory.mktemp("simulated")
    SimulatedPlatform.create(directory, now=datetime.now(UTC))
    return SimulatedPlatform.load(directory / "platform")


@pytest.fixture
def site(postgres: Cluster, platform: SimulatedPlatform, tmp_path: Path) -> Iterator[Site]:
    """The same database seen from this process, with a resource and its policies."""
    settings = ServeSettings(
        tmp_path / "first", "127.0.0.1:0", "127.0.0.1:0",
        unsafe_simulated_root=platform.anchors, database=postgres.settings(postgres.create()),
    )  # fmt: skip
    clock = Clock()
    broker = open_broker(settings, clock=clock)
    site = Site(broker, settings, clock)
    site.allow(Visitor(platform))
    yield site
    broker.close()


@pytest.fixture
def replicas(site: Site, postgres: Cluster, tmp_path: Path) -> Iterator[list[Replica]]:
    name = str(site.settings.database.parsed.database)  # type: ignore[union-attr]
    running = [
        Replica(
            tmp_path / f"replica-{number}", "--database", postgres.url(name),
            "--kek", tmp_path / "first-kek" / "kek",
            "--unsafe-simulated-root", site.settings.unsafe_simulated_root or "",
            env=postgres.environment,
        )
        for number in (1, 2)
    ]  # fmt: skip
    for replica in running:
        replica.wait()
    yield running
    for replica in running:
        replica.stop()


def leaves_of(site: Site) -> list[dict[str, Any]]:
    """Every leaf; the tree over them is the head's and a signed checkpoint's."""
    core = site.broker.core
    core.checkpoints.interval = 0.0
    note = core.checkpoints.latest()
    with core.database.read() as connection:
        stored = list(connection.execute(select(AUDIT.c.leaf).order_by(AUDIT.c.seq)).scalars())
        head = read_head(connection)
    frontier: list[bytes] = []
    for place, leaf in enumerate(stored):
        frontier, _ = tree.appended(frontier, place, leaf_hash(leaf))
    assert tuple(frontier) == head.frontier
    with core.database.read() as connection:
        key = site.broker.instance.signing.current(connection, KeyName.CHECKPOINT).ed25519
    public = key.public_key().public_bytes_raw()
    checkpoint = open_checkpoint(note, [public], instance=site.broker.instance.id)
    assert (checkpoint.size, checkpoint.root) == (head.size, tree.fold(frontier))
    leaves = [jcs.parse_canonical(leaf, what="leaf", limit=MAX_LEAF) for leaf in stored]
    assert [leaf["seq"] for leaf in leaves] == list(range(head.size))
    require_sound(verify_log(core))
    return leaves


def test_killing_one_of_two_loses_nothing(
    site: Site, replicas: list[Replica], platform: SimulatedPlatform
) -> None:
    urls = [replica.url for replica in replicas]
    visitor = Visitor(platform)
    clients = [
        Client(replace(visitor, key=rcar.TeeKey.generate()), urls, random.Random(number))
        for number in range(HANDSHAKES)
    ]
    done = threading.Semaphore(0)
    results: list[bytes] = []

    def run(client: Client) -> None:
        try:
            results.append(client.key())
        finally:
            done.release()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(run, client) for client in clients]
        for _ in range(HANDSHAKES // 2):
            done.acquire()
        replicas[0].kill()
        for future in futures:
            future.result()

    # Every client has its key, and some noticed.
    assert results == [SECRET_TEXT] * HANDSHAKES
    assert any(client.again for client in clients)
    # The log is whole; what was answered is in it once, and nothing is in it twice.
    leaves = leaves_of(site)
    decisions = Counter(
        leaf["request"] for leaf in leaves if leaf["action"] in ("attest", "release")
    )
    assert set(decisions.values()) == {1}
    released = {
        leaf["request"] for leaf in leaves
        if leaf["action"] == "release" and leaf["decision"] == "allow"
    }  # fmt: skip
    answered = {client.request_ids[-1] for client in clients}
    assert len(answered) == HANDSHAKES
    assert answered <= released
    # Released without an answer: at most what was under way when the one died.
    assert len(released - answered) <= AT_ONCE
    attested = {leaf["request"] for leaf in leaves if leaf["action"] == "attest"}
    # auth is no decision; attest and release are, once each in the handshake that ended well. Whose
    # answer to attest died with its replica was given the token again, by a request of another id.
    repeated = [client for client in clients if client.request_ids[-2] not in attested]
    assert len(repeated) <= AT_ONCE
    assert all(client.again for client in repeated)
    assert replicas[1].stop() == 143
    assert "Traceback" not in replicas[1].said()


def test_a_nonce_raced_against_two_replicas_is_spent_once(
    site: Site, replicas: list[Replica], platform: SimulatedPlatform
) -> None:
    import httpx

    visitor = Visitor(platform)
    for _ in range(5):
        with httpx.Client(trust_env=False, timeout=30) as http:
            begun = http.post(
                f"{replicas[0].url}/kbs/v0/auth",
                json={"version": "0.4.0", "tee": "tdx", "extra-params": {}},
            )
            cookie = {"Cookie": f"kbs-session-id={begun.cookies['kbs-session-id']}"}
        bodies = [
            replace(visitor, key=rcar.TeeKey.generate()).body(begun.json()["nonce"])
            for _ in range(4)
        ]
        gate = threading.Barrier(4)

        def attest(
            number: int, gate: threading.Barrier = gate, bodies: list[bytes] = bodies,
            cookie: dict[str, str] = cookie,
        ) -> int:
            gate.wait(30)
            return httpx.post(
                f"{replicas[number % 2].url}/kbs/v0/attest", content=bodies[number],
                headers=cookie, trust_env=False, timeout=30,
            ).status_code  # fmt: skip

        with ThreadPoolExecutor(4) as pool:
            answers = Counter(pool.map(attest, range(4)))
        # A later one may find the session attested and be told its token; never another key's.
        assert answers[200] >= 1
        assert set(answers) <= {200, 401}
    spent = Counter(
        leaf["actor"]["session"] for leaf in leaves_of(site)
        if leaf["action"] == "attest" and leaf["decision"] == "allow"
    )  # fmt: skip
    assert len(spent) == 5
    assert set(spent.values()) == {1}
