"""Who may ask: tokens of a file, tokens of a provider, and what each kind is refused for."""

from __future__ import annotations

import asyncio
import base64
import json
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from cai.errors import CaiError, FormatError, InputMissing, SettingError, StorageError
from tests.tng.gateways import read_request, serving
from tests.tng.guard.guarded import Engine, guarded
from tng.guard import keysource
from tng.guard.jwt import Jwt, KeySet
from tng.guard.limits import Limits
from tng.guard.tokens import create_token, read_tokens, revoke_token, split_token

pytestmark = pytest.mark.anyio


def made(path: Path, name: str = "alice", **more: Any) -> str:
    return create_token(path, name, **more)[1].reveal().decode()


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


async def test_a_token_gets_in_and_its_holder_is_the_caller(tmp_path: Path, tokens: Path) -> None:
    engine = Engine()
    first, second = made(tokens), made(tokens)
    other = made(tokens, "bob")
    async with guarded(tmp_path, engine, tokens=str(tokens)) as bench:
        for shown in (first, second, other):
            assert (await bench.ask(token=shown, session="same")).status == 200
        assert set(bench.desk.ledger.status()) == {"token:alice", "token:bob"}
        assert (await bench.ask(headers={"x-api-key": first})).status == 200
    salts = [body["cache_salt"] for body in engine.bodies]
    assert salts[0] == salts[1] != salts[2]
    assert all(b"cai_" not in head for head in engine.heads)


async def test_the_file_holds_hashes_and_is_the_owners(tokens: Path) -> None:
    shown = made(tokens)
    assert stat.S_IMODE(tokens.stat().st_mode) == 0o600
    secret = shown.rpartition("_")[2] if shown.count("_") == 2 else shown.split("_", 2)[2]
    assert secret not in tokens.read_text()
    assert shown not in repr(read_tokens(tokens))
    assert read_tokens(tokens)[0].masked not in ("", shown)


@pytest.mark.parametrize("spoil", [
    lambda shown: "", lambda shown: shown[:-1], lambda shown: shown + "x",
    lambda shown: shown.swapcase(), lambda shown: shown.replace("cai_", "cai-"),
    lambda shown: "cai_0000000000_" + shown.split("_", 2)[2], lambda shown: "sk-12345",
    lambda shown: shown[:15], lambda shown: "cai_" + "a" * 500, lambda shown: "cai__",
    lambda shown: "é" * 20, lambda shown: "Bearer " + shown,
])  # fmt: skip
async def test_another_token_does_not_get_in(tmp_path: Path, tokens: Path, spoil: Any) -> None:
    shown, engine = made(tokens), Engine()
    async with guarded(tmp_path, engine, tokens=str(tokens)) as bench:
        found = await bench.ask(token=spoil(shown))
    assert found.status == 401
    assert found.error["type"] == "authentication_error"
    assert found.headers["www-authenticate"] == "Bearer"
    assert not engine.heads


@pytest.mark.parametrize("value", ["Basic YTpi", "Bearer", "Bearer ", "bearer\tx"])
async def test_other_schemes_do_not_get_in(tmp_path: Path, tokens: Path, value: str) -> None:
    made(tokens)
    async with guarded(tmp_path, tokens=str(tokens)) as bench:
        assert (await bench.ask(headers={"authorization": value})).status == 401
        assert (await bench.ask()).status == 401


async def test_two_authorizations_are_no_authorization(tmp_path: Path, tokens: Path) -> None:
    shown = made(tokens)
    async with guarded(tmp_path, tokens=str(tokens)) as bench:
        found = await bench.ask(token=shown, headers={"Authorization": f"Bearer {shown}"})
    assert found.status == 400


async def test_without_a_token_no_path_is_told(tmp_path: Path, tokens: Path) -> None:
    made(tokens)
    async with guarded(tmp_path, tokens=str(tokens)) as bench:
        for path in ("/metrics", "/v1/chat/completions", "/cai/receipts/" + "0" * 64):
            assert (await bench.ask(path)).status == 401


async def test_a_revoked_token_is_out_at_once(tmp_path: Path, tokens: Path) -> None:
    first, other = made(tokens), made(tokens, "bob")
    async with guarded(tmp_path, tokens=str(tokens)) as bench:
        client = bench.connect()
        assert (await client.ask(token=first)).status == 200
        revoke_token(tokens, "alice")
        found = await client.ask(token=first)
        assert (found.status, found.error["code"]) == (401, "revoked_api_key")
        assert (await bench.ask(token=other)).status == 200
        assert (await bench.ask(token=made(tokens, "alice"))).status == 200


