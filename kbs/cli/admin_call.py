"""What the verbs share that call the admin listener.

Every option has an environment variable, so that a shell or a job names the broker once:
``KBS_ADMIN_URL``, ``KBS_ADMIN_KEY``, ``KBS_ADMIN_CA``, ``KBS_ADMIN_TOKEN``.
"""

from __future__ import annotations

from contextvars import ContextVar
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
_connection: ContextVar[tuple[Path | None, Path | None]] = ContextVar(
    "connection", default=(None, None)
)

ADMIN_URL = "http://127.0.0.1:8081"
ADMIN_KEY = Path("kbs-data/admin.key")


def connection(
    *,
    admin_ca: Annotated[
        Path | None,
        typer.Option(
            help="Authority behind an https:// admin listener, PEM.", metavar="FILE",
            envvar=CA_VARIABLE,
        ),
    ] = None,
    admin_token: Annotated[
        Path | None,
        typer.Option(
            help="A token made elsewhere, sent instead of one made with --admin-key.",
            metavar="FILE", envvar=TOKEN_VARIABLE,
        ),
    ] = None,
) -> None:
    """Options of the program that say how the admin listener is reached."""
    _connection.set((admin_ca, admin_token))


def open_client(admin_url: str, admin_key: Path) -> AdminClient:
    """Calls of the admin listener as this administrator.

    What was said before the verb (``connection``) applies too.
    """
    from cai.secret import read_secret_file
    from kbs.admin.client import AdminClient
    from kbs.instance import read_admin_key

    ca, token_file = _connection.get()
    token = None
    if token_file is not None:
        text = read_secret_file(token_file, what="admin token").reveal().strip()
        if not text.isascii() or not text.decode("ascii").isprintable():
            raise FormatError(f"admin token {token_file}: not a token")
        token = text.decode("ascii")
    return AdminClient(
        admin_url,
        None if token else read_admin_key(admin_key),
        clock=lambda: datetime.now(UTC),
        ca=ca,
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
