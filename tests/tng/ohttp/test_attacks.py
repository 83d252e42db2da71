"""What an egress refuses of strangers, and an ingress of whoever stands between."""

from __future__ import annotations

import asyncio
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cai import jcs
from tests.tng.gateways import talk
from tests.tng.ohttp.world import (
    Pair,
    ask_once,
    meddler,
    outer,
    pair,
    post,
    read_any,
    status_of,
)
from tng.ohttp.bhttp import encode_content, encode_end, encode_request
from tng.ohttp.chunked import Header, RequestSender
from tng.ohttp.keyconfig import KeyConfig, base64_text, choose, encode_key_list, unbase64
from tng.ohttp.messages import MAX_METADATA, KeyAnswer, Metadata

pytestmark = pytest.mark.anyio

HOST = (b"host", b"model")


@dataclass
class Engine:
    """A backend that notes every whole request that it is given."""

    heads: list[bytes] = field(default_factory=list)
    whole: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await read_any(reader)
        self.heads.append(head)
        self.whole.append(body)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await writer.drain()


@pytest.fixture
def engine() -> Engine:
    return Engine()


async def key_of(made: Pair) -> tuple[RequestSender, bytes]:
    answer = await ask_once(made.egress, outer("/tng/key-config", b"{}"))
    config = KeyAnswer.decode(answer.partition(b"\r\n\r\n")[2]).config
    key_id, public, aead = config.choose()
    return RequestSender(Header(key_id, aead), public), public


def sealed(sender: RequestSender, *plain: bytes, final: bool = True) -> bytes:
    data = sender.head + b"".join(sender.sealer.chunk(part) for part in plain)
    return data + sender.sealer.final() if final else data


def request_plain(
    *fields: tuple[bytes, bytes], body: bytes = b"hello", method: bytes = b"POST"
) -> bytes:
    return encode_request(method, b"/v1", (HOST, *fields)) + encode_content(body) + encode_end()


async def tunnel(made: Pair, data: bytes) -> bytes:
    return await ask_once(
        made.egress, outer("/tng/tunnel", data, kind="message/ohttp-chunked-req")
    )


async def test_a_hand_made_request_is_served(tmp_path: Path, engine: Engine) -> None:
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        answer = await tunnel(made, Metadata(public).encode() + sealed(sender, request_plain()))
    assert status_of(answer) == 200
    assert b"message/ohttp-chunked-res" in answer
    assert engine.whole == [b"hello"]


async def test_a_replayed_request_is_opened_once(tmp_path: Path, engine: Engine) -> None:
    """Stock TNG opens it every time."""
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        data = Metadata(public).encode() + sealed(sender, request_plain())
        assert status_of(await tunnel(made, data)) == 200
        for _ in range(3):
            answer = await tunnel(made, data)
            assert status_of(answer) == 400
            assert b"ReplayedRequest" in answer
    assert engine.whole == [b"hello"]


@pytest.mark.parametrize("place", [0, 1, 3, 20, -1, -17])
async def test_a_changed_bit_reaches_no_backend(
    tmp_path: Path, engine: Engine, place: int
) -> None:
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        body = bytearray(sealed(sender, request_plain())[len(sender.head) :])
        body[place] ^= 1
        answer = await tunnel(made, Metadata(public).encode() + sender.head + bytes(body))
    assert status_of(answer) in (400, 413)
    assert engine.whole == []


@pytest.mark.parametrize("cut", [1, 10, 17, 18, 30, 80])
async def test_a_cut_request_reaches_no_backend_as_a_whole(
    tmp_path: Path, engine: Engine, cut: int
) -> None:
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        data = Metadata(public).encode() + sealed(sender, request_plain())
        answer = await tunnel(made, data[:-cut])
    assert status_of(answer) == 400
    assert engine.whole == []


async def test_chunks_in_another_order_reach_no_backend(tmp_path: Path, engine: Engine) -> None:
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        head = sender.sealer.chunk(encode_request(b"POST", b"/", (HOST,)))
        one, two = sender.sealer.chunk(encode_content(b"1")), sender.sealer.chunk(
            encode_content(b"2")
        )
        end = sender.sealer.chunk(encode_end()) + sender.sealer.final()
        answer = await tunnel(
            made, Metadata(public).encode() + sender.head + head + two + one + end
        )
    assert status_of(answer) == 400
    assert engine.whole == []


