"""``policy.toml``: safe by default, strict, and exact about one guest."""

from __future__ import annotations

import contextlib
import re
import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.attest.facts import DeviceFacts, Facts, TdxFacts
from cai.attest.policy import Profile, VerificationPolicy, policy_for
from cai.attest.verdict import Outcome, Verdict, check
from cai.errors import CaiError, FormatError, LimitExceeded, SettingError

NOW = datetime(2026, 12, 1, tzinfo=UTC)
BODY = {
    "tcb_svn": "06010300" + "00" * 12, "mr_seam": "aa" * 48, "mrsigner_seam": "00" * 48,
    "seam_attributes": "00" * 8, "td_attributes": "0000001000000000", "xfam": "e702060000000000",
    "mr_td": "11" * 48, "mr_config_id": "00" * 48, "mr_owner": "00" * 48,
    "mr_owner_config": "00" * 48, "rtmr_0": "20" * 48, "rtmr_1": "21" * 48, "rtmr_2": "22" * 48,
    "rtmr_3": "23" * 48, "report_data": "ff" * 64,
}  # fmt: skip
TDX = TdxFacts(
    header={}, body=BODY, debug=False, tcb_status="UpToDate", tcb_date="2025-05-14T00:00:00Z",
    advisory_ids=("INTEL-SA-2",), fmspc="b0c06f000000", ppid="81" * 16, eval_data_number=19,
    collateral_expires="2026-12-20T00:00:00Z", collateral_issued="2026-11-20T00:00:00Z",
)  # fmt: skip
DEVICE = DeviceFacts(
    "HOPPER", "GH100 A01 GSP BROM", "4711", "580.95.05", "96.00.74.00.1A", "fe" * 48, {},
    rims={"driver": "d1" * 32, "vbios": "0b" * 32}, rim_expires="2027-01-01T00:00:00Z",
    ocsp_produced="2026-11-30T22:00:00Z",
)
GUEST = {
    "profile": "operated", "launched_by": "agent", "cc_feature": "on", "devtools": "off",
    "count": "1", "driver": "580.95.05",
}  # fmt: skip
FACTS = Facts(TDX, (DEVICE,), "ee" * 32, simulated=False, launch_digest="ab" * 48, guest=GUEST)

EXACT = policy_for(FACTS).decode()


def parse(text: str | bytes) -> VerificationPolicy:
    data = text if isinstance(text, bytes) else text.encode()
    return VerificationPolicy.parse(data, where="policy.toml")


def edited(*changes: tuple[str, str]) -> str:
    """The exact policy with lines replaced; each old text must be there."""
    text = EXACT
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def line(name: str) -> str:
    return next(text for text in EXACT.splitlines() if text.startswith(f"{name} = "))


def failed(policy: VerificationPolicy, facts: Facts = FACTS) -> set[str]:
    return {item.name for item in policy.appraise(facts, now=NOW) if item.outcome is Outcome.FAIL}


def with_body(**fields: str) -> Facts:
    return replace(FACTS, tdx=replace(TDX, body={**BODY, **fields}))


def with_tdx(**fields: Any) -> Facts:
    return replace(FACTS, tdx=replace(TDX, **fields))


def with_guest(**fields: str | None) -> Facts:
    guest = {name: value for name, value in {**GUEST, **fields}.items() if value is not None}
    return replace(FACTS, guest=guest)


