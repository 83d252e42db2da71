"""Hard checks of GPU evidence, on simulated devices; most cases must be refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cai.attest.anchors import simulated_anchors, vendor_anchors
from cai.attest.evidence import DeviceEvidence
from cai.attest.gpu.verify import (
    MAX_DEVICES,
    RISK_FWID,
    RISK_OCSP,
    RISK_RIM,
    GpuResult,
    verify_devices,
)
from cai.attest.verdict import Outcome

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

NONCE = b"\x05" * 32
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def root(platform_dir: Path) -> bytes:
    return simulated_anchors(platform_dir / "anchors").gpu_root


@pytest.fixture(scope="module")
def two(platform: SimulatedPlatform) -> tuple[DeviceEvidence, ...]:
    return platform.devices(2).collect(NONCE)


def failed(result: GpuResult) -> set[str]:
    names = {item.name for item in result.checks if item.outcome is Outcome.FAIL}
    assert (result.facts is None) == bool(names), "facts if and only if every check passed"
    return names


def verify(
    devices: tuple[DeviceEvidence, ...], root: bytes, *, nonce: bytes | None = NONCE,
    now: datetime = NOW,
) -> set[str]:
    return failed(verify_devices(devices, nonce=nonce, root=root, now=now))


def resigned(
    platform: SimulatedPlatform, monkeypatch: pytest.MonkeyPatch, **fields: bytes | None
) -> DeviceEvidence:
    """A report of the first GPU with other opaque fields, properly signed."""
    from cai.attest.sim import nvidia

    original = nvidia._opaque()
    kept: list[bytes] = []
    position = 0
    while position < len(original):
        size = int.from_bytes(original[position + 2 : position + 4], "little")
        kind = int.from_bytes(original[position : position + 2], "little")
        value: bytes | None = original[position + 4 : position + 4 + size]
        value = fields.get(f"f{kind}", value)
        if value is not None:
            kept.append(kind.to_bytes(2, "little") + len(value).to_bytes(2, "little") + value)
        position += 4 + size
    with monkeypatch.context() as patch:
        patch.setattr(nvidia, "_opaque", lambda: b"".join(kept))
        return platform.devices(1).collect(NONCE)[0]


def test_good_devices_give_facts(two: tuple[DeviceEvidence, ...], root: bytes) -> None:
    result = verify_devices(two, nonce=NONCE, root=root, now=NOW)
    assert failed(result) == set()
    assert result.facts is not None
    first, second = result.facts
    assert (first.arch, first.driver_version) == ("HOPPER", "580.95.05")
    assert first.vbios_version == "96.00.74.00.1A"
    assert first.hwmodel == "GH100 A01 GSP BROM"
    assert first.ueid != second.ueid
    assert len(first.measurements) == 64
    names = {item.name: item.outcome for item in result.checks}
    assert names["gpu.0.rim"] is names["gpu.1.ocsp"] is Outcome.NOT_ASKED
    assert result.risks == (RISK_RIM, RISK_OCSP)
    assert (first.rims, first.rim_expires, first.ocsp_produced) == ({}, "", "")


def test_no_devices_is_not_asked(root: bytes) -> None:
    result = verify_devices((), nonce=None, root=root, now=NOW)
    assert [item.outcome for item in result.checks] == [Outcome.NOT_ASKED]
    assert result.facts == ()


def test_too_many_devices(two: tuple[DeviceEvidence, ...], root: bytes) -> None:
    assert verify(two[:1] * (MAX_DEVICES + 1), root) == {"gpu.devices"}


def test_other_nonce(two: tuple[DeviceEvidence, ...], root: bytes) -> None:
    for nonce in (bytes(32), NONCE[:31], b"", None):
        assert verify(two[:1], root, nonce=nonce) == {"gpu.0.nonce"}


def test_one_of_two_is_replayed(
    platform: SimulatedPlatform, two: tuple[DeviceEvidence, ...], root: bytes
) -> None:
    old = platform.devices(2).collect(bytes(32))
    assert verify((two[0], old[1]), root) == {"gpu.1.nonce"}


def test_vendor_root_refuses_the_simulator(two: tuple[DeviceEvidence, ...]) -> None:
    failing = verify(two, vendor_anchors().gpu_root)
    assert failing == {"gpu.0.chain", "gpu.1.chain"}


def test_certificates_out_of_their_window(two: tuple[DeviceEvidence, ...], root: bytes) -> None:
    for days in (-10, 5000):
        assert verify(two[:1], root, now=NOW + timedelta(days=days)) == {"gpu.0.chain"}


def test_chain_of_another_device(two: tuple[DeviceEvidence, ...], root: bytes) -> None:
    swapped = replace(two[0], chain=two[1].chain)
    assert verify((swapped,), root) == {"gpu.0.signature"}


def test_one_device_counts_once(
    platform: SimulatedPlatform, two: tuple[DeviceEvidence, ...], root: bytes
) -> None:
    assert verify((two[0], two[0]), root) == {"gpu.distinct"}
    again = platform.devices(1).collect(NONCE)[0]
    assert again.report != two[0].report
    assert verify((two[0], again), root) == {"gpu.distinct"}


@pytest.mark.parametrize("label", ["BLACKWELL", "LS10", "", "hopper "])
def test_a_false_label(two: tuple[DeviceEvidence, ...], root: bytes, label: str) -> None:
    assert verify((replace(two[0], arch=label),), root) == {"gpu.0.arch"}


def test_label_spelling_of_older_clients(two: tuple[DeviceEvidence, ...], root: bytes) -> None:
    assert verify((replace(two[0], arch="Hopper"),), root) == set()


@pytest.mark.parametrize("keep", [[1, 2, 3, 4], [0, 2, 3, 4], [0, 1, 2, 3], [0, 1], [4], []])
def test_chains_with_holes(
    two: tuple[DeviceEvidence, ...], root: bytes, keep: list[int]
) -> None:
    blocks = two[0].chain.split(b"-----END CERTIFICATE-----\n")
    parts = [block + b"-----END CERTIFICATE-----\n" for block in blocks[:5]]
    chain = b"".join(parts[place] for place in keep)
    assert "gpu.0.chain" in verify((replace(two[0], chain=chain),), root)


def test_a_report_signed_by_the_boot_rom_is_refused(
    platform: SimulatedPlatform, two: tuple[DeviceEvidence, ...], root: bytes
) -> None:
    """The leaf cut off, the report signed by the key above it: that key is a CA's."""
    from cai.attest.sim import nvidia

    gpu = platform.gpus[0]
    report = nvidia.make_report(nvidia.Gpu(gpu.boot_rom, gpu.boot_rom), NONCE)
    chain = two[0].chain.partition(b"-----END CERTIFICATE-----\n")[2]
    assert "gpu.0.chain" in verify((replace(two[0], report=report, chain=chain),), root)
    assert verify((replace(two[0], report=report),), root) == {"gpu.0.signature"}