async def test_a_message_that_ends_before_its_last_chunk_is_not_sent(
    tmp_path: Path, engine: Engine
) -> None:
    """A GET is whole as HTTP/1.1 after its head; it waits for the proof that nothing is missing."""
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        plain = encode_request(b"GET", b"/", (HOST,)) + encode_end()
        answer = await tunnel(
            made, Metadata(public).encode() + sealed(sender, plain, final=False)
        )
    assert status_of(answer) == 400
    assert engine.heads == []


@pytest.mark.parametrize("what", ["hint", "id"])
async def test_an_unknown_key_is_told_so(tmp_path: Path, engine: Engine, what: str) -> None:
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        data = bytearray(sealed(sender, request_plain()))
        hint = public
        if what == "hint":
            hint = bytes(32)
        else:
            data[0] = 7
        answer = await tunnel(made, Metadata(hint).encode() + bytes(data))
    assert status_of(answer) == 422
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "ServerKeyConfigNotFound"
    assert engine.whole == []


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400),
        (b"\x00\x00", 400),
        (struct.pack(">I", MAX_METADATA + 1), 413),
        (b"\xff\xff\xff\xff", 413),
        (struct.pack(">I", 0), 400),
        (struct.pack(">I", 2) + b"\x0a\x00", 400),
        (struct.pack(">I", 2) + b"\x0a\x00" + bytes.fromhex("00002000010002") + bytes(32), 400),
        (struct.pack(">I", 2) + b"\x0a\x00" + bytes.fromhex("00002000010001") + bytes(32), 400),
        (struct.pack(">I", 4) + b"\x0a\x00\x0a\x00", 400),
        (struct.pack(">I", 4) + b"\x0a\x00\x12\x00", 400),
        (struct.pack(">I", 2) + b"\x12\x00", 400),
        (struct.pack(">I", 3) + b"\x0a\x05x", 400),
    ],
    ids=["nothing", "cut length", "too long", "far too long", "no metadata", "no header",
         "another aead", "a weak point", "twice", "both kinds", "empty proof", "cut field"],
)  # fmt: skip
async def test_malformed_beginnings_are_refused(
    tmp_path: Path, engine: Engine, data: bytes, status: int
) -> None:
    async with pair(tmp_path, engine.serve) as made:
        answer = await tunnel(made, data)
    assert status_of(answer) == status
    assert engine.heads == []


@pytest.mark.parametrize(
    "fields",
    [
        [(b"content-length", b"3")],
        [(b"content-length", b"50")],
        [(b"content-length", b"5"), (b"content-length", b"5")],
        [(b"content-length", b"5, 5")],
        [(b"content-length", b"+5")],
        [(b"content-length", b"0x5")],
        [(b"content-length", b"9" * 40)],
        [(b"host", b"other")],
        [(b"connection", b"content-length"), (b"content-length", b"5")],
        [(b"connection", b"Host")],
    ],
    ids=["short", "long", "twice", "list", "sign", "hex", "huge", "two hosts", "hop", "hop host"],
)
async def test_smuggled_framing_reaches_no_backend(
    tmp_path: Path, engine: Engine, fields: list[tuple[bytes, bytes]]
) -> None:
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        answer = await tunnel(
            made, Metadata(public).encode() + sealed(sender, request_plain(*fields))
        )
    assert status_of(answer) == 400
    assert engine.whole == []


