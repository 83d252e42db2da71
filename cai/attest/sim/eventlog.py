"""The boot event log of a simulated guest: TCG crypto-agile, one algorithm, SHA-384.

The events say what they are. Their replay gives rtmr0 to rtmr2 of the guest's quotes; the runtime
events give rtmr3, as on a real guest.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha384

from cai.attest.tdx.log_records import ALGORITHM_SHA384, STOP, event_record, runtime_record

EV_NO_ACTION = 3
EV_SEPARATOR = 4
EV_IPL = 0x0D
EV_EFI_ACTION = 0x8000_0007
EV_EFI_VARIABLE_DRIVER_CONFIG = 0x8000_0001

KERNEL_COMMAND_LINE = b"kernel_cmdline: "
GRUB_COMMAND = b"grub_cmd: "
"""Prefixes of GRUB's events; the digest covers what follows them."""


@dataclass(frozen=True, slots=True)
class BootEvent:
    """One measured event.

    Attributes:
        register: RTMR number, 0 to 2.
        kind: TCG event type.
        data: event data.
        measured: what the digest covers.
    """

    register: int
    kind: int
    data: bytes
    measured: bytes

    @property
    def digest(self) -> bytes:
        """What the register is extended with."""
        return sha384(self.measured).digest()


def boot_events(image: str, command_line: str) -> tuple[BootEvent, ...]:
    """What the firmware and boot loader of an image measure."""
    firmware, kernel = (
        f"SIMULATED {what} of {image}".encode() for what in ("firmware", "kernel")
    )
    line, command = command_line.encode(), f"linux SIMULATED initrd of {image}".encode()
    return (
        BootEvent(0, EV_EFI_ACTION, firmware, firmware),
        BootEvent(0, EV_SEPARATOR, bytes(4), bytes(4)),
        BootEvent(1, EV_EFI_ACTION, kernel, kernel),
        BootEvent(1, EV_SEPARATOR, bytes(4), bytes(4)),
        BootEvent(2, EV_IPL, GRUB_COMMAND + command, command),
        BootEvent(2, EV_IPL, KERNEL_COMMAND_LINE + line, line),
    )


def registers(events: Iterable[BootEvent]) -> tuple[bytes, bytes, bytes]:
    """rtmr0 to rtmr2 after these events."""
    values = [bytes(48), bytes(48), bytes(48)]
    for event in events:
        values[event.register] = sha384(values[event.register] + event.digest).digest()
    return values[0], values[1], values[2]


def event_log(events: Iterable[BootEvent], runtime: Sequence[bytes]) -> bytes:
    """The log: specification record, boot events, runtime events, stop marker."""
    return (
        specification_record()
        + b"".join(
            event_record(event.register + 1, event.kind, event.data, event.digest)
            for event in events
        )
        + b"".join(runtime_record(event) for event in runtime)
        + STOP
    )


def specification_record() -> bytes:
    """The first record, in the old layout, which announces SHA-384 (evidence.md §4.2)."""
    data = (
        b"Spec ID Event03\x00"
        + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 1)
        + struct.pack("<HH", ALGORITHM_SHA384, 48)
        + b"\x00"
    )
    return struct.pack("<II", 1, EV_NO_ACTION) + bytes(20) + struct.pack("<I", len(data)) + data


def measured_image(image: str) -> bytes:
    """mr_td of an image."""
    return sha384(f"SIMULATED mr_td of {image}".encode()).digest()
