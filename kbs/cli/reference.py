"""``kbs reference``: which measurements are good, and who may say so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cai import terminal
from cai.errors import FormatError
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

app = typer.Typer(help="Which measurements are good.", no_args_is_help=True)
keys_app = typer.Typer(help="Keys that may sign reference values.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

Tenant = Annotated[
    str, typer.Option(help="Repository that they are for; empty is everybody's.", metavar="REPO")
]

MAX_SIGNATURE_FILE = 4096
"""Longest file of a signature, bytes."""


@app.command("list")
def reference_list(
    *,
    tenant: Tenant = "",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """List reference values with their source and end."""
    with open_client(admin_url, admin_key) as client:
        answer = client.get(_route("references", tenant))
    headings = ("id", "tenant", "source", "expires", "expired", "value")
    terminal.current().result(answer, _table(member(answer, "values", list), headings))


@app.command("add")
def reference_add(
    file: Annotated[Path, typer.Argument(help="The bundle's exact bytes.", metavar="BUNDLE")],
    *,
    signature: Annotated[
        Path | None,
        typer.Option(help="Base64 signature over them; default BUNDLE.sig.", metavar="FILE"),
    ] = None,
    tenant: Tenant = "",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Store a bundle that a registered key signed; it replaces the one of the same name."""
    from kbs.policy.references import Bundle, SignedBundle, unb64

    data = _read(file, "reference bundle")
    bundle = Bundle.parse(data)
    text = _read(signature or file.with_name(f"{file.name}.sig"), "signature")
    if len(text) > MAX_SIGNATURE_FILE:
        raise FormatError("signature: expected short base64")
    signed = SignedBundle(data, unb64(text.decode("utf-8", "replace").strip(), "signature"))
    with open_client(admin_url, admin_key) as client:
        answer = client.post(_route(f"reference-bundle/{bundle.name}", tenant), signed.encode())
    terminal.current().result(
        {"bundle": bundle.name, **answer},
        f"bundle {bundle.name}: {len(bundle.values)} values until {answer.get('expires')}",
    )


@app.command("sign")
def reference_sign(
    file: Annotated[
        Path, typer.Argument(help="Values as JSON: an object of id to value.", metavar="VALUES")
    ],
    key: Annotated[Path, typer.Option(help="Ed25519 private key, PEM.", metavar="FILE")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle to write.")],
    *,
    name: Annotated[str, typer.Option(help="Its name.")],
    days: Annotated[int, typer.Option(help="Its life.", min=1, max=3650)] = 90,
    json_output: JsonFlag = False,
) -> None:
    """Make a bundle of values and sign it: writes OUTPUT and OUTPUT.sig."""
    import base64
    from datetime import UTC, datetime, timedelta

    from cai import jcs
    from cai.errors import from_os_error
    from kbs.instance import read_admin_key
    from kbs.policy.references import MAX_BUNDLE, Bundle, checked_values

    values = checked_values(
        jcs.parse(_read(file, "reference values"), what=file.name, limit=MAX_BUNDLE)
    )
    now = datetime.now(UTC).replace(microsecond=0)
    data = Bundle(name, now, now + timedelta(days=days), values).encode()
    Bundle.parse(data)
    signature = base64.b64encode(read_admin_key(key).sign(data))
    for path, body in ((output, data), (output.with_name(f"{output.name}.sig"), signature)):
        try:
            with path.open("xb") as stream:
                stream.write(body)
        except OSError as error:
            raise from_os_error(error, f"write {path}") from error
    terminal.current().result(
        {"bundle": str(output), "values": len(values)}, f"wrote {output} and {output}.sig"
    )


@app.command("import")
def reference_import(
    file: Annotated[
        Path,
        typer.Argument(help="Trustee's message, or values as JSON.", metavar="FILE"),
    ],
    *,
    expires: Annotated[
        str, typer.Option(help="Their end, as 2027-01-31T00:00:00Z.", metavar="TIME")
    ] = "",
    tenant: Tenant = "",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Set single values that nobody signed; this administrator answers for them."""
    from cai import jcs
    from kbs.policy.references import MAX_BUNDLE, checked_values, parse_message, parse_time

    data = _read(file, "reference values")
    value = jcs.parse(data, what=file.name, limit=2 * MAX_BUNDLE)
    message = isinstance(value, dict) and set(value) == {"version", "type", "payload"}
    values = parse_message(data) if message else checked_values(value)
    if expires:
        parse_time(expires)
    body = jcs.canonical({"values": values, "expires": expires or None})
    with open_client(admin_url, admin_key) as client:
        answer = client.post(_route("reference-values", tenant), body)
    terminal.current().result(
        answer, f"{len(values)} reference values until {answer.get('expires')}"
    )


@app.command("remove")
def reference_remove(
    name: Annotated[str, typer.Argument(help="A value's id, or a bundle's name.", metavar="NAME")],
    *,
    bundle: Annotated[bool, typer.Option("--bundle", help="NAME is a bundle.")] = False,
    tenant: Tenant = "",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Take a single value or a bundle away."""
    from urllib.parse import quote

    noun = "reference-bundle" if bundle else "reference-value"
    with open_client(admin_url, admin_key) as client:
        answer = client.delete(_route(f"{noun}/{quote(name, safe='/')}", tenant))
    terminal.current().result({"removed": name, **answer}, f"{name} is no longer in force")


@keys_app.command("list")
def keys_list(
    *,
    tenant: Tenant = "",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """List the keys that may sign."""
    with open_client(admin_url, admin_key) as client:
        keys = member(client.get(_route("references", tenant)), "keys", list)
    terminal.current().result({"keys": keys}, _table(keys, ("name", "tenant", "kind", "id")))


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Its name.", metavar="NAME")],
    file: Annotated[Path, typer.Argument(help="PEM public key.", metavar="FILE")],
    *,
    tenant: Tenant = "",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Register a key, Ed25519 or ECDSA P-256 (cosign.pub), or replace it."""
    from kbs.policy.references import ReferenceKey

    pem = _read(file, "public key")
    key = ReferenceKey.parse(pem)
    with open_client(admin_url, admin_key) as client:
        answer = client.post(_route(f"reference-key/{name}", tenant), pem)
    terminal.current().result({"name": name, **answer}, f"{name} ({key.kind} {key.id}) may sign")


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(help="Its name.", metavar="NAME")],
    *,
    tenant: Tenant = "",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Take a key away; what it signed is no longer in force."""
    with open_client(admin_url, admin_key) as client:
        answer = client.delete(_route(f"reference-key/{name}", tenant))
    terminal.current().result({"removed": name, **answer}, f"{name} may sign no longer")


def _route(path: str, tenant: str) -> str:
    from urllib.parse import quote

    return f"{path}?tenant={quote(tenant, safe='')}" if tenant else path


def _read(path: Path, what: str) -> bytes:
    from cai.errors import LimitExceeded, from_os_error
    from kbs.policy.references import MAX_BUNDLE

    limit = 2 * MAX_BUNDLE
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise from_os_error(error, f"read {what} {path}") from error
    if len(data) > limit:
        raise LimitExceeded(f"{what} {path}: longer than {limit} bytes")
    return data


def _table(rows: list[Any], headings: tuple[str, ...]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_text(row.get(heading, ""))) for heading in headings))
    return table


def _text(value: object) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)
