"""``kbs resource``: what is released."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cai import terminal
from cai.terminal import JsonFlag
from kbs.cli.admin_call import ADMIN_KEY, ADMIN_URL, AdminKey, AdminUrl, member, open_client

app = typer.Typer(help="What is released.", no_args_is_help=True)


@app.command("set")
def resource_set(
    uri: Annotated[str, typer.Argument(help="kbs:///repository/type/tag", metavar="URI")],
    file: Annotated[Path, typer.Argument(help="Its exact bytes.", metavar="FILE")],
    *,
    admin_url: AdminUrl = ADMIN_URL,
    admin_key: AdminKey = ADMIN_KEY,
    json_output: JsonFlag = False,
) -> None:
    """Store the next version of a resource."""
    from cai.secret import read_secret_file
    from kbs.names import ResourceName

    name = ResourceName.parse(uri)
    contents = read_secret_file(file, what="resource")
    with open_client(admin_url, admin_key) as client:
        answer = client.post(f"resource/{name.path}", contents.reveal())
    version = member(answer, "version", int)
    terminal.current().result(
        {"resource": name.uri, "version": version}, f"{name.uri} is now version {version}"
    )
