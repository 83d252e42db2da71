"""Messages and digests of the key broker protocol."""

from __future__ import annotations

import base64
import contextlib
import json
from hashlib import sha384
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai import jcs
from cai.attest import rcar
from cai.attest.evidence import DeviceEvidence
from cai.attest.statement import ReleaseStatement
from cai.errors import CaiError, FormatError, LimitExceeded

NONCE = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
JWK = {
    "kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW",
    "x": "stMs2kpxwrNzWBkD2UkiMxbZiQ5cMaQAABet0kcmq5o",
    "y": "ysoe70doCO0MJ8judDdq3iWzZRAS8XA-0TvbA-7ImAw",
}
D = (
    "cec7711dc1fb48439416f374601351f459a3a023b2133e7cf1e2ee501ac9fb7c"
    "aa4f69660bac3684fa1657d988182b8b"
)
P = (
    "7b5d70f4aa59101e2cf4adca89b8c8851482deccc52c65b701427b15358093389"
    "f7f989e34c8a813cd939d3d51300d41"
)
DEVICE = DeviceEvidence("HOPPER", "GPU-1", b"\x11\xe0report", b"-----BEGIN CERTIFICATE-----\n")
STATEMENT = ReleaseStatement("ab" * 48, {"profile": "sealed"}, "0.1.0")


def key(**extra: Any) -> rcar.PublicJwk:
    return rcar.PublicJwk.parse({**JWK, **extra})


def test_known_digests() -> None:
    assert rcar.device_digest(NONCE, key()).hex() == D
    assert rcar.primary_digest(NONCE, key(), "").hex() == P


def test_the_upstream_constant_of_canonical_json() -> None:
    digest = sha384(jcs.canonical({"b": 1, "a": "test", "c": {"d": "e"}})).hexdigest()
    assert digest.startswith("e71ce8e70d814ba6639c3612ebee0ff1f76f650f8dbb5e47157e0f3f525cd22c")


def test_unknown_key_members_do_not_change_the_digest() -> None:
    assert rcar.device_digest(NONCE, key(kid="x")).hex() == D


def attestation(**changes: Any) -> dict[str, Any]:
    value: dict[str, Any] = {
        "init-data": None,
        "runtime-data": {"nonce": NONCE, "tee-pubkey": JWK},
        "tee-evidence": {"primary_evidence": {"quote": "AA=="}, "additional_evidence": ""},
    }
    value.update(changes)
    return value


def test_attestation_binds_by_p_and_the_flat_form_by_d() -> None:
    parsed = rcar.Attestation.parse(json.dumps(attestation()).encode())
    assert parsed.report_digest.hex() == P
    assert parsed.gpu_nonce.hex() == D[:64]
    flat = rcar.Attestation.parse_flat(
        json.dumps({"tee-pubkey": JWK, "tee-evidence": {"quote": "AA=="}}).encode(), nonce=NONCE
    )
    assert flat.report_digest.hex() == D
    assert flat.additional_evidence == ""


def test_attestation_round_trip() -> None:
    text = rcar.additional_evidence([DEVICE], STATEMENT)
    made = rcar.Attestation(NONCE, key(), rcar.encode_tdx_evidence(b"quote", None), text, "a = 1")
    parsed = rcar.Attestation.parse(made.encode())
    assert parsed.additional_evidence == text
    assert parsed.report_digest == made.report_digest
    assert parsed.init_data == "a = 1"
    assert rcar.parse_tdx_evidence(parsed.primary_evidence) == (b"quote", None)
    assert rcar.parse_additional_evidence(text) == ((DEVICE,), STATEMENT)


def test_the_exact_text_of_additional_evidence_is_bound() -> None:
    text = rcar.additional_evidence([DEVICE], None)
    respelt = json.dumps(json.loads(text), indent=1)
    assert rcar.parse_additional_evidence(text) == rcar.parse_additional_evidence(respelt)
    assert rcar.primary_digest(NONCE, key(), text) != rcar.primary_digest(NONCE, key(), respelt)


