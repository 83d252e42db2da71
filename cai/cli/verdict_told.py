"""How a verdict ends a command: the table, the last line, the exit status."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from cai.terminal import Terminal, verdict_table

if TYPE_CHECKING:
    from cai.attest.verdict import Verdict

FAIL = 10
"""Exit status when a check failed."""

UNDECIDED = 20
"""Exit status when something to verify with is absent, and nothing else is wrong."""


def tell(terminal: Terminal, verdict: Verdict, moment: datetime, digest: str) -> None:
    """Print a verdict and end with its exit status.

    Args:
        terminal: where to.
        verdict: every check.
        moment: of the verification.
        digest: of the policy, hex; empty when a service judged.
    """
    from cai.attest.evidence_file import undecided

    absent = undecided(verdict)
    decision = "pass" if verdict.passed else "undecided" if absent else "fail"
    if verdict.failures == () and not verdict.passed:
        decision = "undecided"
    body = verdict.to_json() | {
        "decision": decision, "at": moment.strftime("%Y-%m-%dT%H:%M:%SZ"), "policy": digest,
    }  # fmt: skip
    terminal.result(body, verdict_table(verdict))
    if not terminal.json_output:
        terminal.out.print(Text("\n".join(_lines(verdict, decision))))
    if decision != "pass":
        raise typer.Exit(UNDECIDED if decision == "undecided" else FAIL)


def _lines(verdict: Verdict, decision: str) -> list[str]:
    lines = ["", *(f"{name:<22} {value}" for name, value in verdict.hardware.items() if value)]
    lines += [f"loosened: {name}" for name in verdict.unsafe]
    lines += [f"residual risk: {risk}" for risk in verdict.residual_risks]
    reasons = "; ".join(f"{item.name}: {item.reason}" for item in verdict.failures)
    words = {"pass": "PASS", "fail": f"FAIL: {reasons}", "undecided": f"CANNOT DECIDE: {reasons}"}
    return [*lines, words[decision] + (" [SIMULATED]" if verdict.simulated else "")]
