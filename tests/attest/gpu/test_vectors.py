"""Real and synthetic GPU vectors at their listed times: every manifest entry gets its answer."""

from __future__ import annotations

import base64
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cai.attest.anchors import vendor_anchors
from cai.attest.certificates import load_chain
from cai.attest.evidence import DeviceEvidence
from cai.attest.gpu.ocsp import check_answer
from cai.attest.gpu.rim import verify_rim
from cai.attest.gpu.rim_store import RimStore
from cai.attest.gpu.verify import GpuResult, verify_devices
from cai.attest.verdict import Outcome
from cai.errors import CaiError

ROOT = Path(__file__).resolve().parents[3]
VECTORS = ROOT / os.environ.get("CAI_VECTORS", "../shared/vectors")
EVIDENCE = VECTORS / "evidence"
NVIDIA = VECTORS / "trustee" / "nvidia"
NOW = datetime(2026, 11, 20, tzinfo=UTC)

pytestmark = pytest.mark.skipif(
    not (EVIDENCE / "gpu" / "manifest.json").exists(),
    reason=f"no evidence vectors in {VECTORS} (set CAI_VECTORS)",
)


def manifest(name: str) -> dict[str, Any]:
    path = EVIDENCE / name / "manifest.json"
    value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return value


GPU = manifest("gpu")
NEGATIVE = manifest("negative/gpu")


def read(name: str) -> bytes:
    return (EVIDENCE / name).read_bytes()


def der(name: str) -> bytes:
    return x509.load_pem_x509_certificate(read(name)).public_bytes(Encoding.DER)


def failed(result: GpuResult) -> set[str]:
    names = {item.name for item in result.checks if item.outcome is Outcome.FAIL}
    assert (result.facts is None) == bool(names)
    return names


def verify_files(
    case: dict[str, Any], *, nonce: str, arch: str = "HOPPER", rims: tuple[str, ...] = (),
    roots: tuple[bytes, bytes | None] | None = None, unsafe_without_fwid: bool = False,
) -> GpuResult:
    vendor = vendor_anchors()
    root, rim_root = roots or (vendor.gpu_root, vendor.rim_root)
    device = DeviceEvidence(arch, "unknown", read(case["report"]), read(case["chain"]))
    return verify_devices(
        (device,), nonce=bytes.fromhex(nonce), root=root, rim_root=rim_root,
        now=datetime.fromisoformat(case["at"]),
        rims=RimStore.of([read(name) for name in rims]) if rims else None,
        unsafe_without_fwid=unsafe_without_fwid,
    )


def verify_lists(*names: str) -> GpuResult:
    items = [item for name in names for item in json.loads((EVIDENCE / name).read_text())]
    devices = tuple(
        DeviceEvidence(
            item["arch"], "unknown", base64.b64decode(item["evidence"]),
            base64.b64decode(item["certificate"]),
        )
        for item in items
    )
    return verify_devices(
        devices, nonce=bytes.fromhex(items[0]["nonce"]), root=vendor_anchors().gpu_root, now=NOW
    )


@pytest.mark.parametrize("case", GPU.get("reports", []), ids=lambda case: case["name"])
def test_reports(case: dict[str, Any]) -> None:
    # The question is signature and chain; that a policy wants a firmware digest is the next test.
    nonce = case.get("nonce") or "00" * 32
    result = verify_files(case, nonce=nonce, arch=case["arch"], unsafe_without_fwid=True)
    failing = failed(result)
    if case["expect"]["report_and_chain"] == "pass":
        assert failing == set()
        assert result.facts is not None
        facts = result.facts[0]
        assert facts.arch == case["arch"]
        assert facts.hwmodel == case["hwmodel"]
        assert facts.ueid == case["ueid"]
        assert facts.driver_version == case["driver"]
        assert facts.vbios_version == case["vbios"]
        assert facts.fwid == (case["fwid"]["report"] or "")
        assert len(facts.measurements) == case["blocks"]
    else:
        assert failing & {"gpu.0.report", "gpu.0.signature"}


