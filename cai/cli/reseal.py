"""``cai reseal``: a sealed model anew, under a new data key and new object keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cai.cli.model_keys import ModelKeys
from cai.errors import UsageError
from cai.terminal import JsonFlag, current


def reseal(
    sealed: Annotated[Path, typer.Argument(help="Directory of the sealed model.")],
    key_file: Annotated[Path, typer.Option("--key-file", help="File with its key.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Where the new sealed model appears.")
    ],
    new_key_out: Annotated[
        Path | None, typer.Option(help="Write a new key to this file (default: the key stays).")
    ] = None,
    new_key_file: Annotated[Path | None, typer.Option(help="Use the key in this file.")] = None,
    new_password_file: Annotated[
        Path | None,
        typer.Option(help="Use the password in this file's first line (gocryptfs only)."),
    ] = None,
    kbs: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Give a new key to the KBS with this admin address."),
    ] = None,
    key_id: Annotated[
        str | None, typer.Option(metavar="URI", help="Its name there: kbs:///REPO/TYPE/TAG.")
    ] = None,
    admin_key: Annotated[Path | None, typer.Option(help="The KBS's admin key (PEM).")] = None,
    owner_key: Annotated[
        Path | None,
        typer.Option(help="Key that signs manifest and release record (PEM, Ed25519)."),
    ] = None,
    record_out: Annotated[
        Path | None,
        typer.Option(help="Write the signed release record, which holds the key, to this file."),
    ] = None,
    pad: Annotated[
        bool, typer.Option("--pad", help="Round stored sizes up; stays on where it was.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Seal a sealed model anew as its next revision: every key in it is another, every byte too.

    Plaintext goes through memory only. The old model stays where it is; publish the new one, then
    withdraw the old. A run that was killed is gone on with by the same command (of a gocryptfs
    model, begun anew).
    """
    from cai.model import SealOptions, open_model, read_header
    from cai.model import reseal as reseal_model
    from cai.model.gocryptfs.config import KEY_LOG2_N, PASSWORD_LOG2_N
    from cai.model.gocryptfs.model import CipherModel
    from cai.model.gocryptfs.sealing import reseal_gocryptfs
    from cai.model.layout import GOCRYPTFS
    from cai.model.opening import read_key

    terminal = current()
    old = read_key(sealed, key_file)
    gocryptfs = read_header(sealed).method == GOCRYPTFS
    if gocryptfs and pad:
        raise UsageError("--pad is for --method cai")
    if not (new_key_out or new_key_file or new_password_file or kbs):
        if gocryptfs:
            new_password_file = key_file
        else:
            new_key_file = key_file
    if sealed.resolve() in (out.parent.resolve() / out.name, *(out.parent.resolve()).parents):
        raise UsageError(f"the output {out} is inside the sealed model {sealed}")
    with open_model(sealed, old) as model:
        keys = ModelKeys.chosen(
            sealed.absolute(), out, key_out=new_key_out, key_file=new_key_file, kbs=kbs,
            key_id=key_id, admin_key=admin_key, owner_key=owner_key, record_out=record_out,
            gocryptfs=gocryptfs, password_file=new_password_file,
        )
        with keys.undone_on_failure():
            keys.stage()
            if isinstance(model, CipherModel) and keys.password is not None:
                report = reseal_gocryptfs(
                    model, out, keys.password, progress=terminal.progress,
                    before_commit=lambda made: keys.place(made, terminal), sign=keys.sign(),
                    log2_n=PASSWORD_LOG2_N if new_password_file else KEY_LOG2_N,
                )
            else:
                report = reseal_model(
                    model, out, keys.kek, options=SealOptions(pad=pad), progress=terminal.progress,
                    before_commit=lambda made: keys.place(made, terminal), journal=keys.journal,
                    sign=keys.sign(),
                )
            keys.finish()
        signed = "manifest.sig" in model.files.listing()
    facts: dict[str, Any] = report.to_json() | {"out": str(out)}
    lines = [
        f"resealed {report.files} files into {out}, revision {report.revision}",
        f"model root    {report.root}",
        f"content root  {report.content_root} (as before)",
    ]
    keys.tell(facts, lines)
    if signed and not owner_key:
        terminal.warn("the old manifest was signed and the new one is not: give --owner-key")
    terminal.result(facts, "\n".join(lines))
