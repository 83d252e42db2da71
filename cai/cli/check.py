"""``cai check``: is every byte of a sealed model the one that was sealed?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from cai.errors import UsageError
from cai.terminal import JsonFlag, current

_ROOT = re.compile(r"[0-9a-f]{64}")


def check(
    sealed: Annotated[Path, typer.Argument(help="Directory of the sealed model.")],
    key_file: Annotated[Path, typer.Option("--key-file", help="File with the model's key.")],
    expect_root: Annotated[
        str | None, typer.Option(metavar="HEX", help="Refuse any model root but this one.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Authenticate every byte of a sealed model; name the file that is wrong."""
    from cai.model import check as check_model
    from cai.model import read_key_file

    terminal = current()
    report = check_model(
        sealed, read_key_file(key_file), expect_root=wanted_root(expect_root),
        progress=terminal.progress,
    )
    lines = [
        f"{sealed}: every byte is the one that was sealed",
        f"model root    {report.root}",
        f"content root  {report.content_root} (verified)",
        f"revision {report.revision}, {report.files} files, {report.plaintext_bytes} bytes",
    ]
    terminal.result(report.to_json(), "\n".join(lines))


def wanted_root(text: str | None) -> str | None:
    """The value of ``--expect-root``.

    Raises:
        UsageError: it is not 64 lower-case hex digits.
    """
    if text is not None and not _ROOT.fullmatch(text):
        raise UsageError("--expect-root must be 64 lower-case hex digits")
    return text
