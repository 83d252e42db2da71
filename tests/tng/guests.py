"""Guests that run the real agent on a real socket, for both dialects."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cai.attest.evidence import DeviceEvidence
from cai.host.agent import Agent, now
from cai.host.agent_socket import serve_channel_socket
from cai.host.launch import Launch
from tests.tng.gateways import LAUNCH, MODEL, NONCE, World

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedGuest

BOTH = Launch(
    b'{"launch":"both"}', settings={}, owner_key="cd" * 32, service_id="demo",
    dialects=("cai/1", "rats-tls"),
)  # fmt: skip


class Kept:
    """Devices whose evidence was collected long ago."""

    simulated = True

    def __init__(self, world: World) -> None:
        self._told = world.told
        self._devices = world.devices

    def collect(self, nonce: bytes) -> tuple[DeviceEvidence, ...]:
        del nonce
        return self._devices

    def facts(self) -> dict[str, str]:
        return {k: v for k, v in self._told.items() if k not in ("profile", "launched_by")}


def agent_of(world: World, guest: SimulatedGuest | None = None, **launch: object) -> Agent:
    agent = Agent(replace(BOTH, **launch), guest or world.guest, Kept(world))  # type: ignore[arg-type]
    agent.keep_devices(NONCE, world.devices, now())
    agent.models = (MODEL,)
    return agent


@contextlib.asynccontextmanager
async def at_socket(agent: Agent, path: Path) -> AsyncIterator[str]:
    """The agent behind a channel socket; yields what ``aa_addr`` is."""
    server = await serve_channel_socket(agent, path)
    try:
        yield f"unix://{path}"
    finally:
        server.close()


def lax(world: World, directory: Path) -> str:
    """The world's policy for a guest of any launch; stock evidence names none."""
    text = world.policy.read_text()
    lines = [
        "unsafe_any_launch_digest = true" if LAUNCH in line else line for line in text.splitlines()
    ]
    path = directory / "lax.toml"
    path.write_text("\n".join(lines) + "\n")
    return str(path)
