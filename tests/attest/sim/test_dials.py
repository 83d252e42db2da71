"""Every dial of the simulator turns exactly the checks that it should."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cai import jcs
from cai.attest.anchors import TrustAnchors, simulated_anchors, vendor_anchors
from cai.attest.evidence import Evidence
from cai.attest.facts import Facts
from cai.attest.gpu.ocsp_store import OcspStore, load_ocsp
from cai.attest.gpu.rim_store import RimStore, load_rims
from cai.attest.tdx.collateral import CollateralStore, parse_collateral
from cai.attest.tdx.eventlog import parse_event_log
from cai.attest.tdx.quote import TD15, parse_quote
from cai.attest.tdx.runtime_events import launch_events
from cai.attest.verdict import Outcome, Verdict
from cai.attest.verify import verify_evidence
from cai.errors import InputError, StorageError

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

BINDING = bytes(range(64))
NONCE = b"\x09" * 32


@dataclass(frozen=True)
class Lab:
    """A platform with everything a verifier has of it."""

    platform: SimulatedPlatform
    anchors: TrustAnchors
    rims: RimStore
    ocsp: OcspStore
    now: datetime

    def verify(
        self, evidence: Evidence, *, collateral: Mapping[str, Any] | None = None,
        ocsp: OcspStore | None = None, anchors: TrustAnchors | None = None,
    ) -> tuple[Verdict, Facts | None]:
        from cai.attest.sim import CollateralSettings, intel

        settings = CollateralSettings(**(collateral or {}))
        members = intel.collateral(self.platform.processor, now=self.now, settings=settings)
        item = parse_collateral(jcs.canonical(members), where="collateral")
        assert item is not None
        return verify_evidence(
            evidence, subject="dials", report_data=BINDING,
            gpu_nonce=NONCE if evidence.devices else None,
            anchors=anchors or self.anchors, collateral=CollateralStore([item]), now=self.now,
            require_agreement=True, rims=self.rims, ocsp=ocsp or self.ocsp,
        )  # fmt: skip

    def quote(self, **settings: Any) -> Evidence:
        from cai.attest.sim import GuestSettings

        guest = self.platform.guest(GuestSettings(**settings))
        return Evidence(guest.quote(BINDING), (), guest.event_log())

    def gpus(self, count: int = 2, **settings: Any) -> Evidence:
        from cai.attest.sim import DeviceSettings

        quote = self.quote()
        devices = self.platform.devices(count, DeviceSettings(**settings)).collect(NONCE)
        return Evidence(quote.quote, devices, quote.event_log)


@pytest.fixture(scope="module")
def lab(platform: SimulatedPlatform, platform_dir: Path) -> Lab:
    anchors = platform_dir / "anchors"
    return Lab(
        platform, simulated_anchors(anchors), load_rims(anchors / "rims"),
        load_ocsp(anchors / "ocsp"), datetime.now(UTC),
    )  # fmt: skip


def failures(answer: tuple[Verdict, Facts | None]) -> set[str]:
    verdict, facts = answer
    failed = {item.name for item in verdict.checks if item.outcome is Outcome.FAIL}
    assert (facts is None) == bool(failed)
    assert verdict.simulated
    return failed


def test_everything_in_order(lab: Lab) -> None:
    verdict, facts = lab.verify(lab.gpus(8, protected_pcie=True))
    assert verdict.failures == ()
    assert facts is not None
    assert (facts.tdx.tcb_status, len(facts.devices), facts.simulated) == ("UpToDate", 12, True)
    assert all(device.rims and device.ocsp_produced for device in facts.devices)


@pytest.mark.parametrize("status", [
    "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded", "OutOfDate",
    "OutOfDateConfigurationNeeded",
])  # fmt: skip
def test_platform_status_and_advisories(lab: Lab, status: str) -> None:
    dials = {"tcb_status": status, "advisory_ids": ("INTEL-SA-01099",), "eval_data_number": 17,
             "tcb_date": "2024-03-13T00:00:00Z"}  # fmt: skip
    _verdict, facts = lab.verify(lab.quote(), collateral=dials)
    assert facts is not None
    assert (facts.tdx.tcb_status, facts.tdx.advisory_ids) == (status, ("INTEL-SA-01099",))
    assert (facts.tdx.eval_data_number, facts.tdx.tcb_date) == (17, "2024-03-13T00:00:00Z")


@pytest.mark.parametrize("dials", [{"module_status": "OutOfDate"}, {"qe_status": "OutOfDate"}])
def test_module_and_enclave_status(lab: Lab, dials: dict[str, Any]) -> None:
    _verdict, facts = lab.verify(lab.quote(), collateral=dials)
    assert facts is not None
    assert facts.tdx.tcb_status == "OutOfDate"


def test_relaunch_is_advised(lab: Lab) -> None:
    dials = {"newest_module_svn": 8, "module_status": "OutOfDate"}
    newer = bytes((8, 1, 3)) + bytes(13)
    evidence = lab.quote(td15=True, fields={"tee_tcb_svn2": newer})
    _verdict, facts = lab.verify(evidence, collateral=dials)
    assert facts is not None
    assert facts.tdx.tcb_status == "TDRelaunchAdvised"
    _verdict, facts = lab.verify(lab.quote(td15=True), collateral=dials)
    assert facts is not None
    assert facts.tdx.tcb_status == "OutOfDate"


@pytest.mark.parametrize("dials", [
    {"tcb_status": "Revoked"}, {"module_status": "Revoked"}, {"qe_status": "Revoked"},
    {"revoked": ("pck",)}, {"revoked": ("platform_ca",)}, {"revoked": ("tcb_signing",)},
    {"known_platform": False}, {"tcb_info": {"fmspc": "00" * 6}}, {"tcb_info": {"version": 2}},
    {"qe_identity": {"mrsigner": "00" * 32}}, {"qe_identity": {"isvprodid": 1}},
])  # fmt: skip
def test_what_intel_refuses(lab: Lab, dials: dict[str, Any]) -> None:
    failed = failures(lab.verify(lab.quote(), collateral=dials))
    assert failed <= {"tdx.genuine", "tdx.collateral", "tdx.agreement", "tdx.engines_agree"}
    assert failed


@pytest.mark.parametrize("dials", [
    {"lifetime": timedelta(days=-1)}, {"backdated": timedelta(days=-1)},
])  # fmt: skip
def test_collateral_out_of_its_time(lab: Lab, dials: dict[str, Any]) -> None:
    assert "tdx.collateral" in failures(lab.verify(lab.quote(), collateral=dials))


@pytest.mark.parametrize(("settings", "check"), [
    ({"debug": True}, "tdx.debug"),
    ({"fields": {"td_attributes": bytes(8)}}, "tdx.attributes"),
    ({"td15": True, "fields": {"mr_service_td": b"\x01" * 48}}, "tdx.service_td"),
    ({"fields": {"seam_attributes": b"\x01" + bytes(7)}}, "tdx.genuine"),
    ({"fields": {"mrsigner_seam": b"\x01" * 48}}, "tdx.genuine"),
    ({"fields": {"report_data": bytes(64)}}, "tdx.report_data"),
    ({"padding": b"\x00\x01"}, "tdx.framing"),
    ({"failure": "truncated"}, "tdx.framing"),
    ({"failure": "signature"}, "tdx.genuine"),
    ({"failure": "attestation-key"}, "tdx.genuine"),
    ({"failure": "qe-report"}, "tdx.genuine"),
    ({"rtmr3_events": launch_events(b"a"), "log_events": launch_events(b"b")}, "tdx.event_log"),
    ({"fields": {"rtmr_1": bytes(48)}}, "tdx.event_log"),
])  # fmt: skip
def test_what_a_guest_is_refused_for(lab: Lab, settings: dict[str, Any], check: str) -> None:
    from cai.attest.sim import QuoteFailure

    if "failure" in settings:
        settings = {"failure": QuoteFailure(settings["failure"])}
    assert check in failures(lab.verify(lab.quote(**settings)))


def test_any_field_can_be_set_and_unknown_ones_cannot(lab: Lab) -> None:
    fields = {"mr_owner": b"\x05" * 48, "xfam": b"\xff" * 8, "mr_seam": b"\x06" * 48}
    _verdict, facts = lab.verify(lab.quote(fields=fields))
    assert facts is not None
    assert {name: facts.tdx.body[name] for name in fields} == {
        name: value.hex() for name, value in fields.items()
    }
    for bad in ({"mr_owner": b""}, {"mr_0wner": bytes(48)}, {"mr_service_td": bytes(48)}):
        with pytest.raises(InputError):
            lab.quote(fields=bad)


def test_quote_versions_and_logs(lab: Lab) -> None:
    assert parse_quote(lab.quote(td15=True).quote).body_type == TD15
    assert lab.quote(log=False).event_log is None
    assert failures(lab.verify(lab.quote(td15=True, padding=b""))) == set()
    evidence = lab.quote(rtmr3_events=launch_events(b"launch"))
    assert evidence.event_log is not None
    replayed = parse_event_log(evidence.event_log).replay()
    body = parse_quote(evidence.quote).body
    assert [body[f"rtmr_{place}"] for place in range(4)] == list(replayed)
    with pytest.raises(StorageError):
        lab.quote(unavailable=True)


@pytest.mark.parametrize(("settings", "check"), [
    ({"failure": "signature"}, "gpu.0.signature"),
    ({"failure": "nonce"}, "gpu.0.nonce"),
    ({"failure": "boot-rom"}, "gpu.0.chain"),
    ({"failure": "foreign"}, "gpu.0.chain"),
    ({"failure": "expired"}, "gpu.0.chain"),
    ({"failure": "repeated"}, "gpu.distinct"),
    ({"failure": "swapped-chain"}, "gpu.0.signature"),
    ({"failure": "truncated"}, "gpu.0.report"),
    ({"failure": "trailing"}, "gpu.0.report"),
    ({"nvdec0": 0x11}, "gpu.0.nvdec"),
    ({"label": "BLACKWELL"}, "gpu.0.arch"),
    ({"opaque": {20: None}}, "gpu.0.fwid"),
    ({"opaque": {20: bytes(48)}}, "gpu.0.fwid"),
    ({"opaque": {3: None}}, "gpu.0.versions"),
    ({"feature_flag": 7}, "gpu.mode"),
    ({"opaque": {36: b"\x01\x00"}, "failing": (0,)}, "gpu.mode"),
    ({"feature_flag": 2}, "gpu.topology"),
    ({"protected_pcie": True}, "gpu.topology"),
    ({"measurements": {8: bytes(48)}}, "gpu.0.rim"),
    ({"measurements": {1: bytes(48)}, "failing": (1,)}, "gpu.1.rim"),
    ({"driver_version": "580.0.0"}, "gpu.0.rim_driver"),
    ({"vbios_version": "96.00.74.00.00"}, "gpu.0.rim_vbios"),
])  # fmt: skip
def test_what_devices_are_refused_for(lab: Lab, settings: dict[str, Any], check: str) -> None:
    from cai.attest.sim import DeviceFailure

    if "failure" in settings:
        settings = {"failure": DeviceFailure(settings["failure"])}
    found = failures(lab.verify(lab.gpus(**settings)))
    assert check in found


def test_a_lost_device_gives_no_evidence(lab: Lab) -> None:
    from cai.attest.sim import DeviceFailure

    with pytest.raises(StorageError):
        lab.gpus(failure=DeviceFailure.LOST, failing=(1,))


@pytest.mark.parametrize(("count", "switches"), [(7, 4), (8, 3), (8, 0), (0, 4)])
def test_an_incomplete_system(lab: Lab, count: int, switches: int) -> None:
    found = failures(lab.verify(lab.gpus(count, protected_pcie=True, switches=switches)))
    assert "gpu.topology" in found


def test_disabled_video_decoder_takes_a_measurement_out(lab: Lab) -> None:
    changed = {"measurements": {36: bytes(48)}}
    assert failures(lab.verify(lab.gpus(**changed))) == set()
    assert "gpu.0.rim" in failures(lab.verify(lab.gpus(**changed, nvdec0=0xAA)))


def test_blackwell(lab: Lab) -> None:
    _verdict, facts = lab.verify(lab.gpus(arch="BLACKWELL"))
    assert facts is not None
    assert {device.arch for device in facts.devices} == {"BLACKWELL"}


@pytest.mark.parametrize("name", [
    "GH100 A01 GSP BROM", "NVIDIA GH100 Provisioner ICA 1", "NVIDIA GH100 Identity",
    "HCC RIM L4 Signer", "NVIDIA Reference Value L3 GH100 001",
])  # fmt: skip
@pytest.mark.parametrize("status", ["revoked", "on-hold", "unknown"])
def test_revocation(lab: Lab, name: str, status: str) -> None:
    from cai.attest.sim import OcspSettings

    responder = lab.platform.responder(OcspSettings(status={name: status}))
    store = OcspStore.of(
        responder.about(certificate, now=lab.now) for certificate, _ in responder.links.values()
    )
    assert "gpu.0.ocsp" in failures(lab.verify(lab.gpus(), ocsp=store))


def test_counts_and_kinds_have_limits(lab: Lab) -> None:
    for count, settings in (
        (9, {}), (-1, {}), (1, {"arch": "AMPERE"}), (1, {"protected_pcie": True, "switches": 5})
    ):
        with pytest.raises(InputError):
            lab.gpus(count, **settings)


def test_facts_can_be_dialled(lab: Lab) -> None:
    from cai.attest.sim import DeviceSettings

    source = lab.platform.devices(1, DeviceSettings(facts={"devtools": "on"}))
    assert source.facts()["devtools"] == "on"
    system = lab.platform.devices(8, DeviceSettings(protected_pcie=True)).facts()
    assert (system["multi_gpu_mode"], system["count"]) == ("protected_pcie", "8")


def test_vendor_roots_refuse_all_of_it(lab: Lab) -> None:
    verdict, facts = lab.verify(lab.gpus(8, protected_pcie=True), anchors=vendor_anchors())
    failed = {item.name for item in verdict.failures}
    assert facts is None
    assert {"tdx.root", "tdx.genuine"} <= failed
    assert {f"gpu.{place}.chain" for place in range(12)} <= failed
    assert {"gpu.0.rim_driver", "gpu.0.rim_vbios"} <= failed


def test_one_seed_is_one_platform(tmp_path: Path) -> None:
    from cai.attest.sim import DeviceSettings, GuestSettings, SimulatedPlatform

    when = datetime(2026, 5, 1, tzinfo=UTC)
    one, same, other = (
        SimulatedPlatform.create(tmp_path / name, now=when, seed=seed)
        for name, seed in (("one", b"seed"), ("same", b"seed"), ("other", b"another"))
    )

    def everything(platform: SimulatedPlatform) -> list[bytes]:
        files = sorted(platform.anchors.rglob("*"))
        # Answers of the responder are the one thing that the library signs at random.
        public = [path.read_bytes() for path in files if path.is_file() and path.suffix != ".der"]
        guest = platform.guest(GuestSettings(td15=True, rtmr3_events=(b"x",)))
        devices = platform.devices(8, DeviceSettings(protected_pcie=True)).collect(NONCE)
        parts = [part for device in devices for part in (device.report, device.chain)]
        return [*public, guest.quote(BINDING), guest.event_log() or b"", *parts]

    assert everything(one) == everything(same)
    assert not set(everything(one)) & (set(everything(other)) - {b""}) - _shared(one, other)
    again = SimulatedPlatform.load(tmp_path / "one")
    assert again.guest(GuestSettings()).quote(BINDING) == one.guest(GuestSettings()).quote(BINDING)


def _shared(one: SimulatedPlatform, other: SimulatedPlatform) -> set[bytes]:
    """Event logs speak of images, not of machines."""
    from cai.attest.sim import GuestSettings

    return {
        platform.guest(GuestSettings(td15=True, rtmr3_events=(b"x",))).event_log() or b""
        for platform in (one, other)
    }


def test_pck_flags(tmp_path: Path) -> None:
    from cai.attest.sim import GuestSettings, SimulatedPlatform, intel

    platform = SimulatedPlatform.create(
        tmp_path / "one", now=datetime.now(UTC), pck_flags=("smt_enabled",)
    )
    item = parse_collateral(
        jcs.canonical(intel.collateral(platform.processor, now=datetime.now(UTC))), where="x"
    )
    assert item is not None
    quote = SimulatedPlatform.load(tmp_path / "one").guest(GuestSettings()).quote(BINDING)
    _verdict, facts = verify_evidence(
        Evidence(quote, ()), subject="flags", report_data=BINDING, gpu_nonce=None,
        anchors=simulated_anchors(platform.anchors), collateral=CollateralStore([item]),
        now=datetime.now(UTC),
    )  # fmt: skip
    assert facts is not None
    assert facts.tdx.pck_flags == {
        "dynamic_platform": "false", "cached_keys": "false", "smt_enabled": "true"
    }
    with pytest.raises(InputError):
        SimulatedPlatform.create(tmp_path / "two", now=datetime.now(UTC), pck_flags=("x",))