async def test_an_expired_token_is_out(tmp_path: Path, tokens: Path) -> None:
    shown = made(tokens, expires=int(time.time()) - 1)
    async with guarded(tmp_path, tokens=str(tokens)) as bench:
        found = await bench.ask(token=shown)
    assert (found.status, found.error["code"]) == (401, "expired_api_key")


@pytest.mark.parametrize("spoil", [
    lambda path: path.unlink(), lambda path: path.chmod(0o640), lambda path: path.write_text("{"),
    lambda path: path.write_text('{"cai-tokens": 2, "tokens": []}'),
])  # fmt: skip
async def test_a_spoilt_file_lets_nobody_in(tmp_path: Path, tokens: Path, spoil: Any) -> None:
    shown = made(tokens)
    async with guarded(tmp_path, tokens=str(tokens)) as bench:
        assert (await bench.ask(token=shown)).status == 200
        spoil(tokens)
        found = await bench.ask(token=shown)
    assert found.status == 503
    assert str(tokens) not in found.body.decode()


ROW = {"id": "0" * 10, "name": "a", "sha256": "0" * 64, "created": 1}


@pytest.mark.parametrize("rows", [
    {}, [1], [{**ROW, "more": 1}], [ROW, ROW], [{**ROW, "sha256": "zz"}], [{**ROW, "name": ""}],
    [{**ROW, "expires": -1}], [{**ROW, "limits": {"requests": 1}}], [{**ROW, "name": "a\nb"}],
    [{**ROW, "sha256": "A" * 64}], [{"id": "x"}],
])  # fmt: skip
def test_a_file_of_another_form_is_refused(tokens: Path, rows: object) -> None:
    tokens.write_text(json.dumps({"cai-tokens": 1, "tokens": rows}))
    tokens.chmod(0o600)
    with pytest.raises((FormatError, SettingError)):
        read_tokens(tokens)


def test_what_cannot_be_made_or_revoked(tmp_path: Path, tokens: Path) -> None:
    for name in ("", " a", "a\n", "x" * 65):
        with pytest.raises(SettingError):
            create_token(tokens, name)
    with pytest.raises(InputMissing):
        create_token(tmp_path / "none" / "tokens.json", "a")
    made(tokens)
    with pytest.raises(InputMissing):
        revoke_token(tokens, "nobody")
    with pytest.raises(InputMissing):
        read_tokens(tmp_path / "none.json")
    tokens.chmod(0o604)
    with pytest.raises(StorageError):
        create_token(tokens, "b")


def test_tokens_are_split_strictly() -> None:
    assert split_token("cai_0123456789_secret")
    for text in (
        "", "cai_", "cai_01234_x", "cai_0123456789_", "CAI_0123456789_x", "cai_é123456789_x",
    ):  # fmt: skip
        assert split_token(text) is None


# Tokens of an identity provider.

ISSUER, AUDIENCE = "https://id.example.org", "inference"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def number(value: int, size: int | None = None) -> str:
    return b64(value.to_bytes(size or (value.bit_length() + 7) // 8))


class Provider:
    """Keys of every kind, and tokens signed with them."""

    def __init__(self) -> None:
        self.ec = ec.generate_private_key(ec.SECP256R1())
        self.rsa = rsa.generate_private_key(65537, 2048)
        self.ed = ed25519.Ed25519PrivateKey.generate()

    def jwks(self, *, only: tuple[str, ...] = ("e", "r", "d"), suffix: str = "") -> dict[str, Any]:
        point = self.ec.public_key().public_numbers()
        modulus = self.rsa.public_key().public_numbers()
        keys = [
            {"kid": "e" + suffix, "kty": "EC", "crv": "P-256", "x": number(point.x, 32),
             "y": number(point.y, 32), "use": "sig"},
            {"kid": "r" + suffix, "kty": "RSA", "alg": "RS256", "n": number(modulus.n),
             "e": number(modulus.e)},
            {"kid": "d" + suffix, "kty": "OKP", "crv": "Ed25519",
             "x": b64(self.ed.public_key().public_bytes_raw())},
        ]  # fmt: skip
        return {"keys": [key for key in keys if key["kid"][0] in only]}

    def sign(self, algorithm: str, data: bytes) -> bytes:
        if algorithm == "ES256":
            r, s = decode_dss_signature(self.ec.sign(data, ec.ECDSA(hashes.SHA256())))
            return r.to_bytes(32) + s.to_bytes(32)
        if algorithm == "RS256":
            return self.rsa.sign(data, padding.PKCS1v15(), hashes.SHA256())
        return self.ed.sign(data)

    def token(
        self, algorithm: str = "ES256", head: dict[str, Any] | None = None, *, by: str = "",
        **claims: Any,
    ) -> str:
        names = {"ES256": "e", "RS256": "r", "EdDSA": "d"}
        header = {"alg": algorithm, "kid": names.get(algorithm, "e"), **(head or {})}
        now = int(time.time())
        body = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": now + 300, **claims}
        body = {name: value for name, value in body.items() if value is not None}
        header = {name: value for name, value in header.items() if value is not None}
        data = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(body).encode())}"
        return f"{data}.{b64(self.sign(by or algorithm, data.encode()))}"