def test_firmware_digest(
    platform: SimulatedPlatform, root: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify((resigned(platform, monkeypatch),), root) == set()
    for value in (b"x" * 48, None):
        assert verify((resigned(platform, monkeypatch, f20=value),), root) == {"gpu.0.fwid"}


def test_firmware_without_digest_only_on_demand(
    platform: SimulatedPlatform, root: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(value: bytes | None) -> GpuResult:
        device = resigned(platform, monkeypatch, f20=value)
        return verify_devices(
            (device,), nonce=NONCE, root=root, now=NOW, unsafe_without_fwid=True
        )

    absent = asked(None)
    assert failed(absent) == set()
    assert RISK_FWID in absent.risks
    assert absent.facts is not None
    assert absent.facts[0].fwid == ""
    assert failed(asked(b"x" * 48)) == {"gpu.0.fwid"}, "what is there must be right"


def test_missing_versions(
    platform: SimulatedPlatform, root: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("f3", "f6"):
        device = resigned(platform, monkeypatch, **{kind: None})
        assert verify((device,), root) == {"gpu.0.versions"}


def test_modes(
    platform: SimulatedPlatform, two: tuple[DeviceEvidence, ...], root: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = resigned(platform, monkeypatch, f36=b"\x01\x00")
    assert verify((other,), root) == set()
    assert verify((other, two[1]), root) == {"gpu.mode"}
    for flag in (b"\x03\x00", b"\xff\xff"):
        assert verify((resigned(platform, monkeypatch, f36=flag),), root) == {"gpu.mode"}
    # A part of a protected-PCIe system never stands alone, whichever field says what it is.
    for fields in ({"f36": b"\x02\x00"}, {"f21": b"\xaa"}, {"f36": None, "f21": b"\xaa"}):
        part = resigned(platform, monkeypatch, **fields)
        assert verify((part,), root) == {"gpu.mode", "gpu.topology"}
    part = resigned(platform, monkeypatch, f36=b"\x02\x00", f21=b"\xaa")
    assert verify((part,), root) == {"gpu.topology"}
    assert verify((resigned(platform, monkeypatch, f21=b"\x00"),), root) == {"gpu.mode"}
    assert verify((resigned(platform, monkeypatch, f36=None),), root) == set()


def test_a_field_that_is_marked_as_invalid(
    platform: SimulatedPlatform, root: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai.attest.sim import nvidia

    original = nvidia._opaque()
    for kind, failing in ((254, set()), (255, {"gpu.0.report"}), (65535, set())):
        with monkeypatch.context() as patch:
            field = kind.to_bytes(2, "little") + b"\x01\x00x"
            patch.setattr(nvidia, "_opaque", lambda field=field: original + field)
            device = platform.devices(1).collect(NONCE)[0]
        assert verify((device,), root) == failing


def test_unknown_nvdec_status(
    platform: SimulatedPlatform, root: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify((resigned(platform, monkeypatch, f11=b"\xaa"),), root) == set()
    assert verify((resigned(platform, monkeypatch, f11=b"\x00"),), root) == {"gpu.0.nvdec"}


def test_one_bad_device_spoils_the_list(two: tuple[DeviceEvidence, ...], root: bytes) -> None:
    broken = replace(two[1], report=b"")
    result = verify_devices((two[0], broken), nonce=NONCE, root=root, now=NOW)
    assert failed(result) == {"gpu.1.report"}
    assert result.facts is None


def test_every_flipped_byte_of_a_report_is_refused(
    two: tuple[DeviceEvidence, ...], root: bytes
) -> None:
    report = two[0].report
    for at in range(0, len(report), 7):
        altered = report[:at] + bytes((report[at] ^ (1 << at % 8),)) + report[at + 1 :]
        assert verify((replace(two[0], report=altered),), root), f"flip at {at} was accepted"


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_every_flipped_byte_of_a_chain_is_refused(
    two: tuple[DeviceEvidence, ...], root: bytes
) -> None:
    chain = two[0].chain
    for at in range(0, len(chain), 2):
        altered = chain[:at] + bytes((chain[at] ^ (1 << at % 8),)) + chain[at + 1 :]
        refused = verify((replace(two[0], chain=altered),), root)
        assert refused, f"flip at {at} was accepted"


def test_one_device_by_itself(two: tuple[DeviceEvidence, ...], root: bytes) -> None:
    twice = verify_devices((two[0], two[0]), nonce=NONCE, root=root, now=NOW)
    assert twice.facts is None
    assert twice.alone(0)
    assert twice.alone(1)
    assert not twice.alone(2), "there is none"
    broken = verify_devices(
        (two[0], replace(two[1], report=b"")), nonce=NONCE, root=root, now=NOW
    )
    assert (broken.alone(0), broken.alone(1)) == (True, False)


def test_a_shared_issuer_is_not_taken_on_trust(
    two: tuple[DeviceEvidence, ...], root: bytes
) -> None:
    """Issuers are verified once for a list, but only the very same certificates are skipped."""
    blocks = two[1].chain.split(b"-----BEGIN CERTIFICATE-----\n")
    for place in (2, 3, 4, 5):
        lines = blocks[place].split(b"\n")
        swapped = lines[-4][:-8] + lines[-4][-8:].swapcase()
        if swapped == lines[-4]:
            continue
        lines[-4] = swapped
        altered = [*blocks[:place], b"\n".join(lines), *blocks[place + 1 :]]
        chain = b"-----BEGIN CERTIFICATE-----\n".join(altered)
        assert "gpu.1.chain" in verify((two[0], replace(two[1], chain=chain)), root)
    foreign = replace(two[1], chain=two[0].chain)
    assert "gpu.1.signature" in verify((two[0], foreign), root)