@pytest.mark.parametrize(
    "case", [case for case in GPU.get("reports", []) if (case.get("fwid") or {}).get("cert_oid")],
    ids=lambda case: case["name"],
)
def test_a_firmware_digest_is_asked_for_by_default(case: dict[str, Any]) -> None:
    failing = failed(verify_files(case, nonce=case["nonce"], arch=case["arch"]))
    assert failing == (set() if case["fwid"]["report"] else {"gpu.0.fwid"})


@pytest.mark.parametrize(
    "case", [case for case in GPU.get("reports", []) if case["expect"].get("rims")],
    ids=lambda case: case["name"],
)
def test_reports_with_reference_files(case: dict[str, Any]) -> None:
    wanted = case["expect"]["rims"]
    files = {item["name"]: item["file"] for item in GPU["rims"]}
    result = verify_files(
        case, nonce=case["nonce"], arch=case["arch"], unsafe_without_fwid=True,
        rims=tuple(files[name] for name in wanted["rims"]),
    )
    (comparison,) = result.comparisons
    assert comparison is not None
    assert comparison.compared == wanted["compared"]
    assert [index for index, _ in comparison.mismatches] == wanted["mismatch"]
    assert ("fail" if failed(result) else "pass") == wanted["verdict"]
    assert result.facts is not None
    assert result.facts[0].rims.keys() == {"driver", "vbios"}


@pytest.mark.parametrize("case", GPU.get("rims", []), ids=lambda case: case["name"])
def test_rims(case: dict[str, Any]) -> None:
    root = vendor_anchors().rim_root
    assert root is not None
    data = read(case["file"])
    if case["expect"]["verdict"] == "pass":
        start = datetime.fromisoformat(case["expect"]["at"])
        rim = verify_rim(data, root=root, now=start + timedelta(days=1))
        assert (rim.product, rim.version) == (case["product"], case["version"])
        assert sorted(rim.measurements) == case["active_indexes"]
        assert rim.valid_from == start
        assert rim.valid_until == datetime.fromisoformat(case["valid_until"])
        for now in (start - timedelta(seconds=1), rim.valid_until + timedelta(seconds=1)):
            with pytest.raises(CaiError):
                verify_rim(data, root=root, now=now)
    else:
        for days in range(0, 2500, 90):
            with pytest.raises(CaiError):
                verify_rim(data, root=root, now=NOW - timedelta(days=days))


@pytest.mark.parametrize("case", GPU.get("synthetic", []), ids=lambda case: case["name"])
def test_synthetic(case: dict[str, Any]) -> None:
    rims = (case["driver_rim"], case["vbios_rim"])
    roots = der(case["device_root"]), der(case["rim_root"])
    nonce = case["expected_nonce"]
    result = verify_files(case, nonce=nonce, rims=rims, roots=roots)
    failing = failed(result)
    assert ("fail" if failing else "pass") == case["expect"]["verdict"], failing
    if isinstance(case["prototype"], dict) and all(case["prototype"]["version_match"]):
        (comparison,) = result.comparisons
        assert comparison is not None
        assert comparison.compared == case["prototype"]["compared"]
        assert [list(item) for item in comparison.mismatches] == case["prototype"]["mismatch"]
    vendor = failed(verify_files(case, nonce=nonce, rims=rims))
    assert "gpu.0.chain" in vendor
    assert case["expect"]["under_vendor_roots"] == "fail"
    assert vendor & {"gpu.0.rim_driver", "gpu.0.report"}


def test_synthetic_devices_together() -> None:
    cases = {case["name"]: case for case in GPU["synthetic"]}
    base = cases["good-flag0"]

    def together(*names: str) -> set[str]:
        devices = tuple(
            DeviceEvidence("HOPPER", "", read(cases[name]["report"]), read(cases[name]["chain"]))
            for name in names
        )
        return failed(verify_devices(
            devices, nonce=bytes.fromhex(base["expected_nonce"]), root=der(base["device_root"]),
            now=datetime.fromisoformat(base["at"]),
        ))  # fmt: skip

    assert together("good-flag0", "second-gpu") == set()
    for case in cases.values():
        for other, answer in case["expect"].get("together_with", {}).items():
            assert ("fail" if together(case["name"], other) else "pass") == answer


