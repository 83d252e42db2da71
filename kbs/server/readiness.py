"""Whether this process can decide now: true only while its database answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from sqlalchemy import select

from cai.errors import CaiError
from kbs.database.tables import INSTANCE
from kbs.release.broker import KeyBroker
from kbs.server.answers import json_answer
from kbs.server.crew import Crew

READY_SECONDS = 2
"""How long the database may take to answer, seconds."""


def ready_route(broker: KeyBroker, crew: Crew) -> Callable[[Request], Awaitable[Response]]:
    """``/readyz``: a load balancer sends requests only where this is 200."""

    def ask() -> bool:
        with broker.core.database.read() as connection:
            found = connection.execute(select(INSTANCE.c.id)).scalar()
        return found == broker.instance.id

    async def readyz(_request: Request) -> Response:
        try:
            async with asyncio.timeout(READY_SECONDS):
                ready = await crew.quick(ask)
        except (CaiError, TimeoutError):
            ready = False
        body = {"status": "ready" if ready else "the database does not answer"}
        return json_answer(body, status=200 if ready else 503)

    return readyz
