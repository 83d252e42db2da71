"""Bringing a host up and keeping it up: release, mount, prove, renew, and go down when refused.

The order is fixed: the channel socket listens first but proves nothing; the record is fetched; the
model is opened against the root the record names; the mount becomes usable; only then are sessions
proved. When the lease ends, because the broker refuses to renew it or cannot be asked, no new
session is proved, running requests have the drain that the record grants, then the mount goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

from cai.attest.statement import ServedModel
from cai.errors import (
    CaiError,
    InputMissing,
    Interrupted,
    Refused,
    StorageError,
    Tampered,
    from_os_error,
)
from cai.host.agent import Agent
from cai.host.agent_socket import serve_channel_socket
from cai.host.lease import LeaseKeeper, sleep_until
from cai.host.model_mount import ModelMount
from cai.host.release import Release, fetch_release
from cai.host.settings import HostSettings
from cai.model import open_model

MAX_INDEX = 256 * 1024 * 1024
"""Largest ``index.cai`` that is hashed, bytes."""

_T = TypeVar("_T")

Ready = Callable[[Mapping[str, object]], None]
"""Called once, with what a person or a script wants to know of the running host."""


@dataclass(frozen=True, slots=True)
class HostPlan:
    """What to bring up.

    Attributes:
        settings: ``cai.env``, checked against ``launch.json``.
        agent: this guest.
        model: directory of the sealed model.
        run_dir: where the sockets are made, mode 0700.
    """

    settings: HostSettings
    agent: Agent
    model: Path
    run_dir: Path

    @property
    def channel_socket(self) -> Path:
        """The socket that ``tng`` asks for proofs."""
        return self.run_dir / "channel.sock"


async def up(plan: HostPlan, ready: Ready) -> None:
    """Bring the host up and stay until a signal, a refusal or the mount's end.

    Raises:
        Refused: the broker refuses, now or at a renewal.
        Interrupted: SIGINT or SIGTERM; everything has been taken down.
        CaiError: whatever else prevents serving.
    """
    _make_run_dir(plan.run_dir)
    server = await serve_channel_socket(plan.agent, plan.channel_socket)
    stop = _stop_signals()
    mount: ModelMount | None = None
    try:
        release = await _or_stopped(_fetch(plan), stop)
        served = await asyncio.to_thread(_open_served, plan.model, release)
        mount = await _or_stopped(
            ModelMount.start(
                plan.model, plan.settings.mount_point, release.record.kek, expect_root=served.root
            ),
            stop,
        )
        _hold(plan, release)
        plan.agent.models = (served,)
        ready(_description(plan, mount, served))
        await _keep(plan, release, mount, stop)
    finally:
        plan.agent.stop("the host goes down")
        server.close()
        if mount is not None:
            await mount.stop()
        with contextlib.suppress(OSError):
            plan.channel_socket.unlink()


async def _keep(
    plan: HostPlan, release: Release, mount: ModelMount, stop: asyncio.Event
) -> None:
    async def renew(held: Release) -> Release:
        renewed = await _fetch(plan, held)
        if renewed.record.manifest_root != release.record.manifest_root:
            raise Refused(
                "the owner's record names another model now",
                hint="pull that version and start the host again", code="lease-model",
            )  # fmt: skip
        return renewed

    keeper = LeaseKeeper(release, renew, lambda renewed: _hold(plan, renewed))
    if release.lease is not None:
        plan.agent.renew = keeper.renew_soon
    withdrawal = await _while_up(keeper.run(), mount, stop)
    # No new session from here on; what runs has until the drain is over.
    plan.agent.stop(withdrawal.error.message)
    await _while_up(sleep_until(withdrawal.ends_at), mount, stop)
    raise withdrawal.error


def _hold(plan: HostPlan, release: Release) -> None:
    agent = plan.agent
    agent.keep_devices(release.nonce, release.devices, release.collected_at)
    agent.expires_at = release.expires_at
    agent.keep_ticket(b"" if release.lease is None else release.lease.ticket)


async def _while_up(
    work: Coroutine[object, object, _T], mount: ModelMount, stop: asyncio.Event
) -> _T:
    """The result of ``work``, unless the mount or the whole host ends first."""
    task = asyncio.create_task(work)
    ended = asyncio.create_task(mount.wait())
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((task, ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            raise Interrupted("stopped; the mount and the proofs are gone")
        if ended.done():
            raise StorageError(
                f"the mount ended with status {ended.result()}",
                hint="its own log line says why; start the host again",
            )
        return task.result()
    finally:
        for waiting in (task, ended, stopped):
            waiting.cancel()


async def _fetch(plan: HostPlan, held: Release | None = None) -> Release:
    settings = plan.settings
    return await fetch_release(
        plan.agent, settings.trustee_url, settings.key_path, policy=settings.trustee_policy,
        held=None if held is None else held.lease,
    )  # fmt: skip


def _open_served(directory: Path, release: Release) -> ServedModel:
    """Open the sealed model against the record and say what will be served."""
    record = release.record
    _require_index(directory, record.index_sha256)
    model = open_model(
        directory, record.kek, expect_root=record.manifest_root, min_revision=record.min_revision
    )
    try:
        if model.model_id != record.model_id:
            raise Tampered("the sealed model is of another model line than the record")
        # What neither the owner's record nor the sealed manifest allows, the host does not honour.
        allow = tuple(sorted(set(record.allow) & set(model.allow)))
        return ServedModel(root=model.root, content_root=model.content_root, allow=allow)
    finally:
        model.close()


def _require_index(directory: Path, expected: str) -> None:
    path = directory / "index.cai"
    try:
        if path.stat().st_size > MAX_INDEX:
            raise Tampered("index.cai is larger than any index", path="index.cai")
        observed = sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise InputMissing(
            f"{directory} holds no index.cai", hint="pull the whole sealed model"
        ) from error
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    if observed != expected:
        raise Tampered(
            "index.cai is not the one that the owner's record names",
            path="index.cai",
            hint="pull the version that was released, or upload the record of this one",
        )


def _description(plan: HostPlan, mount: ModelMount, served: ServedModel) -> dict[str, object]:
    return {
        "ready": True,
        "simulated": plan.agent.source.simulated,
        "mount_point": str(plan.settings.mount_point),
        "mount_kind": mount.kind,
        "model_root": served.root,
        "content_root": served.content_root,
        "launch_digest": plan.agent.launch.digest,
        "agent_socket": str(plan.channel_socket),
    }


def _make_run_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise from_os_error(error, f"make {path}") from error


def _stop_signals() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


async def _or_stopped(work: Coroutine[object, object, _T], stop: asyncio.Event) -> _T:
    task = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if task.done():
        return task.result()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError, CaiError):
        await task
    raise Interrupted("stopped before the model was served")
