"""The admin listener, for the broker's owner.

Every route asks for the admin token before it reads a body. On the main listener these routes
exist only where ``admin.on_main_listener`` says so, for stock clients that post there.
"""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI

from kbs.admin import admins, audit, policies, resources
from kbs.admin.changes import ChangeKinds
from kbs.admin.office import Office
from kbs.admin.settings import AdminSettings
from kbs.core import Core
from kbs.release.broker import KeyBroker
from kbs.server.answers import new_app

ROOMS: Final = (admins, resources, audit, policies)
"""Modules with routes; those with the most general paths last."""


def open_office(core: Core, settings: AdminSettings | None = None) -> Office:
    """The office with every kind of change; one is enough for both listeners.

    Raises:
        CaiError: a pinned key of the settings cannot be read.
    """
    kinds = (kind for room in ROOMS for kind in getattr(room, "KINDS", ()))
    return Office(core, settings, ChangeKinds(*kinds))


def add_admin_routes(app: FastAPI, office: Office) -> None:
    """Mount every admin route; on the main listener only after its own routes."""
    for room in ROOMS:
        room.add_routes(app, office)


def admin_app(broker: KeyBroker, settings: AdminSettings | None = None) -> FastAPI:
    """The application of the admin listener.

    Raises:
        CaiError: a pinned key of the settings cannot be read.
    """
    app = new_app(broker, unauthenticated="AdminAuthAccess")
    add_admin_routes(app, open_office(broker.core, settings))
    return app
