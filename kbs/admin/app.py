"""The admin listener, for the broker's owner.

Every route asks for the admin token before it reads a body. On the main listener these routes
exist only where ``admin.on_main_listener`` says so, for stock clients that post there.
"""

from __future__ import annotations

from typing import Final

from fastapi import FastAPI, Request, Response

from cai.attest.rcar import ErrorInformation
from kbs.admin import admins, audit, keys, leases, policies, proposals, references, resources
from kbs.admin.changes import ChangeKinds, Proposed
from kbs.admin.office import Office
from kbs.admin.settings import AdminSettings
from kbs.core import Core
from kbs.release.broker import KeyBroker
from kbs.server.answers import json_answer, new_app, request_id

ROOMS: Final = (admins, proposals, resources, keys, leases, audit, references, policies)
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
    app.add_exception_handler(Proposed, _proposed)
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


def _proposed(request: Request, error: Exception) -> Response:
    assert isinstance(error, Proposed)  # noqa: S101 - the only class it is registered for
    # Clients that know no 202 read it as an error, so it has the members of one.
    told = ErrorInformation("PluginInternalError", error.message).to_json()
    body = {**told, "code": error.machine_code, "request": request_id(request), **error.summary}
    return json_answer(body, status=202)
