"""Starting and stopping the key broker: settings in, two listening sockets out."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
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
from cai.errors import Interrupted, ListenerFailed, SettingError, UsageError
from kbs.admin.app import admin_app
from kbs.database.settings import DatabaseSettings
from kbs.instance import default_kek, open_instance
from kbs.names import Realm
from kbs.policy.rego_library import load_rego
from kbs.protocol.verifier import Endorsements, Verifier
from kbs.release.broker import KeyBroker
from kbs.server.config import ServeSettings
from kbs.server.public_app import public_app

if TYPE_CHECKING:
    from fastapi import FastAPI

KEEP_ALIVE_SECONDS = 10
"""How long an idle connection is kept, seconds."""

MAX_CONNECTIONS = 512
"""Most connections that are served at once; more get 503."""

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
    collateral_path = settings.collateral
    if collateral_path is None and root is not None:
        collateral_path = root / "collateral"
    collateral = (
        CollateralStore.empty() if collateral_path is None else load_collateral(collateral_path)
    )
    # What is missing in either is not asked; each policy decides whether that will do.
    rims = None if settings.rims is None else load_rims(settings.rims, if_available=True)
    ocsp = None if settings.ocsp is None else load_ocsp(settings.ocsp, if_available=True)
    database = settings.database or DatabaseSettings()
    instance = open_instance(
        settings.data, settings.kek or default_kek(settings.data), realm, now=clock(),
        database=database, keys=settings.keys,
    )  # fmt: skip
    unsafe = (() if root is None else (UNSAFE_SIMULATED,)) + database.unsafe
    verifier = Verifier(anchors, realm, Endorsements(collateral, rims, ocsp))
    return KeyBroker(instance, verifier=verifier, clock=clock, unsafe=unsafe)


def serve(settings: ServeSettings, ready: Callable[[Ready], None]) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        settings: where and what.
        ready: called once both listeners accept connections.

    Raises:
        ListenerFailed: an address cannot be listened on.
        Interrupted: ended by SIGINT.
        SystemExit: with 143, ended by SIGTERM.
    """
    host, port = parse_address(settings.admin_address, "--admin-listen")
    require_loopback(host)
    # Ports first: a second start fails before it touches the database.
    with (
        contextlib.closing(bind(*parse_address(settings.listen, "--listen"))) as main,
        contextlib.closing(bind(host, port)) as admin,
        contextlib.closing(open_broker(settings)) as broker,
    ):
        told = Ready(
            _url(main), _url(admin), broker.instance.realm.value, broker.unsafe, settings.data
        )
        servers = [
            (_server(public_app(broker)), main),
            (_server(admin_app(broker)), admin),
        ]
        ended = asyncio.run(_run(servers, lambda: ready(told)))
    if ended == signal.SIGINT:
        raise Interrupted("interrupted")
    raise SystemExit(143)


def parse_address(text: str, option: str) -> tuple[str, int]:
    """Read ``HOST:PORT``; an IPv6 address stands in brackets.

    Raises:
        UsageError: another form.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    if not colon or not host or not 0 <= number <= 65535:
        raise UsageError(f"{option} {text!r}: expected HOST:PORT", hint="e.g. 127.0.0.1:8080")
    return host, number


def require_loopback(host: str) -> None:
    """Refuse an admin listener that others can reach; it carries keys in clear.

    Raises:
        UsageError: the host is not a loopback address.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UsageError(
            f"--admin-listen {host}: the admin listener has no TLS and stays on loopback",
            hint="reach it through ssh -L",
        )


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        ListenerFailed: the address is in use or not ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ListenerFailed(f"cannot listen on {host}:{port}: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        listener.close()
        raise ListenerFailed(
            f"cannot listen on {host}:{port}: {error.strerror}", hint="choose another port"
        ) from error
    return listener


class _Server(uvicorn.Server):
    """A server that leaves signals to the one who runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: FastAPI) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=STOP_SECONDS,
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_HEADERS,
        )
    )


async def _run(
    servers: list[tuple[_Server, socket.socket]], ready: Callable[[], None]
) -> signal.Signals:
    ended = signal.SIGTERM
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        nonlocal ended
        ended = number
        for server, _ in servers:
            server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    tasks = [asyncio.create_task(server.serve([listener])) for server, listener in servers]
    try:
        while not all(server.started for server, _ in servers):
            for task in tasks:
                if task.done():
                    task.result()
                    return ended
            await asyncio.sleep(0.01)
        ready()
        await asyncio.gather(*tasks)
    finally:
        stop(ended)
        await asyncio.gather(*tasks, return_exceptions=True)
    return ended


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