def test_written_policy_accepts_exactly_its_guest() -> None:
    policy = parse(EXACT)
    assert failed(policy) == set()
    assert policy.unsafe == ()
    assert policy.profile is Profile.OPERATED
    assert policy.digest == sha256(EXACT.encode()).hexdigest()


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("mr_td", "mr_td"), ("rtmr_0", "rtmr0"), ("rtmr_1", "rtmr1"), ("rtmr_2", "rtmr2"),
        ("rtmr_3", "rtmr3"), ("xfam", "xfam"), ("td_attributes", "td_attributes"),
        ("mr_config_id", "mr_config_id"), ("mr_owner", "mr_owner"),
        ("mr_owner_config", "mr_owner_config"),
    ],
)  # fmt: skip
def test_another_measurement_is_refused(field: str, name: str) -> None:
    other = "5a" * (len(BODY[field]) // 2)
    assert failed(parse(EXACT), with_body(**{field: other})) == {f"tdx.{name}"}


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        (with_tdx(tcb_status="OutOfDate"), {"tdx.tcb_status"}),
        (with_tdx(tcb_status="SWHardeningNeeded"), {"tdx.tcb_status"}),
        (with_tdx(tcb_status="Revoked"), {"tdx.tcb_status"}),
        (replace(FACTS, devices=()), {"gpu.count"}),
        (replace(FACTS, devices=(DEVICE, DEVICE)), {"gpu.count", "guest.count"}),
        (replace(FACTS, devices=(replace(DEVICE, arch="BLACKWELL"),)), {"gpu.0.architecture"}),
        (
            replace(FACTS, devices=(replace(DEVICE, driver_version="1"),)),
            {"gpu.0.driver_version"},
        ),
        (replace(FACTS, devices=(replace(DEVICE, vbios_version="1"),)), {"gpu.0.vbios_version"}),
        (replace(FACTS, launch_digest="cd" * 48), {"guest.launch_digest"}),
        (with_guest(profile="sealed"), {"guest.profile"}),
        (with_guest(profile=None), {"guest.profile"}),
        (with_guest(cc_feature="off"), {"guest.cc_feature"}),
        (with_guest(cc_feature=None), {"guest.cc_feature"}),
        (with_guest(devtools="on"), {"guest.devtools"}),
        (with_guest(count="2"), {"guest.count"}),
        (
            replace(FACTS, launch_digest="", guest={}),
            {"guest.launch_digest", "guest.profile", "guest.cc_feature", "guest.devtools",
             "guest.count"},
        ),
    ],
)  # fmt: skip
def test_other_facts_are_refused(facts: Facts, names: set[str]) -> None:
    assert failed(parse(EXACT), facts) == names


def test_sealed_is_never_launched_by_the_agent() -> None:
    policy = parse(edited(('profile = "operated"', 'profile = "sealed"')))
    assert failed(policy, with_guest(profile="sealed")) == {"guest.launched_by"}
    assert failed(policy, with_guest(profile="sealed", launched_by="launcher")) == set()
    assert failed(policy) == {"guest.profile", "guest.launched_by"}
    assert policy.residual_risks == ()


def test_operated_is_a_residual_risk() -> None:
    assert any("operated" in risk for risk in parse(EXACT).residual_risks)


