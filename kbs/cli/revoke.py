"""``kbs revoke`` and ``kbs unrevoke``: what is released to nobody any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai import terminal
from cai.errors import UsageError
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

if TYPE_CHECKING:
    from kbs.release.revocation import Target

Model = Annotated[
    str | None, typer.Option("--model", help="Model id (64 hex digits) or resource.")
]
Version = Annotated[
    str | None,
    typer.Option("--version", help="Model root (64 hex digits) or RESOURCE@VERSION."),
]
Platform = Annotated[
    str | None, typer.Option("--platform", help="Platform id, PPID or a GPU's UEID.")
]
Launch = Annotated[str | None, typer.Option("--launch", help="Launch digest (96 hex digits).")]
Owner = Annotated[str | None, typer.Option("--owner", help="Owner's key (64 hex digits).")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it is logged and told to guests.")]


def revoke(
    *,
    model: Model = None,
    version: Version = None,
    platform: Platform = None,
    launch: Launch = None,
    owner: Owner = None,
    reason: Reason = "revoked by the administrator",
    list_blocks: Annotated[
        bool, typer.Option("--list", help="List what is revoked, and change nothing.")
    ] = False,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Release nothing any more for one model, version, platform, launch or owner.

    Renewals are refused from now on, so running servers end with their leases.
    """
    named = _named(model, version, platform, launch, owner)
    if list_blocks:
        if named:
            raise UsageError("--list takes no name")
        _list(admin_url, admin_key)
        return
    target = _one(named)
    with open_client(admin_url, admin_key) as client:
        answer = client.post(f"block/{target}", _body(reason))
    leases, ends = member(answer, "leases", int), member(answer, "last_ends", int)
    until = f"; {leases} living leases end by {_moment(ends)}" if leases else ""
    terminal.current().result(answer, f"{target} is revoked{until}")


def unrevoke(
    *,
    model: Model = None,
    version: Version = None,
    platform: Platform = None,
    launch: Launch = None,
    owner: Owner = None,
    reason: Reason = "lifted by the administrator",
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Lift what ``kbs revoke`` did; the two-person rule applies where it is on."""
    target = _one(_named(model, version, platform, launch, owner))
    with open_client(admin_url, admin_key) as client:
        answer = client.call("DELETE", f"block/{target}", _body(reason))
    terminal.current().result(answer, f"{target} is not revoked any more")


def _named(
    model: str | None, version: str | None, platform: str | None, launch: str | None,
    owner: str | None,
) -> dict[str, str]:  # fmt: skip
    given = {
        "model": model, "version": version, "platform": platform, "launch": launch, "owner": owner
    }  # fmt: skip
    return {kind: value for kind, value in given.items() if value is not None}


def _one(named: dict[str, str]) -> Target:
    from kbs.release.revocation import Target

    if len(named) != 1:
        raise UsageError("name exactly one thing", hint="--model, --version, --platform, …")
    ((kind, value),) = named.items()
    return Target.parse(kind, value)


def _body(reason: str) -> bytes:
    from cai import jcs

    return jcs.canonical({"reason": reason})


def _list(admin_url: str, admin_key: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    with open_client(admin_url, admin_key) as client:
        blocks = member(client.get("block"), "blocks", list)
    table = Table(box=None, padding=(0, 1))
    for heading in ("what", "value", "since", "reason"):
        table.add_column(heading, overflow="fold")
    for block in blocks:
        table.add_row(
            member(block, "kind", str), member(block, "value", str),
            _moment(member(block, "created", int)), Text(member(block, "reason", str)),
        )  # fmt: skip
    terminal.current().result({"blocks": blocks}, table)


def _moment(seconds: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
