"""What the verbs share that call the admin listener.

Every option has an environment variable, so that a shell or a job names the broker once:
``KBS_ADMIN_URL``, ``KBS_ADMIN_KEY``, ``KBS_ADMIN_CA``, ``KBS_ADMIN_TOKEN``.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cai.errors import FormatError

if TYPE_CHECKING:
    from kbs.admin.client import AdminClient

CA_VARIABLE: Final = "KBS_ADMIN_CA"
TOKEN_VARIABLE: Final = "KBS_ADMIN_TOKEN"  # noqa: S105 - the name of a variable

AdminUrl = Annotated[
    str,
    typer.Option(
        help="The broker's admin listener: https://…, unix:PATH, or http:// on loopback.",
        metavar="URL", envvar="KBS_ADMIN_URL",
    ),
]  # fmt: skip
AdminKey = Annotated[
    Path,
    typer.Option(
        help="The administrator's private key.", metavar="FILE", envvar="KBS_ADMIN_KEY"
    ),
]
ADMIN_URL = "http://127.0.0.1:8081"
ADMIN_KEY = Path("kbs-data/admin.key")


def open_client(admin_url: str, admin_key: Path) -> AdminClient:
    """Calls of the admin listener as this administrator.

    ``KBS_ADMIN_CA`` names the authority behind an ``https`` listener; ``KBS_ADMIN_TOKEN`` a file
    with a token that is sent instead of one made with the key.
    """
    from cai.secret import read_secret_file
    from kbs.admin.client import AdminClient
    from kbs.instance import read_admin_key

    ca, token_file = os.environ.get(CA_VARIABLE), os.environ.get(TOKEN_VARIABLE)
    token = None
    if token_file:
        text = read_secret_file(Path(token_file), what="admin token").reveal().strip()
        if not text.isascii() or not text.decode("ascii").isprintable():
            raise FormatError(f"admin token {token_file}: not a token")
        token = text.decode("ascii")
    return AdminClient(
        admin_url,
        None if token else read_admin_key(admin_key),
        clock=lambda: datetime.now(UTC),
        ca=Path(ca) if ca else None,
        token=token,
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