@pytest.mark.parametrize(
    "changes",
    [
        {"runtime-data": None}, {"runtime-data": {}}, {"tee-evidence": []}, {"tee-evidence": {}},
        {"runtime-data": {"nonce": 1, "tee-pubkey": JWK}},
        {"runtime-data": {"nonce": "A" * 300, "tee-pubkey": JWK}},
        {"runtime-data": {"nonce": "\ud800", "tee-pubkey": JWK}},
        {"runtime-data": {"nonce": NONCE}},
        {"runtime-data": {"nonce": NONCE, "tee-pubkey": {**JWK, "alg": "RSA1_5"}}},
        {"tee-evidence": {"primary_evidence": {}}},
        {"tee-evidence": {"primary_evidence": {}, "additional_evidence": {}}},
        {"tee-evidence": {"primary_evidence": {}, "additional_evidence": None}},
        {"init-data": "x"}, {"init-data": {"format": "json", "body": "{}"}},
        {"init-data": {"format": "toml"}},
    ],
)
def test_bad_attestations_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CaiError):
        rcar.Attestation.parse(json.dumps(attestation(**changes)).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"1", b"\xff", b'{"a":1,"a":1}', b"{" * 10000])
def test_no_message_parser_leaks(data: bytes) -> None:
    for parse in (
        rcar.Request.parse, rcar.Challenge.parse, rcar.Attestation.parse,
        rcar.ErrorInformation.parse, lambda d: rcar.Attestation.parse_flat(d, nonce=NONCE),
    ):
        with pytest.raises(CaiError):
            parse(data)


def test_a_message_above_the_limit_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        rcar.Attestation.parse(b" " * (rcar.MAX_MESSAGE + 1))


def test_request_and_challenge() -> None:
    request = rcar.Request.parse(b'{"version":"0.1.0","tee":"tdx","extra-params":"foo"}')
    assert (request.version, request.tee, request.extra_params) == ("0.1.0", "tdx", "foo")
    assert rcar.Request.parse(rcar.Request().encode()) == rcar.Request(extra_params={})
    challenge = rcar.Challenge.for_nonce(bytes(range(32)))
    assert challenge.to_json() == {"nonce": NONCE, "extra-params": ""}
    assert rcar.Challenge.parse(json.dumps(challenge.to_json()).encode()) == challenge


@pytest.mark.parametrize(
    "value",
    [
        {"version": "0.4.0", "tee": "tdx"}, {"version": "0.4.0", "extra-params": ""},
        {"tee": "tdx", "extra-params": ""}, {"version": 4, "tee": "tdx", "extra-params": ""},
        {"version": "0" * 100, "tee": "tdx", "extra-params": ""},
    ],
)
def test_bad_requests_are_refused(value: Any) -> None:
    with pytest.raises(CaiError):
        rcar.Request.parse(json.dumps(value).encode())


@pytest.mark.parametrize(
    "value",
    [
        {"nonce": NONCE}, {"extra-params": ""}, {"nonce": "AAAA", "extra-params": ""},
        {"nonce": "!", "extra-params": ""}, {"nonce": "A" * 400, "extra-params": ""},
        {"nonce": NONCE, "extra-params": {"selected-hash-algorithm": "sha256"}},
    ],
)
def test_bad_challenges_are_refused(value: Any) -> None:
    with pytest.raises(CaiError):
        rcar.Challenge.parse(json.dumps(value).encode())


def test_error_information() -> None:
    error = rcar.ErrorInformation("PolicyDeny", "no")
    value = error.to_json()
    assert value["type"] == "/kbs/v0/errors/PolicyDeny"
    assert rcar.ErrorInformation.parse(json.dumps({**value, "more": 1}).encode()) == error


def test_nothing_to_add_is_the_empty_text() -> None:
    assert rcar.additional_evidence([], None) == ""
    assert rcar.parse_additional_evidence("") == ((), None)


@pytest.mark.parametrize("spelling", ["hex", "b64", "pem"])
def test_spellings_of_device_evidence(spelling: str) -> None:
    value = json.loads(rcar.additional_evidence([DEVICE], None))
    item = value["nvidia"]["device_evidence_list"][0]
    if spelling == "hex":
        item["evidence"] = DEVICE.report.hex()
    if spelling == "pem":
        item["certificate"] = DEVICE.chain.decode()
    item["arch"] = "Hopper"
    assert rcar.parse_additional_evidence(json.dumps(value))[0] == (DEVICE,)
    del item["uuid"]
    assert rcar.parse_additional_evidence(json.dumps(value))[0][0].uuid == "unknown"


def cai_member(**changes: Any) -> str:
    return json.dumps({"cai": {**STATEMENT.to_json(), **changes}})