async def test_framing_of_the_inside_is_made_anew(tmp_path: Path, engine: Engine) -> None:
    """A second request inside a body stays a body."""
    hidden = b"0\r\n\r\nGET /admin HTTP/1.1\r\nhost: a\r\n\r\n"
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        plain = request_plain(
            (b"transfer-encoding", b"chunked"), (b"upgrade", b"h2c"), (b"te", b"trailers"),
            (b"proxy-authorization", b"x"), (b"connection", b"x-drop"), (b"x-drop", b"1"),
            body=hidden,
        )  # fmt: skip
        answer = await tunnel(made, Metadata(public).encode() + sealed(sender, plain))
    assert status_of(answer) == 200
    assert engine.whole == [hidden]
    head = engine.heads[0].lower()
    assert head.count(b"transfer-encoding") == 1
    for dropped in (b"upgrade", b"te:", b"proxy-authorization", b"x-drop"):
        assert dropped not in head.replace(b"transfer-encoding", b"")


async def test_a_request_without_host_is_refused(tmp_path: Path, engine: Engine) -> None:
    async with pair(tmp_path, engine.serve) as made:
        sender, public = await key_of(made)
        plain = encode_request(b"GET", b"/", ()) + encode_end()
        answer = await tunnel(made, Metadata(public).encode() + sealed(sender, plain))
    assert status_of(answer) == 400
    assert engine.heads == []


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (outer("", b""), 403, "RejectNonTngRequest"),
        (outer("", b"", method="GET"), 403, "RejectNonTngRequest"),
        (outer("/tng/other", b""), 400, "InvalidOhttpApiHeaderValue"),
        (outer("/TNG/TUNNEL", b""), 400, "InvalidOhttpApiHeaderValue"),
        (outer("/tng/tunnel", b"", method="PUT"), 405, "MethodNotAllowed"),
        (outer("/tng/key-config", b"", method="GET"), 405, "MethodNotAllowed"),
        (outer("/tng/background-check/challenge", b""), 405, "MethodNotAllowed"),
        (outer("/tng/tunnel", b""), 415, "InvalidContentType"),
        (outer("/tng/key-config", b""), 400, "InvalidRequest"),
        (outer("/tng/key-config", b"[]"), 400, "InvalidRequest"),
        (outer("/tng/key-config", b'{"attestation_request":{"model":"x"}}'), 400,
         "InvalidRequest"),
        (outer("/tng/key-config", b'{"attestation_request":{"model":"background_check"}}'), 400,
         "InvalidRequest"),
        (outer("/tng/key-config", b'{"attestation_request":{"model":"passport"}}'), 500,
         "GenServerHpkeConfigurationResponseFailed"),
        (outer("/tng/background-check/challenge", b"", method="GET"), 400, "InvalidRequest"),
        (outer("/tng/background-check/verify", b"{}"), 400, "InvalidRequest"),
    ],
)  # fmt: skip
async def test_other_requests_are_refused_in_tngs_words(
    tmp_path: Path, engine: Engine, request_bytes: bytes, status: int, code: str
) -> None:
    async with pair(tmp_path, engine.serve) as made:
        answer = await ask_once(made.egress, request_bytes)
    assert status_of(answer) == status
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == code
    assert engine.heads == []


async def test_an_answer_tells_no_address_of_the_guest(tmp_path: Path) -> None:
    async with pair(tmp_path) as made:
        made.agent.socket.unlink()
        asked = jcs.canonical(
            {"attestation_request": {"model": "background_check", "challenge_token": "t"}}
        )
        answer = await ask_once(made.egress, outer("/tng/key-config", asked))
    assert status_of(answer) == 500
    assert str(made.agent.socket).encode() not in answer
    assert str(made.agent.socket) in made.log.getvalue()


@pytest.mark.parametrize("case", ["nothing", "garbage", "another key", "stolen token"])
async def test_a_client_that_must_prove_itself(
    tmp_path: Path, engine: Engine, case: str
) -> None:
    own, other = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    public_own = own.public_key().public_bytes_raw()
    async with pair(tmp_path, engine.serve, mutual=True) as made:
        _, public = await key_of(made)
        claims = {"challenge_token": "c", "pk_s": base64_text(public_own)}
        token = token_about(made, claims)
        header = Header(0, choose(encode_key_list(0, public))[2])
        sender = RequestSender(header, public, own)
        metadata = Metadata(public, token, public_own)
        if case == "nothing":
            sender, metadata = RequestSender(header, public), Metadata(public)
        elif case == "garbage":
            metadata = Metadata(public, "a.b.c", public_own)
        elif case == "another key":
            named = other.public_key().public_bytes_raw()
            sender = RequestSender(header, public, other)
            metadata = Metadata(public, token, named)
        else:
            # Whoever saw the token can show it, but not send with its key.
            sender = RequestSender(header, public, other)
        answer = await tunnel(made, metadata.encode() + sealed(sender, request_plain()))
        assert status_of(answer) == (400 if case == "stolen token" else 403)
        assert engine.heads == []
        sender = RequestSender(header, public, own)
        metadata = Metadata(public, token, public_own)
        answer = await tunnel(made, metadata.encode() + sealed(sender, request_plain()))
        assert status_of(answer) == 200


