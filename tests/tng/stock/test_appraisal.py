"""The attestation service as its client: shapes, limits, and who is trusted for its tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from cai.errors import (
    CaiError,
    FormatError,
    PeerError,
    PeerUnreachable,
    PolicyDenied,
    SettingError,
)
from tests.tng.stock_peers import StockService
from tng.config.trust import Model, ServiceVerify
from tng.stock import service as service_module
from tng.stock.certificate import CocoEvidence
from tng.stock.service import AppraisalService, devices_of, trusted_roots

pytestmark = pytest.mark.anyio

EVIDENCE = CocoEvidence("sample", b'{"report_data":"x"}', None, '{"a":"b"}')
Answer = Callable[[str, bytes], tuple[int, bytes]]


@contextlib.asynccontextmanager
async def answering(answer: Answer) -> AsyncIterator[str]:
    """A service that answers whatever a test wants."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = 0
                for line in head.lower().split("\r\n"):
                    if line.startswith("content-length:"):
                        length = int(line.partition(":")[2])
                body = await reader.readexactly(length)
                status, data = answer(head.split(" ")[1], body)
                writer.write(
                    f"HTTP/1.1 {status} X\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data
                )
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/some/as/"
    finally:
        server.close()


async def appraised(answer: Answer) -> str:
    async with answering(answer) as address:
        service = AppraisalService(address)
        try:
            return await service.appraise(EVIDENCE, [], ["default"])
        finally:
            await service.close()


async def test_the_request_is_stock() -> None:
    seen: list[tuple[str, Any]] = []

    def answer(path: str, body: bytes) -> tuple[int, bytes]:
        seen.append((path, json.loads(body)))
        return 200, b"a.b.c"

    assert await appraised(answer) == "a.b.c"
    assert seen == [
        (
            "/some/as/attestation",
            {
                "verification_requests": [
                    {
                        "tee": "sample",
                        "evidence": "eyJyZXBvcnRfZGF0YSI6IngifQ",
                        "runtime_data": {"structured": {"a": "b"}},
                        "init_data": None,
                        "runtime_data_hash_algorithm": "sha384",
                    }
                ],
                "policy_ids": ["default"],
            },
        )
    ]


async def test_an_older_service_gets_its_older_shape() -> None:
    shapes: list[set[str]] = []

    def answer(_path: str, body: bytes) -> tuple[int, bytes]:
        shapes.append(set(json.loads(body)))
        if "verification_requests" in json.loads(body):
            return 400, b"Json deserialize error: missing field `tee` at line 1"
        return 200, b"old.token.x"

    assert await appraised(answer) == "old.token.x"
    assert "tee" in shapes[1]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 302])
async def test_a_refusal_is_told(status: int) -> None:
    with pytest.raises(PeerError, match=f"{status}.*why not"):
        await appraised(lambda _path, _body: (status, b"why\nnot"))


async def test_an_answer_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "MAX_TOKEN", 1000)

    async with answering(lambda _path, _body: (200, b"x" * 300_000)) as address:
        service = AppraisalService(address)
        with pytest.raises(PeerError, match="more than"):
            await service.certificates()
        await service.close()


async def test_a_service_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "TIMEOUT_S", 0.2)

    async def hold(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.read()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    service = AppraisalService(f"http://127.0.0.1:{port}/")
    with pytest.raises(PeerUnreachable):
        await service.appraise(EVIDENCE, [], [])
    await service.close()
    server.close()


async def test_the_environment_s_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert await appraised(lambda _path, _body: (200, b"a.b.c")) == "a.b.c"


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"extra_params":7}', b'{"extra-params":{"jwt":7}}']
)
async def test_challenges_of_another_form_are_none(body: bytes) -> None:
    async with answering(lambda _path, _body: (200, body)) as address:
        service = AppraisalService(address)
        try:
            assert await service.challenge() is None
        except CaiError:
            assert body == b""
        await service.close()


@pytest.mark.parametrize("body", [b"", b"not PEM", b"-----BEGIN CERTIFICATE-----\nAA\n"])
async def test_certificates_of_another_form(body: bytes) -> None:
    async with answering(lambda _path, _body: (200, body)) as address:
        service = AppraisalService(address)
        with pytest.raises(FormatError):
            await service.certificates()
        await service.close()


def verify(address: str, **more: Any) -> ServiceVerify:
    return ServiceVerify(address, ("default",), (), **more)


async def test_a_certificate_from_whoever_answers_is_not_trusted() -> None:
    """Over plain HTTP to another machine anybody answers (decisions §7, Proxy)."""
    settings = verify("http://192.0.2.1:8080/as/")
    with pytest.raises(PolicyDenied, match="whoever answers"):
        await trusted_roots(settings, AppraisalService(settings.as_addr))


async def test_loopback_and_named_files_are_trusted(tmp_path: Path) -> None:
    service = StockService()
    async with service.running():
        client = AppraisalService(service.address)
        fetched = await trusted_roots(verify(service.address), client)
        await client.close()
    path = tmp_path / "root.pem"
    path.write_bytes(service.root_pem)
    settings = verify("http://192.0.2.1/", trusted_certs=(path,))
    assert await trusted_roots(settings, None) == fetched
    assert fetched is not None
    assert len(fetched) == 1


async def test_files_that_hold_none(tmp_path: Path) -> None:
    path = tmp_path / "root.pem"
    path.write_bytes(b"nothing")
    with pytest.raises(FormatError):
        await trusted_roots(verify("", trusted_certs=(path,)), None)
    with pytest.raises(CaiError):
        await trusted_roots(verify("", trusted_certs=(tmp_path / "absent",)), None)


async def test_nothing_to_trust() -> None:
    with pytest.raises(SettingError):
        await trusted_roots(verify("", model=Model.PASSPORT), None)
    assert await trusted_roots(verify("", skip_certificate=True), None) is None


@pytest.mark.parametrize(
    "additional", [b"\xff", b"[]", b"7", b'{"nvidia":', b'{"a":1,"a":2}', b'"x"']
)
def test_device_evidence_of_another_form(additional: bytes) -> None:
    evidence = CocoEvidence("tdx", b"{}", additional, "{}")
    with pytest.raises(FormatError):
        devices_of(evidence)


def test_no_device_evidence() -> None:
    assert not devices_of(CocoEvidence("tdx", b"{}", None, "{}"))
    assert not devices_of(CocoEvidence("tdx", b"{}", b"{}", "{}"))
