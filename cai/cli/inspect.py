"""``cai inspect``: what a sealed model says of itself, with its key or without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.text import Text

from cai.errors import UsageError
from cai.model.tree import Entry, EntryType
from cai.terminal import JsonFlag, Terminal, current

if TYPE_CHECKING:
    from cai.model import SealedModel
    from cai.model.header import Header


def inspect(
    sealed: Annotated[Path, typer.Argument(help="Directory of the sealed model.")],
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", help="File with the model's key; shows the tree as well."),
    ] = None,
    expect_owner: Annotated[
        str | None,
        typer.Option(metavar="HEX", help="Refuse a manifest that this owner key did not sign."),
    ] = None,
    licence: Annotated[
        bool, typer.Option("--licence", help="Print the whole text of the licence as well.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Show what a sealed model is; without a key only what everybody may see, unauthenticated."""
    from cai.cli.check import wanted_key
    from cai.model import open_model, read_header
    from cai.model.opening import Method, method_of, read_key

    terminal = current()
    owner = wanted_key(expect_owner)
    if method_of(sealed) is Method.STOCK:
        if owner or licence:
            raise UsageError("a gocryptfs directory without a manifest has no owner and no licence")
        _inspect_stock(terminal, sealed, key_file)
        return
    if key_file is None:
        if owner or licence:
            raise UsageError("--expect-owner and --licence need the key", hint="--key-file F")
        facts = _public(read_header(sealed)) | _signed(sealed) | {"authenticated": False}
        terminal.result(facts, _shown(_lines(facts, "not authenticated: give --key-file")))
        return
    with open_model(sealed, read_key(sealed, key_file), owner_key=owner) as model:
        facts = _public(model.header) | {"authenticated": True} | _private(model)
        facts |= _signed(sealed) | ({"signature": "verified"} if owner else {})
        lines = _lines(facts, "the stored objects are not read: 'cai check' does that")
        text = ["", *model.manifest.licence.text.splitlines()] if licence else []
        terminal.result(facts, _shown(lines + _tree(model) + text))


def _inspect_stock(terminal: Terminal, sealed: Path, key_file: Path | None) -> None:
    """What a bare gocryptfs directory says: its parameters, and with the password its tree."""
    from cai.cli.check import warn_unprotected
    from cai.model.gocryptfs.stock import open_stock, read_config
    from cai.model.opening import read_key

    config = read_config(sealed)
    facts: dict[str, Any] = {
        "method": "gocryptfs", "manifest": "none", "flags": list(config.flags),
        "scrypt_n": config.n, "authenticated": False,
    }
    if key_file is None:
        note = "not authenticated: give --key-file"
        terminal.result(facts, _shown(_lines(facts, note)))
        return
    with open_stock(sealed, read_key(sealed, key_file)) as model:
        warn_unprotected(terminal, model, sealed)
        facts["entries"] = _entries(model.entries)
        note = "the files are not read: 'cai check' does that"
        shown = [_line(entry, "") for entry in model.entries.values()]
        terminal.result(facts, _shown([*_lines(facts, note), "", *shown]))


def _signed(sealed: Path) -> dict[str, str]:
    """Who claims to have signed the manifest, if anybody does."""
    from cai.model.files import StoredFiles
    from cai.model.signature import read_signature

    files = StoredFiles(sealed)
    try:
        found = read_signature(files)
    finally:
        files.close()
    return {"signature": "not verified", "signed_by": found.owner_key} if found else {}


def _public(header: Header) -> dict[str, Any]:
    return {
        "method": header.method, "model_id": header.model_id, "revision": header.revision,
        "kek_commitment": header.dek.kek_commitment, "manifest_bytes": header.manifest.size,
        "index_sha256": header.index_sha256,
    }


def _private(model: SealedModel) -> dict[str, Any]:
    manifest = model.manifest
    return {
        "root": model.root, "content_root": model.content_root, "previous": manifest.previous,
        "name": manifest.name, "created": manifest.created, "allow": list(manifest.allow),
        "licence": manifest.licence.name, "licence_terms": manifest.licence.terms,
        "licence_text": manifest.licence.text, "provenance": dict(manifest.provenance),
        "entries": _entries(manifest.entries),
    }


def _entries(entries: Mapping[str, Entry]) -> list[dict[str, Any]]:
    from cai.model.gocryptfs.entries import text_member

    return [
        {
            **text_member("path", entry.path), "type": entry.type.value, "mode": entry.mode,
            "size": entry.size,
            **({"sha256": entry.sha256} if entry.sha256 else {}),
            **(text_member("target", entry.target) if entry.target else {}),
        }
        for entry in entries.values()
    ]


def _lines(facts: dict[str, Any], note: str) -> list[str]:
    shown = {
        name.replace("_", " "): _text(value)
        for name, value in facts.items()
        if name not in ("entries", "authenticated", "licence_text") and value not in ("", [], {})
    }
    if text := facts.get("licence_text"):
        shown["licence text"] = f"{len(text.encode())} bytes, shown by --licence"
    return [*(f"{name:<15} {value}" for name, value in shown.items()), f"({note})"]


def _tree(model: SealedModel) -> list[str]:
    from cai.model.gocryptfs.model import CipherModel

    lines = [""]
    for entry in model.entries.values():
        storage = model.manifest.stored.get(entry.path)
        where = f"  (object {storage.name})" if storage else ""
        if isinstance(model, CipherModel) and entry.type is not EntryType.DIRECTORY:
            where = f"  ({model.stored.path(entry.path)})"
        lines.append(_line(entry, where))
    return lines


def _line(entry: Entry, where: str) -> str:
    size = decimal(entry.size) if entry.type is EntryType.FILE else ""
    suffix = f" -> {entry.target}" if entry.target else ""
    slash = "/" if entry.type is EntryType.DIRECTORY else ""
    return f"{size:>10}  {entry.path}{slash}{suffix}{where}"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {item}" for name, item in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _shown(lines: list[str]) -> Text:
    """Names come from outside: none of them may move the cursor."""
    return Text("\n".join(_printable(line) for line in lines))


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
