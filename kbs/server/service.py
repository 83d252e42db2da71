"""Starting and stopping the key broker: settings in, two listening sockets out."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from cai.attest.anchors import simulated_anchors, vendor_anchors
from cai.attest.gpu.ocsp_store import load_ocsp
from cai.attest.gpu.rim_store import load_rims
from cai.attest.tdx.collateral import CollateralStore, load_collateral
from cai.errors import Interrupted, SettingError, UsageError
from kbs.database.settings import DatabaseSettings
from kbs.instance import default_kek, open_instance
from kbs.names import Realm
from kbs.policy.rego_library import load_rego
from kbs.protocol.verifier import Endorsements, Verifier
from kbs.release.broker import KeyBroker
from kbs.server.config import ServeSettings
from kbs.server.connection import bounded_connections
from kbs.server.crew import Crew
from kbs.server.listeners import Address, close_listener, open_listener, url_of
from kbs.server.surfaces import surfaces
from kbs.server.tls import Certificate
from kbs.server.watch import Watch, Watched

if TYPE_CHECKING:
    from starlette.types import ASGIApp

KEEP_ALIVE_SECONDS = 10
"""How long an idle connection is kept, seconds."""

MAX_HEADERS = 288 * 1024
"""Largest request head, bytes; a bearer token of a guest with many GPUs is long."""

STOP_SECONDS = 10
"""How long running requests may take to end when the service stops, seconds."""

UNSAFE_SIMULATED = "unsafe_simulated_root"
"""Name of the setting as health, logs and verdicts show it."""


@dataclass(frozen=True, slots=True)
class Ready:
    """Where the broker listens."""

    listening: str
    admin: str
    realm: str
    unsafe: tuple[str, ...]
    data: Path


def open_broker(
    settings: ServeSettings, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> KeyBroker:
    """Open the key broker of these settings; the caller closes it.

    Raises:
        SettingError: realm and roots do not fit, or the key lies with the data.
        CaiError: something else cannot be opened.
    """
    # A broker without its policy engine could only refuse; better to say so before it listens.
    load_rego()
    root = settings.unsafe_simulated_root
    realm = Realm.PRODUCTION if root is None else Realm.SIMULATED
    anchors = vendor_anchors() if root is None else simulated_anchors(root)
    if anchors.simulated is not (realm is Realm.SIMULATED):
        raise SettingError("the trust anchors are of another realm than the database")
    endorsements = load_endorsements(settings)
    database = settings.database or DatabaseSettings()
    instance = open_instance(
        settings.data, settings.kek or default_kek(settings.data), realm, now=clock(),
        database=database, keys=settings.keys,
    )  # fmt: skip
    unsafe = (() if root is None else (UNSAFE_SIMULATED,)) + database.unsafe
    return KeyBroker(
        instance,
        verifier=Verifier(anchors, realm, endorsements),
        clock=clock,
        unsafe=unsafe + settings.policy.unsafe,
        leases=settings.release,
        resources=settings.resources,
        policy=settings.policy,
    )


def load_endorsements(settings: ServeSettings) -> Endorsements:
    """What vendors say about platforms and devices, from the files of these settings.

    Raises:
        CaiError: a file cannot be read, or is not what it must be.
    """
    path = _collateral_path(settings)
    # What is missing of the others is not asked; each policy decides whether that will do.
    return Endorsements(
        CollateralStore.empty() if path is None else load_collateral(path),
        None if settings.rims is None else load_rims(settings.rims, if_available=True),
        None if settings.ocsp is None else load_ocsp(settings.ocsp, if_available=True),
    )


def serve(settings: ServeSettings, ready: Callable[[Ready], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: where and what.
        ready: called once both listeners accept connections.

    Raises:
        ListenerFailed: an address cannot be listened on.
        UsageError, SettingError: a listener may not be where it is asked for.
        Interrupted: ended by SIGINT.
        SystemExit: with 143, ended by SIGTERM.
    """
    main_address = Address.parse(settings.listen, "--listen")
    admin_address = Address.parse(settings.admin_address, "--admin-listen")
    certificates = open_certificates(settings, admin_address)
    with contextlib.ExitStack() as stack:
        # Ports first: a second start fails before it touches the database.
        listeners = []
        for address in (main_address, admin_address):
            listeners.append(open_listener(address))
            stack.callback(close_listener, listeners[-1])
        broker = stack.enter_context(contextlib.closing(open_broker(settings)))
        crew = stack.enter_context(contextlib.closing(Crew(settings.limits)))
        served = surfaces(broker, settings, crew)
        main_url, admin_url = (
            url_of(listener, tls=certificate is not None)
            for listener, certificate in zip(listeners, certificates, strict=True)
        )
        told = Ready(
            main_url + settings.http.prefix,
            admin_url + (settings.http.prefix if admin_address.path is None else ""),
            broker.instance.realm.value,
            broker.unsafe,
            settings.data,
        )
        servers = [
            (_server(app, settings, certificate), listener)
            for app, certificate, listener in zip(
                (served.main, served.admin), certificates, listeners, strict=True
            )
        ]
        watched = _watched(settings, broker, certificates)
        ended = asyncio.run(_run(servers, watched, lambda: ready(told)))
    if ended == signal.SIGINT:
        raise Interrupted("interrupted")
    raise SystemExit(143)