def token_about(made: Pair, claims: dict[str, str]) -> str:
    from hashlib import sha384

    from tests.tng.stock_peers import b64u

    digest = base64_text(sha384(jcs.canonical(claims)).digest())
    request = {
        "tee": "sample",
        "runtime_data": {"structured": claims},
        "evidence": b64u(json.dumps({"report_data": digest}).encode()),
    }
    status, token = made.service._attest({"verification_requests": [request]})
    assert status == 200
    return token.decode()


@pytest.mark.parametrize("origin", ["https://a.example", "https://evil.example"])
async def test_browsers_of_named_origins_only(tmp_path: Path, origin: str) -> None:
    cors = {
        "allow_origins": ["https://a.example"], "allow_methods": ["POST"],
        "allow_headers": ["x-tng-ohttp-api"], "expose_headers": [], "allow_credentials": True,
    }  # fmt: skip
    async with pair(tmp_path, server={"cors": cors}) as made:
        preflight = f"OPTIONS / HTTP/1.1\r\nhost: e\r\norigin: {origin}\r\n\r\n".encode()
        answer = (await ask_once(made.egress, preflight)).lower()
    assert status_of(answer.upper()) == 204
    named = origin == "https://a.example"
    assert (f"access-control-allow-origin: {origin}".encode() in answer) is named
    assert (b"access-control-allow-credentials: true" in answer) is named


async def test_a_wildcard_never_comes_with_credentials(tmp_path: Path) -> None:
    cors = {"allow_origins": ["*"], "allow_methods": [], "allow_headers": [],
            "expose_headers": [], "allow_credentials": True}  # fmt: skip
    async with pair(tmp_path, server={"cors": cors}) as made:
        preflight = b"OPTIONS / HTTP/1.1\r\nhost: e\r\norigin: https://x.example\r\n\r\n"
        answer = (await ask_once(made.egress, preflight)).lower()
    assert b"access-control-allow-origin: *" in answer
    assert b"allow-credentials" not in answer


# Somebody between the two gateways.


async def test_a_swapped_key_is_refused(tmp_path: Path, engine: Engine) -> None:
    own = X25519PrivateKey.generate().public_key().public_bytes_raw()

    async def change(request: bytes, answer: bytes) -> tuple[bytes, bytes]:
        if b"/tng/key-config" in request and answer:
            head, _, body = answer.partition(b"\r\n\r\n")
            value = json.loads(body)
            value["hpke_key_config"]["encoded_key_config_list"] = base64_text(
                encode_key_list(0, own)
            )
            body = json.dumps(value).encode()
            return request, with_length(head, body)
        return request, answer

    async with pair(tmp_path, engine.serve, between=meddler(change)) as made:
        answer = await talk(made.ingress, post("/", b"PROMPT"))
    assert status_of(answer) == 502
    assert b"ohttp.key" in answer
    assert engine.heads == []


async def test_a_prolonged_key_is_refused(tmp_path: Path, engine: Engine) -> None:
    async def change(request: bytes, answer: bytes) -> tuple[bytes, bytes]:
        if b"/tng/key-config" in request and answer:
            head, _, body = answer.partition(b"\r\n\r\n")
            value = json.loads(body)
            value["hpke_key_config"]["expire_timestamp"] += 1000
            return request, with_length(head, json.dumps(value).encode())
        return request, answer

    async with pair(tmp_path, engine.serve, between=meddler(change)) as made:
        answer = await talk(made.ingress, post("/", b"x"))
    assert status_of(answer) == 502
    assert b"ohttp.key" in answer


