"""``kbs serve``: run the broker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai import terminal
from cai.terminal import JsonFlag

if TYPE_CHECKING:
    from kbs.server.config import ServeSettings
    from kbs.server.service import Ready


def serve(
    *,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration, TOML or YAML; options win over it.", metavar="FILE"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Data directory, made on first start; default kbs-data.")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="Main listener; default 127.0.0.1:8080.", metavar="HOST:PORT"),
    ] = None,
    admin_listen: Annotated[
        str | None,
        typer.Option(
            help="Admin listener, loopback without TLS; default 127.0.0.1:8081.",
            metavar="HOST:PORT|unix:PATH",
        ),
    ] = None,
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
        str | None,
        typer.Option(
            help="PostgreSQL, without a password; default SQLite in DATA.",
            metavar="postgresql+psycopg://USER@HOST/NAME",
        ),
    ] = None,
    unsafe_simulated_root: Annotated[
        Path | None,
        typer.Option(help="UNSAFE: trust this simulator instead of Intel and NVIDIA."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Run the key broker until SIGTERM or SIGINT; port 0 takes a free port and tells it.

    SIGHUP reads certificates, collateral and revocation answers again at once; they are also
    looked at every few seconds.
    """
    from kbs.server.config import ServeSettings, read_config
    from kbs.server.service import serve as run

    settings = ServeSettings() if config is None else read_config(config)
    given: dict[str, Any] = {
        "data": data,
        "listen": listen,
        "admin_listen": admin_listen,
        "kek": kek,
        "collateral": collateral,
        "rims": rims,
        "ocsp": ocsp,
        "unsafe_simulated_root": unsafe_simulated_root,
    }
    if database is not None:
        given["database"] = replace(settings.database, url=database)
    settings = replace(settings, **{name: item for name, item in given.items() if item is not None})
    _warn(settings)
    run(settings, _tell)


def _warn(settings: ServeSettings) -> None:
    speaker = terminal.current()
    if settings.unsafe_simulated_root is not None:
        speaker.warn(
            "unsafe_simulated_root: SIMULATED platforms are trusted; nothing released here was "
            "protected by hardware"
        )
    elif settings.collateral is None:
        speaker.warn("no --collateral: every quote will be refused")


def _tell(where: Ready) -> None:
    simulated = where.realm == "simulated"
    realm = "simulated realm [SIMULATED]" if simulated else "production realm"
    terminal.current().result(
        {
            "listening": where.listening,
            "admin": where.admin,
            "realm": where.realm,
            "unsafe": list(where.unsafe),
            "data": str(where.data),
        },
        f"kbs listens on {where.listening}, admin on {where.admin}, {realm}",
    )
