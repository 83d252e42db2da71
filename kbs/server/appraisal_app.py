"""The attestation service on the main listener, under ``/as``: the routes that stock clients call.

A token is plain text and so is a certificate, as Trustee's restful service and its fork answer;
errors are the ``ErrorInformation`` of all our surfaces, which stock clients show as text.
"""

from __future__ import annotations

from fastapi import Request, Response
from starlette.routing import BaseRoute, Route

from kbs.appraisal.service import AttestationService, wants_token
from kbs.server.answers import json_answer, read_body, request_id
from kbs.server.crew import Crew

MAX_CHALLENGE_REQUEST = 16 * 1024
"""Largest request for a challenge, bytes."""

PREFIX = "/as"
"""Where the service is."""


class AppraisalRoutes:
    """What clients of the attestation service call.

    Args:
        service: answers.
        crew: runs it off the event loop.
    """

    def __init__(self, service: AttestationService, crew: Crew) -> None:
        self._service = service
        self._crew = crew

    async def challenge(self, request: Request) -> Response:
        """``POST /as/challenge``: a nonce, in the shape that was asked for."""
        body = await read_body(request, limit=MAX_CHALLENGE_REQUEST)
        challenge = await self._crew.quick(self._service.challenge, body)
        if not wants_token(body):
            return _text(challenge.nonce)
        return json_answer({"nonce": challenge.nonce, "extra-params": {"jwt": challenge.token}})

    async def attestation(self, request: Request) -> Response:
        """``POST /as/attestation``: appraise evidence."""
        body = await read_body(request)
        token = await self._crew.verify(
            self._service.appraise, body, request=request_id(request)
        )
        return _text(token)

    async def certificate(self, _request: Request) -> Response:
        """``GET /as/certificate``: the authorities to pin."""
        return _text(await self._crew.quick(self._service.certificate))

    async def keys(self, _request: Request) -> Response:
        """``GET /as/.well-known/jwks.json``: the keys whose signatures are good."""
        return json_answer(await self._crew.quick(self._service.key_set))

    async def policies(self, _request: Request) -> Response:
        """``GET /as/policy``: ids of the attestation policies."""
        return json_answer(await self._crew.quick(self._service.policies))


def appraisal_routes(service: AttestationService, crew: Crew) -> list[BaseRoute]:
    """The routes of the service."""
    routes = AppraisalRoutes(service, crew)
    return [
        Route(f"{PREFIX}/challenge", routes.challenge, methods=["POST"]),
        Route(f"{PREFIX}/attestation", routes.attestation, methods=["POST"]),
        Route(f"{PREFIX}/certificate", routes.certificate, methods=["GET"]),
        Route(f"{PREFIX}/.well-known/jwks.json", routes.keys, methods=["GET"]),
        Route(f"{PREFIX}/policy", routes.policies, methods=["GET"]),
    ]


def _text(text: str) -> Response:
    return Response(text, media_type="text/plain; charset=utf-8")

