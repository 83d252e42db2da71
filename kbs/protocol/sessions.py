"""Protocol sessions: from the challenge to the facts, never a verdict.

``authed`` → ``consumed`` (its nonce is spent, verification runs or failed) → ``attested``. The
cookie itself is not stored, only its SHA-256. What a session established is sealed, with the expiry
and the reference inside, so the row cannot be prolonged or given to another session.
"""

from __future__ import annotations

import base64
import os
import threading
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Table, delete, func, insert, select, update

from cai import jcs
from cai.attest.facts import Facts
from cai.attest.jwk import PublicJwk
from cai.attest.rcar import NONCE_SIZE
from cai.errors import FormatError, Tampered, TooBusy, Unauthenticated
from kbs.database.tables import SESSION
from kbs.keys.sealing import RowIdentity, Sealer

LIFETIME = 300
"""How long a session lives, counted from its challenge, seconds (Trustee's default)."""

MAX_SESSIONS = 100_000
"""Most sessions at once; beyond it the newest is refused."""

SWEEP_SECONDS = 10
"""How often one process deletes what has expired and counts what is left, seconds."""

MAX_RECORD = 1024 * 1024
"""Largest sealed record that is read back, bytes."""


class State(StrEnum):
    """How far a session has come."""

    AUTHED = "authed"
    CONSUMED = "consumed"
    ATTESTED = "attested"


@dataclass(frozen=True, slots=True)
class Session:
    """One session as stored.

    Attributes:
        ref: SHA-256 of the cookie, hex; also the ``jti`` of its token.
        nonce: the challenge's text.
        version: protocol version of the request.
        state: how far it has come.
        expires: Unix seconds.
        selector: id of the policy that the client expects; empty when it named none.
    """

    ref: str
    nonce: str
    version: str
    state: State
    expires: int
    selector: str = ""


@dataclass(frozen=True, slots=True)
class Established:
    """What an attested session knows.

    Attributes:
        facts: verified facts.
        tee_pubkey: the key that answers are encrypted to.
        evidence: digests of the evidence, hex.
        token: the token that was issued.
    """

    facts: Facts
    tee_pubkey: PublicJwk
    evidence: dict[str, str]
    token: str


def session_ref(cookie: str) -> str:
    """Reference of the session that a cookie names; any text has one."""
    return sha256(b"cai/kbs session\x00" + cookie.encode("utf-8", "replace")).hexdigest()


class Census:
    """Keeps a table of short-lived rows short, without counting them at every call.

    Args:
        table: has a column ``expires`` in Unix seconds, with an index.
        most: rows beyond which nothing is added.
    """

    def __init__(self, table: Table, most: int) -> None:
        self._table = table
        self._most = most
        self._lock = threading.Lock()
        self._swept = 0
        self._count = 0

    def admit(self, connection: Connection, seconds: int) -> None:
        """Let one row be added inside the caller's transaction.

        Raises:
            TooBusy: there are as many as may be.
        """
        with self._lock:
            due = not 0 <= seconds - self._swept < SWEEP_SECONDS
            if due:
                self._swept = seconds
        if due:
            expires = self._table.c.expires
            connection.execute(delete(self._table).where(expires <= seconds))
            count = connection.execute(select(func.count()).select_from(self._table)).scalar_one()
            with self._lock:
                self._count = count
        with self._lock:
            # Other replicas add rows, too; the next sweep counts them.
            if self._count >= self._most:
                raise TooBusy(
                    "too many sessions", hint="try again in five minutes", code="too-many-sessions"
                )
            self._count += 1


