"""What table ``[tdx]`` asks of verified facts (docs/spec-policy.md §3, steps 1 to 5)."""

from __future__ import annotations

from datetime import datetime, timedelta

from cai.attest.facts import Facts, TdxFacts
from cai.attest.policy_tdx import ALL_MEASUREMENTS, BOTH_ENGINES, PLATFORM_FLAGS, TdxPolicy
from cai.attest.policy_values import listed, optional, parse_moment
from cai.attest.tdx.eventlog import launched
from cai.attest.verdict import Check, check, not_asked


def tdx_checks(policy: TdxPolicy, facts: Facts, launch: tuple[str, ...] | None,
               now: datetime) -> list[Check]:
    """Compare a quote's facts with the table (spec-policy §3, steps 1 to 5).

    Args:
        policy: the table.
        facts: of the guest.
        launch: accepted launch digests; ``None`` where any is accepted.
        now: time of the appraisal.
    """
    tdx = facts.tdx
    # (1) Measurements and host-chosen identities, each exactly one of the listed values.
    checks = []
    for name, (field, _) in ALL_MEASUREMENTS.items():
        if name == "rtmr3" and policy.rtmr3_events:
            checks.append(_launch_ready(facts, launch))
        else:
            checks.append(
                listed(f"tdx.{name}", tdx.body[field], policy.allowed[name], "another guest")
            )
    return [
        *checks,
        *_status_checks(policy, tdx, now),
        *_age_checks(policy, tdx, now),
        *_platform_checks(policy, tdx),
        *_method_checks(policy, facts),
    ]


def _status_checks(policy: TdxPolicy, tdx: TdxFacts, now: datetime) -> list[Check]:
    # (2) Status of platform, module and quoting enclave; Intel's advisories.
    excepted = next((item for item in policy.exceptions if item.covers(tdx, now)), None)
    expected = [*policy.tcb_status, *(f"{item.status} until {item.expires:%Y-%m-%d}"
                                      for item in policy.exceptions)]  # fmt: skip
    checks = [
        check(
            "tdx.tcb_status",
            passed=tdx.tcb_status in policy.tcb_status or excepted is not None,
            observed=tdx.tcb_status,
            expected=" or ".join(expected),
            reason="Intel's status of this platform"
            + (", which no exception in force covers" if policy.exceptions else ""),
        )
    ]
    denied = sorted(set(tdx.advisory_ids) & set(policy.advisories_denied))
    observed = ", ".join(tdx.advisory_ids) or "none"
    if not policy.advisories_denied:
        return [*checks, not_asked("tdx.advisories", observed)]
    return [
        *checks,
        check("tdx.advisories", passed=not denied, observed=observed,
              expected=f"none of {', '.join(policy.advisories_denied)}",
              reason=f"denied: {', '.join(denied)}"),
    ]  # fmt: skip


def _age_checks(policy: TdxPolicy, tdx: TdxFacts, now: datetime) -> list[Check]:
    # (3) Age of the TCB information and of the recovery that the platform satisfies.
    number, days, date = (
        policy.min_eval_data_number, policy.max_collateral_age_days, policy.min_tcb_date,
    )  # fmt: skip
    issued, recovered = parse_moment(tdx.collateral_issued), parse_moment(tdx.tcb_date)
    return [
        not_asked("tdx.eval_data_number", tdx.eval_data_number) if not number else
        check("tdx.eval_data_number", passed=tdx.eval_data_number >= number,
              observed=tdx.eval_data_number, expected=f"at least {number}",
              reason="the TCB information is of an old generation"),
        not_asked("tdx.collateral_age", tdx.collateral_issued or None) if not days else
        check("tdx.collateral_age",
              passed=issued is not None and now - issued <= timedelta(days=days),
              observed=tdx.collateral_issued or "absent", expected=f"at most {days} days old",
              reason="the TCB information was issued too long ago"),
        not_asked("tdx.tcb_date", tdx.tcb_date) if date is None else
        check("tdx.tcb_date", passed=recovered is not None and recovered >= date,
              observed=tdx.tcb_date, expected=f"not before {date:%Y-%m-%d}",
              reason="the platform satisfies an older TCB recovery only"),
    ]  # fmt: skip


def _platform_checks(policy: TdxPolicy, tdx: TdxFacts) -> list[Check]:
    # (4) TDX module build and machine, where the owner lists them.
    checks = [
        optional("tdx.mr_seam", tdx.body["mr_seam"], policy.mr_seam),
        optional("tdx.ppid", tdx.ppid, policy.ppid),
        optional("tdx.platform_instance_id", tdx.platform_instance_id, policy.platform_instance_id),
    ]
    observed = ", ".join(f"{name} {tdx.pck_flags.get(name, 'undefined')}"
                         for name in PLATFORM_FLAGS)  # fmt: skip
    if not policy.platform_flags_denied:
        return [*checks, not_asked("tdx.platform_flags", observed)]
    # A platform that does not say so is not known to be without it.
    wrong = [name for name in policy.platform_flags_denied if tdx.pck_flags.get(name) != "false"]
    return [
        *checks,
        check("tdx.platform_flags", passed=not wrong, observed=observed,
              expected=f"false: {', '.join(policy.platform_flags_denied)}",
              reason=f"denied: {', '.join(wrong)}"),
    ]  # fmt: skip


def _method_checks(policy: TdxPolicy, facts: Facts) -> list[Check]:
    # (5) How the facts were established.
    given = facts.runtime_events is not None
    both = set(BOTH_ENGINES) <= set(facts.tdx.engines)
    engines = ", ".join(facts.tdx.engines)
    return [
        check("tdx.event_log_given", passed=given, observed="given" if given else "absent",
              expected="given", reason="the policy demands an event log")
        if policy.require_event_log else not_asked("tdx.event_log_given"),
        check("tdx.engines", passed=both, observed=engines, expected=", ".join(BOTH_ENGINES),
              reason="the policy demands that both engines agree")
        if policy.require_agreement else not_asked("tdx.engines", engines),
    ]  # fmt: skip


def _launch_ready(facts: Facts, launch: tuple[str, ...] | None) -> Check:
    """RTMR3 by its events, whose log replayed to the register."""
    events = facts.runtime_events
    digest = None if events is None else launched(events)
    reason = "there is no event log"
    if events is not None:
        reason = "not exactly one launch event and then one ready event"
    if digest is not None:
        reason = "another launch configuration was measured"
    named = digest is not None and (launch is None or digest in launch)
    # What the guest says of itself must be what was measured.
    agrees = facts.launch_digest in ("", digest)
    return check(
        "tdx.rtmr3", passed=named and agrees,
        observed="absent" if events is None else f"{len(events)} events: {'; '.join(events)}"[:500],
        expected="cai launch <digest>; cai ready", reason=reason,
    )  # fmt: skip
