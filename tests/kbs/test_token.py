"""Tokens signed by the broker's own key that are still not tickets to a release."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cai.attest.jwk import b64u_decode
from kbs.protocol.token import sign_token
from tests.kbs.world import SECRET_TEXT, Site, Visitor


def bearer(site: Site, visitor: Visitor, **changes: Any) -> dict[str, str]:
    """A header with a genuine token of a living session, some claims changed, signed anew."""
    answer, _ = visitor.attested(site)
    claims = json.loads(b64u_decode(answer.json()["token"].split(".")[1], what="token"))
    claims.update(changes)
    token = sign_token(
        {name: value for name, value in claims.items() if value is not None},
        site.broker.instance.token_key,
    )
    return {"Authorization": f"Bearer {token}"}


def test_an_unchanged_token_is_a_ticket(allowed: Site, visitor: Visitor) -> None:
    answer = allowed.get(None, headers=bearer(allowed, visitor))
    assert visitor.open(answer) == SECRET_TEXT


@pytest.mark.parametrize(
    "changes",
    [
        {"use": "appraisal"}, {"use": None}, {"aud": "another"}, {"aud": None}, {"aud": ["KBS"]},
        {"iss": "CAI"}, {"iss": None}, {"exp": 1}, {"exp": None}, {"exp": "never"}, {"exp": True},
        {"jti": None}, {"jti": 1}, {"jti": "0" * 64},
    ],
)
def test_other_claims_are_no_ticket(
    allowed: Site, visitor: Visitor, changes: dict[str, Any]
) -> None:
    answer = allowed.get(None, headers=bearer(allowed, visitor, **changes))
    assert answer.status_code == 401
    assert answer.json()["type"].endswith(("/TokenVerifierError", "/TokenNotFound"))
