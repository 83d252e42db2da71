"""A simulated TDX platform, GPUs and NVSwitches, with vendor roots of their own (decisions §1.3).

For demonstrations and tests without hardware. Its quotes and reports have the vendors' exact byte
layouts and verify through the same code as real ones, but only under the simulator's own roots;
every certificate says O=SIMULATED and every verdict that rests on them is marked. Every field, TCB
status, revocation, count, mode and failure can be dialled in; a given seed repeats everything.

Production images do not have this package, so other code imports it only where it is used:

    >>> from cai.attest.sim import GuestSettings, SimulatedPlatform
"""

from cai.attest.sim.devices import DeviceFailure, DeviceSettings, SimulatedDevices
from cai.attest.sim.guest import GuestSettings, SimulatedGuest
from cai.attest.sim.intel import QuoteFailure
from cai.attest.sim.platform import SimulatedPlatform
from cai.attest.sim.revocation import OcspSettings
from cai.attest.sim.tcb import CollateralSettings

__all__ = [
    "CollateralSettings",
    "DeviceFailure",
    "DeviceSettings",
    "GuestSettings",
    "OcspSettings",
    "QuoteFailure",
    "SimulatedDevices",
    "SimulatedGuest",
    "SimulatedPlatform",
]
