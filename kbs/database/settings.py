"""Where the database is, as the configuration says it; never with a password in it.

A password comes from ``password_file``, or as libpq takes it: ``PGPASSFILE``, ``PGPASSWORD``, a
client certificate. So the URL can stand in a command line, a log and an error.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from cai.errors import SettingError
from cai.secret import read_secret_file
from cai.settings import refuse_unknown

if TYPE_CHECKING:
    from cai.secret import Secret
    from cai.settings import Section

POSTGRESQL: Final = "postgresql+psycopg"
"""The one form of a server's URL; a plain ``postgresql://`` is read as this."""

POOL: Final = 12
"""Connections that one process keeps open to the database, unless told otherwise."""

MAX_POOL: Final = 200
"""Most connections of one process."""

QUERY_NAMES: Final = frozenset(
    {"host", "port", "sslmode", "sslrootcert", "sslcert", "sslkey", "passfile", "connect_timeout"}
)
"""Parameters that a URL may carry; libpq's words."""

_VERIFIED: Final = frozenset({"verify-ca", "verify-full"})
_WHERE: Final = "database"


@dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """One database.

    Attributes:
        url: ``postgresql+psycopg://USER@HOST/NAME``; empty is SQLite in the data directory.
        password_file: holds the password and at most one final newline; ``None`` leaves it to
            libpq.
        pool: most connections of this process.
        unsafe_unverified_tls: talk to a server on another machine without checking who it is.
    """

    url: str = ""
    password_file: Path | None = None
    pool: int = POOL
    unsafe_unverified_tls: bool = False
    parsed: URL | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if self.url:
            object.__setattr__(
                self, "parsed", _parse(self.url, unverified=self.unsafe_unverified_tls)
            )
        elif self.password_file is not None:
            raise SettingError("database: password_file without url", hint="SQLite has no password")

    @classmethod
    def from_table(cls, section: Section | None) -> DatabaseSettings:
        """Read ``[database]``.

        Raises:
            SettingError: an unknown member, or one out of its range.
        """
        if section is None:
            return cls()
        password_file = section.text("password_file", "")
        settings = cls(
            section.text("url", ""),
            Path(password_file) if password_file else None,
            section.integer("pool", POOL, least=1, most=MAX_POOL, unit="connections"),
            section.flag("unsafe_unverified_tls", default=False),
        )
        section.finish()
        return settings

    @property
    def unsafe(self) -> tuple[str, ...]:
        """Names of the loosened settings."""
        return ("unsafe_unverified_tls",) if self.unsafe_unverified_tls else ()

    def password(self) -> Secret | None:
        """The password that the file holds.

        Raises:
            InputMissing, StorageError: it cannot be read.
        """
        if self.password_file is None:
            return None
        return read_secret_file(self.password_file, what="database password")


def _parse(text: str, *, unverified: bool) -> URL:
    try:
        url = make_url(text)
        port = url.port
    except (ArgumentError, ValueError) as error:
        # The text itself is not repeated: it may hold what should not stand in it.
        raise SettingError(f"{_WHERE}: not a URL", hint=_form()) from error
    if url.password is not None:
        raise SettingError(
            f"{_WHERE}: the URL holds a password; command lines and logs are read by others",
            hint="put it into a file: PGPASSFILE, or password_file of the configuration",
        )
    if url.drivername == "postgresql":
        url = url.set(drivername=POSTGRESQL)
    if url.drivername != POSTGRESQL:
        raise SettingError(f"{_WHERE}: {url.drivername!r} is not supported", hint=_form())
    if not url.database:
        raise SettingError(f"{_WHERE}: the URL names no database", hint=_form())
    refuse_unknown(url.query, QUERY_NAMES, where=f"{_WHERE} URL")
    if any(not isinstance(value, str) for value in url.query.values()):
        raise SettingError(f"{_WHERE} URL: a parameter is given twice")
    del port
    return _with_tls(url, unverified=unverified)


def _with_tls(url: URL, *, unverified: bool) -> URL:
    """Demand a verified server where the connection leaves this machine."""
    host = str(url.query.get("host") or url.host or "")
    if not host or host.startswith("/") or _is_loopback(host) or unverified:
        return url
    mode = url.query.get("sslmode")
    if mode is None:
        added = {"sslmode": "verify-full"}
        if "sslrootcert" not in url.query:
            added["sslrootcert"] = "system"
        return url.update_query_dict(added)
    if mode not in _VERIFIED:
        raise SettingError(
            f"{_WHERE}: sslmode={mode} does not check who {host} is",
            hint="sslmode=verify-full with sslrootcert, or unsafe_unverified_tls",
        )
    return url


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _form() -> str:
    return f"{POSTGRESQL}://USER@HOST/NAME"
