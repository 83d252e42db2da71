"""Devices against reference files and revocation answers, on the simulated platform."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cai import jcs
from cai.attest.anchors import TrustAnchors, simulated_anchors
from cai.attest.gpu.certificates import describe
from cai.attest.gpu.measurements import rim_ids
from cai.attest.gpu.ocsp_store import OcspStore, load_ocsp
from cai.attest.gpu.report import parse_report
from cai.attest.gpu.rim_store import RimStore, decode_answer, load_rims
from cai.attest.gpu.verify import RISK_DELEGATE, RISK_OCSP, RISK_RIM, GpuResult, verify_devices
from cai.attest.verdict import Outcome
from cai.errors import FormatError, InputMissing, LimitExceeded

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

NONCE = b"\x05" * 32
NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def anchors(platform_dir: Path) -> TrustAnchors:
    return simulated_anchors(platform_dir / "anchors")


@pytest.fixture(scope="module")
def rims(platform: SimulatedPlatform) -> Mapping[str, bytes]:
    return platform.rims()


def outcomes(result: GpuResult) -> dict[str, Outcome]:
    return {item.name: item.outcome for item in result.checks}


def failed(result: GpuResult) -> set[str]:
    names = {item.name for item in result.checks if item.outcome is Outcome.FAIL}
    assert (result.facts is None) == bool(names)
    return names


class Desk:
    """A platform's devices, verified as a test says."""

    def __init__(self, platform: SimulatedPlatform, anchors: TrustAnchors) -> None:
        self.platform, self.anchors = platform, anchors

    def verify(
        self, rims: RimStore | None, ocsp: OcspStore | None = None, *, count: int = 1,
        now: datetime = NOW, rim_root: bytes | None = None, **settings: Any,
    ) -> GpuResult:  # fmt: skip
        from cai.attest.sim.devices import DeviceSettings

        devices = self.platform.devices(count, DeviceSettings(**settings)).collect(NONCE)
        return verify_devices(
            devices, nonce=NONCE, root=self.anchors.gpu_root, now=now, rims=rims, ocsp=ocsp,
            rim_root=rim_root or self.anchors.rim_root,
        )  # fmt: skip

    def file(self, version: str, active: Mapping[int, Any], *, arch: str = "HOPPER") -> bytes:
        from cai.attest.sim.nvidia import CHIPS
        from cai.attest.sim.rim import make_rim

        return make_rim(self.platform.foundry, CHIPS[arch], version, active)

    def usual(self, *indexes: int) -> dict[int, tuple[bytes, ...]]:
        from cai.attest.sim.nvidia import CHIPS
        from cai.attest.sim.rim import golden

        return golden(CHIPS["HOPPER"], indexes)


@pytest.fixture(scope="module")
def desk(platform: SimulatedPlatform, anchors: TrustAnchors) -> Desk:
    return Desk(platform, anchors)


@pytest.fixture(scope="module")
def store(rims: Mapping[str, bytes]) -> RimStore:
    return RimStore.of(rims.values())


@pytest.mark.parametrize("arch", ["HOPPER", "BLACKWELL"])
def test_equal(desk: Desk, store: RimStore, arch: str) -> None:
    result = desk.verify(store, arch=arch)
    assert failed(result) == set()
    assert result.facts is not None
    (facts,) = result.facts
    assert facts.rims.keys() == {"driver", "vbios"}
    assert datetime.fromisoformat(facts.rim_expires) > NOW
    (comparison,) = result.comparisons
    assert comparison is not None
    assert comparison.compared == 32
    assert RISK_RIM not in result.risks
    assert outcomes(result)["gpu.0.rim"] is Outcome.PASS


def test_nothing_is_asked_without_files_or_root(
    platform: SimulatedPlatform, anchors: TrustAnchors, store: RimStore
) -> None:
    devices = platform.devices(1).collect(NONCE)
    for root, files in ((anchors.rim_root, None), (None, store)):
        result = verify_devices(
            devices, nonce=NONCE, root=anchors.gpu_root, now=NOW, rim_root=root, rims=files
        )
        assert failed(result) == set()
        assert outcomes(result)["gpu.0.rim"] is Outcome.NOT_ASKED
        assert RISK_RIM in result.risks
        assert result.facts is not None
        assert (result.facts[0].rims, result.facts[0].rim_expires) == ({}, "")


@pytest.mark.parametrize("index", [0, 7, 12, 34, 40])
def test_another_measurement(desk: Desk, store: RimStore, index: int) -> None:
    result = desk.verify(store, measurements={index + 1: bytes(48)})
    assert failed(result) == {"gpu.0.rim"}
    (comparison,) = result.comparisons
    assert comparison is not None
    assert [item for item, _ in comparison.mismatches] == [index]