@pytest.fixture(scope="module")
def provider() -> Provider:
    return Provider()


def settings(tmp_path: Path, provider: Provider, **jwks: Any) -> dict[str, Any]:
    (tmp_path / "jwks.json").write_text(json.dumps(provider.jwks(**jwks)))
    return {"jwks": str(tmp_path / "jwks.json"), "issuer": ISSUER, "audience": AUDIENCE}


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
async def test_a_jwt_gets_in_and_its_subject_is_the_caller(
    tmp_path: Path, provider: Provider, algorithm: str
) -> None:
    async with guarded(tmp_path, jwt=settings(tmp_path, provider)) as bench:
        assert (await bench.ask(token=provider.token(algorithm))).status == 200
        shown = provider.token(algorithm, aud=["other", AUDIENCE], iat=time.time(), nbf=0)
        assert (await bench.ask(token=shown)).status == 200
        assert set(bench.desk.ledger.status()) == {"jwt:alice"}


NOW = int(time.time())


@pytest.mark.parametrize("claims", [
    {"iss": "https://id.example.org/"}, {"iss": None}, {"iss": [ISSUER]}, {"aud": "other"},
    {"aud": None}, {"aud": ["other"]}, {"aud": {"inference": 1}}, {"exp": None}, {"exp": NOW - 120},
    {"exp": "never"}, {"exp": True}, {"nbf": NOW + 7200}, {"iat": NOW + 7200}, {"nbf": "x"},
    {"sub": None}, {"sub": ""}, {"sub": 1}, {"sub": "x" * 300}, {"aud": "inference2"},
])  # fmt: skip
async def test_a_jwt_with_other_claims_does_not_get_in(
    tmp_path: Path, provider: Provider, claims: dict[str, Any]
) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine, jwt=settings(tmp_path, provider)) as bench:
        found = await bench.ask(token=provider.token(**claims))
    assert (found.status, found.error["code"]) == (401, "invalid_token")
    assert not engine.heads


@pytest.mark.parametrize(("algorithm", "by", "head"), [
    ("none", "ES256", {}), ("HS256", "ES256", {}), ("ES384", "ES256", {}), ("ES256", "EdDSA", {}),
    ("RS256", "ES256", {}), ("EdDSA", "RS256", {"kid": "r"}), ("ES256", "RS256", {"kid": "r"}),
    ("ES256", "ES256", {"kid": "other"}), ("ES256", "ES256", {"crit": ["exp"]}),
    ("ES256", "ES256", {"b64": False}), ("ES256", "ES256", {"kid": 1}), ("PS256", "RS256", {}),
    ("ES256", "ES256", {"alg": ["ES256"]}), ("ES256", "ES256", {"alg": None}),
])  # fmt: skip
async def test_a_jwt_signed_in_another_way_does_not_get_in(
    tmp_path: Path, provider: Provider, algorithm: str, by: str, head: dict[str, Any]
) -> None:
    async with guarded(tmp_path, jwt=settings(tmp_path, provider)) as bench:
        found = await bench.ask(token=provider.token(algorithm, head, by=by))
    assert found.status == 401


async def test_a_key_in_the_token_is_not_looked_at(tmp_path: Path, provider: Provider) -> None:
    stranger = Provider()
    head = {"jwk": stranger.jwks(only=("e",))["keys"][0], "jku": "http://127.0.0.1/"}
    async with guarded(tmp_path, jwt=settings(tmp_path, provider)) as bench:
        assert (await bench.ask(token=stranger.token(head=head))).status == 401
        assert (await bench.ask(token=stranger.token(head={**head, "kid": None}))).status == 401


@pytest.mark.parametrize("text", [
    "", "a.b", "a.b.c", "a.b.c.d", "..", "e30.e30.", "e30=.e30=.AA", "x" * 20_000,
])  # fmt: skip
async def test_what_is_no_jwt_does_not_get_in(
    tmp_path: Path, provider: Provider, text: str
) -> None:
    async with guarded(tmp_path, jwt=settings(tmp_path, provider)) as bench:
        assert (await bench.ask(token=text or "x")).status == 401
    with pytest.raises(CaiError):
        Jwt.parse(text)


async def test_a_changed_byte_breaks_a_jwt(tmp_path: Path, provider: Provider) -> None:
    head, _claims, signature = provider.token().split(".")
    _head, other, _signature = provider.token(sub="mallory").split(".")
    async with guarded(tmp_path, jwt=settings(tmp_path, provider)) as bench:
        assert (await bench.ask(token=f"{head}.{other}.{signature}")).status == 401


