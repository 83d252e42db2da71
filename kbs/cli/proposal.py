"""``kbs proposal``: changes that wait for further persons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai import terminal
from cai.errors import FormatError, Tampered
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

if TYPE_CHECKING:
    from kbs.admin.proposal_form import Proposal

app = typer.Typer(help="Changes that wait for further persons.", no_args_is_help=True)

Id = Annotated[str, typer.Argument(help="As `kbs proposal list` shows it.", metavar="ID")]
Contents = Annotated[
    Path | None,
    typer.Option(
        "--contents", help="Go on only if exactly this file is proposed.", metavar="FILE"
    ),
]


@app.command("list")
def proposal_list(
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """List what waits."""
    with open_client(admin_url, admin_key) as client:
        proposals = member(client.get("proposal"), "proposals", list)
    terminal.current().result({"proposals": proposals}, _table(proposals))


@app.command("show")
def proposal_show(
    identifier: Id,
    *,
    contents: Contents = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Show exactly what a signature would stand under; the contents where they are no secret."""
    with open_client(admin_url, admin_key) as client:
        shown = client.get(f"proposal/{_checked(identifier)}")
    proposal = _require_contents(shown, contents)
    terminal.current().result(shown, _text(shown, proposal))


@app.command("approve")
def proposal_approve(
    identifier: Id,
    *,
    contents: Contents = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Sign a proposal; the last signature makes the change."""
    with open_client(admin_url, admin_key) as client:
        shown = client.get(f"proposal/{_checked(identifier)}")
        proposal = _require_contents(shown, contents)
        speaker = terminal.current()
        speaker.say(_text(shown, proposal))
        answer = client.approve(shown)
    what = f"{proposal.action} of {proposal.object}"
    if answer.get("applied") is True:
        speaker.result(answer, f"{what} is done")
    else:
        speaker.result(answer, f"{what} waits for {answer.get('missing')} more")


@app.command("reject")
def proposal_reject(
    identifier: Id,
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Take a proposal away; one person is enough."""
    with open_client(admin_url, admin_key) as client:
        answer = client.post(f"proposal/{_checked(identifier)}/reject")
    terminal.current().result(answer, f"proposal {identifier} is gone")


def _checked(identifier: str) -> str:
    if not (identifier.isascii() and identifier.isalnum() and len(identifier) <= 64):
        raise FormatError(f"{identifier[:64]!r} is no id of a proposal", hint="kbs proposal list")
    return identifier


def _require_contents(shown: dict[str, Any], file: Path | None) -> Proposal:
    """What is signed; whatever is shown beside it must be what it names."""
    from cai.attest.jwk import b64u_decode
    from cai.settings import read_settings_file
    from kbs.admin.proposal_form import Proposal

    proposal = Proposal.from_json(shown.get("proposal"))
    text = shown.get("contents")
    if isinstance(text, str) and not proposal.is_about(b64u_decode(text, what="contents")):
        raise Tampered("the contents shown are not the ones that are proposed")
    if file is not None and not proposal.is_about(read_settings_file(file, what="contents")):
        raise FormatError(
            f"{file} is not what is proposed", hint="compare with the person who proposed it"
        )
    return proposal


def _text(shown: dict[str, Any], proposal: Proposal) -> Any:
    from datetime import UTC, datetime

    from rich.text import Text

    from cai.attest.jwk import b64u_decode

    ends = datetime.fromtimestamp(proposal.expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
    signers = ", ".join(map(str, member(shown, "signed_by", list))) or "nobody"
    lines = {
        "action": proposal.action,
        "object": proposal.object,
        "proposed by": proposal.proposer,
        "contents": f"{proposal.size} bytes, salted sha256 {proposal.digest}",
        "signed by": f"{signers}; {shown.get('needed')} needed",
        "until": ends,
        "broker": f"{proposal.kbs} ({proposal.realm})",
    }
    if shown.get("void"):
        lines["void"] = str(shown["void"])
    text = Text("\n".join(f"{name:12}{value}" for name, value in lines.items()))
    if isinstance(contents := shown.get("contents"), str):
        decoded = b64u_decode(contents, what="contents").decode("utf-8", "replace")
        visible = "".join(
            char if char.isprintable() or char in "\n\t" else "�" for char in decoded
        )
        text.append("\n\n" + visible.removesuffix("\n"))
    return text


def _table(proposals: list[Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    from kbs.admin.proposal_form import Proposal

    table = Table(box=None, padding=(0, 1))
    for heading in ("id", "action", "object", "by", "signed by", "missing", ""):
        table.add_column(heading, overflow="fold")
    for item in proposals:
        if not isinstance(item, dict):
            raise FormatError("admin answer: a proposal is not an object")
        proposal = Proposal.from_json(item.get("proposal"))
        table.add_row(
            proposal.id,
            Text(proposal.action),
            Text(proposal.object),
            Text(proposal.proposer),
            Text(", ".join(map(str, member(item, "signed_by", list)))),
            str(item.get("missing", "")),
            Text(str(item.get("void", "")), style="red"),
        )
    return table
