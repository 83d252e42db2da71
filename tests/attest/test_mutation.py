"""Mutation: no byte of a quote, a report, a reference file or an event log changes unnoticed.

One bit of every byte is flipped. Nothing may crash and nothing may be accepted; only of an event
log, whose data a replay does not cover, is something accepted that then does not count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cai.attest.anchors import TrustAnchors, simulated_anchors
from cai.attest.evidence import DeviceEvidence
from cai.attest.gpu.rim import verify_rim
from cai.attest.gpu.verify import verify_devices
from cai.attest.tdx.collateral import load_collateral
from cai.attest.tdx.eventlog import EventLog, parse_event_log
from cai.attest.tdx.quote import parse_quote
from cai.attest.tdx.runtime_events import launch_events
from cai.attest.tdx.verify import verify_quote
from cai.errors import CaiError

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

BINDING = bytes(range(64))
NONCE = b"\x03" * 32
NOW = datetime.now(UTC)

RIM_SLOTS = 10
"""Measurements of the reference file that is mutated; NVIDIA's list 64 of the same form."""


@pytest.fixture(scope="module")
def anchors(platform_dir: Path) -> TrustAnchors:
    return simulated_anchors(platform_dir / "anchors")


def accepted(data: bytes, verify: Callable[[bytes], bool]) -> list[int]:
    """Places at which a flipped bit goes unnoticed; an error that is not ours is a crash."""
    found = []
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        try:
            if verify(bytes(changed)):
                found.append(place)
        except CaiError:
            continue
    return found


def test_quote(platform: SimulatedPlatform, platform_dir: Path, anchors: TrustAnchors) -> None:
    from cai.attest.sim import GuestSettings

    quote = platform.guest(GuestSettings()).quote(BINDING)
    store = load_collateral(platform_dir / "anchors" / "collateral")

    def facts(data: bytes) -> object:
        return verify_quote(
            data, report_data=BINDING, root=anchors.tdx_root, collateral=store, now=NOW,
            require_agreement=True,
        ).facts

    original = facts(quote)
    assert original is not None

    def verify(data: bytes) -> bool:
        found = facts(data)
        assert found in (None, original), "a changed quote says something else"
        return found is not None

    assert accepted(quote, verify) == []


def test_gpu_report(platform: SimulatedPlatform, anchors: TrustAnchors) -> None:
    from cai.attest.sim import nvidia

    # Six measurements in place of 64: the layout is the same, and every byte is tried.
    (device,) = platform.devices(1).collect(NONCE)
    short = nvidia.default_measurements()[:6]
    device = replace(
        device, report=nvidia.make_report(platform.gpus[0], NONCE, measurements=short)
    )

    def verify(report: bytes) -> bool:
        changed: DeviceEvidence = replace(device, report=report)
        result = verify_devices((changed,), nonce=NONCE, root=anchors.gpu_root, now=NOW)
        return result.facts is not None

    assert verify(device.report)
    assert accepted(device.report, verify) == []


def test_reference_file(platform: SimulatedPlatform, anchors: TrustAnchors) -> None:
    from cai.attest.sim import nvidia, rim

    chip = nvidia.CHIPS["HOPPER"]
    values = rim.golden(chip, range(1, RIM_SLOTS, 2))
    document = rim.make_rim(platform.foundry, chip, "1.0", values, slots=RIM_SLOTS)

    def verify(data: bytes) -> bool:
        assert anchors.rim_root is not None
        return verify_rim(data, root=anchors.rim_root, now=NOW).version == "1.0"

    assert verify(document)
    assert accepted(document, verify) == []


def test_event_log(platform: SimulatedPlatform) -> None:
    """A log authenticates digests, and data only where the digest is over them."""
    from cai.attest.sim import GuestSettings

    events = launch_events(b"launch.json")
    guest = platform.guest(GuestSettings(rtmr3_events=events))
    log = guest.event_log()
    assert log is not None
    original = parse_event_log(log)
    registers = original.replay()
    body = parse_quote(guest.quote(BINDING)).body
    assert list(registers) == [body[f"rtmr_{place}"] for place in range(4)]
    known, runtime = counting(original), original.runtime_events()

    def verify(data: bytes) -> bool:
        changed = parse_event_log(data)
        if changed.replay() != registers:
            return False
        assert counting(changed) <= known, "a changed log gives data that count"
        # A damaged runtime event is not taken for another: it is only a digest then.
        damaged = [text for text in changed.runtime_events() if text not in runtime]
        assert all(text.startswith("sha384:") for text in damaged)
        return True

    places = accepted(log, verify)
    digests = [event.digest for event in original.events]
    assert digests
    for digest in digests:
        start = log.index(digest)
        assert not set(range(start, start + 48)) & set(places), "a digest changed unnoticed"


def counting(log: EventLog) -> set[tuple[int, bytes, bytes]]:
    """Register, digest and data of the events whose data the digest covers."""
    return {
        (event.register, event.digest, event.data) for event in log.events if event.covered
    }
