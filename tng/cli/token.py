"""``tng token``: API tokens for the guard of an egress."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai import terminal as terminals
from cai.terminal import JsonFlag

if TYPE_CHECKING:
    from rich.table import Table

    from tng.guard.tokens import TokenRow

app = typer.Typer(help="API tokens for the guard of an egress.", no_args_is_help=True)

TokenFileOption = Annotated[
    Path,
    typer.Option(
        "--file", "-f", envvar="TNG_TOKENS", help="The token file (guard.tokens).", metavar="FILE"
    ),
]

DAY_S = 86400


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Who gets it.", metavar="NAME")],
    file: TokenFileOption,
    days: Annotated[
        int, typer.Option(help="Days until it expires; 0 never.", min=0, max=36500)
    ] = 90,
    requests: Annotated[
        int, typer.Option(help="Requests per minute; 0 is no limit.", min=0, max=10**9)
    ] = 0,
    tokens: Annotated[
        int, typer.Option(help="Model tokens per minute; 0 is no limit.", min=0, max=10**9)
    ] = 0,
    concurrent: Annotated[
        int, typer.Option(help="Requests at once; 0 is no limit.", min=0, max=10**9)
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the token to this new file (0600) instead.", metavar="FILE"),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Make a token and show it this once; the file keeps its hash only.

    A running gateway takes it with the next request.
    """
    import time

    from cai.secret import write_secret_file
    from tng.guard.limits import Limits
    from tng.guard.tokens import create_token

    expires = int(time.time()) + days * DAY_S if days else 0
    row, token = create_token(
        file, name, expires=expires, limits=Limits(requests, tokens, concurrent)
    )
    shown = token.reveal().decode("ascii")
    value = _told(row)
    if out is not None:
        write_secret_file(out, token, what="token")
        terminals.current().result({**value, "file": str(out)}, f"{row.masked} is in {out}")
        return
    terminals.current().say("this token is not shown again:")
    terminals.current().result({**value, "token": shown}, shown)


@app.command("list")
def list_tokens(
    file: TokenFileOption,
    json_output: JsonFlag = False,
) -> None:
    """Show every token of a file, masked."""
    from tng.guard.tokens import read_tokens

    rows = read_tokens(file)
    terminals.current().result({"tokens": [_told(row) for row in rows]}, _table(rows))


@app.command()
def revoke(
    which: Annotated[
        str, typer.Argument(help="Id of a token, or the name of its holder.", metavar="ID|NAME")
    ],
    file: TokenFileOption,
    json_output: JsonFlag = False,
) -> None:
    """Revoke a token, or every token of a name; it counts from the next request."""
    from tng.guard.tokens import revoke_token

    rows = revoke_token(file, which)
    names = ", ".join(f"{row.masked} ({row.name})" for row in rows)
    terminals.current().result({"revoked": [_told(row) for row in rows]}, f"revoked {names}")


def _told(row: TokenRow) -> dict[str, object]:
    import time

    return {
        "id": row.id,
        "name": row.name,
        "masked": row.masked,
        "state": row.state(time.time()),
        "created": row.created,
        "expires": row.expires,
        "limits": row.limits.to_json(),
    }


def _table(rows: tuple[TokenRow, ...]) -> Table | str:
    import time

    from rich.table import Table
    from rich.text import Text

    if not rows:
        return "no tokens"
    table = Table(box=None, padding=(0, 1))
    for heading in ("token", "name", "state", "expires", "req/min", "tokens/min", "at once"):
        table.add_column(heading, overflow="fold")
    now = time.time()
    for row in rows:
        limits = (row.limits.requests, row.limits.tokens, row.limits.concurrent)
        day = f"{datetime.fromtimestamp(row.expires, UTC):%Y-%m-%d}" if row.expires else "never"
        state = row.state(now)
        table.add_row(
            row.masked, Text(row.name), Text(state, style="" if state == "valid" else "red"), day,
            *(str(limit or "-") for limit in limits),
        )  # fmt: skip
    return table
