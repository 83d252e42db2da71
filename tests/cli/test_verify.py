"""``cai verify``: the exit status tells pass, fail, cannot decide and wrong usage apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha384
from pathlib import Path
from typing import Any

import pytest

from cai.attest.evidence import Evidence
from cai.attest.evidence_file import EvidenceFile
from cai.attest.policy import policy_for
from cai.attest.statement import stock_report_data
from cai.attest.tdx.runtime_events import launch_events

ROOT = Path(__file__).resolve().parents[2]
EVIDENCE = ROOT / os.environ.get("CAI_VECTORS", "../shared/vectors") / "evidence" / "tdx"

NONCE = bytes(range(32))
REPORT_DATA = stock_report_data(sha384(b"a challenge").digest())
LAUNCH = b'{"launch":1}'


@dataclass(frozen=True)
class Desk:
    """A simulated guest's evidence and what verifies it."""

    directory: Path
    evidence: EvidenceFile
    policy: bytes

    def write(self, evidence: bytes | None = None, policy: bytes | None = None) -> None:
        (self.directory / "evidence.json").write_bytes(
            self.evidence.encode() if evidence is None else evidence
        )
        (self.directory / "policy.toml").write_bytes(self.policy if policy is None else policy)

    def run(self, *more: str | Path, collateral: bool = True) -> tuple[int, dict[str, Any], str]:
        anchors = self.directory / "anchors"
        arguments: list[str | Path] = [
            "--evidence", self.directory / "evidence.json",
            "--policy", self.directory / "policy.toml", "--unsafe-simulated-root", anchors,
        ]  # fmt: skip
        if collateral:
            arguments += ["--collateral", anchors / "collateral"]
        return run(*arguments, "--json", *more)


