"""A simulated TDX platform and GPUs, with vendor roots of their own (decisions §1.3).

For demonstrations and tests without hardware. Its quotes and reports have the vendors' exact byte
layouts and verify through the same code as real ones, but only under the simulator's own roots;
every certificate says O=SIMULATED and every verdict that rests on them is marked.

Production images delete this package, so other code imports it only where it is used:

    >>> from cai.attest.sim import GuestSettings, SimulatedPlatform
"""

from cai.attest.sim.platform import (
    GuestSettings,
    SimulatedDevices,
    SimulatedGuest,
    SimulatedPlatform,
)

__all__ = ["GuestSettings", "SimulatedDevices", "SimulatedGuest", "SimulatedPlatform"]
