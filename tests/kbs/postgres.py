"""A private PostgreSQL for tests: its own directory, its own user, a Unix socket, no TCP."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from kbs.database.engine import Database
from kbs.database.schema import upgrade
from kbs.database.settings import DatabaseSettings

TEMPLATE = "kbs_template"
OWNER = "kbs"
START_SECONDS = 60


class Absent(Exception):
    """This machine has no PostgreSQL server, or no user it could run as."""


def programs() -> Path:
    """The folder of ``initdb`` and ``postgres``.

    Raises:
        Absent: there is none.
    """
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    found = shutil.which("initdb")
    if found is not None:
        places.append(Path(found).resolve().parent)
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise Absent("PostgreSQL's server programs are not on this machine")


def unprivileged() -> dict[str, Any]:
    """How to start a program as somebody who is not root; the server refuses root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise Absent("no unprivileged user to run PostgreSQL as")


@dataclass
class Cluster:
    """A running server; passwords only, as a real one is set up."""

    directory: Path
    process: subprocess.Popen[bytes]
    password: str
    _count: int = field(default=0)

    @classmethod
    def start(cls, *, durable: bool = False) -> Cluster:
        """Make and start one.

        Raises:
            Absent: it cannot be made here.
        """
        bin_directory, who = programs(), unprivileged()
        directory = Path(tempfile.mkdtemp(prefix="cai-pg-"))
        password = secrets.token_hex(16)
        try:
            if who:
                os.chown(directory, who["user"], who["group"])
            # The server's user reads it, then libpq, which wants it closed to others.
            secret = directory / "password"
            secret.write_text(password + "\n")
            if who:
                os.chown(secret, who["user"], who["group"])
            made = subprocess.run(
                [bin_directory / "initdb", "-D", directory / "data", "-U", OWNER, "-E", "UTF8",
                 "--auth=scram-sha-256", "--no-locale", "-N", f"--pwfile={secret}"],
                cwd="/", capture_output=True, text=True, timeout=START_SECONDS, **who,
            )  # fmt: skip
            if made.returncode:
                raise Absent(f"initdb: {made.stderr.strip()[-300:]}")
            process = cls._serve(bin_directory, directory, who, durable=durable)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        cluster = cls(directory, process, password)
        passfile = cluster.passfile
        passfile.touch(0o600)
        passfile.write_text(f"*:*:*:{OWNER}:{password}\n")
        cluster._wait()
        cluster._make_template()
        return cluster

    @staticmethod
    def _serve(
        bin_directory: Path, directory: Path, who: dict[str, Any], *, durable: bool
    ) -> subprocess.Popen[bytes]:
        settings = {
            "listen_addresses": "", "unix_socket_directories": str(directory),
            "max_connections": "120", "fsync": "on" if durable else "off",
        }  # fmt: skip
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (directory / "log").open("wb") as log:
            return subprocess.Popen(
                [bin_directory / "postgres", "-D", directory / "data", *options],
                cwd="/", stdout=log, stderr=log, start_new_session=True, **who,
            )

    @property
    def passfile(self) -> Path:
        return self.directory / "pgpass"

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to find the password."""
        return {"PGPASSFILE": str(self.passfile)}

    def url(self, name: str) -> str:
        """A database's address without its password."""
        return f"postgresql+psycopg://{OWNER}@/{name}?host={self.directory}"

    def settings(self, name: str, *, pool: int = 12) -> DatabaseSettings:
        """The same for this process, where the password file is named by the address."""
        return DatabaseSettings(f"{self.url(name)}&passfile={self.passfile}", pool=pool)

    def create(self, *, empty: bool = False) -> str:
        """A new database, with the tables unless ``empty``; returns its name."""
        self._count += 1
        name = f"t{self._count}"
        template = "template0" if empty else TEMPLATE
        self.run(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def run(self, statement: str, *, database: str = "postgres") -> list[Any]:
        """Run one statement as the owner of everything."""
        with psycopg.connect(
            host=str(self.directory), user=OWNER, dbname=database, password=self.password,
            autocommit=True,
        ) as connection:  # fmt: skip
            done = connection.execute(statement)  # type: ignore[call-overload]
            return done.fetchall() if done.description else []

    def stop(self) -> None:
        """End it and remove everything."""
        self.process.send_signal(signal.SIGINT)  # fast shutdown: sessions are ended
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self.run("SELECT 1")
                return
            except psycopg.OperationalError as error:
                if self.process.poll() is not None or time.monotonic() > until:
                    log = (self.directory / "log").read_text("utf-8", "replace")[-500:]
                    self.stop()
                    raise Absent(f"postgres did not start: {log}") from error
            time.sleep(0.05)

    def _make_template(self) -> None:
        self.run(f"CREATE DATABASE {TEMPLATE} TEMPLATE template0")
        settings = self.settings(TEMPLATE)
        assert settings.parsed is not None
        database = Database.open(settings.parsed)
        upgrade(database)
        database.close()