def test_measurements_that_no_file_lists(desk: Desk, store: RimStore) -> None:
    assert failed(desk.verify(store, measurements={64: bytes(48), 14: bytes(48)})) == set()


def test_nvdec0(desk: Desk, store: RimStore) -> None:
    other = {36: bytes(48)}
    assert failed(desk.verify(store, measurements=other)) == set(), "disabled: left out"
    assert failed(desk.verify(store, measurements=other, nvdec0=0xAA)) == {"gpu.0.rim"}
    assert failed(desk.verify(store, nvdec0=0xAA)) == set()
    assert failed(desk.verify(store, measurements=other, nvdec0=0)) == {"gpu.0.rim", "gpu.0.nvdec"}
    # Without the field nothing says that it is disabled.
    absent = desk.verify(store, measurements=other, opaque={11: None})
    assert failed(absent) == {"gpu.0.rim"}


def test_one_bad_device_of_two(desk: Desk, store: RimStore) -> None:
    result = desk.verify(store, count=2, measurements={1: bytes(48)}, failing=(1,))
    assert failed(result) == {"gpu.1.rim"}


@pytest.mark.parametrize(
    ("settings", "missing"),
    [
        ({"driver_version": "580.95.06"}, "gpu.0.rim_driver"),
        ({"vbios_version": "96.00.74.00.1B"}, "gpu.0.rim_vbios"),
    ],
)
def test_missing_files(
    desk: Desk, rims: Mapping[str, bytes], settings: dict[str, Any], missing: str
) -> None:
    result = desk.verify(RimStore.of(rims.values()), **settings)
    assert failed(result) == {missing}
    assert outcomes(result)["gpu.0.rim"] is Outcome.NOT_ASKED
    lenient = desk.verify(RimStore.of(rims.values(), if_available=True), **settings)
    assert failed(lenient) == set()
    assert outcomes(lenient)[missing] is Outcome.NOT_ASKED
    assert lenient.facts is not None
    assert lenient.facts[0].rims == {}
    assert RISK_RIM in lenient.risks


def test_a_bad_file_fails_even_if_files_are_optional(
    desk: Desk, rims: Mapping[str, bytes]
) -> None:
    for old, new in ((b'active="True"', b'active="False"'), (b"</Payload>", b"</Payload> ")):
        files = [
            data.replace(old, new, 1) if b'"580.95.05"' in data else data
            for data in rims.values()
        ]
        result = desk.verify(RimStore.of(files, if_available=True))
        assert failed(result) == {"gpu.0.rim_driver"}


def test_files_of_another_root(desk: Desk, store: RimStore, anchors: TrustAnchors) -> None:
    result = desk.verify(store, rim_root=anchors.gpu_root)
    assert failed(result) == {"gpu.0.rim_driver", "gpu.0.rim_vbios"}


def test_expired_files(desk: Desk, platform: SimulatedPlatform) -> None:
    from cai.attest.sim.nvidia import CHIPS, create_foundry
    from cai.attest.sim.rim import driver_rim

    later = create_foundry(now=NOW + timedelta(days=30))
    data = driver_rim(later, CHIPS["HOPPER"])
    result = desk.verify(RimStore.of([data]))
    assert "gpu.0.rim_driver" in failed(result)


def test_roles_are_versions(desk: Desk) -> None:
    usual, both = desk.usual(7, 21), desk.usual(0, 1)
    driver, vbios = desk.file("580.95.05", usual), desk.file("96.00.74.00.1a", both)
    assert failed(desk.verify(RimStore.of([driver, vbios]))) == set(), "case aside"
    assert failed(desk.verify(RimStore.of([vbios, vbios]))) == {"gpu.0.rim_driver"}
    assert failed(desk.verify(RimStore.of([driver, driver]))) == {"gpu.0.rim_vbios"}
    wrong = desk.file("580.95.05", usual, arch="BLACKWELL")
    assert failed(desk.verify(RimStore.of([wrong, vbios]))) == {"gpu.0.rim_driver"}
    assert failed(desk.verify(RimStore.of([wrong, driver, vbios]))) == set()


def test_two_files_claim_an_index(desk: Desk) -> None:
    files = [desk.file("580.95.05", desk.usual(7, 21)), desk.file("96.00.74.00.1A",
                                                                 desk.usual(0, 7))]  # fmt: skip
    result = desk.verify(RimStore.of(files))
    assert failed(result) == {"gpu.0.rim"}
    (comparison,) = result.comparisons
    assert comparison is not None
    assert comparison.conflicts == (7,)


