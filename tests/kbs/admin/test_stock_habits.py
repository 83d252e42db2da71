"""What a stock ``kbs-client config`` sends, as it sends it, to the one listener that it knows."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai.attest.jwk import b64u_encode
from kbs.cli.stock import AFFIRMING, ALLOW_ALL, DENY_ALL
from kbs.server.config import ServeSettings, settings_from
from kbs.server.service import open_broker
from tests.kbs.admin.test_tokens import claims, jwt, pem
from tests.kbs.world import SECRET_TEXT, URI, Clock, Site, Visitor


def served(tmp_path: Path, anchors: Path, clock: Clock, value: dict[str, Any]) -> Iterator[Site]:
    settings = replace(
        settings_from(value, where="kbs.toml"), data=tmp_path / "data",
        unsafe_simulated_root=anchors,
    )  # fmt: skip
    broker = open_broker(settings, clock=clock)
    yield Site(broker, settings, clock)
    broker.close()


@pytest.fixture
def old_key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


@pytest.fixture
def stock(
    tmp_path: Path, platform_dir: Path, clock: Clock, old_key: Ed25519PrivateKey
) -> Iterator[Site]:
    """A broker for stock clients: ``compat: trustee`` and one key of before there were roles."""
    legacy = {"name": "old", "key": str(pem(old_key, tmp_path / "old.pub"))}
    value = {"http": {"compat": "trustee"}, "admin": {"legacy_keys": [legacy]}}
    yield from served(tmp_path, platform_dir / "anchors", clock, value)


def demo(site: Site) -> dict[str, str]:
    """The token that Trustee's setup writes, but with an end that is near."""
    token = jwt(site.admin_key, claims(site.clock(), iss="TrusteeInDocker"))
    return {"Authorization": f"Bearer {token}"}


def roleless(site: Site, key: Ed25519PrivateKey) -> dict[str, str]:
    """What ``kbs-client config --auth-private-key`` signs: three times and nothing else."""
    now = int(site.clock().timestamp())
    token = jwt(key, {"iat": now, "exp": now + 7200, "nbf": now})
    return {"Authorization": f"Bearer {token}"}


def post(site: Site, route: str, body: Any, headers: dict[str, str]) -> httpx.Response:
    return site.call("POST", f"/kbs/v0/{route}", body, headers=headers)


def test_a_whole_session_of_kbs_client(
    stock: Site, visitor: Visitor, old_key: Ed25519PrivateKey
) -> None:
    from cai.attest.policy import policy_for

    for headers in (demo(stock), roleless(stock, old_key)):
        assert post(stock, f"resource/{URI}", SECRET_TEXT, headers).status_code == 200
        for policy in (DENY_ALL, ALLOW_ALL, AFFIRMING):
            body = {"policy": b64u_encode(policy)}
            answer = post(stock, "resource-policy", body, headers)
            assert answer.status_code == 200, answer.text
        ids = stock.call("GET", "/kbs/v0/resource-policy", headers=headers)
        assert ids.json() == ["resource-policy"]
    assert stock.set_policy("verification-policy", policy_for(visitor.facts())).status_code == 200
    _, cookie = visitor.attested(stock)
    assert visitor.open(stock.get(cookie)) == SECRET_TEXT
    # The next policy holds at the next request.
    body = {"policy": b64u_encode(DENY_ALL)}
    assert post(stock, "resource-policy", body, demo(stock)).status_code == 200
    assert stock.get(cookie).status_code == 401
    answer = stock.call("DELETE", f"/kbs/v0/resource/{URI}", headers=demo(stock))
    assert answer.status_code == 200, answer.text


def test_an_attestation_policy_as_kbs_client_sends_it(stock: Site) -> None:
    text = (
        b"package policy\n\nimport rego.v1\n\ndefault executables := 3\n\n"
        b'trust_claims := {"executables": executables}\n'
    )
    body = {"type": "rego", "policy_id": "default_cpu", "policy": b64u_encode(text)}
    answer = post(stock, "attestation-policy", body, demo(stock))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("value", [["abcd"], [3], [True], "abcd"])
def test_a_sample_reference_value(stock: Site, value: Any) -> None:
    payload = base64.b64encode(json.dumps({"launch_digest": value}).encode()).decode()
    message = {"version": "0.1.0", "type": "sample", "payload": payload}
    answer = post(stock, "reference-value", message, demo(stock))
    assert answer.status_code == 200, answer.text
    answer = stock.call("GET", "/kbs/v0/reference-value/launch_digest", headers=demo(stock))
    assert answer.json() == value


@pytest.mark.parametrize(
    ("method", "route"),
    [
        ("POST", f"resource/{URI}"), ("DELETE", f"resource/{URI}"), ("POST", "resource-policy"),
        ("GET", "resource-policy"), ("POST", "attestation-policy"), ("POST", "reference-value"),
        ("GET", "reference-value/x"), ("GET", "audit"), ("GET", "admin"),
    ],
)
def test_strangers_get_401_with_trustees_words(stock: Site, method: str, route: str) -> None:
    stranger = Ed25519PrivateKey.generate()
    for headers in (
        {}, {"Authorization": "Bearer x"}, roleless(stock, stranger),
        roleless(stock, stock.admin_key),
        {"Authorization": f"Bearer {jwt(stock.admin_key, claims(stock.clock(), role='user'))}"},
    ):
        answer = stock.call(method, f"/kbs/v0/{route}", b"{}", headers=headers)
        # Under compat everything is 401, a missing role too.
        assert answer.status_code == 401, answer.text
        assert answer.json()["type"].endswith("/AdminAuthAccess")
        assert {"type", "detail"} <= set(answer.json())


def test_admin_routes_are_not_on_the_main_listener_by_default(site: Site) -> None:
    headers = demo(site)
    for method, route in (
        ("POST", f"resource/{URI}"), ("DELETE", f"resource/{URI}"), ("POST", "resource-policy"),
        ("GET", "audit"), ("GET", "admin"), ("GET", "proposal"), ("GET", "whoami"),
    ):
        answer = site.call(method, f"/kbs/v0/{route}", b"x", headers=headers)
        assert answer.status_code == 404, (method, route)
        assert {"type", "detail"} <= set(answer.json())
    assert not [row for row in site.audit() if row["action"] == "resource.set"]


@pytest.mark.parametrize(
    ("value", "on_main"),
    [
        ({}, False), ({"http": {"compat": "trustee"}}, True),
        ({"admin": {"on_main_listener": True}}, True),
        ({"http": {"compat": "trustee"}, "admin": {"on_main_listener": False}}, False),
    ],
)
def test_who_decides_about_the_main_listener(value: dict[str, Any], on_main: bool) -> None:
    settings: ServeSettings = settings_from(value, where="kbs.toml")
    assert settings.admin.on_main_listener is on_main
