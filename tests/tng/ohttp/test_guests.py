"""OHTTP with the real agent of a simulated guest, verified here; and what it cannot prove."""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cai.errors import CaiError, SettingError
from cai.host.agent import Agent
from tests.tng.gateways import World, port_of, running, serving, talk
from tests.tng.guests import agent_of, at_socket, lax
from tests.tng.ohttp.world import (
    LOCAL,
    ask_once,
    echo,
    outer,
    pair,
    post,
    read_any,
    status_of,
)
from tests.tng.stock_peers import StockService, _certificate
from tng.config.entries import parse
from tng.operation.journal import Journal
from tng.operation.service import Gateway

pytestmark = pytest.mark.anyio


def near(port: int, verify: dict[str, object] | None, **more: object) -> dict[str, Any]:
    rule = {"in": {"host": LOCAL, "port": 0}, "out": {"host": LOCAL, "port": port}}
    trust: dict[str, object] = {"verify": verify} if verify else {"no_ra": True}
    return {"add_ingress": [{"mapping": rule, "ohttp": {}, **trust, **more}]}


def far(backend: int, **more: object) -> dict[str, Any]:
    rule = {"in": {"host": LOCAL, "port": 0}, "out": {"host": LOCAL, "port": backend}}
    return {"add_egress": [{"mapping": rule, "ohttp": {}, **more}]}


def by_key(world: World, directory: Path, **more: object) -> dict[str, object]:
    # Stock evidence states neither launch nor guest facts.
    path = Path(lax(world, directory))
    path.write_text(path.read_text() + "unsafe_without_facts = true\n")
    return world.verify(binding="key", policy=str(path), **more)


@contextlib.asynccontextmanager
async def guest(world: World, directory: Path, agent: Agent) -> AsyncIterator[int]:
    async with (
        at_socket(agent, directory / "aa.sock") as address,
        serving(echo) as backend,
        running(far(backend, attest={"aa_addr": address})) as outside,
    ):
        yield port_of(outside, "egress[0]")


async def test_a_guest_is_verified_here_with_its_gpu(world: World, tmp_path: Path) -> None:
    async with (
        guest(world, tmp_path, agent_of(world)) as port,
        running(near(port, by_key(world, tmp_path))) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), post("/", b"PROMPT"))
    assert status_of(answer) == 200
    assert answer.endswith(b"|PROMPT")


async def test_a_debug_guest_is_refused(world: World, tmp_path: Path) -> None:
    async with (
        guest(world, tmp_path, agent_of(world, world.debug_guest)) as port,
        running(near(port, by_key(world, tmp_path))) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), post("/", b"PROMPT"))
    assert status_of(answer) == 502
    assert b"tdx.debug" in answer


async def test_a_guest_of_another_policy_is_refused(world: World, tmp_path: Path) -> None:
    """The world's own policy names a launch, which OHTTP's evidence cannot."""
    async with (
        guest(world, tmp_path, agent_of(world)) as port,
        running(near(port, world.verify(binding="key"))) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), post("/", b"PROMPT"))
    assert status_of(answer) == 502
    assert b"launch" in answer


async def test_an_egress_that_proves_nothing_is_refused(world: World, tmp_path: Path) -> None:
    async with (
        serving(echo) as backend,
        running(far(backend, no_ra=True)) as outside,
        running(near(port_of(outside, "egress[0]"), by_key(world, tmp_path))) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), post("/", b"PROMPT"))
    assert status_of(answer) == 502
    assert b"GenServerHpkeConfigurationResponseFailed" in answer


async def test_without_verification_it_says_so(tmp_path: Path) -> None:
    async with (
        serving(echo) as backend,
        running(far(backend, no_ra=True)) as outside,
        running(near(port_of(outside, "egress[0]"), None)) as inside,
    ):
        answer = await talk(port_of(inside, "ingress[0]"), post("/", b"x"))
    assert status_of(answer) == 200


@pytest.mark.parametrize(
    "more",
    [{"binding": "session"}, {}, {"binding": "key", "expect": {"service": "demo"}},
     {"binding": "key", "kbs_key": "ab" * 32}],
    ids=["session", "the default", "expect", "ticket"],
)  # fmt: skip
async def test_what_ohttp_cannot_prove_is_a_start_error(
    world: World, more: dict[str, object]
) -> None:
    with pytest.raises(SettingError):
        async with running(near(1, world.verify(**more))):
            pass