async def test_old_evidence_is_refused(tmp_path: Path, engine: Engine) -> None:
    """Evidence about an earlier challenge, for a key that somebody has learnt since."""
    kept: list[bytes] = []

    async def change(request: bytes, answer: bytes) -> tuple[bytes, bytes]:
        if b"/tng/key-config" in request and answer:
            kept.append(answer)
            return request, kept[0]
        return request, answer

    async with pair(tmp_path, engine.serve, between=meddler(change)) as made:
        first = await talk(made.ingress, post("/", b"x"))
        assert status_of(first) == 200
    other = tmp_path / "again"
    other.mkdir()
    # The stand-in service gives the same challenge to everybody who asks within a second.
    await asyncio.sleep(1.1)
    async with pair(other, engine.serve, between=meddler(change), service=made.service) as made:
        answer = await talk(made.ingress, post("/", b"x"))
    assert status_of(answer) == 502
    assert b"ohttp.challenge" in answer
    assert len(engine.heads) == 1


async def test_taken_away_evidence_is_refused(tmp_path: Path, engine: Engine) -> None:
    async def change(request: bytes, answer: bytes) -> tuple[bytes, bytes]:
        if b"/tng/key-config" in request and answer:
            head, _, body = answer.partition(b"\r\n\r\n")
            value = json.loads(body)
            value["attestation_info"] = None
            return request, with_length(head, json.dumps(value).encode())
        return request, answer

    async with pair(tmp_path, engine.serve, between=meddler(change)) as made:
        answer = await talk(made.ingress, post("/", b"x"))
    assert status_of(answer) == 502
    assert b"stock.model" in answer
    assert engine.heads == []


@pytest.mark.parametrize("how", ["flip", "cut", "plain", "other type", "empty"])
async def test_a_changed_response_never_looks_like_one(tmp_path: Path, how: str) -> None:
    async def change(request: bytes, answer: bytes) -> tuple[bytes, bytes]:
        if b"ohttp-chunked-req" not in request or not answer:
            return request, answer
        if how == "flip":
            return request, answer[:-40] + bytes([answer[-40] ^ 1]) + answer[-39:]
        if how == "cut":
            return request, answer[:-30]
        if how == "plain":
            return request, b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nEVIL"
        if how == "other type":
            return request, answer.replace(b"message/ohttp-chunked-res", b"text/plain")
        kind = b"content-type: message/ohttp-chunked-res\r\n"
        return request, b"HTTP/1.1 200 OK\r\n" + kind + b"content-length: 0\r\n\r\n"

    async def streaming(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_any(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        writer.write(b"5\r\nhello\r\n0\r\n\r\n")
        await writer.drain()

    async with pair(tmp_path, streaming, between=meddler(change)) as made:
        try:
            answer = await talk(made.ingress, post("/", b"y" * 100))
        except ConnectionError:
            answer = b""
    assert b"EVIL" not in answer
    assert status_of(answer) == 502 or not answer.endswith(b"0\r\n\r\n")


async def test_an_endless_answer_is_given_up(tmp_path: Path) -> None:
    async def change(request: bytes, answer: bytes) -> tuple[bytes, bytes]:
        if b"/tng/key-config" in request and answer:
            return request, b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (17 * 1024 * 1024)
        return request, answer

    async with pair(tmp_path, between=meddler(change)) as made:
        answer = await talk(made.ingress, post("/", b"x"))
    assert status_of(answer) == 502


def with_length(head: bytes, body: bytes) -> bytes:
    lines = [
        line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")
    ]
    lines.append(b"content-length: " + str(len(body)).encode())
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_the_list_that_is_sent_is_read_back() -> None:
    config = KeyConfig(1, base64_text(encode_key_list(0, bytes(range(32)))))
    assert config.choose()[:2] == (0, bytes(range(32)))
    assert unbase64(config.encoded, "x")[:2] == b"\x00\x2d"
