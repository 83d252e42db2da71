"""Tokens of attestation services: every check that one must pass, failed one by one."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509

from cai.errors import CaiError, FormatError, LimitExceeded
from tests.tng.stock.recorded import recording
from tests.tng.stock_peers import StockService
from tng.stock.token import CLOCK_SKEW_S, MAX_SUBMODS, MAX_TOKEN, Token, verify_token


def claims(**changes: Any) -> dict[str, Any]:
    submod = {"ear.status": "affirming", "ear.appraisal-policy-id": "default",
              "ear.veraison.annotated-evidence": {"runtime_data_claims": {"a": "b"}}}  # fmt: skip
    body = {"exp": int(time.time()) + 300, "submods": {"cpu0": submod}}
    return {name: item for name, item in (body | changes).items() if item is not None}


def submod(**changes: Any) -> dict[str, Any]:
    inner: dict[str, Any] = dict(claims()["submods"]["cpu0"])
    return {name: item for name, item in (inner | changes).items() if item is not None}


SERVICE = StockService()
ROOTS = (x509.load_pem_x509_certificate(SERVICE.root_pem),)


def failures(
    text: str, *, roots: Any = ROOTS, policies: tuple[str, ...] = ("default",),
    now: datetime | None = None,
) -> set[str]:  # fmt: skip
    token = Token.parse(text)
    checks = verify_token(token, roots=roots, policy_ids=policies, now=now or datetime.now(UTC))
    return {item.name for item in checks if item.outcome.value == "fail"}


def test_a_good_token_passes() -> None:
    text = SERVICE.sign(claims())
    assert failures(text) == set()
    assert Token.parse(text).runtime_claims == {"a": "b"}


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (claims(exp=int(time.time()) - CLOCK_SKEW_S - 5), "as.token.time"),
        (claims(exp=None), "as.token.time"),
        (claims(exp="soon"), "as.token.time"),
        (claims(exp=True), "as.token.time"),
        (claims(nbf=int(time.time()) + CLOCK_SKEW_S + 60), "as.token.time"),
        (claims(nbf="now"), "as.token.time"),
        (claims(submods={}), "as.appraisal"),
        (claims(submods=None), "as.appraisal"),
        (claims(submods=[1]), "as.appraisal"),
        (claims(submods={"cpu0": submod(**{"ear.status": "warning"})}), "as.appraisal.cpu0"),
        (claims(submods={"cpu0": submod(**{"ear.status": None})}), "as.appraisal.cpu0"),
        (claims(submods={"cpu0": "affirming"}), "as.appraisal.cpu0"),
        (
            claims(submods={"cpu0": submod(), "gpu0": submod(**{"ear.status": "none"})}),
            "as.appraisal.gpu0",
        ),
        (claims(submods={f"m{n}": submod() for n in range(MAX_SUBMODS + 1)}), "as.appraisal"),
        (
            claims(submods={"cpu0": submod(**{"ear.appraisal-policy-id": "other"})}),
            "as.policy",
        ),
        (claims(submods={"cpu0": submod(**{"ear.appraisal-policy-id": None})}), "as.policy"),
    ],
)
def test_what_does_not_pass(body: dict[str, Any], seen: str) -> None:
    assert seen in failures(SERVICE.sign(body))


def test_every_wanted_policy_must_be_named() -> None:
    assert failures(SERVICE.sign(claims()), policies=("default", "more")) == {"as.policy"}


def test_a_signer_that_leads_elsewhere() -> None:
    other = StockService()
    assert failures(other.sign(claims())) == {"as.token.signer"}
    assert failures(other.sign(claims()), roots=()) == {"as.token.signer"}
    # Only whoever says so takes any signer; the signature itself is verified all the same.
    assert failures(other.sign(claims()), roots=None) == set()


def test_certificates_that_are_not_in_date() -> None:
    later = datetime.now(UTC) + timedelta(days=3)
    text = SERVICE.sign(claims(exp=int(later.timestamp()) + 60))
    assert failures(text, now=later) == {"as.token.signer"}


def changed(text: str, part: int, change: Callable[[bytes], bytes]) -> str:
    parts = text.split(".")
    raw = base64.urlsafe_b64decode(parts[part] + "==")
    parts[part] = base64.urlsafe_b64encode(change(raw)).decode().rstrip("=")
    return ".".join(parts)


def test_changed_claims_and_signatures() -> None:
    text = SERVICE.sign(claims(submods={"cpu0": submod(**{"ear.status": "warning"})}))
    forged = changed(text, 1, lambda raw: raw.replace(b"warning", b"affirming"))
    assert failures(forged) == {"as.token.signature"}
    for cut in (0, 1, 63):
        assert "as.token.signature" in failures(changed(text, 2, lambda raw: raw[:cut]))  # noqa: B023
    zero = changed(text, 2, lambda raw: bytes(len(raw)))
    assert "as.token.signature" in failures(zero)


def head(text: str, **changes: Any) -> str:
    def change(raw: bytes) -> bytes:
        value = json.loads(raw) | changes
        return json.dumps({name: item for name, item in value.items() if item != "-"}).encode()

    return changed(text, 0, change)


def test_a_key_in_the_header_is_not_believed() -> None:
    """The ``jwk`` alone, without a chain, signs for nobody."""
    text = SERVICE.sign(claims())
    jwk = json.loads(base64.urlsafe_b64decode(text.split(".")[0] + "=="))["jwk"]
    del jwk["x5c"]
    assert {"as.token.signature", "as.token.signer"} <= failures(head(text, jwk=jwk))


@pytest.mark.parametrize("alg", ["none", "HS256", "RS256", "es256", "-", 7])
def test_other_algorithms(alg: Any) -> None:
    with pytest.raises(FormatError, match="ES256"):
        Token.parse(head(SERVICE.sign(claims()), alg=alg))


@pytest.mark.parametrize(
    "text",
    ["", "..", "a.b", "a.b.c.d", "é.é.é", "e30.e30.", "W10.W10.", "e30.!.e30", "\x00.\x00.\x00",
     "eyJhIjoxLCJhIjoyfQ.e30.e30"],
)  # fmt: skip
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(CaiError):
        Token.parse(text)


@pytest.mark.parametrize("x5c", [7, "x", ["!"], ["AAAA"], [""], [None], ["AAAA"] * 20])
def test_chains_of_another_form(x5c: Any) -> None:
    text = SERVICE.sign(claims())
    jwk = json.loads(base64.urlsafe_b64decode(text.split(".")[0] + "=="))["jwk"]
    with pytest.raises(FormatError):
        Token.parse(head(text, jwk=jwk | {"x5c": x5c}))


def test_one_that_is_too_long() -> None:
    with pytest.raises(LimitExceeded):
        Token.parse("a" * (MAX_TOKEN + 1))


@pytest.mark.parametrize("name", ["rats_tls_background_check", "rats_tls_passport"])
def test_recorded_tokens(name: str) -> None:
    """They verify at the time of their recording, and not a day later."""
    record = recording(name)
    text = record["as_tokens"][0]
    token = Token.parse(text)
    roots = x509.load_pem_x509_certificates(record["as_certificate_pem"].encode())
    assert token.expires is not None
    then = datetime.fromtimestamp(token.expires - 10, UTC)
    assert failures(text, roots=roots, now=then) == set()
    late = datetime.fromtimestamp(token.expires + CLOCK_SKEW_S + 1, UTC)
    assert "as.token.time" in failures(text, roots=roots, now=late)
