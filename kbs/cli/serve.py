"""``kbs serve``: run the broker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai import terminal
from cai.terminal import JsonFlag

if TYPE_CHECKING:
    from kbs.server.service import Ready


def serve(
    *,
    data: Annotated[Path, typer.Option(help="Data directory, made on first start.")] = Path(
        "kbs-data"
    ),
    listen: Annotated[str, typer.Option(help="Main listener.", metavar="HOST:PORT")] = (
        "127.0.0.1:8080"
    ),
    admin_listen: Annotated[
        str, typer.Option(help="Admin listener, loopback only.", metavar="HOST:PORT")
    ] = "127.0.0.1:8081",
    kek: Annotated[
        Path | None,
        typer.Option(help="Key encryption key, outside DATA; default DATA-kek/kek."),
    ] = None,
    collateral: Annotated[
        Path | None, typer.Option(help="Bundle or directory of Intel's collateral.")
    ] = None,
    rims: Annotated[
        Path | None, typer.Option(help="Directory of NVIDIA's reference measurements.")
    ] = None,
    ocsp: Annotated[
        Path | None, typer.Option(help="Directory of NVIDIA's revocation answers.")
    ] = None,
    database: Annotated[
        str,
        typer.Option(
            help="PostgreSQL, without a password; default SQLite in DATA.",
            metavar="postgresql+psycopg://USER@HOST/NAME",
        ),
    ] = "",
    unsafe_simulated_root: Annotated[
        Path | None,
        typer.Option(help="UNSAFE: trust this simulator instead of Intel and NVIDIA."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the key broker until SIGTERM or SIGINT; port 0 takes a free port and tells it."""
    from kbs.database.settings import DatabaseSettings
    from kbs.server.service import ServeSettings
    from kbs.server.service import serve as run

    speaker = terminal.current()
    if unsafe_simulated_root is not None:
        speaker.warn(
            "unsafe_simulated_root: SIMULATED platforms are trusted; nothing released here was "
            "protected by hardware"
        )
    elif collateral is None:
        speaker.warn("no --collateral: every quote will be refused")

    def ready(where: Ready) -> None:
        realm = "simulated realm [SIMULATED]" if where.unsafe else "production realm"
        speaker.result(
            {
                "listening": where.listening,
                "admin": where.admin,
                "realm": where.realm,
                "unsafe": list(where.unsafe),
                "data": str(where.data),
            },
            f"kbs listens on {where.listening}, admin on {where.admin}, {realm}",
        )

    run(
        ServeSettings(
            data, listen, admin_listen, kek, collateral, unsafe_simulated_root, rims, ocsp,
            DatabaseSettings(database),
        ),
        ready,
    )
