"""``cai ls``: what a store holds, and whether a sealed model there is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cai.cli.store_options import (
    Config,
    Endpoint,
    EnvFile,
    Profile,
    Region,
    Uri,
    store_options,
)
from cai.errors import InputError, Tampered, UsageError
from cai.terminal import JsonFlag, current

if TYPE_CHECKING:
    from cai.store import Store
    from cai.store.base import Listed


def ls(
    uri: Uri,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="List everything below.")
    ] = False,
    endpoint: Endpoint = "",
    region: Region = "",
    profile: Profile = "",
    config: Config = None,
    env: EnvFile = None,
    json_output: JsonFlag = False,
) -> None:
    """List a store; of a sealed model also say which revision it is and what of it is missing."""
    from cai.store import open_store

    terminal = current()
    store = open_store(uri, store_options(endpoint, region, profile, config, env))
    try:
        model = _model(store)
        names = _names(store, model, recursive=recursive)
    finally:
        store.close()
    value: dict[str, Any] = {
        "uri": store.uri,
        "files": [{"path": name.path, "size": name.size} for name in names],
    }
    if model:
        value["model"] = model
    terminal.result(value, _table(names))
    if model and not terminal.json_output:
        terminal.say(
            f"sealed model {model['model_id'][:16]}…, revision {model['revision']}, "
            f"{model['listed']} listed files, {len(model['missing'])} missing"
        )


def _model(store: Store) -> dict[str, Any] | None:
    from cai.store.publication import read_publication

    try:
        published = read_publication(store)
    except (InputError, Tampered):
        return None  # whatever is wrong with it, the names can be listed
    missing = []
    for path, file in published.files.items():
        found = store.stat(path)
        if found is None or found.size != file.size:
            missing.append(path)
    return {
        "model_id": published.model_id, "revision": published.revision,
        "index_sha256": published.index_sha256, "listed": len(published.files),
        "missing": missing, "bytes": published.total,
    }


def _names(store: Store, model: dict[str, Any] | None, *, recursive: bool) -> list[Listed]:
    from cai.store.base import Listed
    from cai.store.publication import read_publication

    try:
        return list(store.names(recursive=recursive))
    except UsageError:
        if model is None:
            raise
    # A web server lists nothing, but the model itself says what it is made of.
    published = read_publication(store)
    documents = {"cai.json": len(published.header), "index.cai": len(published.index)}
    sizes = documents | {path: file.size for path, file in published.files.items()}
    return [Listed(path, sizes[path]) for path in sorted(sizes)]


def _table(names: list[Listed]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for name in names:
        # What a store calls a name may hold anything; a terminal gets it escaped.
        shown = name.path if name.path.isprintable() else ascii(name.path)
        table.add_row("" if name.size is None else str(name.size), Text(shown))
    return table