def test_alternatives_and_editions(desk: Desk) -> None:
    vbios = desk.file("96.00.74.00.1A", desk.usual(0))
    (value,) = desk.usual(7)[7]
    two = desk.file("580.95.05", {7: (bytes(48), value)})
    assert failed(desk.verify(RimStore.of([two, vbios]))) == set()
    # Two editions of one version: either may match, but one of them completely.
    first = desk.file("580.95.05", {7: (value,), 21: (bytes(48),)})
    second = desk.file("580.95.05", {7: (bytes(48),), **desk.usual(21)})
    assert failed(desk.verify(RimStore.of([first, second, vbios]))) == {"gpu.0.rim"}
    assert failed(desk.verify(RimStore.of([first, second, two, vbios]))) == set()


def test_nothing_compared_is_a_failure(desk: Desk) -> None:
    # The only measurement of the driver file is the one that is left out; VBIOS has one.
    only = desk.file("580.95.05", desk.usual(35))
    vbios = desk.file("96.00.74.00.1A", desk.usual(0))
    result = desk.verify(RimStore.of([only, vbios]))
    assert failed(result) == {"gpu.0.rim"}


def test_a_measurement_beyond_the_report(desk: Desk) -> None:
    driver = desk.file("580.95.05", {**desk.usual(7)})
    far = driver.replace(b'index="63"', b'index="200"')
    assert far != driver
    vbios = desk.file("96.00.74.00.1A", desk.usual(0))
    assert "gpu.0.rim_driver" in failed(desk.verify(RimStore.of([far, vbios])))


def test_names_of_missing_files(
    desk: Desk, platform: SimulatedPlatform, rims: Mapping[str, bytes]
) -> None:
    from cai.attest.certificates import load_chain
    from cai.attest.sim.devices import DeviceSettings

    for arch in ("HOPPER", "BLACKWELL"):
        (device,) = platform.devices(1, DeviceSettings(arch=arch)).collect(NONCE)
        found = rim_ids(parse_report(device.report), describe(load_chain(device.chain, what="x")))
        assert set(found.values()) <= rims.keys()


def test_a_directory(rims: Mapping[str, bytes], desk: Desk, tmp_path: Path) -> None:
    from cai.attest.sim.rim import service_answer

    for number, (name, data) in enumerate(rims.items()):
        if number % 2:
            (tmp_path / f"{name}.xml").write_bytes(data)
        else:
            (tmp_path / f"{name}.json").write_bytes(service_answer(name, data))
    (tmp_path / "notes.txt").write_text("x")
    assert failed(desk.verify(load_rims(tmp_path))) == set()
    assert load_rims(tmp_path / "notes.txt", if_available=True).files == {}
    for name, data in (("a.xml", b"<a/>"), ("b.json", b"{}"), ("c.json", b'{"rim":"*"}')):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormatError, match=name[0]):
            load_rims(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(InputMissing):
        load_rims(tmp_path / "none")
    with pytest.raises(LimitExceeded):
        decode_answer(jcs.canonical({"rim": "A" * 800_000}))


def test_revocation(desk: Desk, store: RimStore, platform_dir: Path, tmp_path: Path) -> None:
    from cai.attest.sim import SimulatedPlatform
    from cai.attest.sim.revocation import OcspSettings

    platform = SimulatedPlatform.create(tmp_path / "p", now=NOW)
    own = Desk(platform, simulated_anchors(tmp_path / "p" / "anchors"))
    files = RimStore.of(platform.rims().values())
    answers = load_ocsp(platform.renew_answers(now=NOW))
    result = own.verify(files, answers, count=2)
    assert failed(result) == set()
    assert result.facts is not None
    produced = datetime.fromisoformat(result.facts[0].ocsp_produced)
    assert abs(NOW - produced) < timedelta(seconds=2)
    assert RISK_OCSP not in result.risks
    assert RISK_DELEGATE in result.risks
    assert failed(own.verify(files, answers, now=NOW + timedelta(days=2))) == {"gpu.0.ocsp"}
    # A revoked signer of reference files fails the device, as a revoked part of it does.
    for name in ("GH100 A01 GSP BROM", "NVIDIA GH100 Identity", "HCC RIM L4 Signer"):
        for status in ("revoked", "on-hold", "unknown"):
            settings = OcspSettings(status={name: status})
            bad = load_ocsp(platform.renew_answers(now=NOW, settings=settings), if_available=True)
            assert failed(own.verify(files, bad)) == {"gpu.0.ocsp"}
    # Without reference files their signer is not asked about.
    settings = OcspSettings(status={"HCC RIM L4 Signer": "revoked"})
    bad = load_ocsp(platform.renew_answers(now=NOW, settings=settings))
    assert failed(own.verify(None, bad)) == set()