@pytest.mark.parametrize(
    "text",
    [
        " ", "[]", "null", "x", "\ud800", '{"sampledevice":{}}', '{"nvidia":{}}', '{"nvidia":[]}',
        '{"nvidia":{"device_evidence_list":[1]}}',
        '{"nvidia":{"device_evidence_list":[{"arch":"HOPPER"}]}}',
        '{"nvidia":{"device_evidence_list":[{"arch":"H","evidence":"!","certificate":"AA=="}]}}',
        '{"nvidia":{"device_evidence_list":[{"arch":"H","evidence":"AA==","certificate":"é"}]}}',
        '{"nvidia":{"device_evidence_list":[{"arch":1,"evidence":"AA==","certificate":"AA=="}]}}',
        '{"cai":null}', '{"cai":{}}', '{"cai":[]}', cai_member(purpose="channel"),
        cai_member(launch_digest="AB" * 48), cai_member(launch_digest="ab"), cai_member(more=1),
        cai_member(guest_facts={"a": 1}), cai_member(agent_version=None),
        cai_member(guest_facts={"a": "\ud800"}), cai_member(agent_version="\udfff"),
        cai_member(guest_facts={"a": "x" * 70_000}),
        cai_member()[:-1] + "," + cai_member()[1:],
        cai_member().replace('"purpose"', '"agent_version":"0","purpose"'),
    ],
)
def test_bad_additional_evidence_is_refused(text: str) -> None:
    with pytest.raises(CaiError):
        rcar.parse_additional_evidence(text)


def test_too_many_devices_are_refused() -> None:
    with pytest.raises(LimitExceeded):
        rcar.parse_additional_evidence(
            rcar.additional_evidence([DEVICE] * (rcar.MAX_DEVICES + 1), None)
        )


@pytest.mark.parametrize(
    "value",
    [
        None, [], {}, {"quote": None}, {"quote": ""}, {"quote": "!!"}, {"quote": "QQ"},
        {"quote": "é"}, {"quote": "A" * 100_000}, {"quote": "AA==", "cc_eventlog": ""},
        {"quote": "AA==", "cc_eventlog": 1},
    ],
)
def test_bad_tdx_evidence_is_refused(value: Any) -> None:
    with pytest.raises(CaiError):
        rcar.parse_tdx_evidence(value)


def test_tdx_evidence_with_event_log() -> None:
    assert rcar.parse_tdx_evidence(rcar.encode_tdx_evidence(b"q", b"log")) == (b"q", b"log")
    assert rcar.parse_tdx_evidence({"quote": base64.b64encode(b"q").decode()}) == (b"q", None)


def test_init_data_digest_covers_the_whole_text() -> None:
    text = 'version = "0.1.0"\nalgorithm = "sha384"\n[data]\n"aa.toml" = "x"\n'
    digest = rcar.init_data_digest(text, size=48)
    assert digest == sha384(text.encode()).digest()
    assert rcar.init_data_digest(text + "#", size=48) != digest
    short = rcar.init_data_digest(text.replace("sha384", "sha256"), size=48)
    assert short[32:] == bytes(16)


@pytest.mark.parametrize("text", ["", "= x", 'algorithm = "md5"', "algorithm = 1", "a = [" * 5000])
def test_bad_init_data_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        rcar.init_data_digest(text, size=48)


NAMES = st.sampled_from(
    ["nvidia", "cai", "device_evidence_list", "arch", "uuid", "evidence", "certificate", "kty",
     "crv", "alg", "x", "y", "n", "e", "quote", "cc_eventlog", "nonce", "tee-pubkey",
     "runtime-data", "tee-evidence", "primary_evidence", "additional_evidence", "init-data"]
)  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=8),
    st.sampled_from(["EC", "RSA", "P-256", "AA==", "00", "\ud800", NONCE, JWK["x"]]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=5),
    max_leaves=12,
)


@given(VALUES)
def test_only_our_errors_leave_a_parser(value: Any) -> None:
    data = json.dumps(value).encode()
    parsers: list[Any] = [
        lambda: rcar.Request.parse(data), lambda: rcar.Challenge.parse(data),
        lambda: rcar.Attestation.parse(data), lambda: rcar.PublicJwk.parse(value),
        lambda: rcar.Attestation.parse_flat(data, nonce=NONCE),
        lambda: rcar.parse_tdx_evidence(value),
        lambda: rcar.parse_additional_evidence(data.decode()),
    ]
    for parse in parsers:
        with contextlib.suppress(CaiError):
            parse()
