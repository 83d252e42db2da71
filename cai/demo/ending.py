"""The ending: where each decision is written down, and the commands to do each step by hand."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from cai.demo.stage import Stage
from cai.demo.telling import SIMULATED, StoryBroken

MAX_REASON = 120
"""Longest reason in the table, characters."""

MIN_REFUSED = 5
"""Refusals that the log must hold at least: too early, measurement, debug, and both replays."""


def end(stage: Stage) -> dict[str, Any]:
    """Show the audit log and the commands.

    Returns:
        The document's members ``acts``, ``refusals``, ``audit`` and ``by_hand``.

    Raises:
        StoryBroken: a decision is not in the audit log.
    """
    sentence = "Every decision is on record, and every step is yours."
    with stage.tell.act(7, "Afterwards", sentence) as act:
        command = ["kbs", "audit", "show", *stage.admin]
        stage.tell.command(command)
        rows = stage.parties.require("audit", [*command, "--json"]).document()["rows"]
        _require_decisions(rows)
        stage.tell.table(_audit_table(rows))
        commands = by_hand(stage)
        stage.tell.note("the gateways keep a line for each request: logs/tng-*.err")
        stage.tell.note("each step by hand, in the directory of `cai demo --keep DIR`:")
        for line in commands:
            stage.tell.copyable(f"    {line}")
        act.simulated = True
        act.facts = {"audit_rows": len(rows)}
    stage.tell.table(_acts_table(stage))
    refused = next(act.facts["refusals"] for act in stage.tell.acts if act.number == 6)
    return {
        "acts": [act.to_json() for act in stage.tell.acts],
        "refusals": refused,
        "audit": rows,
        "by_hand": commands,
    }


def by_hand(stage: Stage) -> list[str]:
    """Each step's command once, as it was run; they work in the directory that ``--keep`` names."""
    return list(dict.fromkeys(stage.tell.commands))


def _require_decisions(rows: list[dict[str, Any]]) -> None:
    """The log must hold a release, and a refusal for each guest that was refused."""
    released = [row for row in rows if row["action"] == "release" and row["decision"] == "allow"]
    refused = [row for row in rows if row["decision"] == "deny"]
    if not released:
        raise StoryBroken("the audit log holds no release")
    if len(refused) < MIN_REFUSED:
        raise StoryBroken(f"the audit log holds {len(refused)} refusals, at least {MIN_REFUSED}")
    reasons = " ".join(
        f"{row['reason']} {' '.join(check['name'] for check in row['checks'])}" for row in refused
    )
    for word in ("tdx.debug", "mr_td"):
        if word not in reasons:
            raise StoryBroken(f"no refusal in the audit log speaks of {word}")


def _audit_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="audit log of the key broker", title_justify="left", box=None, expand=True)
    for heading, width in (("#", 3), ("decision", 8), ("action", 23)):
        table.add_column(heading, width=width, no_wrap=True)
    table.add_column("why", ratio=1, no_wrap=True, overflow="ellipsis")
    for row in rows:
        allowed = row["decision"] == "allow"
        why = Text(f"{SIMULATED} " if row["simulated"] else "", style="bold yellow")
        why.append(str(row["reason"] or row["subject"])[:MAX_REASON], style="default")
        table.add_row(
            str(row["seq"]),
            Text(str(row["decision"]), style="green" if allowed else "magenta"),
            str(row["action"]),
            why,
        )
    return table


def _acts_table(stage: Stage) -> Table:
    table = Table(title="the whole way", title_justify="left")
    for heading in ("act", "what", "seconds", "rests on"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for act in stage.tell.acts:
        table.add_row(
            Text(f"{'✓' if act.ok else '✗'} {act.number}", style="green" if act.ok else "red"),
            act.title,
            f"{act.seconds:.1f}",
            Text(SIMULATED if act.simulated else "real", style="yellow" if act.simulated else ""),
        )
    return table