@pytest.mark.parametrize("change", [
    {"n": "AQAB"}, {"e": "AQ"}, {"n": 1}, {"n": None}, {"n": "!!"}, {"e": "AAAAAAAAAAAB"},
])  # fmt: skip
def test_a_weak_or_malformed_key_spoils_the_set(
    provider: Provider, change: dict[str, Any]
) -> None:
    value = provider.jwks(only=("r",))
    value["keys"][0].update(change)
    with pytest.raises(FormatError):
        KeySet.parse(json.dumps(value).encode())


@pytest.mark.parametrize("data", [
    b"", b"[]", b"{}", b'{"keys":{}}', b'{"keys":[],"keys":[]}', b"\xff",
    b'{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AA"}]}',
    b'{"keys":[{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}]}',
])  # fmt: skip
def test_what_is_no_key_set_is_refused(data: bytes) -> None:
    with pytest.raises(CaiError):
        KeySet.parse(data)


def test_keys_for_other_uses_are_left_out(provider: Provider) -> None:
    value = provider.jwks()
    for key in value["keys"]:
        key["use"] = "enc"
    value["keys"] += [{"kty": "oct", "k": "AAAA", "kid": "h"}, 1, {"kty": "EC", "crv": "P-384"}]
    assert not KeySet.parse(json.dumps(value).encode()).keys


async def test_keys_rotate_and_a_silent_provider_is_survived(
    tmp_path: Path, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keysource, "UNKNOWN_S", 0.0)
    served: dict[str, Any] = {"value": provider.jwks(), "asked": 0, "status": "200 OK"}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        served["asked"] += 1
        data = json.dumps(served["value"]).encode()
        writer.write(f"HTTP/1.1 {served['status']}\r\ncontent-length: {len(data)}\r\n\r\n".encode())
        writer.write(data)
        await writer.drain()

    async with serving(serve) as port:
        place = f"http://127.0.0.1:{port}/jwks"
        jwt = {"jwks": place, "issuer": ISSUER, "audience": AUDIENCE}
        async with guarded(tmp_path, jwt=jwt) as bench:
            for _ in range(3):
                assert (await bench.ask(token=provider.token())).status == 200
            assert served["asked"] == 1
            served["value"] = provider.jwks(suffix="2")
            fresh = provider.token(head={"kid": "e2"})
            assert (await bench.ask(token=fresh)).status == 200
            assert (await bench.ask(token=provider.token())).status == 401
            served["status"] = "500 Internal Server Error"
            assert (await bench.ask(token=fresh)).status == 200


async def test_a_stranger_cannot_drive_the_provider(
    tmp_path: Path, provider: Provider
) -> None:
    asked = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        await read_request(reader)
        asked += 1
        data = json.dumps(provider.jwks()).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))
        await writer.drain()

    async with serving(serve) as port:
        jwt = {"jwks": f"http://127.0.0.1:{port}/", "issuer": ISSUER, "audience": AUDIENCE}
        async with guarded(tmp_path, jwt=jwt) as bench:
            for index in range(10):
                shown = provider.token(head={"kid": f"unknown-{index}"})
                assert (await bench.ask(token=shown)).status == 401
    assert asked == 1


async def test_no_keys_is_503_and_lets_nobody_in(tmp_path: Path, provider: Provider) -> None:
    jwt = {"jwks": "http://127.0.0.1:1/", "issuer": ISSUER, "audience": AUDIENCE}
    async with guarded(tmp_path, jwt=jwt) as bench:
        found = await bench.ask(token=provider.token())
    assert found.status == 503


@pytest.mark.parametrize("data", [None, "{", '{"keys": {}}'])
async def test_a_gateway_does_not_start_without_its_files(
    tmp_path: Path, data: str | None
) -> None:
    file = tmp_path / "file.json"
    if data is not None:
        file.write_text(data)
        file.chmod(0o600)
    jwt = {"jwks": str(file), "issuer": ISSUER, "audience": AUDIENCE}
    for settings_ in ({"tokens": str(file)}, {"jwt": jwt}):
        with pytest.raises(CaiError):
            async with guarded(tmp_path, **settings_):
                pass


async def test_both_kinds_side_by_side(tmp_path: Path, tokens: Path, provider: Provider) -> None:
    shown = made(tokens, limits=Limits(requests=1))
    jwt = settings(tmp_path, provider)
    async with guarded(tmp_path, tokens=str(tokens), jwt=jwt) as bench:
        assert (await bench.ask(token=shown)).status == 200
        assert (await bench.ask(token=shown)).status == 429
        assert (await bench.ask(token=provider.token())).status == 200
        assert (await bench.ask(token=provider.token())).status == 200
