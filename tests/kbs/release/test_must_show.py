"""What must be shown of releases: each refusal with a code of its own, and in the audit log.

The names of these tests are those of the issue; what they rest on is tested elsewhere in detail.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from cai.attest import rcar
from cai.attest.evidence import DeviceEvidence
from cai.attest.policy import policy_for
from cai.attest.tdx.runtime_events import launch_events
from kbs.keys.signing import KeyName
from kbs.protocol.token import session_of_token, sign_token
from kbs.server.service import open_broker
from tests.kbs.release.guests import ask, failed, lease, record, refused, request
from tests.kbs.world import SECRET_TEXT, STATEMENT, URI, Site, Visitor

LAUNCH = b'{"cai-launch":1}'


def refused_evidence(site: Site, answer: httpx.Response, code: str) -> None:
    """Evidence that a hard check refused: its code, its leaf, and nothing released."""
    refused(answer, 403, code, "AttestationError")
    row = site.last("attest")
    assert row["decision"] == "deny"
    assert code in failed(row)
    assert row["request"] == answer.json()["request"]
    assert not [item for item in site.audit() if item["decision"] == "allow" and "served" in item]


def refused_release(site: Site, answer: httpx.Response, code: str) -> None:
    """A release that policies refused: its code and its leaf."""
    refused(answer, 403, code)
    row = site.last("release")
    assert row["decision"] == "deny"
    assert code in failed(row)
    assert row["request"] == answer.json()["request"]
    assert "served" not in row


def refused_stranger(site: Site, answer: httpx.Response, code: str, kind: str) -> None:
    """A request of nobody: its code, counted under it in one leaf a minute."""
    refused(answer, 401, code, kind)
    row = site.last("unauthenticated")
    assert row["decision"] == "deny"
    assert row["details"].get(code, 0) >= 1


# Both release forms of decisions §2.3.


def test_the_form_with_a_statement_is_released(leasing: Site, visitor: Visitor) -> None:
    held = lease(leasing, visitor)
    assert held.grant.contents.reveal() == record()
    assert held.ticket.claims.launch_digest == STATEMENT.launch_digest


def stock(visitor: Visitor, nonce: str, launch: bytes = LAUNCH) -> bytes:
    """Evidence as for a stock broker: no statement, the launch in RTMR3 and in the event log."""
    from cai.attest.sim import GuestSettings
    from cai.attest.statement import stock_report_data

    guest = visitor.platform.guest(GuestSettings(rtmr3_events=launch_events(launch)))
    gpu_nonce = rcar.device_digest(nonce, visitor.key.jwk)[:32]
    devices = visitor.platform.devices(1).collect(gpu_nonce)
    additional = rcar.additional_evidence(devices, None)
    assert "cai" not in json.loads(additional)
    digest = rcar.primary_digest(nonce, visitor.key.jwk, additional)
    return rcar.Attestation(
        nonce, visitor.key.jwk,
        rcar.encode_tdx_evidence(guest.quote(stock_report_data(digest)), guest.event_log()),
        additional,
    ).encode()  # fmt: skip


STOCK_REGO = b"""package policy
import rego.v1
default allow := false
allow if {
    input.submods.cpu0["ear.status"] == "affirming"
    input.submods.gpu0["ear.status"] == "affirming"
}
"""


@pytest.fixture
def stock_site(site: Site, visitor: Visitor) -> Site:
    """A site whose policy judges RTMR3 by its launch event and asks for no statement."""
    from hashlib import sha384

    site.broker.core.checkpoints.interval = 0.0
    site.allow(visitor)
    digest = sha384(LAUNCH).hexdigest()
    text = policy_for(
        visitor.facts(), profile="operated", launch_digest=digest, rtmr3_events=True
    ).replace(b"[guest]\n", b"[guest]\nunsafe_without_facts = true\n")
    assert site.set_policy("verification-policy", text).status_code == 200
    assert site.set_policy("resource-policy", STOCK_REGO).status_code == 200
    return site


def test_the_stock_form_is_released_by_its_measured_launch(
    stock_site: Site, visitor: Visitor
) -> None:
    nonce, cookie = stock_site.auth()
    assert stock_site.attest(cookie, stock(visitor, nonce)).status_code == 200
    assert visitor.open(stock_site.get(cookie)) == SECRET_TEXT


def test_the_stock_form_of_another_launch_is_refused(stock_site: Site, visitor: Visitor) -> None:
    nonce, cookie = stock_site.auth()
    body = stock(visitor, nonce, b'{"cai-launch":2}')
    assert stock_site.attest(cookie, body).status_code == 200
    refused_release(stock_site, stock_site.get(cookie), "tdx.rtmr3")
    assert "guest.launch_digest" in failed(stock_site.last("release"))


def test_the_stock_form_is_leased_too(stock_site: Site, visitor: Visitor) -> None:
    from hashlib import sha384

    from tests.kbs.release.guests import opened

    nonce, cookie = stock_site.auth()
    assert stock_site.attest(cookie, stock(visitor, nonce)).status_code == 200
    wanted = request()
    held = opened(visitor, wanted, ask(stock_site, cookie, wanted))
    assert held.ticket.claims.launch_digest == sha384(LAUNCH).hexdigest()


# The member `cai`, where the policy demands it.


def test_a_missing_member_is_refused(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.but(statement=None).attested(allowed)
    refused_release(allowed, allowed.get(cookie), "guest.launch_digest")


def test_an_altered_member_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    value = json.loads(visitor.body(nonce))
    text = value["tee-evidence"]["additional_evidence"]
    value["tee-evidence"]["additional_evidence"] = text.replace("sealed", "operated")
    answer = allowed.attest(cookie, json.dumps(value).encode())
    refused_evidence(allowed, answer, "tdx.report_data")


def test_a_duplicate_member_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    text = rcar.additional_evidence((), visitor.statement)
    body = visitor.body(nonce, additional=text[:-1] + "," + text[1:])
    refused_evidence(allowed, allowed.attest(cookie, body), "rcar.form")


# Tokens.


def claims_of(site: Site, visitor: Visitor) -> dict[str, Any]:
    from cai.attest.jwk import b64u_decode

    answer, _ = visitor.attested(site)
    value: dict[str, Any] = json.loads(
        b64u_decode(answer.json()["token"].split(".")[1], what="token")
    )
    return value


def bearer(site: Site, claims: dict[str, Any], name: KeyName = KeyName.TOKEN) -> httpx.Response:
    core = site.broker.core
    with core.database.read() as connection:
        key = core.signing.current(connection, name).es256
    header = {"Authorization": f"Bearer {sign_token(claims, key)}"}
    return site.get(None, headers=header)


def test_an_appraisal_token_releases_nothing(allowed: Site, visitor: Visitor) -> None:
    """A token of `/as/`: it says `use: appraisal`, and another key signs it."""
    claims = claims_of(allowed, visitor)
    answer = bearer(allowed, claims, KeyName.APPRAISAL)
    refused_stranger(allowed, answer, "token-unknown", "TokenVerifierError")
    allowed.clock.ahead += timedelta(seconds=61)
    answer = bearer(allowed, claims | {"use": "appraisal"})
    refused_stranger(allowed, answer, "token-use", "TokenVerifierError")


def test_a_token_of_the_attestation_service_releases_nothing(
    allowed: Site, visitor: Visitor
) -> None:
    from cai.attest.jwk import b64u_encode
    from cai.attest.sim import GuestSettings

    bound = bytes(range(64))
    quote = visitor.platform.guest(GuestSettings()).quote(bound)
    evidence = json.dumps(rcar.encode_tdx_evidence(quote, None)).encode()
    entry = {
        "tee": "tdx", "evidence": b64u_encode(evidence),
        "runtime_data": {"raw": b64u_encode(bound)},
    }  # fmt: skip
    appraised = allowed.call("POST", "/as/attestation", {"verification_requests": [entry]})
    assert appraised.status_code == 200, appraised.text
    token = appraised.text.strip().strip('"')
    assert token.count(".") == 2
    answer = allowed.get(None, headers={"Authorization": f"Bearer {token}"})
    refused_stranger(allowed, answer, "token-unknown", "TokenVerifierError")


def test_a_token_after_a_policy_change_releases_nothing(allowed: Site, visitor: Visitor) -> None:
    claims = claims_of(allowed, visitor)
    assert bearer(allowed, claims).status_code == 200
    text = policy_for(visitor.but(image="other").facts())
    assert allowed.set_policy("verification-policy", text).status_code == 200
    refused_release(allowed, bearer(allowed, claims), "tdx.mr_td")
    # Not even where its own claims still affirm everything.
    assert claims["submods"]["cpu0"]["ear.status"] == "affirming"


def test_an_expired_token_releases_nothing(allowed: Site, visitor: Visitor) -> None:
    claims = claims_of(allowed, visitor)
    answer = bearer(allowed, claims | {"exp": int(allowed.clock().timestamp()) - 1})
    refused_stranger(allowed, answer, "token-expired", "TokenVerifierError")


def test_a_token_of_a_foreign_audience_releases_nothing(allowed: Site, visitor: Visitor) -> None:
    claims = claims_of(allowed, visitor)
    answer = bearer(allowed, claims | {"aud": "ff" * 16})
    refused_stranger(allowed, answer, "token-audience", "TokenVerifierError")


def test_a_token_of_another_broker_releases_nothing(
    allowed: Site, other_site: Site, visitor: Visitor
) -> None:
    other_site.allow(visitor)
    answer = bearer(other_site, claims_of(allowed, visitor))
    refused_stranger(other_site, answer, "token-audience", "TokenVerifierError")


def test_a_retired_key_still_verifies_for_its_overlap(allowed: Site, visitor: Visitor) -> None:
    from kbs.audit.log import Entry

    core, claims = allowed.broker.core, claims_of(allowed, visitor)
    with core.database.read() as connection:
        old = core.signing.current(connection, KeyName.TOKEN).es256
    with core.database.decide() as connection:
        change = core.signing.rotate(connection, KeyName.TOKEN, now=core.clock())
        entry = Entry("key.rotate", {"kind": "system"}, "r", allowed=True, change=change)
        core.audit.append(connection, entry, core.clock())
    header = {"Authorization": f"Bearer {sign_token(claims, old)}"}
    assert allowed.get(None, headers=header).status_code == 200
    assert visitor.attested(allowed)[0].status_code == 200


# A policy that the client names.


def test_a_policy_that_the_client_names_must_be_the_bound_one(
    allowed: Site, visitor: Visitor
) -> None:
    def visit(selector: str) -> httpx.Response:
        extra = {"attestation-policy-selector": selector}
        answer = allowed.call(
            "POST", "/kbs/v0/auth", {"version": "0.4.0", "tee": "tdx", "extra-params": extra}
        )
        cookie = answer.cookies["kbs-session-id"]
        assert allowed.attest(cookie, visitor.body(answer.json()["nonce"])).status_code == 200
        return allowed.get(cookie)

    assert visit("default").status_code == 200
    refused_release(allowed, visit("another"), "policy.selector")


# One nonce, two replicas.


@pytest.fixture(params=["sqlite", "postgresql"])
def replicas(
    request: pytest.FixtureRequest, tmp_path: Path, platform_dir: Path, visitor: Visitor
) -> Iterator[list[Site]]:
    """Two brokers on one database."""
    from kbs.server.service import ServeSettings
    from tests.kbs.world import Clock

    settings = ServeSettings(
        tmp_path / "kbs-data", "127.0.0.1:0", "127.0.0.1:0",
        unsafe_simulated_root=platform_dir / "anchors",
    )
    if request.param == "postgresql":
        cluster = request.getfixturevalue("postgres")
        settings = replace(settings, database=cluster.settings(cluster.create(), pool=4))
    clock = Clock()
    brokers = [open_broker(settings, clock=clock) for _ in range(2)]
    sites = [Site(broker, settings, clock) for broker in brokers]
    sites[0].allow(visitor)
    for broker in brokers:
        broker.core.checkpoints.interval = 0.0
    yield sites
    for broker in brokers:
        broker.close()


def test_a_nonce_raced_against_two_replicas_is_spent_once(
    replicas: list[Site], visitor: Visitor
) -> None:
    one, two = replicas
    nonce, cookie = one.auth()
    good, bad = visitor.body(nonce), visitor.but(debug=True).body(nonce)
    with ThreadPoolExecutor(4) as threads:
        answers = list(
            threads.map(
                lambda job: job[0].attest(cookie, job[1]),
                [(one, bad), (two, bad), (one, bad), (two, bad)],
            )
        )
    spent = [answer for answer in answers if answer.status_code == 403]
    late = [answer for answer in answers if answer.status_code == 401]
    assert (len(spent), len(late)) == (1, 3)
    for answer in late:
        refused(answer, 401, "nonce-replayed", "TokenNotFound")
    # Nor does good evidence help afterwards, at either replica.
    for site in replicas:
        refused(site.attest(cookie, good), 401, "nonce-replayed", "TokenNotFound")
        assert failed(site.last("attest")) == {"kbs.nonce-replayed"}
        assert site.get(cookie).status_code == 401


def test_a_block_at_one_replica_holds_at_the_other(
    replicas: list[Site], visitor: Visitor
) -> None:
    one, two = replicas
    _, cookie = visitor.attested(one)
    assert visitor.open(two.get(cookie)) == SECRET_TEXT
    assert one.admin("POST", f"block/model/{URI}", {"reason": "x"}).status_code == 200
    refused_release(two, two.get(cookie), "revoked.model")
    assert two.admin("DELETE", f"block/model/{URI}").status_code == 200
    assert visitor.open(one.get(cookie)) == SECRET_TEXT


def test_a_lease_of_one_replica_is_renewed_by_the_other(
    replicas: list[Site], visitor: Visitor
) -> None:
    from tests.kbs.release.guests import renew

    one, two = replicas
    held = lease(one, visitor)
    assert renew(two, visitor, held).grant.lease == held.grant.lease


def test_leases_at_both_replicas_do_not_unsettle_each_other(
    replicas: list[Site], visitor: Visitor
) -> None:
    def visit(number: int) -> str:
        mine = visitor.but(key=rcar.TeeKey.generate())
        return lease(replicas[number % 2], mine).grant.lease

    with ThreadPoolExecutor(6) as threads:
        assert len(set(threads.map(visit, range(12)))) == 12


# Default start.


def test_perfect_evidence_without_a_policy_gets_nothing(site: Site, visitor: Visitor) -> None:
    assert site.admin("POST", f"resource/{URI}", SECRET_TEXT).status_code == 200
    _, cookie = visitor.attested(site)
    refused_release(site, site.get(cookie), "policy.verification")
    assert failed(site.last("release")) == {"policy.verification", "policy.release"}


# Evidence.


def test_a_debug_guest_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    answer = allowed.attest(cookie, visitor.but(debug=True).body(nonce))
    refused_evidence(allowed, answer, "tdx.debug")


def test_a_replayed_nonce_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    body = visitor.but(debug=True).body(nonce)
    allowed.attest(cookie, body)
    refused(allowed.attest(cookie, visitor.body(nonce)), 401, "nonce-replayed", "TokenNotFound")
    row = allowed.last("attest")
    assert (row["decision"], failed(row)) == ("deny", {"kbs.nonce-replayed"})


def test_an_attestation_of_another_session_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, _ = allowed.auth()
    _, cookie = allowed.auth()
    refused_evidence(allowed, allowed.attest(cookie, visitor.body(nonce)), "rcar.nonce")


def test_a_wrong_key_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    value = json.loads(visitor.body(nonce))
    value["runtime-data"]["tee-pubkey"] = rcar.TeeKey.generate().jwk.to_json()
    answer = allowed.attest(cookie, json.dumps(value).encode())
    refused_evidence(allowed, answer, "tdx.report_data")


def test_swapped_gpu_evidence_is_refused(allowed: Site, visitor: Visitor) -> None:
    stale = visitor.platform.devices(1).collect(bytes(32))
    nonce, cookie = allowed.auth()
    body = visitor.but(bend_devices=lambda _fresh: stale).body(nonce)
    refused_evidence(allowed, allowed.attest(cookie, body), "gpu.0.nonce")


def test_swapped_gpu_certificates_are_refused(allowed: Site, visitor: Visitor) -> None:
    def swap(devices: tuple[DeviceEvidence, ...]) -> tuple[DeviceEvidence, ...]:
        one, two = devices
        return (replace(one, chain=two.chain), replace(two, chain=one.chain))

    nonce, cookie = allowed.auth()
    body = visitor.but(gpus=2, bend_devices=swap).body(nonce)
    refused_evidence(allowed, allowed.attest(cookie, body), "gpu.0.signature")


def test_a_simulated_root_in_production_is_refused(
    tmp_path: Path, site: Site, visitor: Visitor
) -> None:
    settings = replace(
        site.settings, data=tmp_path / "production", unsafe_simulated_root=None,
        collateral=visitor.platform.anchors / "collateral",
    )  # fmt: skip
    broker = open_broker(settings, clock=site.clock)
    try:
        production = Site(broker, settings, site.clock)
        production.allow(visitor)
        nonce, cookie = production.auth()
        answer = production.attest(cookie, visitor.body(nonce))
        refused_evidence(production, answer, "tdx.root")
        assert production.get(cookie).status_code == 401
    finally:
        broker.close()


def test_simulated_facts_never_reach_a_production_release(
    allowed: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if verification were wrong: the release itself looks at the realm."""
    from kbs.names import Realm

    _, cookie = visitor.attested(allowed)
    monkeypatch.setattr(type(allowed.broker.instance), "realm", Realm.PRODUCTION, raising=False)
    object.__setattr__(allowed.broker.instance, "realm", Realm.PRODUCTION)
    refused_release(allowed, allowed.get(cookie), "kbs.realm")


def test_a_token_verifies_for_one_broker_and_realm_only(allowed: Site, visitor: Visitor) -> None:
    from cai.errors import Unauthenticated
    from kbs.names import Realm

    core = allowed.broker.core
    with core.database.read() as connection:
        key = core.signing.current(connection, KeyName.TOKEN).es256
    token = sign_token(claims_of(allowed, visitor), key)
    with pytest.raises(Unauthenticated) as caught:
        session_of_token(
            token, key.public_key(), realm=Realm.PRODUCTION, instance=core.instance.id,
            now=core.clock(),
        )  # fmt: skip
    assert caught.value.machine_code == "token-use"
