"""The whole protocol as a guest meets it: what is released, and everything that is refused."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from cai.attest import rcar
from cai.attest.evidence import DeviceEvidence
from cai.attest.jwk import b64u_decode
from cai.attest.policy import policy_for
from cai.attest.statement import ReleaseStatement, stock_report_data
from tests.kbs.world import SECRET_TEXT, URI, Site, Visitor


def failed(row: dict[str, Any]) -> set[str]:
    return {item["name"] for item in row["checks"] if item["outcome"] == "fail"}


def claims(token: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(b64u_decode(token.split(".")[1], what="token"))
    return value


# What is released.


def test_a_guest_that_proves_itself_gets_the_key(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    assert visitor.open(allowed.get(cookie)) == SECRET_TEXT
    row = allowed.last("release")
    assert row["decision"] == "allow"
    assert row["served"] == 1
    assert row["simulated"] is True
    assert row["unsafe"] == [
        "gpu.unsafe_without_rim", "gpu.unsafe_without_ocsp", "unsafe_simulated_root",
    ]  # fmt: skip
    assert row["hardware"]["ppid"]
    assert set(row["policies"]) == {"resource/", "verification/default"}
    assert len(row["evidence"]["quote_sha256"]) == 64
    assert not failed(row)


def test_only_the_guests_key_opens_the_answer(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    answer = allowed.get(cookie)
    with pytest.raises(Exception, match="another key"):
        visitor.but(key=rcar.TeeKey.generate()).open(answer)


def test_the_newest_version_is_released(allowed: Site, visitor: Visitor) -> None:
    assert allowed.admin("POST", f"resource/{URI}", b"second").json() == {"version": 2}
    _, cookie = visitor.attested(allowed)
    assert visitor.open(allowed.get(cookie)) == b"second"
    assert allowed.last("release")["served"] == 2


def test_the_token_is_ear_shaped_and_marked_simulated(allowed: Site, visitor: Visitor) -> None:
    answer, _ = visitor.attested(allowed)
    token = answer.json()["token"]
    value = claims(token)
    assert json.loads(b64u_decode(token.split(".")[0], what="h")) == {"alg": "ES256", "typ": "JWT"}
    assert value["iss"] == "CAI-SIMULATED"
    assert value["aud"] == allowed.broker.instance.id
    assert value["use"] == "release"
    assert 0 < value["exp"] - value["iat"] <= 300
    assert set(value["submods"]) == {"cpu0", "gpu0"}
    for submod in value["submods"].values():
        assert submod["ear.status"] == "affirming"
        assert submod["simulated"] is True
        assert "ear.trustworthiness-vector" in submod
    evidence = value["submods"]["cpu0"]["ear.veraison.annotated-evidence"]
    assert evidence["runtime_data_claims"]["tee-pubkey"] == visitor.key.jwk.to_json()
    assert evidence["tdx"]["td_attributes"]["debug"] is False
    assert len(token) < 16 * 1024


def test_attesting_twice_in_one_session_returns_the_stored_token(
    allowed: Site, visitor: Visitor
) -> None:
    nonce, cookie = allowed.auth()
    body = visitor.body(nonce)
    first = allowed.attest(cookie, body)
    before = len(allowed.audit())
    assert allowed.attest(cookie, body).json() == first.json()
    assert len(allowed.audit()) == before


def test_a_bearer_token_stands_for_its_session(allowed: Site, visitor: Visitor) -> None:
    answer, _ = visitor.attested(allowed)
    header = {"Authorization": f"Bearer {answer.json()['token']}"}
    assert visitor.open(allowed.get(None, headers=header)) == SECRET_TEXT


def test_protocol_0_2_0_is_served(allowed: Site, visitor: Visitor) -> None:
    from cai.attest.sim import GuestSettings

    nonce, cookie = allowed.auth("0.2.0")
    digest = rcar.device_digest(nonce, visitor.key.jwk)
    quote = visitor.platform.guest(GuestSettings()).quote(stock_report_data(digest))
    body = {
        "tee-pubkey": visitor.key.jwk.to_json(),
        "tee-evidence": rcar.encode_tdx_evidence(quote, None),
    }
    assert allowed.attest(cookie, json.dumps(body).encode()).status_code == 200
    # It verifies, but brings no GPU and no statement, so this policy denies it.
    answer = allowed.get(cookie)
    assert answer.status_code == 403
    assert {"gpu.count", "guest.launch_digest"} <= failed(allowed.last("release"))


# No policy, other policies.


def test_without_any_policy_nothing_is_released(site: Site, visitor: Visitor) -> None:
    site.admin("POST", f"resource/{URI}", SECRET_TEXT)
    token, cookie = visitor.attested(site)
    status = claims(token.json()["token"])["submods"]["cpu0"]["ear.status"]
    assert status == "none"
    answer = site.get(cookie)
    assert answer.status_code == 403
    assert answer.json()["type"].endswith("/PolicyDeny")
    assert failed(site.last("release")) == {"policy.verification", "policy.release"}


@pytest.mark.parametrize("route", ["resource-policy", "verification-policy"])
def test_one_layer_alone_is_not_enough(site: Site, visitor: Visitor, route: str) -> None:
    from cai.attest.policy import policy_for

    site.admin("POST", f"resource/{URI}", SECRET_TEXT)
    text = b"package policy\ndefault allow := true\n"
    if route == "verification-policy":
        text = policy_for(visitor.facts())
    assert site.set_policy(route, text).status_code == 200
    _, cookie = visitor.attested(site)
    assert site.get(cookie).status_code == 403


@pytest.mark.parametrize(
    "rule",
    [
        "", 'allow := "true" if { input.iss }', "allow := 1 if { input.iss }",
        "allow := [true] if { input.iss }", "allow := null if { input.iss }",
        "allow if { 1 / 0 == 1 }", 'allow if { input.iss == "someone else" }',
        "allow if { input.iss }\nallow := false if { input.iss }",
        "allow if { not_there(input.iss) }", "allow if { input.submods.gpu1 }",
    ],
)
def test_only_true_allows(allowed: Site, visitor: Visitor, rule: str) -> None:
    text = f"package policy\nimport rego.v1\ndefault allow := false\n{rule}\n"
    stored = allowed.set_policy("resource-policy", text.encode())
    if stored.status_code != 200:
        assert stored.status_code == 400
        return
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 403
    assert failed(allowed.last("release")) == {"release.allow"}


def test_a_rule_on_the_path_is_obeyed(allowed: Site, visitor: Visitor) -> None:
    rule = 'allow if { data["resource-path"][0] == "models"; data.plugin == "resource" }'
    text = f"package policy\nimport rego.v1\ndefault allow := false\n{rule}\n"
    assert allowed.set_policy("resource-policy", text.encode()).status_code == 200
    assert allowed.admin("POST", "resource/others/minilm/key", b"x").status_code == 200
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 200
    assert allowed.get(cookie, "others/minilm/key").status_code == 403


def test_a_changed_policy_holds_for_sessions_that_attested_before(
    allowed: Site, visitor: Visitor
) -> None:
    _, cookie = visitor.attested(allowed)
    assert allowed.get(cookie).status_code == 200
    allowed.set_policy("resource-policy", b"package policy\ndefault allow := false\n")
    assert allowed.get(cookie).status_code == 403


# Guests that are refused.


def test_another_measurement_is_denied_by_name(allowed: Site, visitor: Visitor) -> None:
    other = visitor.but(image="other")
    answer, cookie = other.attested(allowed)
    status = claims(answer.json()["token"])["submods"]["cpu0"]["ear.status"]
    assert status == "contraindicated"
    refused = allowed.get(cookie)
    assert refused.status_code == 403
    assert "tdx.mr_td" in refused.json()["detail"]
    row = allowed.last("release")
    assert row["decision"] == "deny"
    assert "tdx.mr_td" in failed(row)


def test_another_launch_is_denied(allowed: Site, visitor: Visitor) -> None:
    statement = ReleaseStatement("cd" * 48, visitor.statement.guest_facts, "0.1.0")  # type: ignore[union-attr]
    _, cookie = visitor.but(statement=statement).attested(allowed)
    assert allowed.get(cookie).status_code == 403
    assert failed(allowed.last("release")) == {"guest.launch_digest"}


def test_a_guest_without_statement_is_denied(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.but(statement=None).attested(allowed)
    assert allowed.get(cookie).status_code == 403
    assert "guest.launch_digest" in failed(allowed.last("release"))


def test_a_guest_without_gpu_is_denied(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.but(gpus=0).attested(allowed)
    assert allowed.get(cookie).status_code == 403
    assert "gpu.count" in failed(allowed.last("release"))


def refusal(site: Site, cookie: str, body: bytes) -> set[str]:
    """The failed checks of evidence that must be refused."""
    answer = site.attest(cookie, body)
    assert answer.status_code == 403, answer.text
    assert answer.json()["type"].endswith("/AttestationError")
    row = site.last("attest")
    assert row["decision"] == "deny"
    assert row["request"] == answer.json()["request"]
    assert site.get(cookie).status_code == 401
    return failed(row)


def test_a_debug_guest_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    assert "tdx.debug" in refusal(allowed, cookie, visitor.but(debug=True).body(nonce))


def test_a_spent_nonce_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    refusal(allowed, cookie, visitor.but(debug=True).body(nonce))
    again = allowed.attest(cookie, visitor.body(nonce))
    assert again.status_code == 401
    assert "used before" in again.json()["detail"]
    assert allowed.last("attest")["decision"] == "deny"


def test_a_replayed_body_is_refused_in_a_new_session(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    body = visitor.body(nonce)
    assert allowed.attest(cookie, body).status_code == 200
    _, other = allowed.auth()
    assert "rcar.nonce" in refusal(allowed, other, body)


def test_a_replayed_quote_under_a_new_nonce_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, _ = allowed.auth()
    value = json.loads(visitor.body(nonce))
    fresh, cookie = allowed.auth()
    value["runtime-data"]["nonce"] = fresh
    checks = refusal(allowed, cookie, json.dumps(value).encode())
    assert "tdx.report_data" in checks


def test_another_key_than_the_bound_one_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    value = json.loads(visitor.body(nonce))
    value["runtime-data"]["tee-pubkey"] = rcar.TeeKey.generate().jwk.to_json()
    assert "tdx.report_data" in refusal(allowed, cookie, json.dumps(value).encode())


def test_gpu_evidence_of_another_handshake_is_refused(allowed: Site, visitor: Visitor) -> None:
    stale = visitor.platform.devices(1).collect(bytes(32))
    nonce, cookie = allowed.auth()
    body = visitor.but(bend_devices=lambda _fresh: stale).body(nonce)
    assert "gpu.0.nonce" in refusal(allowed, cookie, body)


def test_one_gpu_shown_twice_is_refused(allowed: Site, visitor: Visitor) -> None:
    def twice(devices: tuple[DeviceEvidence, ...]) -> tuple[DeviceEvidence, ...]:
        return (devices[0], devices[0])

    nonce, cookie = allowed.auth()
    assert refusal(allowed, cookie, visitor.but(bend_devices=twice).body(nonce))


def test_swapped_certificates_are_refused(allowed: Site, visitor: Visitor) -> None:
    def swap(devices: tuple[DeviceEvidence, ...]) -> tuple[DeviceEvidence, ...]:
        one, two = devices
        return (replace(one, chain=two.chain), replace(two, chain=one.chain))

    nonce, cookie = allowed.auth()
    assert refusal(allowed, cookie, visitor.but(gpus=2, bend_devices=swap).body(nonce))


def test_a_quote_bit_flip_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    value = json.loads(visitor.body(nonce))
    quote = bytearray(base64.b64decode(value["tee-evidence"]["primary_evidence"]["quote"]))
    quote[200] ^= 1
    value["tee-evidence"]["primary_evidence"]["quote"] = base64.b64encode(quote).decode()
    assert refusal(allowed, cookie, json.dumps(value).encode())


@pytest.mark.parametrize("quote", [b"x", bytes(632), b"\x04\x00" + bytes(5000)])
def test_rubbish_quotes_are_refused(allowed: Site, visitor: Visitor, quote: bytes) -> None:
    nonce, cookie = allowed.auth()
    value = json.loads(visitor.body(nonce))
    value["tee-evidence"]["primary_evidence"]["quote"] = base64.b64encode(quote).decode()
    assert refusal(allowed, cookie, json.dumps(value).encode())


def test_an_altered_statement_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    value = json.loads(visitor.body(nonce))
    text = value["tee-evidence"]["additional_evidence"]
    value["tee-evidence"]["additional_evidence"] = text.replace("sealed", "operated")
    assert text != value["tee-evidence"]["additional_evidence"]
    assert "tdx.report_data" in refusal(allowed, cookie, json.dumps(value).encode())


def test_a_dropped_statement_is_refused(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    body = visitor.body(nonce, sent="")
    assert "tdx.report_data" in refusal(allowed, cookie, body)


@pytest.mark.parametrize("where", ["outer", "inner"])
def test_a_member_twice_is_refused_even_when_bound(
    allowed: Site, visitor: Visitor, where: str
) -> None:
    nonce, cookie = allowed.auth()
    text = rcar.additional_evidence((), visitor.statement)
    if where == "outer":
        text = text[:-1] + "," + text[1:]
    else:
        text = text.replace('"agent_version"', '"agent_version":"9","agent_version"')
    body = visitor.body(nonce, additional=text)
    assert refusal(allowed, cookie, body) == {"rcar.form"}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"sample":{}}', '{"nvidia":1}', '{"cai":{"purpose":"channel"}}']
)
def test_additional_evidence_of_another_form_is_refused(
    allowed: Site, visitor: Visitor, text: str
) -> None:
    nonce, cookie = allowed.auth()
    body = visitor.body(nonce, additional=text)
    assert refusal(allowed, cookie, body) == {"rcar.form"}


def test_init_data_must_be_in_mrconfigid(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    value = json.loads(visitor.body(nonce))
    value["init-data"] = {"format": "toml", "body": 'version="0.1.0"\nalgorithm="sha384"\n'}
    assert refusal(allowed, cookie, json.dumps(value).encode()) == {"tdx.init_data"}


# Wrong messages.


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"not json", 400), (b"[]", 400), (b"{}", 400), (b"\xff\xfe", 400),
        (b'{"version":"0.4.0","tee":"tdx"}', 400),
        (b'{"version":"0.4.0","version":"0.4.0","tee":"tdx","extra-params":{}}', 400),
        (b'{"version":"0.4.0","tee":"snp","extra-params":{}}', 400),
        (b'{"version":"0.4.0","tee":"sample","extra-params":{}}', 400),
        (b'{"version":1.5,"tee":"tdx","extra-params":{}}', 400),
        (b"[" * 5000, 413), (b" " * (rcar.MAX_MESSAGE + 1), 413),
    ],
)
def test_bad_requests_get_no_challenge(site: Site, body: bytes, status: int) -> None:
    answer = site.call("POST", "/kbs/v0/auth", body)
    assert answer.status_code == status
    assert set(answer.json()) >= {"type", "detail", "request"}
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("version", ["0.3.0", "0.5.0", "1", ""])
def test_other_versions_are_told_which_is_expected(site: Site, version: str) -> None:
    answer = site.call(
        "POST", "/kbs/v0/auth", {"version": version, "tee": "tdx", "extra-params": {}}
    )
    assert answer.status_code == 400
    expected = f"KBS Client Protocol Version Mismatch: expect =0.4.0 while the request is {version}"
    assert answer.json()["detail"] == expected


@pytest.mark.parametrize("version", ["0.1.0", "0.1.1"])
def test_old_clients_get_a_nonce_and_then_a_clear_refusal(site: Site, version: str) -> None:
    answer = site.call(
        "POST", "/kbs/v0/auth", {"version": version, "tee": "tdx", "extra-params": "foo"}
    )
    assert set(answer.json()) == {"nonce", "extra-params"}
    assert answer.json()["extra-params"] == ""
    assert len(base64.b64decode(answer.json()["nonce"])) == 32
    refused = site.attest(answer.cookies["kbs-session-id"], b'{"tee-pubkey":{}}')
    assert refused.status_code == 400
    assert "Version Mismatch" in refused.json()["detail"]


def test_the_cookie_is_for_http_only(site: Site) -> None:
    answer = site.call(
        "POST", "/kbs/v0/auth", {"version": "0.4.0", "tee": "tdx", "extra-params": {}}
    )
    header = answer.headers["set-cookie"]
    assert header.startswith("kbs-session-id=")
    assert "HttpOnly" in header
    assert answer.headers["cache-control"] == "no-store"


def test_nonces_are_never_the_same(site: Site) -> None:
    assert len({site.auth()[0] for _ in range(8)}) == 8


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"runtime-data":{}}', b"null"])
def test_bad_attestations_leave_the_nonce(site: Site, visitor: Visitor, body: bytes) -> None:
    nonce, cookie = site.auth()
    answer = site.attest(cookie, body)
    assert answer.status_code == 400
    assert site.last("attest")["decision"] == "deny"
    assert site.attest(cookie, visitor.body(nonce)).status_code == 200


def test_wrong_kinds_of_key_are_refused(site: Site, visitor: Visitor) -> None:
    nonce, cookie = site.auth()
    value = json.loads(visitor.body(nonce))
    for changes in ({"kty": "RSA"}, {"alg": "RSA1_5"}, {"crv": "P-384"}, {"x": "AA"}):
        value["runtime-data"]["tee-pubkey"] = {**visitor.key.jwk.to_json(), **changes}
        answer = site.attest(cookie, json.dumps(value).encode())
        assert answer.status_code == 400, changes


def test_oversize_evidence_is_refused(site: Site) -> None:
    _, cookie = site.auth()
    answer = site.attest(cookie, b" " * (rcar.MAX_MESSAGE + 1))
    assert answer.status_code == 413


@pytest.mark.parametrize("cookie", ["", "x", "0" * 32, "é", "0" * 5000, '"', "a=b", "\x7f"])
def test_rubbish_cookies_are_no_session(site: Site, visitor: Visitor, cookie: str) -> None:
    body = visitor.body("AAAA")
    headers = {"Cookie": b"kbs-session-id=" + cookie.encode("latin-1")}
    for method, path, content in (("POST", "attest", body), ("GET", f"resource/{URI}", None)):
        answer = site.call(method, f"/kbs/v0/{path}", content, headers=headers)  # type: ignore[arg-type]
        assert answer.status_code == 401
        assert answer.json()["type"].endswith("/TokenNotFound")


def test_a_session_that_has_not_attested_gets_nothing(allowed: Site) -> None:
    _, cookie = allowed.auth()
    answer = allowed.get(cookie)
    assert answer.status_code == 401
    assert allowed.last("release")["decision"] == "deny"


def test_sessions_expire(allowed: Site, visitor: Visitor) -> None:
    nonce, waiting = allowed.auth()
    answer, cookie = visitor.attested(allowed)
    allowed.clock.ahead = timedelta(seconds=301)
    assert allowed.attest(waiting, visitor.body(nonce)).status_code == 401
    assert allowed.get(cookie).status_code == 401
    header = {"Authorization": f"Bearer {answer.json()['token']}"}
    assert allowed.get(None, headers=header).status_code == 401


@pytest.mark.parametrize("bend", ["signature", "claims", "alg", "parts", "empty", "scheme"])
def test_bent_bearer_tokens_are_refused(allowed: Site, visitor: Visitor, bend: str) -> None:
    answer, _ = visitor.attested(allowed)
    header, body, signature = answer.json()["token"].split(".")
    token = f"{header}.{body}.{signature}"
    if bend == "signature":
        token = f"{header}.{body}.{signature[:-4]}AAAA"
    if bend == "claims":
        token = f"{header}.{body[:-4]}fQ.{signature}"
    if bend == "alg":
        none = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
        token = f"{none}.{body}."
    if bend == "parts":
        token = f"{header}.{body}"
    if bend == "empty":
        token = ""
    scheme = "Basic" if bend == "scheme" else "Bearer"
    refused = allowed.get(None, headers={"Authorization": f"{scheme} {token}"})
    assert refused.status_code == 401


def test_a_token_of_another_broker_is_refused(
    allowed: Site, visitor: Visitor, other_site: Site
) -> None:
    answer, _ = visitor.attested(other_site)
    header = {"Authorization": f"Bearer {answer.json()['token']}"}
    assert allowed.get(None, headers=header).status_code == 401


@pytest.mark.parametrize(
    "path",
    [
        "a/b", "a/b/c/d", "a//c", "a/b/..", "../../x", "a/b/c%00", "a/b/é", ".a/b/c",
        "a/b/" + "c" * 200,
    ],
)  # fmt: skip
def test_what_names_no_resource_is_not_found(allowed: Site, visitor: Visitor, path: str) -> None:
    _, cookie = visitor.attested(allowed)
    answer = allowed.get(cookie, path)
    assert answer.status_code in (401, 404)
    assert "type" in answer.json()


def test_a_missing_resource_is_404_once_policies_allow(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.attested(allowed)
    answer = allowed.get(cookie, "models/minilm/other")
    assert answer.status_code == 404
    row = allowed.last("release")
    assert (row["decision"], row["subject"]) == ("deny", "kbs:///models/minilm/other")


def test_a_missing_resource_looks_as_denied_to_others(allowed: Site, visitor: Visitor) -> None:
    _, cookie = visitor.but(image="other").attested(allowed)
    assert allowed.get(cookie, "models/minilm/other").status_code == 403
    assert allowed.get(cookie).status_code == 403


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"), ("GET", "/kbs/v0"), ("GET", "/kbs/v0/auth"), ("PUT", "/kbs/v0/attest"),
        ("GET", "/kbs/v0/nothing"), ("POST", f"/kbs/v0/resource/{URI}"),
        ("DELETE", f"/kbs/v0/resource/{URI}"), ("POST", "/kbs/v0/resource-policy"),
        ("GET", "/kbs/v0/audit"), ("GET", "/docs"), ("GET", "/openapi.json"),
    ],
)
def test_unknown_paths_are_404_with_error_information(site: Site, method: str, path: str) -> None:
    answer = site.call(method, path)
    assert answer.status_code == 404
    assert answer.json()["type"].rpartition("/")[2] in ("InvalidRequestPath", "PluginNotFound")


def test_health_shows_realm_and_loosenings(site: Site) -> None:
    assert site.call("GET", "/healthz").json() == {
        "status": "ok", "realm": "simulated", "unsafe": ["unsafe_simulated_root"],
    }


def test_no_secret_is_in_the_audit_log(
    allowed: Site, visitor: Visitor, capfd: pytest.CaptureFixture[str]
) -> None:
    answer, cookie = visitor.attested(allowed)
    visitor.open(allowed.get(cookie))
    log = json.dumps(allowed.audit())
    shown = capfd.readouterr()
    for secret in (SECRET_TEXT.decode(), cookie, answer.json()["token"]):
        assert secret not in log
        assert secret not in shown.out + shown.err
    assert base64.b64encode(SECRET_TEXT).decode() not in log


def test_failures_of_strangers_are_counted_not_listed(site: Site) -> None:
    before = len(site.audit())
    for _ in range(20):
        site.get("0" * 32)
    assert len(site.audit()) == before + 1
    site.clock.ahead = timedelta(seconds=61)
    site.get("0" * 32)
    row = site.last("unauthenticated")
    assert row["details"] == {"session": 20}


def test_a_fault_of_our_own_tells_no_message(
    allowed: Site, visitor: Visitor, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise RuntimeError("holds planted-text")

    _, cookie = visitor.attested(allowed)
    monkeypatch.setattr(allowed.broker, "release", fault)
    answer = allowed.get(cookie)
    assert answer.status_code == 500
    assert answer.json()["type"].endswith("/PluginInternalError")
    assert "RuntimeError at test_release.py" in caplog.text
    assert "planted-text" not in answer.text + caplog.text


def test_hostile_guest_facts_stay_text(allowed: Site, visitor: Visitor) -> None:
    """A guest's own words reach Rego as strings, whatever they hold."""
    assert visitor.statement is not None
    hostile = '"}, "submods": {"cpu0": 1}} \n\\ ` $ é \u2028'
    facts = {**visitor.statement.guest_facts, "x": hostile, hostile: "y"}
    guest = visitor.but(statement=replace(visitor.statement, guest_facts=facts))
    _, cookie = guest.attested(allowed)
    for expected, status in ((hostile, 200), (hostile + " ", 403)):
        rule = f"guest.x == {json.dumps(expected, ensure_ascii=False)}; count(input.submods) == 2"
        where = 'input.submods.cpu0["ear.veraison.annotated-evidence"].cai.guest'
        text = (
            "package policy\nimport rego.v1\ndefault allow := false\n"
            f"allow if {{ guest := {where}; {rule} }}\n"
        )
        assert allowed.set_policy("resource-policy", text.encode()).status_code == 200
        assert allowed.get(cookie).status_code == status


