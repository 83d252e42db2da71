"""``policy.toml``: safe by default, strict, and exact about one guest."""

from __future__ import annotations

import contextlib
import json
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
from cai.attest.policy import Profile, VerificationPolicy, policy_for, policy_from
from cai.attest.reference import measurements_of, parse_measurements, release_rego
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
        ((line("tcb_status"), "tcb_status = []"), "no TCB status"),
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


# Exceptions, ages, platforms.


def exception(expires: str = "2026-12-31T00:00:00Z", *, status: str = "OutOfDate",
              advisories: str = '"INTEL-SA-2", "INTEL-SA-3"') -> str:  # fmt: skip
    table = (f'[[tdx.exception]]\nstatus = "{status}"\nadvisories = [{advisories}]\n'
             f'expires = "{expires}"\n')  # fmt: skip
    return edited(("[gpu]", f"{table}\n[gpu]"))


def test_a_dated_exception() -> None:
    policy = parse(exception())
    behind = with_tdx(tcb_status="OutOfDate")
    assert failed(policy) == failed(policy, behind) == set()
    assert failed(policy, with_tdx(tcb_status="SWHardeningNeeded")) == {"tdx.tcb_status"}
    more = with_tdx(tcb_status="OutOfDate", advisory_ids=("INTEL-SA-2", "INTEL-SA-9"))
    assert failed(policy, more) == {"tdx.tcb_status"}
    over = datetime(2027, 1, 1, tzinfo=UTC)
    late = {item.name for item in policy.appraise(behind, now=over)
            if item.outcome is Outcome.FAIL}  # fmt: skip
    assert "tdx.tcb_status" in late
    assert policy.unsafe == ("tdx.exception",)
    assert any("OutOfDate" in risk and "2026-12-31" in risk for risk in policy.residual_risks)


def test_a_denied_advisory_stands_above_an_exception() -> None:
    text = exception().replace("tcb_status =", 'advisories_denied = ["INTEL-SA-2"]\ntcb_status =')
    assert failed(parse(text), with_tdx(tcb_status="OutOfDate")) == {"tdx.advisories"}


@pytest.mark.parametrize(
    "text",
    [
        exception(status="Revoked"), exception(status=""), exception("2026-12-31"),
        exception("2026-12-31T00:00:00"), exception("never"), exception("0000-00-00T00:00:00Z"),
        exception(advisories="1"), exception().replace("expires", "until"),
        exception().replace('expires = "2026-12-31T00:00:00Z"\n', ""),
        exception().replace("[[tdx.exception]]", "[tdx.exception]"),
        edited(("[gpu]", "exception = 1\n[gpu]")), edited(("[gpu]", "exception = [1]\n[gpu]")),
        edited(("[gpu]", '[[tdx.exception]]\nstatus = "OutOfDate"\nadvisories = []\n'
                'expires = "2027-01-01T00:00:00Z"\n' * 17 + "[gpu]")),
    ],
)  # fmt: skip
def test_malformed_exceptions(text: str) -> None:
    with pytest.raises(CaiError):
        parse(text)


def with_tdx_line(text: str) -> VerificationPolicy:
    return parse(edited(("[gpu]", f"{text}\n[gpu]")))


@pytest.mark.parametrize(
    ("text", "facts", "name"),
    [
        ("max_collateral_age_days = 11", with_tdx(collateral_issued="2026-11-19T00:00:00Z"),
         "tdx.collateral_age"),
        ("max_collateral_age_days = 11", with_tdx(collateral_issued=""), "tdx.collateral_age"),
        ('min_tcb_date = "2025-05-14T00:00:00Z"', with_tdx(tcb_date="2024-03-13T00:00:00Z"),
         "tdx.tcb_date"),
        ('min_tcb_date = "2025-05-14T00:00:00Z"', with_tdx(tcb_date="?"), "tdx.tcb_date"),
        (f'platform_instance_id = ["{"00" * 16}"]', FACTS, "tdx.platform_instance_id"),
        ('platform_flags_denied = ["smt_enabled"]', FACTS, "tdx.platform_flags"),
        ('platform_flags_denied = ["smt_enabled"]', with_tdx(pck_flags={"smt_enabled": "true"}),
         "tdx.platform_flags"),
        ("require_agreement = true", FACTS, "tdx.engines"),
        ("require_event_log = true", FACTS, "tdx.event_log_given"),
    ],
)  # fmt: skip
def test_further_demands(text: str, facts: Facts, name: str) -> None:
    assert failed(with_tdx_line(text), facts) == {name}


def test_further_demands_are_met() -> None:
    policy = with_tdx_line(
        'max_collateral_age_days = 11\nmin_tcb_date = "2025-05-14T00:00:00Z"\n'
        f'platform_instance_id = ["{"1d" * 16}"]\nplatform_flags_denied = ["smt_enabled"]\n'
        "require_agreement = true\nrequire_event_log = true"
    )
    facts = with_tdx(
        platform_instance_id="1d" * 16, pck_flags={"smt_enabled": "false"},
        engines=("dcap-qvl", "pure"),
    )  # fmt: skip
    assert failed(policy, replace(facts, runtime_events=())) == set()
    assert policy.tdx.require_agreement


BY_EVENTS = edited((line("rtmr3"), 'rtmr3_events = "launch-ready"'))


def events(*texts: str) -> Facts:
    return replace(FACTS, runtime_events=texts)