async def test_clients_are_not_verified_here(world: World, tmp_path: Path) -> None:
    attest = {"aa_addr": f"unix://{tmp_path}/aa.sock"}
    with pytest.raises(SettingError, match="attestation service"):
        async with running(far(1, attest=attest, verify=by_key(world, tmp_path))):
            pass


async def test_a_missing_key_file_is_a_start_error(tmp_path: Path) -> None:
    config = far(1, no_ra=True)
    config["add_egress"][0]["ohttp"] = {"key": {"source": "file", "path": str(tmp_path / "no")}}
    with pytest.raises(CaiError):
        async with running(config):
            pass


@pytest.mark.parametrize("trusted", [True, False])
async def test_outer_tls(tmp_path: Path, trusted: bool) -> None:
    """A load balancer that ends TLS; its certificate says nothing of the guest."""
    files = certificate_files(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files["chain"], files["key"])

    @contextlib.asynccontextmanager
    async def balancer(port: int) -> AsyncIterator[int]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            back, forth = await asyncio.open_connection(LOCAL, port)

            async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                with contextlib.suppress(OSError):
                    while data := await source.read(65536):
                        sink.write(data)
                        await sink.drain()
                sink.close()

            await asyncio.gather(pump(reader, forth), pump(back, writer))

        server = await asyncio.start_server(serve, LOCAL, 0, ssl=context)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()

    roots = [str(files["root"])] if trusted else [str(files["other"])]
    client = {"tls": True, "tls_ca_certs": roots}
    async with pair(tmp_path, between=balancer, client=client) as made:
        answer = await talk(made.ingress, post("/", b"PROMPT"))
    assert status_of(answer) == (200 if trusted else 502)


