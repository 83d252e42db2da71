"""The simulated TEE behind ``--unsafe-simulated-tee``, where the simulator is installed at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cai.errors import UsageError

if TYPE_CHECKING:
    from cai.attest.evidence import DeviceSource, QuoteSource
    from cai.terminal import Terminal


@dataclass(frozen=True, slots=True)
class SimulatedTee:
    """A simulated guest with its GPU, and where its public anchors are."""

    source: QuoteSource
    devices: DeviceSource
    anchors: Path


def open_simulated_tee(
    terminal: Terminal, directory: Path, *, image: str, launch: bytes | None, debug: bool = False
) -> SimulatedTee:
    """Start a simulated guest.

    Args:
        terminal: told that it is simulated.
        directory: private directory of the platform.
        image: which guest image it pretends to have booted.
        launch: exact bytes of ``launch.json`` that its rtmr3 measures; nothing without it.
        debug: whether it is a debug guest.

    Raises:
        UsageError: the simulator is not installed; production installations never have it.
        InputMissing, InputError, FormatError, StorageError: there is no platform.
    """
    from cai.attest.tdx.runtime_events import launch_events

    try:
        # Deferred: production images do not have the simulator.
        from cai.attest.sim import GuestSettings, SimulatedPlatform
    except ImportError as error:
        raise UsageError(
            "the simulator is not part of this installation",
            hint="pip install cai-confidential-simulator, never on a production host",
        ) from error

    terminal.warn("SIMULATED TEE: this evidence proves nothing about any hardware")
    platform = SimulatedPlatform.load(directory)
    events = () if launch is None else launch_events(launch)
    guest = platform.guest(GuestSettings(image=image, debug=debug, rtmr3_events=events))
    return SimulatedTee(guest, platform.devices(), platform.anchors)
