"""Protected-PCIe systems: complete and of one piece, or refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cai.attest.anchors import simulated_anchors
from cai.attest.evidence import DeviceEvidence
from cai.attest.gpu.rim_store import RimStore
from cai.attest.gpu.verify import GpuResult, verify_devices
from cai.attest.verdict import Outcome

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

NONCE = b"\x05" * 32
NOW = datetime.now(UTC)
SWITCHES = tuple(range(8, 12))
"""Places of the switches behind eight GPUs."""


class Machine:
    """Devices of one platform, changed as a test says."""

    def __init__(self, platform: SimulatedPlatform, root: bytes) -> None:
        self.platform, self.root = platform, root

    def collect(
        self, count: int = 8, *, nonce: bytes = NONCE, **settings: Any
    ) -> tuple[DeviceEvidence, ...]:
        from cai.attest.sim.devices import DeviceSettings

        chosen = DeviceSettings(protected_pcie=True, **settings)
        return self.platform.devices(count, chosen).collect(nonce)

    def verify(self, devices: tuple[DeviceEvidence, ...], **options: Any) -> GpuResult:
        return verify_devices(devices, nonce=NONCE, root=self.root, now=NOW, **options)

    def failed(self, devices: tuple[DeviceEvidence, ...]) -> set[str]:
        result = self.verify(devices)
        names = {item.name for item in result.checks if item.outcome is Outcome.FAIL}
        assert (result.facts is None) == bool(names)
        return names


@pytest.fixture(scope="module")
def machine(platform: SimulatedPlatform, platform_dir: Path) -> Machine:
    return Machine(platform, simulated_anchors(platform_dir / "anchors").gpu_root)


@pytest.fixture(scope="module")
def system(machine: Machine) -> tuple[DeviceEvidence, ...]:
    return machine.collect()


def test_a_complete_system(machine: Machine, system: tuple[DeviceEvidence, ...]) -> None:
    for devices in (system, system[::-1]):
        result = machine.verify(devices)
        assert machine.failed(devices) == set()
        assert result.facts is not None
        assert [device.is_switch for device in result.facts].count(True) == 4
        assert {device.mode for device in result.facts} == {"2", ""}


def test_a_system_with_reference_files(
    machine: Machine, platform_dir: Path, system: tuple[DeviceEvidence, ...]
) -> None:
    anchors = simulated_anchors(platform_dir / "anchors")
    files = RimStore.of(machine.platform.rims().values())
    result = machine.verify(system, rims=files, rim_root=anchors.rim_root)
    assert result.facts is not None
    assert [set(device.rims) for device in result.facts] == [
        *[{"driver", "vbios"}] * 8, *[{"switch"}] * 4
    ]  # fmt: skip
    counts = [item.compared for item in result.comparisons if item is not None]
    assert counts == [*[32] * 8, *[31] * 4]
    changed = machine.collect(measurements={3: bytes(48)}, failing=(9,))
    result = machine.verify(changed, rims=files, rim_root=anchors.rim_root)
    assert [item.name for item in result.checks if item.outcome is Outcome.FAIL] == ["gpu.9.rim"]


@pytest.mark.parametrize("missing", range(12))
def test_one_is_missing(
    machine: Machine, system: tuple[DeviceEvidence, ...], missing: int
) -> None:
    devices = (*system[:missing], *system[missing + 1 :])
    assert machine.failed(devices) == {"gpu.topology"}


def test_parts(machine: Machine, system: tuple[DeviceEvidence, ...]) -> None:
    assert machine.failed(system[:8]) == {"gpu.topology"}
    assert machine.failed(system[8:]) == {"gpu.topology", "gpu.mode"}
    assert machine.failed(system[:1]) == {"gpu.topology"}
    assert machine.failed(system[8:9]) == {"gpu.topology", "gpu.mode"}


@pytest.mark.parametrize(("place", "instead"), [(0, 1), (9, 8)])
def test_one_twice(
    machine: Machine, system: tuple[DeviceEvidence, ...], place: int, instead: int
) -> None:
    devices = list(system)
    devices[place] = system[instead]
    assert "gpu.distinct" in machine.failed(tuple(devices))


def test_a_smaller_system(machine: Machine) -> None:
    assert machine.failed(machine.collect(4)) == {"gpu.topology"}
    assert machine.failed(machine.collect(8, switches=3)) == {"gpu.topology"}
    assert machine.failed(machine.collect(8, switches=0)) == {"gpu.topology"}


def other_pdis(data: bytes, place: int) -> bytes:
    return data[: 8 * place] + bytes(7) + b"\x01" + data[8 * place + 8 :]


def field(device: DeviceEvidence, kind: int) -> bytes:
    from cai.attest.gpu.report import parse_report

    return parse_report(device.report).opaque[kind]


@pytest.mark.parametrize("place", [0, 5, 7])
def test_a_gpu_with_another_switch(
    machine: Machine, system: tuple[DeviceEvidence, ...], place: int
) -> None:
    links = field(system[place], 22)
    for edited in (other_pdis(links, 3), links[: 3 * 8], links[::-1], b"", bytes(144)):
        devices = machine.collect(opaque={22: edited}, failing=(place,))
        assert machine.failed(devices) == {"gpu.topology"}


def test_links_that_lead_nowhere(
    machine: Machine, system: tuple[DeviceEvidence, ...]
) -> None:
    links = field(system[0], 22) + bytes(8) + b"\xff" * 8
    assert machine.failed(machine.collect(opaque={22: links}, failing=(0,))) == set()


@pytest.mark.parametrize("place", SWITCHES)
def test_a_switch_with_another_gpu(
    machine: Machine, system: tuple[DeviceEvidence, ...], place: int
) -> None:
    seen = field(system[place], 26)
    for edited in (other_pdis(seen, 0), other_pdis(seen, 7), seen[:56], seen[8:], b""):
        devices = machine.collect(opaque={26: edited}, failing=(place,))
        assert machine.failed(devices) == {"gpu.topology"}


def test_all_switches_with_another_gpu(
    machine: Machine, system: tuple[DeviceEvidence, ...]
) -> None:
    """The counts are right, and all switches agree; only certificates tell that it is another."""
    devices = machine.collect(opaque={26: other_pdis(field(system[8], 26), 2)}, failing=SWITCHES)
    assert machine.failed(devices) == {"gpu.topology"}


@pytest.mark.parametrize("place", SWITCHES)
def test_a_switch_under_another_name(
    machine: Machine, system: tuple[DeviceEvidence, ...], place: int
) -> None:
    own = field(system[place], 22)
    other = field(system[8 if place != 8 else 9], 22)
    for edited in (other, bytes(7) + b"\x01", b"", own + other, own * 2):
        devices = machine.collect(opaque={22: edited}, failing=(place,))
        assert machine.failed(devices) == {"gpu.topology"}


def test_a_gpu_of_another_machine(
    machine: Machine, system: tuple[DeviceEvidence, ...], tmp_path: Path
) -> None:
    from cai.attest.sim import nvidia

    gpu = nvidia.create_gpu(machine.platform.foundry, now=machine.platform.made)
    report = nvidia.make_report(
        gpu, NONCE, opaque={21: b"\xaa", 22: field(system[0], 22), 36: b"\x02\x00"}
    )
    chain = nvidia.chain(machine.platform.foundry, gpu)
    stranger = replace(system[0], report=report, chain=chain)
    assert machine.failed((stranger, *system[1:])) == {"gpu.topology"}


def test_another_moment(machine: Machine, system: tuple[DeviceEvidence, ...]) -> None:
    old = machine.collect(nonce=bytes(32))
    assert machine.failed((*system[:8], *old[8:])) == {
        *(f"gpu.{place}.nonce" for place in SWITCHES), "gpu.topology"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "failing"),
    [
        ({36: b"\x00\x00"}, {"gpu.mode"}),
        ({36: b"\x03\x00"}, {"gpu.mode"}),
        ({36: None}, {"gpu.mode"}),
        ({21: b"\x55"}, {"gpu.mode"}),
        ({21: None}, {"gpu.mode"}),
        ({22: bytes(7)}, {"gpu.2.report"}),
        ({21: b"\xaa\xaa"}, {"gpu.2.report"}),
    ],
)
def test_one_gpu_in_another_mode(
    machine: Machine, fields: dict[int, bytes | None], failing: set[str]
) -> None:
    assert machine.failed(machine.collect(opaque=fields, failing=(2,))) == failing


def test_all_gpus_in_another_mode(machine: Machine) -> None:
    for fields in ({36: b"\x00\x00", 21: b"\x55"}, {36: b"\x01\x00"}, {36: None}):
        devices = machine.collect(opaque=fields, failing=tuple(range(8)))
        assert machine.failed(devices) == {"gpu.mode"}


def test_blackwell_has_no_such_systems(machine: Machine) -> None:
    assert machine.failed(machine.collect(arch="BLACKWELL")) == {"gpu.topology"}


def test_a_switch_beside_plain_gpus(
    machine: Machine, system: tuple[DeviceEvidence, ...]
) -> None:
    plain = machine.platform.devices(1).collect(NONCE)
    assert machine.failed((*plain, system[8])) == {"gpu.mode", "gpu.topology"}
    assert machine.failed(plain) == set()


def test_labels_do_not_make_switches(
    machine: Machine, system: tuple[DeviceEvidence, ...]
) -> None:
    devices = (replace(system[0], arch="LS10"), *system[1:])
    assert machine.failed(devices) == {"gpu.0.arch"}
