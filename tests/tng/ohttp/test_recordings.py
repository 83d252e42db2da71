"""Whole exchanges that TNG 2.12.0 had with itself, opened and judged here (Base and Auth)."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cai import jcs
from cai.errors import CaiError, Tampered
from tng.ohttp.bhttp import Content, End, Event, MessageReader, RequestHead, ResponseHead
from tng.ohttp.chunked import HEADER_SIZE, Header, Opener, RequestReceiver, _response_cipher
from tng.ohttp.hpke import KEY_SIZE, Aead
from tng.ohttp.keys import parse_key
from tng.ohttp.messages import KeyAnswer, KeyRequest, Metadata, client_claims, server_claims
from tng.stock.service import parse_roots
from tng.stock.token import Token, verify_token

BASE, AUTH = "ohttp_background_check_filekey", "ohttp_client_attested_filekey"
RECORDED = Path(os.environ.get("CAI_VECTORS", "../shared/vectors")) / "tng" / "recorded"

pytestmark = pytest.mark.skipif(
    not RECORDED.is_dir(), reason=f"no recordings at {RECORDED} (set CAI_VECTORS)"
)


@cache
def recording(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((RECORDED / f"{name}.json").read_bytes())
    return value


@dataclass
class Exchange:
    api: str
    request: bytes
    response: bytes


def exchanges(name: str, api: str) -> Iterator[Exchange]:
    for item in recording(name)["exchanges"]:
        lines = item["request_line_and_headers"]
        if f"x-tng-ohttp-api: {api}" in lines:
            request = base64.b64decode(item["request_body_b64"])
            yield Exchange(api, request, base64.b64decode(item["response_body_b64"]))


def server_key(name: str) -> X25519PrivateKey:
    return parse_key(recording(name)["server_x25519_private_key_pem"].encode(), name)


@dataclass
class Opened:
    metadata: Metadata
    receiver: RequestReceiver
    enc: bytes
    sealed: bytes


def open_request(name: str, body: bytes) -> Opened:
    size = int.from_bytes(body[:4])
    metadata, rest = Metadata.decode(body[4 : 4 + size]), body[4 + size :]
    header, enc = Header.decode(rest[:HEADER_SIZE]), rest[HEADER_SIZE : HEADER_SIZE + KEY_SIZE]
    receiver = RequestReceiver(header, enc, server_key(name), metadata.public or None)
    return Opened(metadata, receiver, enc, rest[HEADER_SIZE + KEY_SIZE :])


def events(opener: Opener, data: bytes, *, request: bool) -> list[Event]:
    reader = MessageReader(request=request)
    found = [event for plain in opener.feed(data) for event in reader.feed(plain)]
    found += reader.feed(opener.finish())
    assert reader.done
    return found


def opened_whole(name: str, body: bytes) -> list[Event]:
    opened = open_request(name, body)
    return events(opened.receiver.opener, opened.sealed, request=True)


@pytest.mark.parametrize("name", [BASE, AUTH])
def test_every_request_and_response_opens(name: str) -> None:
    seen = 0
    for exchange in exchanges(name, "/tng/tunnel"):
        opened = open_request(name, exchange.request)
        assert opened.metadata.hint == server_key(name).public_key().public_bytes_raw()
        assert bool(opened.metadata.token) is (name == AUTH)
        asked = events(opened.receiver.opener, opened.sealed, request=True)
        assert isinstance(asked[0], RequestHead)
        assert asked[-1] == End()
        nonce, data = exchange.response[:16], exchange.response[16:]
        cipher = _response_cipher(opened.receiver._context, opened.enc, nonce)
        answered = events(Opener(cipher), data, request=False)
        assert isinstance(answered[0], ResponseHead)
        assert answered[0].status == 200
        # The backend of the recordings says what it was asked.
        content = b"".join(item.data for item in answered if isinstance(item, Content))
        assert asked[0].path in content or content.startswith(b"data: 0") or len(content) > 40_000
        seen += 1
    assert seen >= 4


def test_the_recordings_hold_both_modes_and_a_stream() -> None:
    paths = []
    for name in (BASE, AUTH):
        for exchange in exchanges(name, "/tng/tunnel"):
            opened = open_request(name, exchange.request)
            head = events(opened.receiver.opener, opened.sealed, request=True)[0]
            assert isinstance(head, RequestHead)
            paths.append(head.path)
    assert b"/v1/models?x=1" in paths
    assert b"/sse" in paths


def test_a_recorded_auth_request_is_no_base_request() -> None:
    exchange = next(exchanges(AUTH, "/tng/tunnel"))
    opened = open_request(AUTH, exchange.request)
    header = Header(0, Aead.AES_128_GCM)
    for sender in (None, server_key(AUTH).public_key().public_bytes_raw()):
        receiver = RequestReceiver(header, opened.enc, server_key(AUTH), sender)
        with pytest.raises(Tampered):
            list(receiver.opener.feed(opened.sealed))


@pytest.mark.parametrize("name", [BASE, AUTH])
def test_a_recorded_request_with_any_changed_byte_does_not_open(name: str) -> None:
    exchange = next(exchanges(name, "/tng/tunnel"))
    opened = open_request(name, exchange.request)
    start = len(exchange.request) - len(opened.sealed) - KEY_SIZE
    for place in range(start, len(exchange.request), 5):
        changed = bytearray(exchange.request)
        changed[place] ^= 0x40
        with pytest.raises(CaiError):
            opened_whole(name, bytes(changed))


@pytest.mark.parametrize("name", [BASE, AUTH])
def test_recorded_key_configurations_are_about_their_key(name: str) -> None:
    seen = 0
    for exchange in exchanges(name, "/tng/key-config"):
        asked = KeyRequest.decode(exchange.request)
        answer = KeyAnswer.decode(exchange.response)
        assert answer.evidence is not None
        expected = server_claims(answer.config, asked.challenge)
        assert answer.evidence.claims == expected
        key_id, public, aead = answer.config.choose()
        assert (key_id, aead) == (0, Aead.AES_128_GCM)
        assert public == server_key(name).public_key().public_bytes_raw()
        # The stand-in TEE's evidence repeats the report data.
        told = json.loads(answer.evidence.evidence)["report_data"]
        assert base64.b64decode(told) == answer.evidence.report_data
        seen += 1
    assert seen >= 1


@pytest.mark.parametrize("name", [BASE, AUTH])
def test_recorded_messages_are_written_alike(name: str) -> None:
    """Ours mean the same JSON as TNG's, and the same metadata bytes."""
    for exchange in exchanges(name, "/tng/key-config"):
        asked = KeyRequest.decode(exchange.request)
        assert json.loads(asked.encode()) == json.loads(exchange.request)
        answer = KeyAnswer.decode(exchange.response)
        assert json.loads(answer.encode()) == json.loads(exchange.response)
    for exchange in exchanges(name, "/tng/tunnel"):
        metadata = open_request(name, exchange.request).metadata
        assert exchange.request.startswith(metadata.encode())


