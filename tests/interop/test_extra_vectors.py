"""The conformance runner over folders that it has never seen: made here, by the simulator."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cai import jcs
from tests.interop import test_vectors
from tests.interop.conformance import Folder, Question, questions

WHEN = datetime(2026, 3, 1, tzinfo=UTC)
NONCE = b"\x21" * 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the shared shape, with evidence of a simulated platform."""
    from cai.attest.sim import (
        CollateralSettings,
        DeviceSettings,
        GuestSettings,
        SimulatedPlatform,
        intel,
    )

    out = tmp_path_factory.mktemp("extra")
    platform = SimulatedPlatform.create(out / "sim", now=WHEN, seed=b"extra")
    for name in ("tdx", "gpu"):
        (out / name).mkdir()

    def put(name: str, data: bytes) -> str:
        (out / name).write_bytes(data)
        return name

    roots = {name: put(f"{name}.pem", (platform.anchors / f"{name}-root.pem").read_bytes())
             for name in ("tdx", "gpu", "rim")}  # fmt: skip
    cases: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
        "order": ({}, {}, {"verdict": "pass", "status": "UpToDate"}),
        "fifteen": ({"td15": True}, {}, {"verdict": "pass", "status": "UpToDate"}),
        "late": ({}, {"tcb_status": "OutOfDate"}, {"verdict": "fail", "status": "OutOfDate"}),
        "gone": ({}, {"revoked": ("pck",)}, {"verdict": "fail"}),
        "open": ({"debug": True}, {}, {"verdict": "fail"}),
    }
    entries = []
    for name, (guest, dials, expect) in cases.items():
        members = intel.collateral(
            platform.processor, now=WHEN, settings=CollateralSettings(**dials)
        )
        quote = platform.guest(GuestSettings(**guest)).quote(bytes(64))
        entries.append({
            "name": name,
            "quote": put(f"tdx/{name}.bin", quote),
            "root": roots["tdx"],
            "at_unix": int(WHEN.timestamp()),
            "expect": {
                "collateral_file": put(f"tdx/{name}.json", jcs.canonical(members)),
                "root": roots["tdx"], "at_unix": int(WHEN.timestamp()),
                "under_vendor_root": "fail", **expect,
            },
        })  # fmt: skip
    (out / "tdx" / "manifest.json").write_text(json.dumps({"synthetic": entries}))
    rims = platform.rims()
    files = {
        role: put(f"gpu/{role}.xml", next(data for name, data in rims.items()
                                          if name.startswith(start)))
        for role, start in (("driver_rim", "NV_GPU_DRIVER"), ("vbios_rim", "NV_GPU_VBIOS_1010"))
    }  # fmt: skip
    devices = []
    for name, dials, verdict in (
        ("sound", {}, "pass"), ("changed", {"measurements": {8: bytes(48)}}, "fail"),
        ("nameless", {"opaque": {20: None}}, "fail"),
    ):  # fmt: skip
        (device,) = platform.devices(1, DeviceSettings(**dials)).collect(NONCE)  # type: ignore[arg-type]
        devices.append({
            "name": name, "report": put(f"gpu/{name}.bin", device.report),
            "chain": put(f"gpu/{name}.pem", device.chain), **files,
            "device_root": roots["gpu"], "rim_root": roots["rim"], "expected_nonce": NONCE.hex(),
            "at": WHEN.isoformat(), "expect": {"verdict": verdict, "under_vendor_roots": "fail"},
        })  # fmt: skip
    (out / "gpu" / "manifest.json").write_text(json.dumps({"synthetic": devices}))
    return out


def asked(folder: Path) -> list[Question]:
    return list(questions(Folder(folder)))


def test_every_question_is_answered(folder: Path) -> None:
    found = asked(folder)
    assert len(found) == 2 * (5 + 3)
    for question in found:
        test_vectors.test_expected_answer(question)


def test_a_wrong_expectation_is_noticed(folder: Path) -> None:
    for question in asked(folder):
        verdict = question.expected["verdict"]
        turned = {"verdict": "fail" if verdict == "pass" else "pass"}
        with pytest.raises(AssertionError):
            test_vectors.test_expected_answer(Question(question.name, question.ask, turned))


def test_folders_are_named_by_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "evidence").symlink_to(folder)
    monkeypatch.setenv("CAI_EXTRA_VECTORS", os.pathsep.join((str(folder), str(tmp_path))))
    paths = [item.path for item in test_vectors.folders()]
    assert paths[-2:] == [folder, tmp_path / "evidence"]
    monkeypatch.setenv("CAI_EXTRA_VECTORS", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError):
        test_vectors.folders()


def test_an_entry_that_nobody_can_ask_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    body = {"novelties": [{"name": "new", "expect": {"verdict": "pass"}}]}
    (tmp_path / "gpu" / "manifest.json").write_text(json.dumps(body))
    (question,) = asked(tmp_path)
    with pytest.raises(AssertionError):
        test_vectors.test_expected_answer(question)
