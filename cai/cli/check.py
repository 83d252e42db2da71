"""``cai check``: is every byte of a sealed model the one that was sealed?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai.errors import UsageError
from cai.terminal import JsonFlag, Terminal, current

if TYPE_CHECKING:
    from cai.model import CheckReport
    from cai.model.opening import AnyModel
    from cai.secret import Secret

_HEX = re.compile(r"[0-9a-f]{64}")


def check(
    sealed: Annotated[Path, typer.Argument(help="Directory of the sealed model.")],
    key_file: Annotated[Path, typer.Option("--key-file", help="File with the model's key.")],
    expect_root: Annotated[
        str | None, typer.Option(metavar="HEX", help="Refuse any model root but this one.")
    ] = None,
    min_revision: Annotated[int, typer.Option(help="Refuse older revisions.")] = 0,
    expect_owner: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Refuse a manifest that this owner key did not sign."),
    ] = None,
    index_sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Refuse any index.cai but this one.")
    ] = None,
    openssf_signature: Annotated[
        Path | None,
        typer.Option(help="Refuse a model that this OpenSSF model-signing bundle does not sign."),
    ] = None,
    openssf_public_key: Annotated[
        Path | None, typer.Option(help="Key of that bundle's signer (PEM, EC).")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Authenticate every byte of a sealed model; name the file that is wrong."""
    from cai.model.opening import check_any, read_key

    terminal = current()
    if (openssf_signature is None) != (openssf_public_key is None):
        raise UsageError("--openssf-signature needs --openssf-public-key, and that one it")
    key, root = read_key(sealed, key_file), wanted_root(expect_root)
    report = check_any(
        sealed, key, expect_root=root, min_revision=min_revision,
        owner_key=wanted_key(expect_owner),
        index_sha256=_wanted(index_sha256, "--index-sha256"), progress=terminal.progress,
    )
    if openssf_signature and openssf_public_key:
        _check_bundle(sealed, key, report.root, openssf_signature, openssf_public_key)
    if not report.root:
        _tell_stock(terminal, sealed, report)
        return
    lines = [
        f"{sealed}: every byte is the one that was sealed",
        f"model root    {report.root}",
        f"content root  {report.content_root} (verified)",
        f"revision {report.revision}, {report.files} files, {report.plaintext_bytes} bytes",
    ]
    if report.signature != "none":
        lines.append(f"signature     {report.signature}")
    terminal.result(report.to_json(), "\n".join(lines))


def _tell_stock(terminal: Terminal, sealed: Path, report: CheckReport) -> None:
    from cai.model.gocryptfs.stock import UNPROTECTED

    terminal.warn(f"{sealed} is {UNPROTECTED}")
    lines = [
        f"{sealed}: every block that is there verifies",
        f"content root  {report.content_root} (of what is there now)",
        f"{report.files} files, {report.plaintext_bytes} bytes",
    ]
    terminal.result(report.to_json(), "\n".join(lines))


def warn_unprotected(terminal: Terminal, model: AnyModel, sealed: Path) -> None:
    """Say what a bare gocryptfs directory does not protect, and what in it was left out."""
    from cai.model.gocryptfs.stock import StockModel

    if isinstance(model, StockModel):
        terminal.warn(f"{sealed} is {model.unprotected}")
        for stored in model.foreign:
            terminal.warn(f"left out: {stored!r} is not a file of gocryptfs in this place")
        for path, fault in model.outside.items():
            terminal.warn(f"symbolic link {path!r}: {fault}")


def wanted_root(text: str | None) -> str | None:
    """The value of ``--expect-root``.

    Raises:
        UsageError: it is not 64 lower-case hex digits.
    """
    return _wanted(text, "--expect-root")


def wanted_key(text: str | None) -> str | None:
    """The value of ``--expect-owner``; errors as ``wanted_root``."""
    return _wanted(text, "--expect-owner")


def _wanted(text: str | None, option: str) -> str | None:
    if text is not None and not _HEX.fullmatch(text):
        raise UsageError(f"{option} must be 64 lower-case hex digits")
    return text


def _check_bundle(sealed: Path, key: Secret, root: str, bundle: Path, public_key: Path) -> None:
    from cai.model import open_model
    from cai.model.openssf import verify_bundle

    with open_model(sealed, key, expect_root=root) as model:
        verify_bundle(model.entries.values(), bundle, public_key)
