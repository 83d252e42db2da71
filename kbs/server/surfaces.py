"""The two listeners' applications, composed of the surfaces behind one gate each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from kbs.admin.app import admin_app
from kbs.release.broker import KeyBroker
from kbs.server.config import ServeSettings
from kbs.server.crew import Crew
from kbs.server.gate import Door, Gate
from kbs.server.public_app import public_app
from kbs.server.readiness import ready_route


@dataclass(frozen=True, slots=True)
class Surfaces:
    """What the listeners serve.

    Attributes:
        main: the main listener.
        admin: the admin listener.
    """

    main: ASGIApp
    admin: ASGIApp


class FirstServed:
    """Serves a request by the first of several applications that has a route for it.

    Args:
        apps: in order; the first answers what none has a route for.
    """

    def __init__(self, apps: Sequence[Starlette]) -> None:
        self._apps = tuple(apps)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        for app in self._apps:
            if any(route.matches(scope)[0] is Match.FULL for route in app.routes):
                await app(scope, receive, send)
                return
        await self._apps[0](scope, receive, send)


def surfaces(broker: KeyBroker, settings: ServeSettings, crew: Crew) -> Surfaces:
    """Build both listeners' applications.

    Raises:
        CaiError: a pinned key of the settings cannot be read.
    """
    http, limits = settings.http, settings.limits
    # Resources are uploaded where the administrators are.
    upload = settings.resources.max_bytes
    admin = admin_app(broker, settings.admin)
    admin.router.routes.append(Route("/readyz", ready_route(broker, crew), methods=["GET"]))
    main = [public_app(broker, crew)]
    if settings.admin.on_main_listener:
        main.append(admin)
    main_door = Door(http, limits, http.allow, also_bytes=upload if len(main) > 1 else 0)
    return Surfaces(
        Gate(FirstServed(main) if len(main) > 1 else main[0], main_door),
        Gate(admin, Door(http, limits, admin=True, also_bytes=upload)),
    )
