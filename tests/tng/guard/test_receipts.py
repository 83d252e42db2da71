"""Receipts: who gets one, what it shows, and what it does not."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cai import jcs
from cai.errors import CaiError, Tampered
from tests.tng.gateways import FakeAgent, World
from tests.tng.guard.guarded import CHAT, PROMPT, Engine, guarded, request
from tng.guard import receipts
from tng.guard.receipts import Receipts, Record, Standing, verify_receipt

pytestmark = pytest.mark.anyio

NONCE, SALT = "0a" * 32, "0b" * 32
ASKING = {"cai-receipt-nonce": NONCE, "cai-receipt-salt": SALT}
LINE = f"POST {CHAT}".encode()


def checked(bench: Any, signed: bytes, line: bytes = LINE) -> receipts.ReceiptChecker:
    key = bench.desk.status()["receipt_key"]
    return verify_receipt(signed, key=key, salt=bytes.fromhex(SALT), line=line)


async def fetched(bench: Any, **kwargs: Any) -> Any:
    return await bench.ask(receipts.PATH + NONCE, method="GET", **kwargs)


async def test_a_receipt_shows_what_passed(tmp_path: Path) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        found = await bench.ask(headers=ASKING)
        receipt = await fetched(bench)
        assert receipt.status == 200
        shown = checked(bench, receipt.body)
    assert shown.shows_request(json.dumps(PROMPT).encode())
    assert shown.shows_response(found.body)
    assert shown.receipt["status"] == 200
    assert shown.receipt["ending"] == "complete"
    assert shown.receipt["counter"] == 1
    assert not shown.shows_request(json.dumps({**PROMPT, "seed": 1}).encode())
    assert not shown.shows_response(found.body + b" ")
    assert all(NONCE.encode() not in head and SALT.encode() not in head for head in engine.heads)


async def test_it_names_what_the_guest_had_proven(
    tmp_path: Path, world: World, agent: FakeAgent
) -> None:
    statement = agent.evidence([bytes(32)]).statement
    async with guarded(tmp_path) as bench:
        client = bench.connect(statement=statement)
        await client.ask(headers=ASKING)
        receipt = await client.ask(receipts.PATH + NONCE, method="GET")
        shown = checked(bench, receipt.body).receipt
    assert shown["statement"] == Standing.of(statement).statement
    assert len(shown["statement"]) == 64
    assert shown["model_roots"] == ["01" * 32]


def test_no_statement_is_named_where_there_was_none() -> None:
    assert Standing.of(b"") == Standing()
    assert Standing.of(b"other").model_roots == ()


async def test_an_answer_that_broke_off_has_a_receipt_that_says_so(tmp_path: Path) -> None:
    async def endless(_engine: Engine, _body: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\npart")
        await writer.drain()
        await asyncio.sleep(60)

    async with guarded(tmp_path, Engine(endless)) as bench:
        client = bench.connect()
        client.send(request(headers=ASKING))
        async with asyncio.timeout(5):
            await client.stream.answer.readuntil(b"part")
            client.leave()
            await client.task
        shown = checked(bench, (await fetched(bench)).body)
    assert shown.receipt["ending"] == "truncated"
    assert shown.shows_response(b"part")


async def test_nobody_else_gets_it(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bench:
        await bench.ask(headers=ASKING, session="aa")
        found = await fetched(bench, session="bb")
        assert (found.status, found.error["code"]) == (404, "no_receipt")
        assert (await fetched(bench, session="aa")).status == 200
        other = receipts.PATH + "0c" * 32
        assert (await bench.ask(other, method="GET", session="aa")).status == 404
        assert (await bench.ask(receipts.PATH + NONCE, session="aa")).status == 405


@pytest.mark.parametrize("headers", [
    {"cai-receipt-nonce": NONCE}, {"cai-receipt-salt": SALT}, {**ASKING, "cai-receipt-salt": "00"},
    {**ASKING, "cai-receipt-nonce": NONCE.upper()}, {**ASKING, "cai-receipt-nonce": "../" + NONCE},
    {**ASKING, "cai-receipt-salt": ""}, {**ASKING, "CAI-receipt-nonce": NONCE},
])  # fmt: skip
async def test_another_form_of_asking_is_refused(tmp_path: Path, headers: dict[str, str]) -> None:
    engine = Engine()
    async with guarded(tmp_path, engine) as bench:
        if len(headers) == 3:
            headers = {**headers, "x": "y"}
        assert (await bench.ask(headers=headers)).status == 400
    assert not engine.heads


async def test_without_asking_there_is_none(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bench:
        await bench.ask()
        assert (await fetched(bench)).status == 404


async def test_a_guard_without_receipts(tmp_path: Path) -> None:
    async with guarded(tmp_path, receipts=False) as bench:
        assert (await bench.ask(headers=ASKING)).status == 200
        assert (await fetched(bench)).status == 403


@pytest.mark.parametrize("change", [
    {"response": "00" * 32}, {"counter": 2}, {"ending": "truncated"}, {"statement": "00" * 32},
    {"nonce": "0c" * 32}, {"status": 500}, {"more": 1},
])  # fmt: skip
async def test_a_changed_receipt_does_not_verify(tmp_path: Path, change: dict[str, Any]) -> None:
    async with guarded(tmp_path) as bench:
        await bench.ask(headers=ASKING)
        value = json.loads((await fetched(bench)).body)
        value["receipt"].update(change)
        with pytest.raises(Tampered):
            checked(bench, jcs.canonical(value))


@pytest.mark.parametrize("signed", [
    b"", b"{}", b"[]", b'{"receipt":{},"signature":1}', b'{"receipt":{},"signature":"zz"}',
    b'{"receipt":{}, "signature":"00"}', b"x" * 20_000,
])  # fmt: skip
def test_what_is_no_receipt_does_not_verify(signed: bytes) -> None:
    with pytest.raises(CaiError):
        verify_receipt(signed, key="00" * 32, salt=bytes(32), line=LINE)


async def test_another_gateways_key_and_another_salt_do_not_verify(tmp_path: Path) -> None:
    async with guarded(tmp_path) as bench:
        found = await bench.ask(headers=ASKING)
        signed = (await fetched(bench)).body
        other = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
        with pytest.raises(Tampered):
            verify_receipt(signed, key=other, salt=bytes.fromhex(SALT), line=LINE)
        key = bench.desk.status()["receipt_key"]
        shown = verify_receipt(signed, key=key, salt=bytes(32), line=LINE)
        assert not shown.shows_response(found.body)
        shown = checked(bench, signed, b"POST /v1/completions")
        assert not shown.shows_request(json.dumps(PROMPT).encode())


def test_receipts_are_kept_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receipts, "MAX_KEPT", 3)
    now = [0.0]
    kept = Receipts(Ed25519PrivateKey.generate(), lambda: now[0])
    for index in range(5):
        kept.keep(Record(f"{index:064x}", bytes(32), b"x"), "a", Standing())
    assert kept.fetch(receipts.PATH + f"{0:064x}", "a") is None
    assert kept.fetch(receipts.PATH + f"{4:064x}", "a")
    now[0] = receipts.KEPT_S + 1
    assert kept.fetch(receipts.PATH + f"{4:064x}", "a") is None