@pytest.mark.parametrize("case", GPU.get("synthetic_ocsp", []), ids=lambda case: case["name"])
def test_synthetic_ocsp(case: dict[str, Any]) -> None:
    chain = load_chain(read("gpu/synthetic/chain.pem"), what="chain")
    at = datetime.fromisoformat(case.get("at", "2026-01-02T00:00:00+00:00"))
    nonce = bytes.fromhex(case.get("request_nonce", ""))

    def answered() -> str:
        try:
            check_answer(
                read(case["file"]), certificate=chain[2], issuer=chain[3], now=at,
                nonce=nonce or None,
            )
        except CaiError:
            return "fail"
        return "pass"

    assert answered() == case["expect"]["verdict"]


@pytest.mark.parametrize("case", NEGATIVE.get("tampered", []), ids=lambda case: case["name"])
def test_tampered(case: dict[str, Any]) -> None:
    # The untampered report is one without a firmware digest, so that alone would prove nothing.
    result = verify_files(
        case, nonce=case["expected_nonce"], unsafe_without_fwid=True,
        rims=(case["driver_rim"], case["vbios_rim"]),
    )
    failing = failed(result)
    about_rim = {name for name in failing if ".rim" in name}
    assert case["expect"]["verdict"] == "fail"
    assert failing
    assert bool(about_rim) == case["name"].startswith("rim-")
    assert not case["name"].startswith("rim-") or failing == about_rim


LISTS = [case for case in GPU.get("evidence", []) if "expect" in case]


@pytest.mark.parametrize("case", LISTS, ids=lambda case: Path(case["file"]).stem)
def test_lists(case: dict[str, Any]) -> None:
    together = case["expect"].get("together_with", [case["file"]])
    for names in (together, together[::-1]):
        result = verify_lists(*names)
        failing = failed(result)
        assert ("fail" if failing else "pass") == case["expect"]["verdict"], failing
    if len(together) > 1:
        assert failed(verify_lists(case["file"])) & {"gpu.topology", "gpu.mode"}
        assert result.facts is not None
        assert sum(device.is_switch for device in result.facts) == 4


REASONS = {
    "ppcie-7gpu": "topology",
    "ppcie-8gpu-one-twice": "gpu.distinct",
    "ppcie-3switch": "topology",
    "ppcie-4switch-one-twice": "gpu.distinct",
    "ppcie-8gpu-reports-swapped": "signature",
    "ppcie-8gpu-foreign-gpu": "nonce",
    "ppcie-8gpu-wrong-arch": "arch",
    "ppcie-switches-of-other-system": "topology",
}


@pytest.mark.parametrize("case", NEGATIVE.get("lists", []), ids=lambda case: case["name"])
def test_bad_lists(case: dict[str, Any]) -> None:
    failing = failed(verify_lists(case["file"], case["together_with"]))
    assert case["expect"]["verdict"] == "fail"
    assert any(name.endswith(REASONS[case["name"]]) for name in failing), failing


@pytest.mark.skipif(not NVIDIA.exists(), reason=f"no Trustee vectors in {VECTORS}")
@pytest.mark.parametrize("name", ["hopper", "blackwell"])
def test_reports_of_trustee(name: str) -> None:
    report = NVIDIA / ("hopper_report1.hex" if name == "hopper" else "blackwell_report.hex")
    data = bytes.fromhex(report.read_text().strip())

    def answered(number: int) -> set[str]:
        chain = (NVIDIA / f"{name}_cert_chain_case{number}.txt").read_bytes()
        device = DeviceEvidence(name, "", data, chain)
        return failed(verify_devices(
            (device,), nonce=data[4:36], root=vendor_anchors().gpu_root, now=NOW
        ))  # fmt: skip

    assert answered(1) == set()
    assert "gpu.0.chain" in answered(2)
    assert "gpu.0.chain" in answered(3)
