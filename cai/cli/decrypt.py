"""``cai decrypt``: the plain model back from a sealed one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cai.terminal import JsonFlag, current


def decrypt(
    sealed: Annotated[Path, typer.Argument(help="Directory of the sealed model.")],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where the plain model shall appear.")
    ],
    key_file: Annotated[Path, typer.Option("--key-file", help="File with the model's key.")],
    expect_root: Annotated[
        str | None, typer.Option(metavar="HEX", help="Refuse any model root but this one.")
    ] = None,
    min_revision: Annotated[int, typer.Option(help="Refuse older revisions.")] = 0,
    expect_owner: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Refuse a manifest that this owner key did not sign."),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Write the plain model to DIR, readable by you only; all of it is verified first."""
    from cai.cli.check import wanted_key, wanted_root, warn_unprotected
    from cai.model.opening import open_any, read_key, unseal_any

    terminal = current()
    key = read_key(sealed, key_file)
    with open_any(
        sealed, key, expect_root=wanted_root(expect_root), min_revision=min_revision,
        owner_key=wanted_key(expect_owner),
    ) as model:
        warn_unprotected(terminal, model, sealed)
        written = unseal_any(model, directory, progress=terminal.progress)
        terminal.result(
            {
                "out": str(directory), "root": model.root, "content_root": model.content_root,
                "plaintext_bytes": written,
            },
            f"wrote the plain model to {directory} ({written} bytes); it is no longer encrypted",
        )
