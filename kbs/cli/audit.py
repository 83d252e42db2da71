"""``kbs audit``: what was decided."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cai import terminal
from cai.errors import FormatError
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

app = typer.Typer(help="What was decided.", no_args_is_help=True)


@app.command("show")
def audit_show(
    *,
    start: Annotated[int, typer.Option("--from", help="First row.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="Most rows.", min=1, max=1000)] = 100,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Print the audit log: every decision with every check behind it."""
    with open_client(admin_url, admin_key) as client:
        answer = client.get(f"audit?from={start}&limit={limit}")
    rows = member(answer, "rows", list)
    speaker = terminal.current()
    speaker.result({"size": member(answer, "size", int), "rows": rows}, _audit_table(rows))


def _audit_table(rows: list[Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    for heading in ("seq", "time", "action", "decision", "subject", "reason"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        if not isinstance(row, dict):
            raise FormatError("audit answer: a row is not an object")
        texts = {name: str(row.get(name, "")) for name in row}
        decision = texts.get("decision", "")
        mark = " [SIMULATED]" if row.get("simulated") else ""
        subject = texts.get("subject", "") or str(row.get("change", {}).get("object", ""))
        table.add_row(
            texts.get("seq", ""),
            texts.get("time", ""),
            texts.get("action", "") + mark,
            Text(decision, style="green" if decision == "allow" else "red"),
            Text(subject),
            Text(texts.get("reason", "")),
        )
    return table
