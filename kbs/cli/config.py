"""``kbs config``: look at a configuration before a broker runs on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cai import terminal
from cai.terminal import JsonFlag

app = typer.Typer(help="The configuration file of `kbs serve`.", no_args_is_help=True)


@app.command("check")
def config_check(
    file: Annotated[Path, typer.Argument(help="TOML or YAML.", metavar="FILE")],
    *,
    json_output: JsonFlag = False,
) -> None:
    """Refuse what `kbs serve --config FILE` would refuse, without starting anything.

    Files that the configuration names are read: certificates, collateral, pinned keys. No database,
    key provider or port is touched.
    """
    from kbs.admin.identity import read_public_keys
    from kbs.server.config import read_config
    from kbs.server.listeners import Address
    from kbs.server.service import load_endorsements, open_certificates

    settings = read_config(file)
    Address.parse(settings.listen, "listen")
    open_certificates(settings, Address.parse(settings.admin_address, "admin.listen"))
    load_endorsements(settings)
    pinned = [provider.key for provider in settings.admin.identity_providers]
    for path in (*pinned, *(legacy.key for legacy in settings.admin.legacy_keys)):
        read_public_keys(path)
    shown = _plain(settings)
    text = "\n".join([f"{file}: sound", *_lines(shown)])
    terminal.current().result(shown, text)


def _plain(value: Any) -> Any:
    """Settings as JSON, defaults included; there is no secret among them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: _plain(getattr(value, item.name))
            for item in dataclasses.fields(value)
            if item.init
        }
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, frozenset):
        return sorted(str(item) for item in value)
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)


def _lines(shown: Mapping[str, Any], where: str = "") -> list[str]:
    lines = []
    for name, value in shown.items():
        if isinstance(value, dict) and value:
            lines += _lines(value, f"{where}{name}.")
        elif value not in (None, "", [], {}):
            lines.append(f"  {where}{name} = {value}")
    return lines