def test_one_nonce_is_spent_once_by_many(allowed: Site, visitor: Visitor) -> None:
    nonce, cookie = allowed.auth()
    body = visitor.but(debug=True).body(nonce)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: allowed.attest(cookie, body).status_code, range(8)))
    assert sorted(answers) == [401] * 7 + [403]


def test_many_guests_at_once(allowed: Site, visitor: Visitor) -> None:
    def visit(_: int) -> bytes:
        mine = visitor.but(key=rcar.TeeKey.generate())
        return mine.open(allowed.get(mine.attested(allowed)[1]))

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(visit, range(16))) == {SECRET_TEXT}
    rows = allowed.audit()
    assert [row["seq"] for row in rows] == list(range(len(rows)))


# Demands on how evidence was verified.


def test_both_engines_verify_where_the_policy_demands_it(site: Site, visitor: Visitor) -> None:
    site.allow(visitor)
    _, before = visitor.attested(site)
    text = policy_for(visitor.facts()).replace(b"[gpu]", b"require_agreement = true\n[gpu]")
    assert site.set_policy("verification-policy", text).status_code == 200
    # Facts of before the demand do not meet it; those of a new session do.
    assert site.get(before).status_code == 403
    assert failed(site.last("release")) == {"tdx.engines"}
    _, cookie = visitor.attested(site)
    assert visitor.open(site.get(cookie)) == SECRET_TEXT
    assert site.last("attest")["hardware"]["engines"] == "dcap-qvl, pure"
    assert site.last("release")["hardware"]["collateral_age"].endswith("days")


def test_a_dated_exception_ends_for_old_sessions_too(site: Site, visitor: Visitor) -> None:
    site.allow(visitor)
    _, cookie = visitor.attested(site)
    table = '[[tdx.exception]]\nstatus = "UpToDate"\nadvisories = []\nexpires = "{}"\n'
    for expires, status in (("2999-01-01T00:00:00Z", 200), ("2020-01-01T00:00:00Z", 403)):
        text = policy_for(visitor.facts()).replace(
            b'tcb_status = ["UpToDate"]', f"tcb_status = []\n{table.format(expires)}".encode()
        )
        assert site.set_policy("verification-policy", text).status_code == 200
        assert site.get(cookie).status_code == status
    assert failed(site.last("release")) == {"tdx.tcb_status"}
