"""``kbs key``: who wraps the keys, and the broker's own signing keys."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from cai import terminal
from cai.errors import UsageError
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

app = typer.Typer(help="Key providers and signing keys.", no_args_is_help=True)


@app.command("status")
def key_status(
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Show the key providers, whether each answers, and the signing keys."""
    from rich.table import Table

    with open_client(admin_url, admin_key) as client:
        status = client.get("key")
    table = Table("key", "id", "wraps", "state")
    for item in member(status, "providers", list):
        state = item["trouble"] or ("in force" if item["in_force"] else "answers")
        table.add_row(f"provider {item['name']}", item["id"], str(item["keys"]), state)
    for item in member(status, "unknown", list):
        table.add_row("provider", item["id"], str(item["keys"]), "NOT CONFIGURED")
    table.add_section()
    for item in member(status, "signing", list):
        retired = f", retired {_day(item['retired'])}" if item["retired"] else ""
        table.add_row(f"signs {item['name']}s", item["id"], "", _day(item["created"]) + retired)
    terminal.current().result(status, table)


@app.command("rotate")
def key_rotate(
    *,
    to: Annotated[
        str | None,
        typer.Option(help="Key provider to go to; by default the configured one.", metavar="NAME"),
    ] = None,
    signing: Annotated[
        str | None,
        typer.Option(
            help="Rotate this signing key instead: token, appraisal, ticket or checkpoint.",
            metavar="NAME",
        ),
    ] = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Wrap every stored key anew, so that the key before can go; guests notice nothing."""
    from cai import jcs

    if to is not None and signing is not None:
        raise UsageError("--to and --signing are two rotations", hint="call it twice")
    with open_client(admin_url, admin_key) as client:
        if signing is not None:
            answer = client.post(f"key/rotate-signing/{signing}", b"")
            text = f"{answer.get('name')} key is now version {answer.get('version')}"
        else:
            answer = client.post("key/rotate", b"" if to is None else jcs.canonical({"to": to}))
            text = (
                f"{answer.get('data_keys')} data keys and the row key are now wrapped by"
                f" {answer.get('to')}, no longer by {answer.get('from')}"
            )
    terminal.current().result(answer, text)


@app.command("make-file")
def key_make_file(
    file: Annotated[Path, typer.Argument(help="New key file, made 0400.", metavar="FILE")],
    *,
    json_output: JsonFlag = False,
) -> None:
    """Make a key encryption key for a provider of kind file."""
    from kbs.keys.file_provider import FileProvider
    from kbs.keys.sealing import create_kek

    provider = FileProvider(create_kek(file))
    terminal.current().result(
        {"file": str(file), "id": provider.id}, f"{file} is key provider {provider.id}"
    )


@app.command("make-pkcs11")
def key_make_pkcs11(
    *,
    module: Annotated[Path, typer.Option(help="PKCS #11 library.", metavar="FILE")],
    token: Annotated[str, typer.Option(help="Label of the token.", metavar="LABEL")],
    key: Annotated[str, typer.Option(help="Label of the new key.", metavar="LABEL")],
    pin_file: Annotated[Path, typer.Option(help="Holds the user PIN.", metavar="FILE")],
    json_output: JsonFlag = False,
) -> None:
    """Make a key encryption key on a hardware module; it never leaves it."""
    from kbs.keys.pkcs11_provider import TokenKey, make_token_key
    from kbs.keys.secret_input import SecretInput

    make_token_key(TokenKey(module, token, key, SecretInput("PIN", pin_file)))
    terminal.current().result(
        {"id": f"pkcs11:{token}/{key}"}, f"token {token} has the key {key} now"
    )


def _day(seconds: Any) -> str:
    if not isinstance(seconds, int):
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