class SessionStore:
    """Sessions in one database."""

    def __init__(self, *, instance: str, realm: str, sealer: Sealer) -> None:
        self._instance = instance
        self._realm = realm
        self._sealer = sealer
        self._census = Census(SESSION, MAX_SESSIONS)

    def begin(
        self, connection: Connection, *, version: str, tee: str, now: datetime, selector: str = ""
    ) -> tuple[str, Session]:
        """Make a session and, now and then, sweep the expired ones.

        Returns:
            The cookie value, 32 hex digits, and the session.

        Raises:
            TooBusy: there are ``MAX_SESSIONS`` already.
        """
        seconds = int(now.timestamp())
        self._census.admit(connection, seconds)
        cookie = os.urandom(16).hex()
        nonce = base64.b64encode(os.urandom(NONCE_SIZE)).decode("ascii")
        session = Session(
            session_ref(cookie), nonce, version, State.AUTHED, seconds + LIFETIME, selector
        )
        connection.execute(
            insert(SESSION).values(
                ref=session.ref,
                nonce=nonce,
                version=version,
                tee=tee,
                selector=selector,
                state=session.state.value,
                expires=session.expires,
            )
        )
        return cookie, session

    def find(self, connection: Connection, ref: str, *, now: datetime) -> Session:
        """The living session of this reference.

        Raises:
            Unauthenticated: there is none, or it has expired.
        """
        row = connection.execute(select(SESSION).where(SESSION.c.ref == ref)).one_or_none()
        if row is None or row.expires <= int(now.timestamp()):
            raise Unauthenticated(
                "no such session, or it has expired", hint="start again with POST auth"
            )
        return Session(
            row.ref, row.nonce, row.version, State(row.state), row.expires, row.selector
        )

    def consume(self, connection: Connection, session: Session, *, now: datetime) -> bool:
        """Spend the nonce by one conditional update; false when it was spent before."""
        spent = connection.execute(
            update(SESSION)
            .where(SESSION.c.ref == session.ref)
            .where(SESSION.c.state == State.AUTHED.value)
            .where(SESSION.c.expires > int(now.timestamp()))
            .values(state=State.CONSUMED.value)
        )
        return spent.rowcount == 1

    def complete(
        self, connection: Connection, session: Session, established: Established
    ) -> None:
        """Store what the session established.

        Raises:
            Unauthenticated: the session is gone, or its nonce was not spent for this.
        """
        record = jcs.canonical(
            {
                "expires": session.expires,
                "selector": session.selector,
                "facts": established.facts.to_json(),
                "tee_pubkey": established.tee_pubkey.to_json(),
                "evidence": established.evidence,
                "token": established.token,
            }
        )
        stored = connection.execute(
            update(SESSION)
            .where(SESSION.c.ref == session.ref)
            .where(SESSION.c.state == State.CONSUMED.value)
            .values(
                state=State.ATTESTED.value,
                sealed=self._sealer.seal(self._identity(session.ref), record),
            )
        )
        if stored.rowcount != 1:
            raise Unauthenticated("the session ended while its evidence was verified")

    def established(self, connection: Connection, session: Session) -> Established:
        """What an attested session knows.

        Raises:
            Unauthenticated: it has not attested.
            Tampered: the stored record is not the one that was sealed for it.
        """
        sealed = connection.execute(
            select(SESSION.c.sealed).where(SESSION.c.ref == session.ref)
        ).scalar()
        if session.state is not State.ATTESTED or sealed is None:
            raise Unauthenticated("this session has not attested", hint="POST attest first")
        record = self._sealer.open(self._identity(session.ref), sealed)
        value: dict[str, Any] = jcs.parse_canonical(record, what="session", limit=MAX_RECORD)
        try:
            if value["expires"] != session.expires:
                raise Tampered("database row session: its expiry was changed")
            if value["selector"] != session.selector:
                raise Tampered("database row session: its selector was changed")
            return Established(
                Facts.from_json(value["facts"]),
                PublicJwk.parse(value["tee_pubkey"]),
                value["evidence"],
                value["token"],
            )
        except KeyError as error:
            raise FormatError("session record: a member is missing") from error

    def _identity(self, ref: str) -> RowIdentity:
        return RowIdentity(self._instance, self._realm, SESSION.name, ref, 1)
