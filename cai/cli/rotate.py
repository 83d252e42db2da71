"""``cai rotate``: a new key for a sealed model, without touching its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cai.cli.model_keys import ModelKeys
from cai.errors import UsageError
from cai.terminal import JsonFlag, current


def rotate(
    sealed: Annotated[Path, typer.Argument(help="Directory of the sealed model.")],
    key_file: Annotated[Path, typer.Option("--key-file", help="File with the key it has now.")],
    new_key_out: Annotated[
        Path | None, typer.Option(help="Write a new key to this file.")
    ] = None,
    new_key_file: Annotated[Path | None, typer.Option(help="Use the key in this file.")] = None,
    new_password_file: Annotated[
        Path | None,
        typer.Option(help="Use the password in this file's first line (gocryptfs only)."),
    ] = None,
    kbs: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Give the new key to the KBS with this admin address."),
    ] = None,
    key_id: Annotated[
        str | None, typer.Option(metavar="URI", help="Its name there: kbs:///REPO/TYPE/TAG.")
    ] = None,
    admin_key: Annotated[Path | None, typer.Option(help="The KBS's admin key (PEM).")] = None,
    owner_key: Annotated[
        Path | None, typer.Option(help="Key that signs the release record (PEM, Ed25519).")
    ] = None,
    record_out: Annotated[
        Path | None,
        typer.Option(help="Write the signed release record, which holds the key, to this file."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Put a sealed model under a new key or password; no weights are touched.

    Only cai.json is rewritten, and of a gocryptfs model also its gocryptfs.conf and the index. A
    killed run can be repeated. Whoever holds the old key and the old files keeps what they had.
    """
    from cai.model import read_header
    from cai.model import rotate as rotate_model
    from cai.model.gocryptfs.config import KEY_LOG2_N, PASSWORD_LOG2_N
    from cai.model.gocryptfs.rotating import rotate_password
    from cai.model.layout import GOCRYPTFS
    from cai.model.opening import read_key

    terminal = current()
    if not (new_key_out or new_key_file or new_password_file or kbs):
        raise UsageError(
            "no new key was chosen", hint="give --new-key-out, --new-key-file or --kbs"
        )
    gocryptfs = read_header(sealed).method == GOCRYPTFS
    old = read_key(sealed, key_file)
    keys = ModelKeys.chosen(
        sealed.absolute(), sealed, key_out=new_key_out, key_file=new_key_file, kbs=kbs,
        key_id=key_id, admin_key=admin_key, owner_key=owner_key, record_out=record_out,
        rotating=True, gocryptfs=gocryptfs, password_file=new_password_file,
    )
    with keys.undone_on_failure():
        keys.stage()
        if keys.password is not None:
            report = rotate_password(
                sealed, old, keys.password,
                before_commit=lambda rotated: keys.place(rotated, terminal),
                log2_n=PASSWORD_LOG2_N if new_password_file else KEY_LOG2_N,
            )
        else:
            report = rotate_model(
                sealed, old, keys.kek, before_commit=lambda rotated: keys.place(rotated, terminal)
            )
        keys.finish()
    facts: dict[str, Any] = report.to_json() | {"sealed": str(sealed)}
    what, where = ("password", "gocryptfs.conf") if gocryptfs else ("key", "cai.json")
    lines = [f"{sealed} is under the new {what}; model root {report.root} is as before"]
    keys.tell(facts, lines)
    lines.append(
        f"whoever holds the old {what} and an old {where} keeps what they had: after a leak, reseal"
    )
    terminal.result(facts, "\n".join(lines))
