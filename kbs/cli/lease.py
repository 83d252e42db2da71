"""``kbs lease``: who holds what until when."""

from __future__ import annotations

from typing import Any

import typer

from cai import terminal
from cai.errors import FormatError
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

app = typer.Typer(help="Who holds what until when.", no_args_is_help=True)


@app.callback()
def lease() -> None:
    """Keep ``list`` a verb of its own."""


@app.command("list")
def lease_list(
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """List the leases, those that end last first; what has ended stays for an hour."""
    with open_client(admin_url, admin_key) as client:
        answer = client.get("lease")
    rows, now = member(answer, "leases", list), member(answer, "now", int)
    terminal.current().result({"now": now, "leases": rows}, _table(rows, now))


def _table(rows: list[Any], now: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    for heading in ("lease", "resource", "platform", "renewals", "state", "new until", "ends"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        if not isinstance(row, dict):
            raise FormatError("lease answer: a row is not an object")
        state = str(row.get("state", ""))
        by = ", ".join(str(item) for item in row.get("revoked_by", ()))
        table.add_row(
            str(row.get("id", ""))[:12],
            Text(f"{row.get('resource', '')} v{row.get('version', '')}"),
            str(row.get("platform", ""))[:12],
            str(row.get("renewals", "")),
            Text(f"{state} by {by}" if state == "revoked" else state,
                 style="green" if state == "living" else "red"),
            _distance(row.get("expires"), now),
            _distance(row.get("ends"), now),
        )  # fmt: skip
    return table


def _distance(moment: object, now: int) -> str:
    if not isinstance(moment, int):
        raise FormatError("lease answer: a moment is not a number")
    left = moment - now
    return f"in {left} s" if left > 0 else f"{-left} s ago"