def run(*arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "cai", "verify", *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    value = json.loads(done.stdout) if "--json" in arguments and done.stdout else {}
    return done.returncode, value, done.stdout + done.stderr


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    from cai.attest.anchors import simulated_anchors
    from cai.attest.sim import GuestSettings, SimulatedPlatform
    from cai.attest.tdx.collateral import load_collateral
    from cai.attest.verify import verify_evidence

    directory = tmp_path_factory.mktemp("verify")
    SimulatedPlatform.create(directory, now=datetime.now(UTC))
    platform = SimulatedPlatform.load(directory / "platform")
    guest = platform.guest(GuestSettings(rtmr3_events=launch_events(LAUNCH)))
    evidence = Evidence(
        guest.quote(REPORT_DATA), platform.devices(1).collect(NONCE), guest.event_log()
    )
    verdict, facts = verify_evidence(
        evidence, subject="guest", report_data=REPORT_DATA, gpu_nonce=NONCE,
        anchors=simulated_anchors(directory / "anchors"),
        collateral=load_collateral(directory / "anchors" / "collateral"), now=datetime.now(UTC),
    )  # fmt: skip
    assert facts is not None, verdict.failures
    digest = sha384(LAUNCH).hexdigest()
    policy = policy_for(facts, profile="operated", launch_digest=digest, rtmr3_events=True)
    text = policy.replace(b"[guest]\n", b"[guest]\nunsafe_without_facts = true\n")
    found = Desk(directory, EvidenceFile(evidence, gpu_nonce=NONCE, report_data=REPORT_DATA), text)
    found.write()
    return found


def names(value: dict[str, Any]) -> set[str]:
    return {item["name"] for item in value["checks"] if item["outcome"] == "fail"}


def test_pass(desk: Desk) -> None:
    desk.write()
    status, value, _ = desk.run("--report-data", REPORT_DATA.hex())
    assert (status, value["decision"], names(value)) == (0, "pass", set())
    assert value["simulated"] is True
    assert "unsafe_simulated_root" in value["unsafe"]
    assert {"fmspc", "ppid", "tcb_date", "advisories", "collateral_age"} <= set(value["hardware"])
    assert not any("freshness" in risk for risk in value["residual_risks"])


def test_without_report_data_freshness_is_a_risk(desk: Desk) -> None:
    desk.write()
    status, value, _ = desk.run()
    assert status == 0
    assert any("freshness" in risk for risk in value["residual_risks"])


def test_for_people(desk: Desk) -> None:
    desk.write()
    anchors = desk.directory / "anchors"
    status, _, text = run(
        "--evidence", desk.directory / "evidence.json", "--policy", desk.directory / "policy.toml",
        "--unsafe-simulated-root", anchors, "--collateral", anchors / "collateral",
    )  # fmt: skip
    assert status == 0
    assert "PASS [SIMULATED]" in text
    assert "residual risk: " in text


def test_fail(desk: Desk) -> None:
    desk.write()
    status, value, _ = desk.run("--report-data", "00" * 64)
    assert (status, value["decision"]) == (10, "fail")
    assert names(value) == {"tdx.report_data", "evidence.report_data"}
    mr_td = desk.evidence.evidence.quote[184:232].hex().encode()
    desk.write(policy=desk.policy.replace(mr_td, b"11" * 48))
    status, value, _ = desk.run()
    assert (status, names(value)) == (10, {"tdx.mr_td"})


def test_both_engines(desk: Desk) -> None:
    desk.write(policy=desk.policy.replace(b"[gpu]", b"require_agreement = true\n[gpu]"))
    status, value, _ = desk.run()
    assert status == 0
    outcomes = {item["name"]: item["outcome"] for item in value["checks"]}
    assert outcomes["tdx.second_engine"] == outcomes["tdx.engines"] == "pass"


def test_evidence_that_is_none(desk: Desk) -> None:
    for data in (b"", b"{", b"{}", b'{"cai-evidence":2}', b"\x00" * 100):
        desk.write(evidence=data)
        status, value, _ = desk.run()
        assert (status, value["decision"]) == (10, "fail"), data


def test_expired_collateral_is_a_failure(desk: Desk) -> None:
    desk.write()
    status, value, _ = desk.run("--at", "2060-01-01T00:00:00Z")
    assert status == 10
    assert "tdx.collateral" in names(value)
    assert value["at"] == "2060-01-01T00:00:00Z"


def test_cannot_decide_without_collateral(desk: Desk) -> None:
    desk.write()
    status, value, _ = desk.run(collateral=False)
    assert (status, value["decision"], names(value)) == (20, "undecided", {"tdx.collateral"})
    # Something that is wrong in any case decides.
    status, value, _ = desk.run("--report-data", "00" * 64, collateral=False)
    assert (status, value["decision"]) == (10, "fail")


def test_cannot_decide_without_references(desk: Desk) -> None:
    desk.write(policy=desk.policy.replace(b"unsafe_without_rim = true\n", b""))
    status, value, _ = desk.run()
    assert (status, names(value)) == (20, {"gpu.0.rim_compared"})


@pytest.mark.parametrize(
    "more",
    [
        ["--at", "yesterday"], ["--at", "2026-01-01"], ["--report-data", "00"],
        ["--report-data", "zz" * 64], ["--nonsense"], ["--collateral", "/nonexistent"],
        ["--policy", "/nonexistent"], ["--evidence", "/nonexistent"],
        ["--policy", "/dev/null"], ["--rims", "/nonexistent"],
    ],
)  # fmt: skip
def test_wrong_usage(desk: Desk, more: list[str]) -> None:
    desk.write()
    status, _, text = desk.run(*more)
    assert status == 2, text


def test_a_bare_quote_of_real_hardware(tmp_path: Path) -> None:
    if not (EVIDENCE / "manifest.json").exists():
        pytest.skip("no evidence vectors (set CAI_VECTORS)")
    manifest = json.loads((EVIDENCE / "manifest.json").read_text())
    quote = next(item for item in manifest["quotes"] if item["name"] == "v4-uptodate-b0c06f")
    fields, expect = quote["fields"], quote["expect"]
    lines = [f'mr_td = ["{fields["mr_td"]}"]', f'xfam = ["{fields["xfam"]}"]']
    lines += [f'rtmr{place} = ["{fields[f"rt_mr{place}"]}"]' for place in range(4)]
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'version = 1\nprofile = "operated"\n[tdx]\nrequire_agreement = true\n' + "\n".join(lines)
        + "\n[gpu]\ncount = 0\n[guest]\nunsafe_any_launch_digest = true\n"
        "unsafe_without_facts = true\n"
    )
    arguments = [
        "--evidence", EVIDENCE.parent / quote["file"], "--policy", policy,
        "--collateral", EVIDENCE / "collateral", "--json",
    ]  # fmt: skip
    status, value, text = run(*arguments, "--at", expect["at"])
    assert status == 0, text
    assert value["hardware"]["fmspc"] == quote["fmspc"]
    assert value["hardware"]["ppid"] == quote["pck"]["ppid"]
    assert not value["simulated"]
    assert run(*arguments)[0] == 10  # today its collateral has expired