@pytest.mark.parametrize("name", ["mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", "xfam"])
def test_required_measurements_have_no_default(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name} is missing"):
        parse(edited((line(name) + "\n", "")))
    loosened = parse(edited((line(name), f"unsafe_any_{name} = true")))
    assert loosened.unsafe == (f"tdx.unsafe_any_{name}",)
    field = {"mr_td": "mr_td", "xfam": "xfam"}.get(name, f"rtmr_{name[-1]}")
    assert failed(loosened, with_body(**{field: "5a" * (len(BODY[field]) // 2)})) == set()
    outcomes = {item.name: item.outcome for item in loosened.appraise(FACTS, now=NOW)}
    assert outcomes[f"tdx.{name}"] is Outcome.NOT_ASKED
    with pytest.raises(SettingError, match="contradict"):
        parse(edited((line(name), f"{line(name)}\nunsafe_any_{name} = true")))
    off = parse(edited((line(name), f"{line(name)}\nunsafe_any_{name} = false")))
    assert off.unsafe == ()


@pytest.mark.parametrize(
    "name", ["td_attributes", "mr_config_id", "mr_owner", "mr_owner_config", "tcb_status"]
)
def test_defaults_are_the_safe_values(name: str) -> None:
    policy = parse(edited((line(name) + "\n", "")))
    assert failed(policy) == set()
    if name == "tcb_status":
        assert failed(policy, with_tdx(tcb_status="SWHardeningNeeded")) == {"tdx.tcb_status"}
    else:
        other = "5a" * (len(BODY[name]) // 2)
        assert failed(policy, with_body(**{name: other})) == {f"tdx.{name}"}


def test_several_values() -> None:
    both = f'mr_td = ["{"11" * 48}", "{"12" * 48}"]'
    policy = parse(edited((line("mr_td"), both)))
    assert failed(policy, with_body(mr_td="12" * 48)) == set()
    assert failed(policy, with_body(mr_td="13" * 48)) == {"tdx.mr_td"}


def test_optional_demands() -> None:
    extra = (
        f'mr_seam = ["{"aa" * 48}"]\nppid = ["{"81" * 16}"]\nmin_eval_data_number = 19\n'
        'advisories_denied = ["INTEL-SA-9"]\n[gpu]'
    )
    policy = parse(edited(("[gpu]", extra)))
    assert failed(policy) == set()
    assert failed(policy, with_body(mr_seam="ab" * 48)) == {"tdx.mr_seam"}
    assert failed(policy, with_tdx(ppid="82" * 16)) == {"tdx.ppid"}
    assert failed(policy, with_tdx(eval_data_number=18)) == {"tdx.eval_data_number"}
    denied = with_tdx(advisory_ids=("INTEL-SA-9", "INTEL-SA-1"))
    assert failed(policy, denied) == {"tdx.advisories"}


def test_unsound_status_needs_an_unsafe_name() -> None:
    with pytest.raises(SettingError) as caught:
        parse(edited((line("tcb_status"), 'tcb_status = ["OutOfDate"]')))
    assert "unsafe_tcb_status" in str(caught.value.hint)
    policy = parse(edited((line("tcb_status"), 'unsafe_tcb_status = ["OutOfDate"]')))
    assert policy.unsafe == ("tdx.unsafe_tcb_status",)
    assert failed(policy, with_tdx(tcb_status="OutOfDate")) == set()
    for status in ("Revoked", "UpToDate", "uptodate"):
        with pytest.raises(SettingError):
            parse(edited((line("tcb_status"), f'unsafe_tcb_status = ["{status}"]')))


def test_stock_guests_need_two_loosenings() -> None:
    """A guest behind a stock client states neither launch digest nor facts."""
    bare = replace(FACTS, launch_digest="", guest={})
    policy = parse(
        edited((line("launch_digest"), "unsafe_any_launch_digest = true\n"
                "unsafe_without_facts = true"))
    )  # fmt: skip
    assert failed(policy, bare) == set()
    assert policy.unsafe == ("guest.unsafe_any_launch_digest", "guest.unsafe_without_facts")


def test_further_facts() -> None:
    policy = parse(EXACT + '[guest.facts]\ndriver = "580.95.05"\n')
    assert failed(policy) == set()
    assert failed(policy, with_guest(driver="1")) == {"guest.driver"}
    assert failed(policy, with_guest(driver=None)) == {"guest.driver"}


def test_gpu_count() -> None:
    nothing = replace(FACTS, devices=(), guest={"profile": "operated"})
    none_wanted = parse(edited(("count = 1", "count = 0")))
    assert failed(none_wanted, nothing) == set()
    assert failed(none_wanted) == {"gpu.count"}
    any_number = parse(edited(("count = 1", "unsafe_any_count = true")))
    assert any_number.unsafe == ("gpu.unsafe_any_count",)
    assert failed(any_number, nothing) == set()
    assert failed(any_number) == set()
    with pytest.raises(SettingError, match="contradict"):
        parse(edited(("count = 1", "count = 1\nunsafe_any_count = true")))
    with pytest.raises(SettingError, match="count is missing"):
        parse(edited(("count = 1\n", "")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("version = 1", "version = 2"), "version is 2"),
        (("version = 1\n", ""), "version is missing"),
        (('profile = "operated"\n', ""), "profile is missing"),
        (('profile = "operated"', 'profile = "open"'), "unknown"),
        (("[tdx]", "[tdxx]"), "is missing"),
        (("[gpu]", "[gpus]"), "unknown setting|is missing"),
        (("count = 1", "count = 17"), "count is 17"),
        (("count = 1", "count = -1"), "count is -1"),
        (("count = 1", "count = true"), "whole number"),
        (("count = 1", 'count = "1"'), "whole number"),
        ((line("mr_td"), "mr_td = []"), "empty list"),
        ((line("mr_td"), 'mr_td = "11"'), "list of strings"),
        ((line("mr_td"), "mr_td = [1]"), "list of strings"),
        ((line("mr_td"), f'mr_td = ["{"11" * 47}"]'), "96 lower-case hex"),
        ((line("mr_td"), f'mr_td = ["{"AA" * 48}"]'), "96 lower-case hex"),
        ((line("mr_td"), f'mr_td = ["*{"1" * 95}"]'), "96 lower-case hex"),
        ((line("xfam"), 'xfam = ["e7"]'), "16 lower-case hex"),
        (('"HOPPER"', '"hopper"'), "architectures"),
        ((line("mr_td"), line("mr_td") + "\nmin_eval_data_number = -1"), "min_eval_data_number"),
        ((line("mr_td"), line("mr_td") + "\nppid = [" + '"",' * 257 + "]"), "more than"),
        ((line("launch_digest"), line("launch_digest") + "\nunsafe_any_launch_digest = true"),
         "contradict"),
        ((line("launch_digest"), ""), "launch_digest is missing"),
    ],
)  # fmt: skip
def test_malformed_policies(change: tuple[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        parse(edited(change))


@pytest.mark.parametrize(
    ("old", "new", "suggested"),
    [
        ("[gpu]", "tcb_statis = []\n[gpu]", "tcb_status"),
        ("[gpu]", "unsafe_any_rtmr4 = true\n[gpu]", "unsafe_any_rtmr"),
        ("count = 1", "count = 1\ndriver_version = []", "driver_versions"),
        ("version = 1", "version = 1\nprofiles = 1", "profile"),
        ("[guest]", "[guest]\nlaunch_digests = []", "launch_digest"),
    ],
)
def test_misspelt_members_are_refused(old: str, new: str, suggested: str) -> None:
    with pytest.raises(SettingError, match="unknown setting") as caught:
        parse(edited((old, new)))
    assert suggested in str(caught.value.hint)


@pytest.mark.parametrize("name", ["cc_feature", "devtools", "profile", "count"])
def test_facts_that_are_always_asked_cannot_be_reset(name: str) -> None:
    with pytest.raises(SettingError, match="always asked"):
        parse(EXACT + f'[guest.facts]\n{name} = "off"\n')


def test_facts_contradict_their_absence() -> None:
    with pytest.raises(SettingError, match="contradict"):
        parse(EXACT + 'unsafe_without_facts = true\n[guest.facts]\ndriver = "1"\n')


def test_what_is_not_toml() -> None:
    for data in (b"\xff", b"= 1", b"a = 1\na = 2", b"a = [" * 2000, b"a = 2020-13-01"):
        with pytest.raises(FormatError):
            parse(data)
    with pytest.raises(LimitExceeded):
        parse(b"#" * (1024 * 1024 + 1))
    with pytest.raises(SettingError):
        parse(b"")


def test_the_documented_example_is_a_policy() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "spec-policy.md").read_text()
    example = text.partition("```toml\n")[2].partition("```")[0]
    policy = parse(example.replace("<96 hex>", "00" * 48))
    assert policy.unsafe == ()
    rows = [row for row in text.splitlines() if row.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    written = {row.partition(" = ")[0] for row in EXACT.splitlines() if " = " in row}
    assert written <= documented


def test_apply_extends_a_verdict() -> None:
    verdict = Verdict("guest", (check("tdx.genuine", passed=True),), residual_risks=("first",))
    policy = parse(edited((line("rtmr3"), "unsafe_any_rtmr3 = true")))
    judged = policy.apply(verdict, FACTS, now=NOW)
    assert judged.passed
    assert judged.unsafe == ("tdx.unsafe_any_rtmr3",)
    assert judged.residual_risks[0] == "first"
    assert any("unsafe_any_rtmr3" in risk for risk in judged.residual_risks)
    assert not policy.apply(verdict, with_body(mr_td="12" * 48), now=NOW).passed


def test_policy_for_needs_profile_and_launch() -> None:
    with pytest.raises(SettingError, match="profile"):
        policy_for(with_guest(profile=None))
    with pytest.raises(SettingError, match="profile"):
        policy_for(FACTS, profile="open")
    bare = replace(FACTS, launch_digest="")
    with pytest.raises(SettingError, match="launch digest"):
        policy_for(bare)
    written = policy_for(bare, profile=Profile.SEALED, launch_digest="cd" * 48)
    assert parse(written).profile is Profile.SEALED
    assert tomllib.loads(written.decode())["guest"]["launch_digest"] == ["cd" * 48]


def test_policy_for_cannot_be_injected_into() -> None:
    for text in ('1"]\nunsafe_any_count = true #', "1\\", "1\n", "é"):
        with pytest.raises(SettingError):
            policy_for(replace(FACTS, devices=(replace(DEVICE, driver_version=text),)))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_leak_nothing(data: bytes) -> None:
    with pytest.raises(CaiError):
        parse(data)


@given(st.integers(0, len(EXACT)), st.text(max_size=6), st.integers(0, 6))
def test_altered_policies_leak_nothing(at: int, patch: str, cut: int) -> None:
    altered = EXACT[:at] + patch + EXACT[at + cut :]
    with contextlib.suppress(CaiError):
        policy = parse(altered)
        assert policy.unsafe == ()