def test_recorded_client_tokens_are_about_the_key_that_sends() -> None:
    seen = 0
    for exchange in exchanges(AUTH, "/tng/tunnel"):
        metadata = open_request(AUTH, exchange.request).metadata
        token = Token.parse(metadata.token)
        for member, value in client_claims(metadata.public, "").items():
            assert token.runtime_claims[member] == value
        seen += 1
    assert seen >= 3


@pytest.mark.parametrize("name", [BASE, AUTH])
def test_recorded_tokens_verify_at_their_time_only(name: str) -> None:
    roots = parse_roots(recording(name)["as_certificate_pem"].encode(), name)
    for text in recording(name)["as_tokens"]:
        token = Token.parse(text)
        expires = token.expires or 0
        now = datetime.fromtimestamp(expires - 10, UTC)
        checks = verify_token(token, roots=roots, policy_ids=["default"], now=now)
        assert [item.name for item in checks if item.outcome.value == "fail"] == []
        late = datetime.fromtimestamp(expires + 61, UTC)
        failed = verify_token(token, roots=roots, policy_ids=["default"], now=late)
        assert "as.token.time" in [item.name for item in failed if item.outcome.value == "fail"]


def test_recorded_evidence_of_a_client_is_about_its_challenge() -> None:
    challenges = {
        json.loads(item.response)["challenge_token"]
        for item in exchanges(AUTH, "/tng/background-check/challenge")
    }
    seen = 0
    for exchange in exchanges(AUTH, "/tng/background-check/verify"):
        evidence = json.loads(exchange.request)["evidence"]
        claims = jcs.parse_canonical(
            evidence["aa_runtime_data"].encode(), what="claims", limit=1 << 20
        )
        assert claims["challenge_token"] in challenges
        assert len(base64.b64decode(claims["pk_s"])) == KEY_SIZE
        seen += 1
    assert seen >= 1