def open_certificates(
    settings: ServeSettings, admin: Address
) -> tuple[Certificate | None, Certificate | None]:
    """The certificates of the main and the admin listener; ``None`` is plain HTTP.

    Raises:
        UsageError: others could reach the admin listener in clear; it carries keys.
        SettingError, InputMissing: the files are not a chain and its key.
    """
    main = None if settings.tls.pair is None else Certificate(*settings.tls.pair)
    chain, key = settings.admin.certificate, settings.admin.private_key
    if chain is not None and key is not None:
        return main, Certificate(chain, key)
    if admin.is_private:
        return main, None
    if main is None:
        raise UsageError(
            f"--admin-listen {admin.host}: the admin listener has no TLS and stays on loopback",
            hint="set [admin] certificate and private_key, or reach it through ssh -L",
        )
    return main, main


def _collateral_path(settings: ServeSettings) -> Path | None:
    root = settings.unsafe_simulated_root
    if settings.collateral is None and root is not None:
        return root / "collateral"
    return settings.collateral


def _watched(
    settings: ServeSettings,
    broker: KeyBroker,
    certificates: tuple[Certificate | None, Certificate | None],
) -> list[Watched]:
    watched = [
        Watched("TLS certificate", certificate.files, certificate.reload, here=True)
        for certificate in dict.fromkeys(certificates)
        if certificate is not None
    ]
    paths = (_collateral_path(settings), settings.rims, settings.ocsp)
    endorsements = tuple(path for path in paths if path is not None)
    if endorsements:

        def load() -> None:
            broker.verifier.exchange(load_endorsements(settings))

        watched.append(Watched("collateral", endorsements, load))
    return watched


class _Server(uvicorn.Server):
    """A server that leaves signals to the one who runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: ASGIApp, settings: ServeSettings, certificate: Certificate | None) -> _Server:
    config = uvicorn.Config(
        app,
        http=bounded_connections(settings.limits.connections),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
        h11_max_incomplete_event_size=MAX_HEADERS,
    )
    config.load()
    config.ssl = None if certificate is None else certificate.context
    return _Server(config)


async def _run(
    servers: list[tuple[_Server, socket.socket]],
    watched: list[Watched],
    ready: Callable[[], None],
) -> signal.Signals:
    ended = signal.SIGTERM
    loop = asyncio.get_running_loop()
    watch = Watch(watched)
    loop.add_signal_handler(signal.SIGHUP, watch.hurry)

    def stop(number: signal.Signals) -> None:
        nonlocal ended
        ended = number
        for server, _ in servers:
            server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    looking: asyncio.Task[None] | None = None
    tasks = [asyncio.create_task(server.serve([listener])) for server, listener in servers]
    try:
        while not all(server.started for server, _ in servers):
            for task in tasks:
                if task.done():
                    task.result()
                    return ended
            await asyncio.sleep(0.01)
        looking = asyncio.create_task(watch.run())
        ready()
        await asyncio.gather(*tasks)
    finally:
        stop(ended)
        if looking is not None:
            looking.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return ended

