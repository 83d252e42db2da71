"""Real and synthetic TDX vectors at their listed times: ours must answer as listed.

Covered: quotes, collateral, synthetic sets, tampered ones. Event logs come with their replay.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cai.attest.anchors import vendor_anchors
from cai.attest.facts import Facts
from cai.attest.policy import VerificationPolicy
from cai.attest.tdx.collateral import CollateralStore, parse_collateral
from cai.attest.tdx.quote import parse_quote
from cai.attest.tdx.verify import TdxResult, verify_quote
from cai.attest.verdict import Outcome
from cai.errors import FormatError, LimitExceeded

ROOT = Path(__file__).resolve().parents[3]
VECTORS = ROOT / os.environ.get("CAI_VECTORS", "../shared/vectors")
EVIDENCE = VECTORS / "evidence"

pytestmark = pytest.mark.skipif(
    not (EVIDENCE / "tdx" / "manifest.json").exists(),
    reason=f"no evidence vectors in {VECTORS} (set CAI_VECTORS)",
)

POLICY = """
version = 1
profile = "operated"
[tdx]
unsafe_any_mr_td = true
unsafe_any_rtmr0 = true
unsafe_any_rtmr1 = true
unsafe_any_rtmr2 = true
unsafe_any_rtmr3 = true
unsafe_any_xfam = true
mr_config_id = ["{mr_config_id}"]
mr_owner = ["{mr_owner}"]
mr_owner_config = ["{mr_owner_config}"]
[gpu]
count = 0
[guest]
unsafe_any_launch_digest = true
unsafe_without_facts = true
"""
"""Status and attributes as by default; measurements are not asked, as the vectors' readme says."""


def manifest(name: str) -> dict[str, Any]:
    path = EVIDENCE / name / "manifest.json"
    value: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return value


TDX = manifest("tdx")
NEGATIVE = manifest("negative/tdx")


def store(path: Path) -> CollateralStore:
    item = parse_collateral(path.read_bytes(), where=path.name)
    return CollateralStore([item] if item else [])


def root_of(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)


def verify(quote: bytes, collateral: CollateralStore, at: int, root: bytes) -> TdxResult:
    """Verify with the quote's own report data: binding is not what the vectors ask."""
    try:
        binding = parse_quote(quote).body["report_data"]
    except (FormatError, LimitExceeded):
        binding = bytes(64)
    return verify_quote(
        quote, report_data=binding, root=root, collateral=collateral,
        now=datetime.fromtimestamp(at, UTC),
    )


def verdict(result: TdxResult) -> str:
    if result.facts is None:
        return "fail"
    body = result.facts.body
    policy = VerificationPolicy.parse(POLICY.format(**body).encode(), where="policy.toml")
    checks = policy.appraise(
        Facts(result.facts, (), "", simulated=False), now=datetime.now(UTC)
    )
    return "fail" if any(item.outcome is Outcome.FAIL for item in checks) else "pass"


GENUINE = [
    pytest.param(quote, case, id=f"{quote['name']}@{case['collateral']}-{place}")
    for quote in TDX.get("quotes", [])
    for place, case in enumerate([quote.get("expect"), *(quote.get("also") or [])])
    if case
]


@pytest.mark.parametrize(("quote", "case"), GENUINE)
def test_genuine(quote: dict[str, Any], case: dict[str, Any]) -> None:
    result = verify(
        (EVIDENCE / quote["file"]).read_bytes(),
        store(EVIDENCE / "tdx" / "collateral" / f"{case['collateral']}.json"),
        case["at_unix"],
        vendor_anchors().tdx_root,
    )
    assert verdict(result) == case["verdict"]
    if case["verdict"] == "pass":
        assert result.facts is not None
    if result.facts is not None:
        assert result.facts.tcb_status == case["status"]
        assert list(result.facts.advisory_ids) == sorted(case["advisory_ids"])
        expected = {
            **quote["fields"],
            **{f"rtmr_{n}": quote["fields"][f"rt_mr{n}"] for n in range(4)},
            "tcb_svn": quote["fields"]["tee_tcb_svn"],
        }
        for name, value in result.facts.body.items():
            if name != "mrsigner_seam":
                assert value == expected[name], name
        assert result.facts.fmspc == quote["fmspc"]
        assert result.facts.ppid == quote["pck"]["ppid"]


def test_genuine_quotes_outside_their_time() -> None:
    """The same quote and collateral, today: refused."""
    case = next(quote for quote in TDX["quotes"] if quote["name"] == "v4-uptodate-b0c06f")
    result = verify(
        (EVIDENCE / case["file"]).read_bytes(),
        store(EVIDENCE / "tdx" / "collateral" / f"{case['expect']['collateral']}.json"),
        1_795_000_000,
        vendor_anchors().tdx_root,
    )
    failed = {item.name for item in result.checks if item.outcome is Outcome.FAIL}
    assert failed == {"tdx.collateral", "tdx.genuine"}


@pytest.mark.parametrize("case", TDX.get("synthetic", []), ids=lambda case: case["name"])
def test_synthetic(case: dict[str, Any]) -> None:
    expect = case["expect"]
    quote = (EVIDENCE / case["quote"]).read_bytes()
    collateral = store(EVIDENCE / expect["collateral_file"])
    result = verify(quote, collateral, expect["at_unix"], root_of(EVIDENCE / expect["root"]))
    assert verdict(result) == expect["verdict"]
    if result.facts is not None and "status" in expect:
        assert result.facts.tcb_status == expect["status"]
    under_vendor = verify(quote, collateral, expect["at_unix"], vendor_anchors().tdx_root)
    assert verdict(under_vendor) == expect["under_vendor_root"] == "fail"


OUR_OWN = {"outer-cert-type-7", "siglen-plus-1"}
"""The engine accepts these; only the strict parser stands in their way."""


@pytest.mark.parametrize("case", NEGATIVE.get("tampered", []), ids=lambda case: case["name"])
def test_tampered(case: dict[str, Any]) -> None:
    quotes = {item["name"]: item["file"] for item in TDX["quotes"]}
    own = case["kind"] != "collateral"
    quote = (EVIDENCE / (case["file"] if own else quotes[case["quote"]])).read_bytes()
    if case["kind"] == "collateral":
        path = EVIDENCE / case["file"]
    elif "collateral_file" in case:
        path = EVIDENCE / case["collateral_file"]
    else:
        path = EVIDENCE / "tdx" / "collateral" / f"{case['collateral']}.json"
    try:
        collateral = store(path)
    except FormatError:
        assert case["kind"] == "collateral"
        return
    result = verify(quote, collateral, case["at_unix"], vendor_anchors().tdx_root)
    assert result.facts is None
    failed = {item.name for item in result.checks if item.outcome is Outcome.FAIL}
    if case["name"] in OUR_OWN:
        assert failed == {"tdx.framing"}
    if case["name"].startswith("flip-"):
        assert failed == {"tdx.genuine"}


def test_trustee_debug_quote() -> None:
    path = VECTORS / "trustee" / "tdx" / "tdx_quote_4.dat"
    if not path.exists():
        pytest.skip(f"no {path}")
    result = verify(
        path.read_bytes(), CollateralStore.empty(), 1_750_000_000, vendor_anchors().tdx_root
    )
    failed = {item.name for item in result.checks if item.outcome is Outcome.FAIL}
    assert failed == {"tdx.debug", "tdx.collateral"}
