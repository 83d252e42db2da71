"""Challenges of the attestation service: short-lived, stored, each good for one appraisal.

A client gets the nonce and, as Trustee's relatives know it, a JWT around it that travels inside the
evidence's runtime data. The JWT is only an envelope: what makes a challenge good is its row.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from hashlib import sha256
from typing import Final

from sqlalchemy import Connection, insert, select, update

from cai import jcs
from cai.attest.jwk import b64u_decode
from cai.attest.rcar import NONCE_SIZE
from cai.errors import CaiError, Unauthenticated
from kbs.appraisal.tokens import sign_jwt
from kbs.database.tables import CHALLENGE
from kbs.keys.signing import SigningKey
from kbs.protocol.sessions import Census

LIFETIME: Final = 300
"""How long a challenge may be answered, seconds."""

MAX_CHALLENGES: Final = 100_000
"""Most challenges at once; beyond it no more are given."""

MAX_CHALLENGE_TOKEN: Final = 4096
"""Longest challenge token that is read, characters."""

TYPE: Final = "cai-challenge+jwt"
"""``typ`` of a challenge token; no appraisal has it."""


class Freshness(StrEnum):
    """Whether evidence answers a challenge, as tokens say it."""

    FRESH = "fresh"
    NONE = "none"


class _State(StrEnum):
    OPEN = "open"
    ANSWERED = "answered"


@dataclass(frozen=True, slots=True)
class Challenge:
    """A challenge as it is given.

    Attributes:
        nonce: base64 text.
        token: the nonce in an envelope.
    """

    nonce: str
    token: str


class ChallengeStore:
    """The challenges of one database."""

    def __init__(self) -> None:
        self._census = Census(CHALLENGE, MAX_CHALLENGES)

    def give(self, connection: Connection, key: SigningKey, *, now: datetime) -> Challenge:
        """Make a challenge.

        Raises:
            TooBusy: there are ``MAX_CHALLENGES`` already.
        """
        seconds = int(now.timestamp())
        self._census.admit(connection, seconds)
        nonce = base64.b64encode(os.urandom(NONCE_SIZE)).decode("ascii")
        claims = {"nonce": nonce, "iat": seconds, "exp": seconds + LIFETIME}
        connection.execute(
            insert(CHALLENGE).values(
                ref=_ref(nonce), state=_State.OPEN.value, expires=seconds + LIFETIME
            )
        )
        return Challenge(nonce, sign_jwt({"alg": "ES256", "typ": TYPE}, claims, key))

    def answer(self, connection: Connection, nonce: str, *, now: datetime) -> Freshness:
        """Spend a challenge by one conditional update.

        Returns:
            Whether it was one of ours; a nonce that somebody else chose is theirs to remember.

        Raises:
            Unauthenticated: it was answered before, or has expired.
        """
        ref, seconds = _ref(nonce), int(now.timestamp())
        spent = connection.execute(
            update(CHALLENGE)
            .where(CHALLENGE.c.ref == ref)
            .where(CHALLENGE.c.state == _State.OPEN.value)
            .where(CHALLENGE.c.expires > seconds)
            .values(state=_State.ANSWERED.value)
        )
        if spent.rowcount == 1:
            return Freshness.FRESH
        known = connection.execute(select(CHALLENGE.c.state).where(CHALLENGE.c.ref == ref)).scalar()
        if known is None:
            return Freshness.NONE
        raise Unauthenticated(
            "this challenge was answered before, or has expired",
            hint="ask for another with POST challenge", code="challenge-replayed",
        )  # fmt: skip


def nonce_of_token(token: str) -> str:
    """The nonce in a challenge token; whether it is ours is what its row says.

    Raises:
        Unauthenticated: it is not a challenge token.
    """
    refused = Unauthenticated(
        "not a challenge of this service", hint="ask for one with POST challenge",
        code="challenge-unknown",
    )  # fmt: skip
    parts = token.split(".")
    if len(token) > MAX_CHALLENGE_TOKEN or len(parts) != 3:
        raise refused
    try:
        body = b64u_decode(parts[1], what="challenge token")
        claims = jcs.parse(body, what="challenge token", limit=MAX_CHALLENGE_TOKEN)
    except CaiError as error:
        raise refused from error
    nonce = claims.get("nonce") if isinstance(claims, dict) else None
    if not isinstance(nonce, str):
        raise refused
    return nonce


def _ref(nonce: str) -> str:
    return sha256(b"cai/as challenge\x00" + nonce.encode("utf-8", "replace")).hexdigest()