def test_rtmr3_by_its_events() -> None:
    policy = parse(BY_EVENTS)
    assert policy.unsafe == ()
    good = events(f"cai launch {'ab' * 48}", "cai ready")
    assert failed(policy, good) == set()
    # The value itself is free: it is the events' hash, which the event log check compared.
    other = replace(good, tdx=replace(TDX, body={**BODY, "rtmr_3": "99" * 48}))
    assert failed(policy, other) == set()
    # A guest without a statement: the measured event says what was launched.
    bare = replace(good, launch_digest="")
    assert failed(policy, bare) == set()


@pytest.mark.parametrize(
    "facts",
    [
        FACTS, events(), events("cai ready"), events(f"cai launch {'ab' * 48}"),
        events(f"cai launch {'ab' * 48}", "cai ready", "more"),
        events(f"cai launch {'ab' * 48}", f"cai launch {'ab' * 48}", "cai ready"),
        events(f"cai launch {'cd' * 48}", "cai ready"),
    ],
)  # fmt: skip
def test_other_events_are_refused(facts: Facts) -> None:
    assert failed(parse(BY_EVENTS), facts) == {"tdx.rtmr3"}


def test_a_stated_launch_must_be_the_measured_one() -> None:
    text = BY_EVENTS.replace(line("launch_digest"), "unsafe_any_launch_digest = true")
    policy = parse(text)
    assert failed(policy, events(f"cai launch {'cd' * 48}", "cai ready")) == {"tdx.rtmr3"}
    assert failed(policy, events(f"cai launch {'ab' * 48}", "cai ready")) == set()


@pytest.mark.parametrize(
    "text",
    ['rtmr3_events = "any"', "rtmr3_events = true",
     line("rtmr3") + '\nrtmr3_events = "launch-ready"',
     'unsafe_any_rtmr3 = true\nrtmr3_events = "launch-ready"'],
)  # fmt: skip
def test_rtmr3_is_asked_for_once(text: str) -> None:
    with pytest.raises(SettingError):
        parse(edited((line("rtmr3"), text)))


def test_switches_are_not_counted() -> None:
    switch = replace(DEVICE, arch="LS10", driver_version="", ueid="9")
    both = replace(FACTS, devices=(DEVICE, switch))
    assert failed(parse(EXACT), both) == set()
    assert failed(parse(policy_for(both))) == set()


# Reference texts.


def measurements(**changes: object) -> bytes:
    value: dict[str, object] = {
        "profile": "sealed", "launch_digest": ["ab" * 48], "mr_td": ["11" * 48, "12" * 48],
        **{f"rtmr{place}": [f"2{place}" * 48] for place in range(3)}, "rtmr3_events": True,
        "xfam": ["e702060000000000"], "gpu": {"count": 1, "architectures": ["HOPPER"]}, **changes,
    }  # fmt: skip
    return json.dumps({name: item for name, item in value.items() if item is not None}).encode()


def test_a_policy_from_a_build() -> None:
    found = parse_measurements(measurements(), where="m.json")
    policy = parse(policy_from(found))
    assert policy.unsafe == ()
    assert policy.profile is Profile.SEALED
    guest = events(f"cai launch {'ab' * 48}", "cai ready")
    launched_by = replace(guest, guest={**GUEST, "profile": "sealed", "launched_by": "launcher"})
    assert failed(policy, launched_by) == set()
    assert failed(policy, replace(launched_by, devices=())) >= {"gpu.count"}


@pytest.mark.parametrize(
    "changes",
    [
        {"mr_td": None}, {"mr_td": []}, {"mr_td": ["zz"]}, {"rtmr0": None}, {"xfam": None},
        {"profile": None}, {"profile": "open"}, {"launch_digest": None}, {"more": 1},
        {"gpu": {}}, {"gpu": {"count": 17}}, {"gpu": {"count": 1, "more": 1}}, {"gpu": []},
        {"rtmr3_events": None}, {"rtmr3_events": False},
        {"gpu": {"count": 1, "driver_versions": ['1"]\nunsafe_any_count = true #']}},
    ],
)  # fmt: skip
def test_malformed_measurements(changes: dict[str, object]) -> None:
    with pytest.raises(CaiError):
        policy_from(parse_measurements(measurements(**changes), where="m.json"))


def allowed(rego: str, facts: Facts, path: tuple[str, ...] = ("a", "b", "c")) -> bool:
    import regopy

    submods = {
        name: {"ear.status": "affirming", "ear.veraison.annotated-evidence": claims}
        for name, claims in facts.claims()
    }
    data = {"plugin": "resource", "resource-path": list(path), "query": {}}
    engine = regopy.Interpreter()
    engine.add_module("policy", rego)
    engine.add_data_json(json.dumps(data))
    engine.set_input_term(json.dumps({"submods": submods}))
    results = engine.query("answer = data.policy.allow").results
    return [result.bindings["answer"] for result in results] == [True]


def test_the_rego_accepts_exactly_the_guest() -> None:
    rego = release_rego(measurements_of(FACTS), resource="a/b/c")
    assert allowed(rego, FACTS)
    assert not allowed(rego, FACTS, ("a", "b", "d"))
    for name, item in BODY.items():
        if name in ("mr_td", "rtmr_0", "rtmr_3", "xfam", "td_attributes", "mr_config_id"):
            assert not allowed(rego, with_body(**{name: "5a" * (len(item) // 2)})), name
    assert not allowed(rego, with_tdx(tcb_status="OutOfDate"))
    assert not allowed(rego, replace(FACTS, launch_digest="cd" * 48))
    assert not allowed(rego, replace(FACTS, devices=()))
    assert allowed(release_rego(measurements_of(FACTS)), FACTS, ("x", "y", "z"))
    for bad in ("a/b", "a/b/c/d", "a//c", 'a/b/"', "a/b/c\n"):
        with pytest.raises(SettingError):
            release_rego(measurements_of(FACTS), resource=bad)