def certificate_files(directory: Path) -> dict[str, Path]:
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
    root = _certificate("root", keys[0], "root", keys[0], ca=True)
    other = _certificate("other", keys[2], "other", keys[2], ca=True)
    leaf = _certificate("leaf", keys[1], "root", keys[0], ca=False)
    named = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOCAL))])
    builder = (
        x509.CertificateBuilder()
        .subject_name(leaf.subject)
        .issuer_name(root.subject)
        .public_key(keys[1].public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(leaf.not_valid_before_utc)
        .not_valid_after(leaf.not_valid_after_utc)
        .add_extension(named, critical=False)
    )
    leaf = builder.sign(keys[0], hashes.SHA256())
    files = {name: directory / f"{name}.pem" for name in ("root", "other", "chain", "key")}
    files["root"].write_bytes(root.public_bytes(Encoding.PEM))
    files["other"].write_bytes(other.public_bytes(Encoding.PEM))
    files["chain"].write_bytes(leaf.public_bytes(Encoding.PEM))
    files["key"].write_bytes(
        keys[1].private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    )
    return files


async def test_a_key_is_proven_anew_while_it_serves(tmp_path: Path) -> None:
    """Tokens of two seconds: no request waits for long, none fails."""
    async with pair(tmp_path, service=StockService(lifetime_s=2)) as made:
        for _ in range(25):
            assert status_of(await talk(made.ingress, post("/", b"x"))) == 200
            await asyncio.sleep(0.1)
    assert made.agent.calls.count("GetEvidence") >= 2


async def test_a_guest_that_no_longer_passes_gets_no_further_request(tmp_path: Path) -> None:
    served: list[bytes] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append((await read_any(reader))[1])
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()

    async with pair(tmp_path, engine, service=StockService(lifetime_s=1)) as made:
        assert status_of(await talk(made.ingress, post("/", b"good"))) == 200
        made.service.status = "contraindicated"
        await asyncio.sleep(1.2)
        assert status_of(await talk(made.ingress, post("/", b"bad"))) == 502
    assert served == [b"good"]


@pytest.mark.parametrize("busy", [False, True])
async def test_a_stopping_gateway_ends_what_is_idle_and_lets_the_rest_end(
    tmp_path: Path, busy: bool
) -> None:
    go = asyncio.Event()

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_any(reader)
        if busy:
            await go.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone")
        await writer.drain()

    request = b"GET / HTTP/1.1\r\nhost: h\r\n\r\n"
    async with serving(engine) as backend, running(far(backend, no_ra=True)) as outside:
        config = parse(near(port_of(outside, "egress[0]"), None), where="test")
        gateway = Gateway(config, Journal(io.StringIO()))
        port = port_of(await gateway.start(), "ingress[0]")
        reader, writer = await asyncio.open_connection(LOCAL, port)
        writer.write(request)
        if not busy:
            await reader.readuntil(b"done")
        await asyncio.sleep(0.2)
        async with asyncio.timeout(5):
            draining = asyncio.create_task(gateway.drain())
            await asyncio.sleep(0.1)
            go.set()
            rest = await reader.read()
            writer.close()
            await draining
    assert rest.endswith(b"done") is busy


async def test_two_hundred_streams_at_once(tmp_path: Path) -> None:
    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_any(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(32):
            token = b"%s-%d\n" % (body, number)
            writer.write(b"%x\r\n%s\r\n" % (len(token), token))
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def ask(port: int, number: int) -> bool:
        answer = await talk(port, post("/s", b"client%d" % number))
        tokens = [line for line in answer.split(b"\n") if b"client%d-" % number in line]
        return len(tokens) == 32 and answer.endswith(b"0\r\n\r\n")

    async with pair(tmp_path, engine) as made:
        done = await asyncio.gather(*(ask(made.ingress, number) for number in range(200)))
    assert all(done)
    assert made.agent.calls.count("GetEvidence") == 1


async def test_a_flood_of_key_requests_does_not_queue_without_end(tmp_path: Path) -> None:
    body = b'{"attestation_request":{"model":"background_check","challenge_token":"%d"}}'
    async with pair(tmp_path) as made:
        answers = await asyncio.gather(
            *(ask_once(made.egress, outer("/tng/key-config", body % n)) for n in range(120))
        )
    found = [status_of(answer) for answer in answers]
    assert set(found) <= {200, 503}
    assert found.count(200) >= 30


async def test_the_guard_stands_before_the_backend(tmp_path: Path) -> None:
    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head, body = await read_any(reader)
        path = head.split(b" ")[1].decode()
        # The guard also asks whether the backend is well, without a body.
        answer = json.dumps({"path": path, "got": json.loads(body or b"{}")})
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
            + str(len(answer)).encode() + b"\r\n\r\n" + answer.encode()
        )  # fmt: skip
        await writer.drain()

    prompt = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
    kind = "content-type: application/json"
    async with pair(tmp_path, engine, egress={"guard": {}}) as made:
        chat = await talk(made.ingress, post("/v1/chat/completions", prompt, kind))
        other = await talk(made.ingress, post("/metrics", prompt, kind))
    assert status_of(chat) == 200
    assert b"cache_salt" in chat
    assert status_of(other) in (403, 404)


@pytest.mark.parametrize("mutual", [False, True], ids=["unproven", "proven"])
async def test_callers_share_no_prompt_cache_because_they_share_a_connection(
    tmp_path: Path, mutual: bool
) -> None:
    """Outer connections are pooled here and by load balancers: only a proven key is a caller."""
    salts: list[str] = []

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, body = await read_any(reader)
        if body:
            salts.append(json.loads(body)["cache_salt"])
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()

    prompt = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
    request = post("/v1/chat/completions", prompt, "content-type: application/json")
    async with pair(tmp_path, engine, egress={"guard": {}}, mutual=mutual) as made:
        for _ in range(2):
            assert status_of(await talk(made.ingress, request)) == 200
    assert (salts[0] == salts[1]) is mutual


async def test_logs_hold_nothing_of_a_request(tmp_path: Path) -> None:
    async with pair(tmp_path) as made:
        secret = post("/v1/SECRETPATH?q=SECRETQUERY", b"SECRETBODY", "x-s: SECRETH")
        await talk(made.ingress, secret)
        await talk(made.ingress, b"GET /SECRETPATH HTTP/1.1\r\nhost: a\r\nhost: SECRETHOST\r\n\r\n")
    assert "SECRET" not in made.log.getvalue()
    assert isinstance(made.log, io.StringIO)
