"""``cai push``: a sealed model into a store; needs no key."""

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
from cai.terminal import JsonFlag, current


def push(
    sealed: Annotated[Path, typer.Argument(metavar="SEALED", help="The sealed model.")],
    uri: Uri,
    endpoint: Endpoint = "",
    region: Region = "",
    profile: Profile = "",
    config: Config = None,
    env: EnvFile = None,
    index_sha256: IndexDigest = None,
    limit: Limit = "",
    jobs: Jobs = 6,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything back and compare it.")
    ] = False,
    prune: Annotated[
        bool,
        typer.Option("--prune", help="Then remove every file there that is not of this revision."),
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Put a sealed model into a store: only what is missing; a broken push is continued."""
    from cai.store import open_store
    from cai.store import push as push_model
    from cai.store.throttle import parse_rate

    terminal = current()
    expected, rate = wanted_digest(index_sha256), parse_rate(limit) if limit else 0
    store = open_store(uri, store_options(endpoint, region, profile, config, env))
    try:
        report = push_model(
            sealed, store, index_sha256=expected, workers=jobs, rate=rate, verify=verify,
            prune=prune, progress=terminal.progress,
        )
    finally:
        store.close()
    there = report.resumed_bytes + report.present_bytes
    lines = [
        f"{report.uri} holds revision {report.revision} of model {report.model_id[:16]}…",
        f"{report.files} files, {report.total_bytes} bytes; {report.sent_bytes} sent, "
        f"{there} were there",
        f"index sha-256  {report.index_sha256}",
    ]
    if report.removed:
        lines.append(f"removed {len(report.removed)} files of other revisions")
    terminal.result(report.to_json(), "\n".join(lines))
