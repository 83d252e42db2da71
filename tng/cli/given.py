"""The configuration as every verb takes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai.errors import UsageError

if TYPE_CHECKING:
    from tng.config.entries import Config

ConfigContent = Annotated[
    str | None, typer.Option("--config-content", help="The configuration itself, as JSON.")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config-file", "-c", help="A JSON file, or YAML by its suffix."),
]


def given_config(content: str | None, file: Path | None) -> Config:
    """The one configuration that a command line gives.

    Raises:
        UsageError: none, or two.
        CaiError: it cannot be read, or is no configuration.
    """
    from tng.config.load import load_content, load_file

    if content is not None and file is None:
        return load_content(content)
    if file is not None and content is None:
        return load_file(file)
    raise UsageError(
        "give exactly one of --config-content and --config-file", hint="tng launch --help"
    )
