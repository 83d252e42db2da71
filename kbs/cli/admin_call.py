"""What the verbs share that call the admin listener."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai.errors import FormatError

if TYPE_CHECKING:
    from kbs.admin.client import AdminClient

AdminUrl = Annotated[str, typer.Option(help="The broker's admin listener.", metavar="URL")]
AdminKey = Annotated[
    Path, typer.Option(help="The administrator's private key.", metavar="FILE")
]
ADMIN_URL = "http://127.0.0.1:8081"
ADMIN_KEY = Path("kbs-data/admin.key")


def open_client(admin_url: str, admin_key: Path) -> AdminClient:
    """Calls of the admin listener as this administrator."""
    from kbs.admin.client import AdminClient
    from kbs.instance import read_admin_key

    return AdminClient(
        admin_url, read_admin_key(admin_key), clock=lambda: datetime.now(UTC)
    )


def member(answer: dict[str, Any], name: str, kind: type) -> Any:
    """A member of an answer, of the kind that it must have.

    Raises:
        FormatError: it is missing or of another kind.
    """
    value = answer.get(name)
    if not isinstance(value, kind):
        raise FormatError(f"admin answer: {name} is missing or of another kind")
    return value
