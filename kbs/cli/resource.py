"""``kbs resource``: what is released. Contents go in; none ever comes out here."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai import terminal
from cai.errors import UsageError
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

if TYPE_CHECKING:
    from kbs.admin.client import AdminClient
    from kbs.names import ResourceName

app = typer.Typer(help="What is released.", no_args_is_help=True)

Uri = Annotated[str, typer.Argument(help="kbs:///repository/type/tag", metavar="URI")]
LeaseRule = Annotated[
    str | None,
    typer.Option(help="required or optional; by default required for a release record."),
]


@app.command("set")
def resource_set(
    uri: Uri,
    file: Annotated[Path, typer.Argument(help="Its exact bytes.", metavar="FILE")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Store the next version of a resource."""
    from kbs.resources.settings import MOST_RESOURCE

    name = _name(uri)
    contents = _read(file, limit=MOST_RESOURCE)
    with open_client(admin_url, admin_key) as client:
        _stored(name, client.post(f"resource/{name.path}", contents))


@app.command("new")
def resource_new(
    uri: Uri,
    *,
    size: Annotated[int, typer.Option("--bytes", help="Length of the key.", min=16)] = 32,
    hexadecimal: Annotated[
        bool, typer.Option("--hex", help="Store it as hex digits, the shape of a KEY file.")
    ] = False,
    lease: LeaseRule = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make it the next version of one that exists.")
    ] = False,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Generate a key inside the broker; no person ever sees it."""
    name = _name(uri)
    order: dict[str, Any] = {"bytes": size, "form": "hex" if hexadecimal else "raw"}
    if lease is not None:
        order["lease"] = lease
    if replace:
        order["replace"] = True
    with open_client(admin_url, admin_key) as client:
        _stored(name, _ask(client, f"resource-new/{name.path}", order))


@app.command("lease")
def resource_lease(
    uri: Uri,
    rule: Annotated[str, typer.Argument(help="required or optional", metavar="RULE")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Say whether a resource is given away only by lease."""
    name = _name(uri)
    with open_client(admin_url, admin_key) as client:
        answer = client.post(f"resource-lease/{name.path}", rule.encode("utf-8", "replace"))
    _stored(name, answer)


