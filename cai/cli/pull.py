"""``cai pull``: a sealed model out of a store; needs no key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cai.cli.store_options import (
    Config,
    Endpoint,
    EnvFile,
    IndexDigest,
    Jobs,
    Limit,
    Profile,
    Region,
    Uri,
    store_options,
    wanted_digest,
)
from cai.errors import UsageError
from cai.terminal import JsonFlag, current


def pull(
    uri: Uri,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Where it appears (default: its name).")
    ] = None,
    endpoint: Endpoint = "",
    region: Region = "",
    profile: Profile = "",
    config: Config = None,
    env: EnvFile = None,
    index_sha256: IndexDigest = None,
    limit: Limit = "",
    jobs: Jobs = 6,
    json_output: JsonFlag = False,
) -> None:
    """Fetch a sealed model: only what is missing; a broken pull is continued."""
    from cai.store import open_store
    from cai.store import pull as pull_model
    from cai.store.throttle import parse_rate

    terminal = current()
    expected, rate = wanted_digest(index_sha256), parse_rate(limit) if limit else 0
    target = out or _name_of(uri)
    store = open_store(uri, store_options(endpoint, region, profile, config, env))
    try:
        report = pull_model(
            store, target, index_sha256=expected, workers=jobs, rate=rate,
            progress=terminal.progress,
        )
    finally:
        store.close()
    lines = [
        f"{target} holds revision {report.revision} of model {report.model_id[:16]}…",
        f"{report.files} files, {report.total_bytes} bytes; {report.fetched_bytes} fetched",
        f"index sha-256  {report.index_sha256}",
        "complete and authenticated: the index is the one you named" if report.authenticated else
        "complete, not authenticated: the store named its own index; 'cai check' with the key, or "
        "--index-sha256 from the release record, tells",
    ]
    terminal.result(report.to_json(), "\n".join(lines))


def _name_of(uri: str) -> Path:
    name = uri.rstrip("/").rpartition("/")[2]
    if not name or ":" in name or name in (".", ".."):
        raise UsageError(f"{uri!r} has no name to give to the copy", hint="name OUT")
    return Path(name)
