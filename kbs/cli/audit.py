"""``kbs audit``: what was decided, and proofs of it that need no broker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai import terminal
from cai.errors import FormatError, Tampered, UsageError
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

if TYPE_CHECKING:
    from rich.table import Table

    from cai.attest.verdict import Verdict

app = typer.Typer(help="What was decided, and proofs of it.", no_args_is_help=True)

Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key", help="Public key of the log: 64 hex digits, name+id+base64, or a file of them.",
        metavar="KEY|FILE",
    ),
]  # fmt: skip
Held = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="A checkpoint kept from before; the log must extend it.",
        metavar="FILE",
    ),
]  # fmt: skip
Out = Annotated[Path, typer.Option("--out", "-o", help="New file.", metavar="FILE")]


@app.command("show")
def audit_show(
    *,
    start: Annotated[int, typer.Option("--from", help="First row.", min=0)] = 0,
    limit: Annotated[int, typer.Option(help="Most rows.", min=1, max=1000)] = 100,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Print the audit log: every decision with every check behind it."""
    with open_client(admin_url, admin_key) as client:
        answer = client.get(f"audit?from={start}&limit={limit}")
    rows = member(answer, "rows", list)
    speaker = terminal.current()
    speaker.result({"size": member(answer, "size", int), "rows": rows}, _audit_table(rows))


@app.command("key")
def audit_key(
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write them to a new file.", metavar="FILE")
    ] = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Print the public keys under which checkpoints are signed, the current one first.

    Hand them to auditors and hosts on a way that the broker's machine does not control.
    """
    from kbs.audit.files import write_new
    from kbs.cli.audit_call import log_of, verifier_keys

    with open_client(admin_url, admin_key) as client:
        keys = verifier_keys(log_of(client))
    if out is not None:
        write_new(out, [key.encode() for key in keys])
    terminal.current().result({"keys": keys}, "\n".join(keys))


@app.command("checkpoint")
def audit_checkpoint(
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE",
            help="Keep it here; it replaces an older one only if the log extends that one.",
        ),
    ] = None,
    key: Keys = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Print the newest checkpoint, a signed note over the whole log; or keep it in a file."""
    from cai.attest.checkpoint import read_checkpoint
    from kbs.audit.files import keep_note, read_keys, read_note
    from kbs.audit.proof import verify_file
    from kbs.audit.report import require_sound
    from kbs.cli.audit_call import consistency_lines, log_of

    keys = read_keys(key or ())
    with open_client(admin_url, admin_key) as client:
        log = log_of(client)
        old = read_note(out) if out is not None and out.exists() else log.note
        if old != log.note and not keys:
            raise UsageError(
                f"{out} exists; only --key can show that the log extends it",
                hint="give the key that `kbs audit key` wrote when the log was known to be sound",
            )
        if keys:
            require_sound(verify_file(consistency_lines(client, old, log.note), keys))
    if out is not None:
        keep_note(out, log.note)
    checkpoint = read_checkpoint(log.note)
    value = {
        "checkpoint": log.note.decode(), "origin": checkpoint.origin, "size": checkpoint.size,
        "root": checkpoint.root.hex(),
    }  # fmt: skip
    terminal.current().result(value, log.note.decode().removesuffix("\n"))


@app.command("prove")
def audit_prove(
    seq: Annotated[
        int | None, typer.Argument(help="Prove that this leaf is in the log.", min=0)
    ] = None,
    *,
    out: Out,
    since: Annotated[
        Path | None,
        typer.Option(
            "--since", metavar="FILE",
            help="Prove instead that the log extends this kept checkpoint.",
        ),
    ] = None,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Write a proof to a file that `kbs audit verify --bundle` checks without the broker."""
    from kbs.audit.files import read_note, write_new
    from kbs.cli.audit_call import consistency_lines, inclusion_lines, log_of

    if (seq is None) == (since is None):
        raise UsageError("prove either a leaf or, with --since, an extension")
    with open_client(admin_url, admin_key) as client:
        if since is not None:
            lines = consistency_lines(client, read_note(since), log_of(client).note)
            kind = "consistency"
        else:
            lines, kind = inclusion_lines(client, seq or 0), "inclusion"
    write_new(out, lines)
    terminal.current().result({"file": str(out), "kind": kind}, f"{out}: proof of {kind}")


@app.command("export")
def audit_export(
    *,
    out: Out,
    start: Annotated[
        int, typer.Option("--from", help="First leaf; those before are in earlier exports.", min=0)
    ] = 0,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Write leaves and checkpoints to a file that `kbs audit verify --bundle` checks."""
    from kbs.audit.files import write_new
    from kbs.cli.audit_call import export_lines, log_of

    with open_client(admin_url, admin_key) as client:
        size, lines = export_lines(client, log_of(client), start)
        write_new(out, lines)
    value = {"file": str(out), "from": start, "size": size}
    terminal.current().result(value, f"{out}: leaves {start} to {size - 1}")


@app.command("verify")
def audit_verify(
    *,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Verify this export or proof; no broker is asked.", metavar="FILE"),
    ] = None,
    key: Keys = None,
    checkpoint: Held = None,
    open_rows: Annotated[
        bool,
        typer.Option(help="Open every stored row too; asks the key provider for each resource."),
    ] = True,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Verify the log: with --bundle a file, else the broker's, with every row that it names.

    Exit status 0 when everything holds, 6 when something does not; each failure is named.
    """
    from kbs.audit.files import read_keys, read_lines, read_note
    from kbs.audit.proof import verify_file
    from kbs.cli.audit_call import verify_broker

    keys = read_keys(key or ())
    held = None if checkpoint is None else read_note(checkpoint)
    if bundle is not None:
        if not keys:
            raise UsageError("--bundle needs --key", hint="kbs audit key, at the log's owner")
        _tell(verify_file(read_lines(bundle), keys, held=held))
        return
    if held is not None and not keys:
        raise UsageError("--checkpoint needs --key", hint="kbs audit key, at the log's owner")
    with open_client(admin_url, admin_key) as client:
        verdict = verify_broker(client, keys, held, opening=open_rows)
    if not keys:
        terminal.current().warn("without --key this is the broker's own word about its log")
    _tell(verdict)


def _tell(verdict: Verdict) -> None:
    speaker = terminal.current()
    speaker.result(verdict.to_json(), terminal.verdict_table(verdict))
    if not verdict.passed:
        raise typer.Exit(Tampered.exit_status)


def _audit_table(rows: list[Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1))
    for heading in ("seq", "time", "action", "decision", "subject", "reason"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        if not isinstance(row, dict):
            raise FormatError("audit answer: a row is not an object")
        texts = {name: str(row.get(name, "")) for name in row}
        decision = texts.get("decision", "")
        mark = " SIMULATED" if row.get("simulated") else ""
        subject = texts.get("subject", "") or str(row.get("change", {}).get("object", ""))
        table.add_row(
            texts.get("seq", ""),
            texts.get("time", ""),
            Text(texts.get("action", "") + mark),
            Text(decision, style="green" if decision == "allow" else "red"),
            Text(subject),
            Text(texts.get("reason", "")),
        )
    return table