@app.command("list")
def resource_list(
    prefix: Annotated[
        str, typer.Argument(help="Only below this: repository or repository/type.")
    ] = "",
    *,
    deleted: Annotated[bool, typer.Option("--deleted", help="Show deleted ones too.")] = False,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """List what is stored, without contents."""
    from rich.table import Column, Table

    prefix = prefix.removeprefix("kbs:///").strip("/")
    with open_client(admin_url, admin_key) as client:
        found = [item for item in _listed(client, prefix) if deleted or not item["deleted"]]
    # A name that is broken over lines cannot be copied.
    longest = max((len(_path(item)) + len("kbs:///") for item in found), default=8)
    name = Column("resource", min_width=longest, no_wrap=True)
    table = Table(name, "version", "bytes", "lease", "stored", "state")
    for item in found:
        table.add_row(
            f"kbs:///{_path(item)}", str(item["version"]), str(item["size"]), item["lease"],
            _day(item["created"]), _state(item),
        )  # fmt: skip
    terminal.current().result({"resources": found}, table)


@app.command("get-info")
def resource_info(
    uri: Uri,
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Show what is known of a resource, without its contents."""
    from rich.text import Text

    name = _name(uri)
    with open_client(admin_url, admin_key) as client:
        info = client.get(f"resource-info/{name.path}")
    lines = [name.uri]
    if info.get("external"):
        lines += [f"lives in {info['external']}", f"lease {info['lease'] or 'by contents'}"]
    for version in member(info, "versions", list)[:1]:
        lines += [
            f"version {version['version']}, {version['size']} bytes, stored"
            f" {_day(version['created'])} by {version['by'] or 'unknown'}",
            f"lease {version['lease']}",
            f"data key wrapped by {version['provider']}",
        ]
        lines += [f"{label} {version[label]}" for label in ("owner", "model") if version[label]]
    if info.get("deleted"):
        lines.append(f"deleted {info['deleted']}")
    if not info.get("intact", True):
        lines.append("TAMPERED: the stored row is not the one in the audit log")
    terminal.current().result(info, Text("\n".join(lines)))


@app.command("versions")
def resource_versions(
    uri: Uri,
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """List the stored versions of a resource, the newest first."""
    from rich.table import Table

    name = _name(uri)
    with open_client(admin_url, admin_key) as client:
        info = client.get(f"resource-info/{name.path}")
    table = Table("version", "bytes", "lease", "stored", "by", "state", title=name.uri)
    for item in member(info, "versions", list):
        state = "living" if item["version"] == info.get("living") else ""
        table.add_row(
            str(item["version"]), str(item["size"]), item["lease"], _day(item["created"]),
            item["by"], state if item["intact"] else "TAMPERED",
        )  # fmt: skip
    terminal.current().result(info, table)


@app.command("delete")
def resource_delete(
    uri: Uri,
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Stop releasing a resource; it can be restored until its retention is over."""
    name = _name(uri)
    with open_client(admin_url, admin_key) as client:
        answer = client.delete(f"resource/{name.path}")
    days = member(answer, "keep_days", int)
    terminal.current().result(
        {"resource": name.uri, **answer},
        f"{name.uri} is deleted; it can be restored for {days} days (kbs resource restore)",
    )


@app.command("restore")
def resource_restore(
    uri: Uri,
    *,
    version: Annotated[
        int | None, typer.Option(help="Bring back this version instead of the newest.", min=1)
    ] = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Bring a deleted resource back, or an older version, as the next version."""
    name = _name(uri)
    order = {} if version is None else {"version": version}
    with open_client(admin_url, admin_key) as client:
        _stored(name, _ask(client, f"resource-restore/{name.path}", order))


@app.command("purge")
def resource_purge(
    uri: Annotated[
        str | None, typer.Argument(help="kbs:///repository/type/tag", metavar="[URI]")
    ] = None,
    *,
    upto: Annotated[
        int | None, typer.Option(help="Only versions up to this one.", min=1)
    ] = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Destroy old versions for good, or all of a deleted resource; without URI what is overdue."""
    if uri is None:
        if upto is not None:
            raise UsageError("--upto needs a URI")
        with open_client(admin_url, admin_key) as client:
            answer = client.post("resource-purge", b"")
        count = member(answer, "purged", int)
        terminal.current().result(answer, f"overdue versions of {count} resources are destroyed")
        return
    name = _name(uri)
    order = {} if upto is None else {"upto": upto}
    with open_client(admin_url, admin_key) as client:
        answer = _ask(client, f"resource-purge/{name.path}", order)
    upto = member(answer, "upto", int)
    terminal.current().result(
        {"resource": name.uri, **answer}, f"{name.uri}: versions up to {upto} are destroyed"
    )


def _name(uri: str) -> ResourceName:
    from kbs.names import ResourceName

    return ResourceName.parse(uri)


def _read(file: Path, *, limit: int) -> bytes:
    from cai.errors import InputMissing, LimitExceeded, from_os_error

    try:
        with file.open("rb") as source:
            data = source.read(limit + 1)
    except FileNotFoundError as error:
        raise InputMissing(f"resource {file} does not exist", hint="check the path") from error
    except OSError as error:
        raise from_os_error(error, f"read resource {file}") from error
    if len(data) > limit:
        raise LimitExceeded(f"resource {file}: more than {limit} bytes")
    return data


def _ask(client: AdminClient, route: str, order: dict[str, Any]) -> dict[str, Any]:
    from cai import jcs

    return client.post(route, jcs.canonical(order) if order else b"")


def _stored(name: ResourceName, answer: dict[str, Any]) -> None:
    version = member(answer, "version", int)
    terminal.current().result(
        {"resource": name.uri, "version": version}, f"{name.uri} is now version {version}"
    )


def _listed(client: AdminClient, prefix: str) -> list[dict[str, Any]]:
    from urllib.parse import urlencode

    from kbs.resources.listing import MAX_LISTED

    found: list[dict[str, Any]] = []
    while True:
        after = _path(found[-1]) if found else ""
        query = urlencode({"prefix": prefix, "after": after})
        page = member(client.get(f"resource-info?{query}"), "resources", list)
        found += page
        if len(page) < MAX_LISTED:
            return found


def _path(item: dict[str, Any]) -> str:
    return f"{item['repository_name']}/{item['resource_type']}/{item['resource_tag']}"


def _state(item: dict[str, Any]) -> str:
    if not item["intact"]:
        return "TAMPERED"
    return f"deleted {item['deleted'][:10]}" if item["deleted"] else ""


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
