"""``kbs admin``: who may administer the broker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cai import terminal
from cai.errors import FormatError
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

app = typer.Typer(help="Who may administer the broker.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The person.", metavar="NAME")]
Roles = Annotated[
    list[str],
    typer.Option(
        "--role", help="admin, policy, reference, resource or auditor; may be repeated.",
        metavar="ROLE",
    ),
]  # fmt: skip

DAY_SECONDS = 86400


@app.command("keygen")
def admin_keygen(
    file: Annotated[Path, typer.Argument(help="Private key to write.", metavar="FILE")],
    *,
    json_output: JsonFlag = False,
) -> None:
    """Make a key pair: FILE stays with its person, FILE.pub goes to `kbs admin add`."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cai.secret import Secret, write_secret_file

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    beside = file.with_name(file.name + ".pub")
    write_secret_file(file, Secret(private), what="admin key")
    write_secret_file(beside, Secret(public), what="public key", mode=0o644)
    terminal.current().result(
        {"private": str(file), "public": str(beside)},
        f"{file} is your key: keep it; give {beside} to an administrator",
    )


@app.command("add")
def admin_add(
    name: Name,
    *,
    public_key: Annotated[
        Path, typer.Option(help="Ed25519 public key in PEM.", metavar="FILE.pub")
    ],
    role: Roles,
    tenant: Annotated[
        str, typer.Option(help="The one repository that they may change.", metavar="REPOSITORY")
    ] = "",
    days: Annotated[
        int, typer.Option(help="End of the key, days from now; 0 is never.", min=0, max=3650)
    ] = 0,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Add an administrator, or replace the key, roles and tenant of one."""
    from datetime import UTC, datetime

    from cai import jcs

    expires = int(datetime.now(UTC).timestamp()) + days * DAY_SECONDS if days else 0
    record = {
        "key": _public_key(public_key), "roles": role, "tenant": tenant, "expires": expires,
    }  # fmt: skip
    with open_client(admin_url, admin_key) as client:
        answer = client.post(f"admin/{_quoted(name)}", jcs.canonical(record))
    version = member(answer, "version", int)
    terminal.current().result(
        {"name": name, "version": version}, f"{name} may now act as {', '.join(role)}"
    )


@app.command("list")
def admin_list(
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """List every stored administrator."""
    with open_client(admin_url, admin_key) as client:
        admins = member(client.get("admin"), "admins", list)
    terminal.current().result({"admins": admins}, _table(admins))


@app.command("remove")
def admin_remove(
    name: Name,
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Remove an administrator; their tokens and open signatures are worth nothing at once."""
    with open_client(admin_url, admin_key) as client:
        client.delete(f"admin/{_quoted(name)}")
    terminal.current().result({"name": name, "removed": True}, f"{name} is no administrator now")


@app.command("whoami")
def admin_whoami(
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Say who the broker takes you for, and what you may do."""
    with open_client(admin_url, admin_key) as client:
        answer = client.get("whoami")
    roles = ", ".join(map(str, member(answer, "roles", list)))
    tenant = member(answer, "tenant", str)
    where = f" in {tenant}" if tenant else ""
    rule = "; changes need several persons" if answer.get("two_person") is True else ""
    terminal.current().result(answer, f"{member(answer, 'name', str)}: {roles}{where}{rule}")


@app.command("token")
def admin_token(
    *,
    role: Roles = ["admin"],  # noqa: B006 - typer reads the default and never changes it
    minutes: Annotated[
        int, typer.Option(help="How long it is valid; the broker has a limit.", min=1, max=1440)
    ] = 30,
    subject: Annotated[
        str, typer.Option(help="A label; the key says who it is.", metavar="TEXT")
    ] = "admin",
    out: Annotated[
        Path | None, typer.Option(help="Write it to a new file, 0600.", metavar="FILE")
    ] = None,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Make a token for a program that cannot hold a key, e.g. Trustee's kbs-client."""
    from datetime import UTC, datetime

    from cai.secret import Secret, write_secret_file
    from kbs.admin.settings import parse_roles
    from kbs.admin.tokens import make_admin_token
    from kbs.instance import read_admin_key

    token = make_admin_token(
        read_admin_key(admin_key),
        now=datetime.now(UTC),
        subject=subject,
        roles=parse_roles(role, where="--role"),
        lifetime=minutes * 60,
    )
    if out is None:
        terminal.current().result({"token": token}, token)
        return
    write_secret_file(out, Secret(token.encode("ascii") + b"\n"), what="admin token")
    terminal.current().result({"token_file": str(out)}, f"{out} is valid for {minutes} minutes")


def _public_key(path: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    from kbs.admin.identity import read_public_keys

    keys = read_public_keys(path)
    if len(keys) != 1 or not isinstance(keys[0], Ed25519PublicKey):
        raise FormatError(f"{path}: expected one Ed25519 public key", hint="kbs admin keygen")
    return keys[0].public_bytes_raw().hex()


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _table(admins: list[Any]) -> Any:
    from datetime import UTC, datetime

    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    for heading in ("name", "roles", "tenant", "ends", "key", "added by"):
        table.add_column(heading, overflow="fold")
    for item in admins:
        if not isinstance(item, dict) or not isinstance(item.get("roles"), list):
            raise FormatError("admin answer: an administrator is not an object")
        expires = item.get("expires")
        ends = ""
        if isinstance(expires, int) and expires:
            ends = datetime.fromtimestamp(expires, UTC).strftime("%Y-%m-%d %H:%M")
        table.add_row(
            Text(str(item.get("name", ""))),
            ", ".join(map(str, item["roles"])),
            Text(str(item.get("tenant", "")) or "all"),
            Text(ends or "never", style="" if item.get("living") is True else "red"),
            str(item.get("key_id", ""))[:16],
            Text(str(item.get("added_by", ""))),
        )
    return table
