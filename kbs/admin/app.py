"""The admin listener, for the broker's owner.

Nothing here is reachable through the main listener, and every route asks for the admin token before
it reads a body.
"""

from __future__ import annotations

from fastapi import FastAPI

from kbs.admin import audit, policies, resources
from kbs.admin.office import Office
from kbs.release.broker import KeyBroker
from kbs.server.answers import new_app

ROOMS = (resources, audit, policies)
"""Modules with routes; those with the most general paths last."""


def admin_app(broker: KeyBroker) -> FastAPI:
    """The application of the admin listener."""
    app = new_app(broker, unauthenticated="AdminAuthAccess")
    office = Office(broker.core)
    for room in ROOMS:
        room.add_routes(app, office)
    return app
