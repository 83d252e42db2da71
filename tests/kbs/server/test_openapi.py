"""Must show 2: whatever the OpenAPI of the three surfaces can generate, nothing answers 500.

The documents also have to be true: every route is in one, and no document names another.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation.modes import GenerationMode
from starlette.routing import Route

from kbs.admin.app import admin_app
from kbs.appraisal.service import AttestationService
from kbs.server.crew import Crew
from kbs.server.openapi import admin_document, appraisal_document, main_document
from kbs.server.public_app import public_app
from tests.kbs.world import SECRET_TEXT, Site, Visitor

if TYPE_CHECKING:
    from schemathesis.core.transport import Response

EXAMPLES = int(os.environ.get("CAI_SCHEMATHESIS_EXAMPLES", "6"))
"""Examples of each operation and mode; a soak takes hundreds."""


def routes_of(app: Any) -> set[tuple[str, str]]:
    """Methods and paths, with every parameter called the same."""
    found = set()
    for route in app.routes:
        if isinstance(route, Route):
            # What matches the rest of a path is three segments in one document and one in another.
            path = route.path.replace("{path:path}", "{a}/{b}/{c}")
            plain = re.sub(r"\{[^}]+\}", "{}", path)
            found |= {(method, plain) for method in route.methods or () if method != "HEAD"}
    return found


def operations_of(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (method.upper(), re.sub(r"\{[^}]+\}", "{}", path))
        for path, operations in document["paths"].items()
        for method in operations
    }


def test_the_documents_are_true(site: Site) -> None:
    broker = site.broker
    service = AttestationService(broker.core, broker.verifier, site.settings.attestation, ())
    served = routes_of(public_app(broker, Crew(site.settings.limits), service))
    told = operations_of(main_document()) | operations_of(appraisal_document())
    assert told == served


def test_the_administrators_document_is_their_routes(site: Site) -> None:
    app = admin_app(site.broker)
    document = admin_document(app)
    assert len(document["paths"]) > 30
    assert all("security" in item for path in document["paths"].values() for item in path.values())


def require_sound(answer: Response) -> None:
    """No fault of ours, and every refusal in the one form."""
    assert answer.status_code != 500, answer.text
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    if answer.status_code >= 400:
        value = answer.json()
        assert value["type"].rpartition("/")[2], answer.text
        assert isinstance(value["detail"], str)
        assert value["type"].rpartition("/")[2] != "PluginInternalError"
    assert SECRET_TEXT.decode() not in answer.text


def attack(document: dict[str, Any], site: Site, app: str, credentials: Any) -> int:
    """Send what the document generates, valid and not; the number of requests."""
    schema = schemathesis.openapi.from_dict(document)
    sent = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
                phases=[Phase.generate], suppress_health_check=list(HealthCheck),
            )
            def send(case: Any) -> None:
                nonlocal sent
                sent += 1
                for headers in credentials():
                    case.headers = {**(case.headers or {}), **headers}
                    require_sound(case.call(app=site.apps[app], base_url="http://kbs.test"))

            try:
                send()
            except Exception as error:
                if type(error).__name__ in ("Unsatisfiable", "SkipTest", "Skipped"):
                    continue  # nothing about this operation can be wrong
                raise
    return sent


def test_no_500_of_the_protocol(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)

    def credentials() -> list[dict[str, str]]:
        # A stranger, and a guest that attested.
        return [{}, {"Cookie": f"kbs-session-id={cookie}"}]

    assert attack(main_document(), allowed, "main", credentials) > 20
    # What was attacked still works.
    assert visitor.open(allowed.get(cookie)) == SECRET_TEXT


def test_no_500_of_the_attestation_service(allowed: Site) -> None:
    assert attack(appraisal_document(), allowed, "main", lambda: [{}]) > 10


def test_no_500_of_administration(allowed: Site) -> None:
    def credentials() -> list[dict[str, str]]:
        return [{}, {"Authorization": f"Bearer {allowed.admin_token()}"}]

    document = admin_document(admin_app(allowed.broker))
    assert attack(document, allowed, "admin", credentials) > 100


@pytest.mark.parametrize("document", [main_document, appraisal_document])
def test_documents_are_openapi(document: Any) -> None:
    schemathesis.openapi.from_dict(document()).validate()
