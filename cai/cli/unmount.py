"""``cai unmount``: take away what ``cai mount`` mounted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cai.terminal import JsonFlag, current


def unmount(
    mount_point: Annotated[Path, typer.Argument(help="Where the model is mounted.")],
    force: Annotated[
        bool, typer.Option("--force", help="Also when it is in use: its readers get errors.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Unmount a model, alive or left behind by a killed process."""
    from cai.mount import unmount as unmount_tree

    kind = unmount_tree(mount_point, force=force)
    current().result(
        {"mount_point": str(mount_point), "kind": kind.value}, f"unmounted {mount_point}"
    )
