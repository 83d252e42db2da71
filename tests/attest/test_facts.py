"""Facts survive JSON exactly and show Trustee's names."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai import jcs
from cai.attest.facts import DeviceFacts, Facts, TdxFacts
from cai.attest.statement import ChannelStatement, GpuFacts, ReleaseStatement, ServedModel
from cai.errors import FormatError

BODY = {
    "tcb_svn": "06010300" + "00" * 12, "mr_seam": "aa" * 48, "mrsigner_seam": "00" * 48,
    "seam_attributes": "00" * 8, "td_attributes": "0000001000000000", "xfam": "e702060000000000",
    "mr_td": "11" * 48, "mr_config_id": "00" * 48, "mr_owner": "00" * 48,
    "mr_owner_config": "00" * 48, "rtmr_0": "20" * 48, "rtmr_1": "21" * 48, "rtmr_2": "22" * 48,
    "rtmr_3": "23" * 48, "report_data": "ff" * 64,
}  # fmt: skip
HEADER = {
    "version": "0400", "att_key_type": "0200", "tee_type": "81000000", "reserved": "00" * 4,
    "vendor_id": "939a7233f79c4ca9940a0db3957f0607", "user_data": "00" * 20,
}  # fmt: skip
TDX = TdxFacts(
    header=HEADER, body=BODY, debug=False,
    tcb_status="UpToDate", tcb_date="2025-05-14T00:00:00Z", advisory_ids=("INTEL-SA-1",),
    fmspc="b0c06f000000", ppid="81" * 16, eval_data_number=19,
    collateral_expires="2026-12-20T00:00:00Z", platform_instance_id="07" * 16,
    pck_flags={"smt_enabled": "true"}, collateral_issued="2026-11-20T00:00:00Z",
    engines=("dcap-qvl", "pure"),
)  # fmt: skip
DEVICE = DeviceFacts(
    "HOPPER", "GH100 A01 GSP BROM", "4711", "580.95.05", "96.00.74.00.1A", "fe" * 48,
    {"1": "01" * 48},
)  # fmt: skip
FACTS = Facts(
    TDX, (DEVICE, replace(DEVICE, ueid="4712")), "ee" * 32, simulated=True,
    launch_digest="ab" * 48, guest={"profile": "operated"},
    models=(ServedModel("aa" * 32, "bb" * 32, ("tools",)),), runtime_events=("cai ready",),
    event_claims=(
        {"index": 1, "type_name": "EV_SEPARATOR", "event": "AAAAAA==", "details": {},
         "digests": [{"alg": "SHA-384", "digest": "ab" * 48}], "digest_matches_event": True},
    ),
)  # fmt: skip


def test_round_trip() -> None:
    text = jcs.canonical(FACTS.to_json())
    assert Facts.from_json(json.loads(text)) == FACTS
    bare = Facts(TDX, (), "00" * 32, simulated=False)
    assert Facts.from_json(json.loads(jcs.canonical(bare.to_json()))) == bare


def test_claims_have_trustees_names() -> None:
    claims = dict(FACTS.claims())
    assert list(claims) == ["cpu0", "gpu0", "gpu1"]
    tdx: Any = claims["cpu0"]["tdx"]
    assert tdx["quote"]["body"]["mr_td"] == "11" * 48
    assert tdx["quote"]["header"]["tee_type"] == "81000000"
    assert tdx["td_attributes"] == {
        "debug": False, "septve_disable": True, "protection_keys": False, "key_locker": False,
        "perfmon": False,
    }
    assert tdx["collateral_expiration_status"] == "0"
    assert tdx["uefi_event_logs"][0]["type_name"] == "EV_SEPARATOR"
    assert claims["cpu0"]["cai"]["runtime_events"] == ["cai ready"]  # type: ignore[index]
    bare = dict(replace(FACTS, runtime_events=None, event_claims=None).claims())
    assert "uefi_event_logs" not in bare["cpu0"]["tdx"]  # type: ignore[operator]
    assert claims["cpu0"]["report_data"] == "ff" * 64
    assert claims["cpu0"]["init_data"] == "00" * 48
    assert claims["cpu0"]["cai"]["simulated"] is True  # type: ignore[index]
    gpu: Any = claims["gpu1"]["nvidia"]
    assert (gpu["arch"], gpu["ueid"]) == ("Hopper", "4712")
    assert gpu["config"]["driver_version"] == "580.95.05"
    jcs.canonical(claims)


def test_statements_add_what_they_bind() -> None:
    bare = Facts(TDX, (), "00" * 32, simulated=False)
    release = bare.with_statement(ReleaseStatement("cd" * 48, {"profile": "sealed"}, "0.1.0"))
    assert (release.launch_digest, release.guest) == ("cd" * 48, {"profile": "sealed"})
    assert release.models == ()
    channel = ChannelStatement(
        "cd" * 48, "svc", "", FACTS.models, GpuFacts("00" * 32, "00" * 32, 1), {"count": "1"}, "",
        ("cai/1",), "00" * 16, 1, "00" * 32, 1,
    )  # fmt: skip
    assert bare.with_statement(channel).models == FACTS.models


def damaged(path: str, value: object) -> dict[str, Any]:
    body: Any = json.loads(jcs.canonical(FACTS.to_json()))
    *parents, last = path.split(".")
    place = body
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return body  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tdx", None), ("tdx", []), ("tdx.body", None), ("tdx.body", {"a": 1}),
        ("tdx.body.mr_td", None), ("tdx.body.mr_td", "11" * 47), ("tdx.body.mr_td", "XX" * 48),
        ("tdx.body.other", "00"), ("tdx.header.version", None),
        ("tdx.debug", "no"), ("tdx.eval_data_number", -1), ("tdx.eval_data_number", True),
        ("tdx.advisory_ids", "x"), ("tdx.advisory_ids", [1]), ("tdx.extra", 1),
        ("devices", None), ("devices", {}), ("devices", ["x"]), ("devices.0.ueid", 4711),
        ("devices.0.more", "x"), ("devices.1.measurements", []), ("simulated", None),
        ("simulated", "true"), ("guest", None), ("guest", {"a": 1}), ("models", "x"),
        ("models.0.root", None), ("models.0.allow", [1]), ("launch_digest", 1), ("more", 1),
        ("tdx.engines", None), ("tdx.engines", "pure"), ("tdx.collateral_issued", None),
        ("runtime_events", "x"), ("runtime_events", [1]), ("event_claims", {}),
        ("event_claims", [1]), ("event_claims", [{}]), ("event_claims.0.index", None),
        ("event_claims.0.more", 1),
    ],
)  # fmt: skip
def test_damaged_facts_are_refused(path: str, value: object) -> None:
    with pytest.raises(FormatError):
        Facts.from_json(damaged(path, value))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@given(JSON, st.sampled_from(["tdx", "devices", "guest", "models", "gpu_digest", "simulated"]))
def test_arbitrary_json_leaks_nothing(value: Any, member: str) -> None:
    with pytest.raises(FormatError):
        Facts.from_json(value)
    body: Any = json.loads(jcs.canonical(FACTS.to_json()))
    body[member] = value
    try:
        Facts.from_json(body)
    except FormatError:
        return
