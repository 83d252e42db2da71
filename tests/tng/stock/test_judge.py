"""Verdicts about certificates: what a service's tokens must say, and how long a verdict counts."""

from __future__ import annotations

import datetime as dt
import itertools
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cai.attest.verdict import not_asked
from cai.errors import CaiError, EvidenceRefused, PeerUnreachable
from tests.tng.stock_peers import StockService
from tng.config.trust import Binding, Model, ServiceVerify
from tng.stock import judge as judge_module
from tng.stock.certificate import (
    DIALECT_CLAIM,
    CocoEvidence,
    make_certificate,
    runtime_data,
    spki_der,
)
from tng.stock.judge import RISK_FRESH, CertificateJudge

pytestmark = pytest.mark.anyio

NOT_ASKED = not_asked("x").outcome.value
NOW = dt.datetime.now(dt.UTC)


def evidence_for(spki: bytes, **claims: str) -> CocoEvidence:
    import base64
    import json
    from hashlib import sha384

    text = runtime_data(spki, **claims)
    told = base64.b64encode(sha384(text.encode()).digest()).decode()
    return CocoEvidence("sample", json.dumps({"report_data": told}).encode(), None, text)


def certificate(*, other_key: bool = False, **claims: str) -> bytes:
    own, bound = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    spki = spki_der((bound if other_key else own).public_key())
    return make_certificate(own, evidence_for(spki, **claims), now=NOW).der


async def judged(service: StockService, der: bytes | None, **settings: Any) -> Any:
    async with service.running():
        judge = CertificateJudge(ServiceVerify(service.address, ("default",), (), **settings), None)
        try:
            return await judge.judge(der, "peer")
        finally:
            await judge.close()


async def test_a_good_certificate() -> None:
    proven = await judged(StockService(), certificate())
    assert proven.verdict.binding.value == "key"
    assert RISK_FRESH in proven.verdict.residual_risks
    assert proven.max_age_s <= judge_module.MAX_VERDICT_S


@pytest.mark.parametrize(
    ("service", "der", "settings", "seen"),
    [
        (StockService(), None, {}, "stock.certificate"),
        (StockService(), b"none", {}, "stock.certificate"),
        (StockService(), certificate(other_key=True), {}, "stock.key"),
        (StockService(), certificate(**{DIALECT_CLAIM: "1"}), {}, "channel.downgrade"),
        (StockService(), certificate(), {"model": Model.PASSPORT}, "stock.model"),
        (StockService(), certificate(), {"kbs_key": "ab" * 32}, "ticket.present"),
        (StockService(status="warning"), certificate(), {}, "as.appraisal.cpu0"),
        (StockService(status="contraindicated"), certificate(), {}, "as.appraisal.cpu0"),
        (StockService(policies="other"), certificate(), {}, "as.policy"),
        (StockService(lifetime_s=-120), certificate(), {}, "as.token.time"),
    ],
    ids=itertools.count(),
)
async def test_what_does_not_pass(
    service: StockService, der: bytes | None, settings: dict[str, Any], seen: str
) -> None:
    with pytest.raises(EvidenceRefused) as refused:
        await judged(service, der, **settings)
    assert refused.value.verdict is not None
    assert seen in {item.name for item in refused.value.verdict.failures}


async def test_key_binding_on_request_takes_a_guest_of_ours() -> None:
    der = certificate(**{DIALECT_CLAIM: "1"})
    proven = await judged(StockService(), der, binding=Binding.KEY)
    asked = {item.name: item.outcome.value for item in proven.verdict.checks}
    assert asked["channel.downgrade"] == NOT_ASKED


async def test_a_token_about_other_claims() -> None:
    service = StockService()
    honest = service._attest

    def other(request: dict[str, Any]) -> tuple[int, bytes]:
        structured = request["verification_requests"][0]["runtime_data"]
        structured["structured"] = {"pubkey-hash": "other"}
        request["verification_requests"][0]["tee"] = "unchecked"
        return honest(request)

    service._attest = other  # type: ignore[method-assign]
    with pytest.raises(EvidenceRefused) as refused:
        await judged(service, certificate())
    assert refused.value.verdict is not None
    assert "stock.claims" in {item.name for item in refused.value.verdict.failures}


async def test_verdicts_are_used_again_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    service, der = StockService(), certificate()
    async with service.running():
        judge = CertificateJudge(ServiceVerify(service.address, ("default",), ()), None)
        for _ in range(3):
            await judge.judge(der, "peer")
        assert service.calls.count("attestation") == 1
        await judge.judge(certificate(), "peer")
        assert service.calls.count("attestation") == 2
        monkeypatch.setattr(judge_module, "MAX_VERDICTS", 1)
        await judge.judge(certificate(), "peer")
        await judge.judge(der, "peer")
        assert service.calls.count("attestation") == 4
        await judge.close()


async def test_a_verdict_ends_with_its_token() -> None:
    proven = await judged(StockService(lifetime_s=30), certificate())
    assert proven.max_age_s <= 30


async def test_refusals_are_not_remembered() -> None:
    """A service that was in trouble for a moment refuses nobody for longer."""
    service, der = StockService(status="warning"), certificate()
    async with service.running():
        judge = CertificateJudge(ServiceVerify(service.address, ("default",), ()), None)
        with pytest.raises(EvidenceRefused):
            await judge.judge(der, "peer")
        service.status = "affirming"
        await judge.judge(der, "peer")
        await judge.close()


async def test_a_service_that_is_away_is_not_a_verdict() -> None:
    judge = CertificateJudge(ServiceVerify("http://127.0.0.1:9/", ("default",), ()), None)
    with pytest.raises(PeerUnreachable):
        await judge.judge(certificate(), "peer")
    await judge.close()


async def test_a_service_that_answers_nonsense() -> None:
    service = StockService()
    service.sign = lambda _claims: "not a token"  # type: ignore[method-assign]
    with pytest.raises(CaiError):
        await judged(service, certificate())
