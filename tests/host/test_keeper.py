"""Going down: proofs end at once, the mount after the drain, and the reason is the refusal's."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cai.errors import CaiError, Interrupted, PolicyDenied, Refused, StorageError
from cai.host import keeper, lease
from cai.host.agent import Agent, now
from cai.host.launch import Launch
from cai.host.release import Release
from cai.model.record import Lease, ReleaseRecord
from cai.secret import Secret

LAUNCH = Launch(b"{}", settings={}, owner_key="ab" * 32, service_id="demo")
RECORD = ReleaseRecord(
    Secret(bytes(32)), "11" * 32, "22" * 32, 1, "33" * 32, "ab" * 32, (), Lease(1, 1)
)
DRAIN = 0.4


@dataclass
class Mount:
    """A mount that ends when it is told to."""

    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> int:
        await self.ended.wait()
        return 6


class Short(Release):
    """A release with times that a test can wait for."""

    @property
    def ttl_s(self) -> Any:
        return 0.3

    @property
    def drain_s(self) -> Any:
        return DRAIN


def released() -> Release:
    return Short(RECORD, bytes(32), (), now(), now())


def going_down(answer: Any, during: Any = None) -> tuple[CaiError, Agent, dict[str, float]]:
    """Keep a host whose renewals answer so; what ended it, and when."""
    agent = Agent(LAUNCH, SimpleNamespace(simulated=True), SimpleNamespace())  # type: ignore[arg-type]
    settings = SimpleNamespace(trustee_url="http://kbs", key_path="a/b/c", trustee_policy="default")
    plan = keeper.HostPlan(settings, agent, Path("m"), Path("r"))  # type: ignore[arg-type]
    seen: dict[str, float] = {}

    async def fetch(*_parts: Any, **_more: Any) -> Release:
        seen.setdefault("asked", now())
        if isinstance(answer, CaiError):
            raise answer
        return answer()  # type: ignore[no-any-return]

    async def run() -> CaiError:
        mount, stop = Mount(), asyncio.Event()

        async def watch() -> None:
            while agent.stopped is None:
                await asyncio.sleep(0.01)
            seen["stopped"] = now()
            if during is not None:
                during(mount, stop)

        watcher = asyncio.create_task(watch())
        try:
            await asyncio.wait_for(keeper._keep(plan, released(), mount, stop), 10)  # type: ignore[arg-type]
        except CaiError as error:
            return error
        finally:
            seen["over"] = now()
            watcher.cancel()
        raise AssertionError("it ended without a reason")

    original = keeper.fetch_release
    keeper.fetch_release = fetch  # type: ignore[assignment]
    try:
        return asyncio.run(run()), agent, seen
    finally:
        keeper.fetch_release = original


def test_a_refusal_ends_proofs_at_once_and_the_mount_after_the_drain() -> None:
    refusal = PolicyDenied("key broker: revoked: stolen", code="revoked.model")
    error, agent, seen = going_down(refusal)
    assert error is refusal
    assert agent.stopped == refusal.message
    assert seen["stopped"] - seen["asked"] < 0.15
    assert DRAIN - 0.05 <= seen["over"] - seen["stopped"] <= DRAIN + 0.3


def test_a_broker_that_is_gone_ends_it_with_another_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cai.errors import PeerUnreachable

    monkeypatch.setattr(lease, "RETRY_S", 0.05)
    error, agent, _ = going_down(PeerUnreachable("key broker does not answer"))
    assert error.machine_code == "lease-expired"
    assert error.exit_status == 7
    assert agent.stopped is not None


def test_another_model_in_the_record_ends_it() -> None:
    other = replace(RECORD, manifest_root="44" * 32)
    error, _, _ = going_down(lambda: Short(other, bytes(32), (), now(), now()))
    assert isinstance(error, Refused)
    assert error.machine_code == "lease-model"


def test_a_mount_that_ends_during_the_drain_is_told() -> None:
    error, _, seen = going_down(
        PolicyDenied("no"), lambda mount, _stop: mount.ended.set()
    )
    assert isinstance(error, StorageError)
    assert seen["over"] - seen["stopped"] < DRAIN / 2


def test_a_signal_during_the_drain_ends_it_now() -> None:
    error, _, seen = going_down(PolicyDenied("no"), lambda _mount, stop: stop.set())
    assert isinstance(error, Interrupted)
    assert seen["over"] - seen["stopped"] < DRAIN / 2
