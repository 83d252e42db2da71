"""Messages around encapsulated requests: what is read, and everything else that is refused."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai.attest import ttrpc
from cai.errors import CaiError, FormatError, LimitExceeded
from tng.ohttp.hpke import Aead
from tng.ohttp.keyconfig import MAX_KEY_LIST, KeyConfig, choose, encode_key_list
from tng.ohttp.messages import (
    MAX_METADATA,
    KeyAnswer,
    KeyRequest,
    Metadata,
    evidence_json,
    parse_evidence,
    server_claims,
)
from tng.stock.certificate import CocoEvidence

KEY = bytes(range(32))
CONFIG = KeyConfig(2_000_000_000, "AAA=")
EVIDENCE = CocoEvidence("sample", b"evidence", b'{"nvidia":{}}', '{"a":1}')


def key_list(*configs: bytes) -> bytes:
    return b"".join(struct.pack(">H", len(item)) + item for item in configs)


def config(*suites: tuple[int, int], key_id: int = 0, kem: int = 0x20, key: bytes = KEY) -> bytes:
    data = b"".join(struct.pack(">HH", *suite) for suite in suites)
    return struct.pack(">BH", key_id, kem) + key + struct.pack(">H", len(data)) + data


def test_a_key_list_is_that_of_tng() -> None:
    """2.12.0 writes the same for this key (recorded)."""
    assert encode_key_list(0, KEY)[:5].hex() == "002d000020"
    assert encode_key_list(0, KEY)[-10:].hex() == "00080001000100010003"
    assert choose(encode_key_list(0, KEY)) == (0, KEY, Aead.AES_128_GCM)


def test_the_servers_first_served_choice_counts() -> None:
    """Up to 2.11 ChaCha20-Poly1305 stands first."""
    both = key_list(config((1, 3), (1, 1)))
    assert choose(both)[2] is Aead.CHACHA20_POLY1305
    odd = key_list(config((1, 9), (2, 1), (1, 1)))
    assert choose(odd)[2] is Aead.AES_128_GCM


def test_keys_of_other_kinds_are_passed_over() -> None:
    other = config((1, 1), kem=0x10, key=bytes(65))
    assert choose(key_list(other, config((1, 1), key_id=5))) == (5, KEY, Aead.AES_128_GCM)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00", b"\x00\x05ab", key_list(b""), key_list(b"\x00\x00"),
        key_list(config()), key_list(config((1, 2))), key_list(config((2, 1))),
        key_list(config((1, 1), kem=0x10)), key_list(config((1, 1), key=bytes(31))),
        key_list(config((1, 1))[:-1]), key_list(config((1, 1)) + b"x"),
        key_list(config((1, 1))) + b"\x00\x09x",
    ],
)  # fmt: skip
def test_lists_without_a_usable_key_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        choose(data)


def test_a_huge_list_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        choose(bytes(MAX_KEY_LIST + 1))


@pytest.mark.parametrize("encoded", ["", "x", "AAA", "AA AA=", "AAAA\n", "é"])
def test_a_list_that_is_no_base64_is_refused(encoded: str) -> None:
    with pytest.raises(FormatError):
        KeyConfig(1, encoded).choose()


@pytest.mark.parametrize(
    "asked", [KeyRequest(), KeyRequest("passport"), KeyRequest("background_check", "t")]
)
def test_requests_are_read_as_written(asked: KeyRequest) -> None:
    assert KeyRequest.decode(asked.encode()) == asked


def test_an_empty_object_asks_for_no_evidence() -> None:
    assert KeyRequest.decode(b"{}") == KeyRequest()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'"x"', b'{"attestation_request":1}',
        b'{"attestation_request":"passport"}', b'{"attestation_request":{}}',
        b'{"attestation_request":{"model":"other"}}',
        b'{"attestation_request":{"model":"background_check"}}',
        b'{"attestation_request":{"model":"background_check","challenge_token":""}}',
        b'{"attestation_request":{"model":"background_check","challenge_token":1}}',
        b'{"attestation_request":null,"attestation_request":null}', b"\xff", b"{",
    ],
)  # fmt: skip
def test_other_requests_are_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        KeyRequest.decode(body)


@pytest.mark.parametrize(
    "answer",
    [KeyAnswer(CONFIG), KeyAnswer(CONFIG, EVIDENCE), KeyAnswer(CONFIG, token="a.b.c")],
    ids=["bare", "evidence", "token"],
)
def test_answers_are_read_as_written(answer: KeyAnswer) -> None:
    assert KeyAnswer.decode(answer.encode()) == answer


def changed(**members: Any) -> bytes:
    value = json.loads(KeyAnswer(CONFIG, EVIDENCE).encode())
    value["attestation_info"].update(members)
    return json.dumps(value).encode()


def changed_evidence(**members: Any) -> bytes:
    value = json.loads(KeyAnswer(CONFIG, EVIDENCE).encode())
    value["attestation_info"]["evidence"].update(members)
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b'{"hpke_key_config":null}', b'{"hpke_key_config":{}}',
        b'{"hpke_key_config":{"expire_timestamp":"1","encoded_key_config_list":"AA=="}}',
        b'{"hpke_key_config":{"expire_timestamp":true,"encoded_key_config_list":"AA=="}}',
        b'{"hpke_key_config":{"expire_timestamp":1.5,"encoded_key_config_list":"AA=="}}',
        b'{"hpke_key_config":{"expire_timestamp":1,"encoded_key_config_list":1}}',
        changed(model="x"), changed(model=None), changed(evidence=None), changed(evidence=[]),
        changed(model="passport"), changed(model="passport", attestation_result=""),
        changed_evidence(aa_runtime_data_hash_algo="sha256"),
        changed_evidence(aa_runtime_data_hash_algo=None), changed_evidence(aa_tee_type=""),
        changed_evidence(aa_tee_type=1), changed_evidence(aa_evidence="?"),
        changed_evidence(aa_evidence=None), changed_evidence(aa_runtime_data={}),
        changed_evidence(aa_additional_evidence=1), changed_evidence(aa_additional_evidence="?"),
    ],
)  # fmt: skip
def test_other_answers_are_refused(body: bytes) -> None:
    with pytest.raises(FormatError):
        KeyAnswer.decode(body)


def test_a_tees_name_has_an_end() -> None:
    with pytest.raises(LimitExceeded):
        KeyAnswer.decode(changed_evidence(aa_tee_type="x" * 2000))


@pytest.mark.parametrize("additional", [None, b"{}"])
def test_evidence_is_read_as_written(additional: bytes | None) -> None:
    evidence = CocoEvidence("tdx", b"\x00\xff", additional, "{}")
    assert parse_evidence(evidence_json(evidence)) == evidence


def test_claims_name_key_and_challenge() -> None:
    claims = server_claims(CONFIG, "c")
    assert claims["challenge_token"] == "c"
    assert claims["hpke_key_config"] == {
        "encoded_key_config_list": "AAA=", "expire_timestamp": 2_000_000_000,
    }  # fmt: skip
    assert "challenge_token" not in server_claims(CONFIG, "")


@pytest.mark.parametrize("metadata", [Metadata(KEY), Metadata(KEY, "a.b.c", KEY)])
def test_metadata_is_read_as_written(metadata: Metadata) -> None:
    data = metadata.encode()
    assert int.from_bytes(data[:4]) == len(data) - 4
    assert Metadata.decode(data[4:]) == metadata


def test_a_hint_may_be_left_out() -> None:
    assert Metadata.decode(b"\x0a\x00") == Metadata(b"")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x0a", b"\x08\x00", b"\x0a\x00\x0a\x00", b"\x0a\x00\x12\x00",
        b"\x12\x00", b"\x0a\x00\x1a\x02\x0a\x00\x1a\x02\x0a\x00",
        b"\x0a\x00" + ttrpc.bytes_field(3, ttrpc.bytes_field(1, bytes(31))),
        ttrpc.bytes_field(2, ttrpc.bytes_field(1, b"t")),
        ttrpc.bytes_field(2, ttrpc.bytes_field(2, KEY)),
        ttrpc.bytes_field(2, ttrpc.bytes_field(1, b"t") + ttrpc.bytes_field(2, bytes(33))),
        ttrpc.bytes_field(2, ttrpc.bytes_field(1, b"\xff") + ttrpc.bytes_field(2, KEY)),
    ],
)  # fmt: skip
def test_other_metadata_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        Metadata.decode(data)


def test_long_metadata_is_refused() -> None:
    with pytest.raises(LimitExceeded):
        Metadata.decode(bytes(MAX_METADATA + 1))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120))
def test_any_bytes_end_in_our_errors(data: bytes) -> None:
    for parse in (choose, KeyRequest.decode, KeyAnswer.decode, Metadata.decode):
        try:
            parse(data)
        except CaiError:
            continue
