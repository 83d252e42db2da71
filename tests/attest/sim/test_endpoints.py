"""The simulated vendors over HTTP: what a fetcher gets is what a verifier accepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import httpx
import pytest

from cai.attest.anchors import simulated_anchors
from cai.attest.certificates import load_chain
from cai.attest.gpu.ocsp import build_request, check_answer
from cai.attest.gpu.rim import verify_rim
from cai.attest.gpu.rim_store import decode_answer
from cai.errors import EvidenceRefused

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform
    from cai.attest.sim.endpoints import SimulatedVendors

PCS = "/tdx/certification/v4"


@pytest.fixture
def vendors(platform: SimulatedPlatform) -> Iterator[SimulatedVendors]:
    from cai.attest.sim.endpoints import SimulatedVendors

    with SimulatedVendors(platform) as running:
        yield running


def test_tcb_info_is_given_as_it_was_signed(
    vendors: SimulatedVendors, platform: SimulatedPlatform
) -> None:
    from cai.attest.sim import intel

    answer = httpx.get(f"{vendors.url}{PCS}/tcb", params={"fmspc": intel.FMSPC.hex()})
    text = answer.text
    exact = text[text.index('{"tcbInfo":') + 11 : text.index(',"signature":"')]
    assert json.loads(exact)["fmspc"] == intel.FMSPC.hex().upper()
    chain = unquote(answer.headers["TCB-Info-Issuer-Chain"]).encode()
    assert len(load_chain(chain, what="chain")) == 2
    signature = bytes.fromhex(json.loads(text)["signature"])
    assert len(signature) == 64
    assert httpx.get(f"{vendors.url}{PCS}/tcb", params={"fmspc": "00" * 6}).status_code == 404


def test_revocation_lists_by_every_path(vendors: SimulatedVendors) -> None:
    base = f"{vendors.url}/sgx/certification/v4"
    der = httpx.get(f"{base}/pckcrl?ca=platform&encoding=der")
    assert "SGX-PCK-CRL-Issuer-Chain" in der.headers
    assert bytes.fromhex(httpx.get(f"{base}/pckcrl?ca=platform").text)[:1] == der.content[:1]
    root = httpx.get(f"{vendors.url}/IntelSGXRootCA.der").content
    assert root[:1] == bytes.fromhex(httpx.get(f"{base}/rootcacrl").text)[:1] == b"\x30"
    assert httpx.get(f"{base}/pckcrl?ca=processor").status_code == 404


def test_reference_files_verify(
    vendors: SimulatedVendors, platform: SimulatedPlatform, platform_dir: Path
) -> None:
    root = simulated_anchors(platform_dir / "anchors").rim_root
    assert root is not None
    for identifier in platform.rims():
        answer = httpx.get(f"{vendors.url}/v1/rim/{identifier}")
        rim = verify_rim(decode_answer(answer.content), root=root, now=datetime.now(UTC))
        assert len(rim.measurements) in (12, 21, 31)
    assert httpx.get(f"{vendors.url}/v1/rim/NV_GPU_DRIVER_GH100_1.0").status_code == 404


def test_revocation_answers(vendors: SimulatedVendors, platform: SimulatedPlatform) -> None:
    from cai.attest.sim import OcspSettings

    chain = load_chain(platform.devices(1).collect(bytes(32))[0].chain, what="chain")
    certificate, issuer = chain[1], chain[2]
    nonce = b"\x07" * 32
    request = build_request(certificate, issuer, nonce=nonce)

    def ask() -> bytes:
        return httpx.post(f"{vendors.url}/", content=request).content

    good = check_answer(
        ask(), certificate=certificate, issuer=issuer, now=datetime.now(UTC), nonce=nonce
    )
    assert good.good
    for settings, reason in (
        (OcspSettings(status={"GH100 A01 GSP BROM": "revoked"}), "revoked"),
        (OcspSettings(status={"GH100 A01 GSP BROM": "on-hold"}), "revoked"),
        (OcspSettings(status={"GH100 A01 GSP BROM": "unknown"}), "unknown"),
        (OcspSettings(age=timedelta(days=3)), "usable until"),
        (OcspSettings(age=timedelta(hours=2), lifetime=None), "usable until"),
        (OcspSettings(unavailable=True), "TRY_LATER"),
        (OcspSettings(ignore_nonce=True), "nonce"),
        (OcspSettings(signer="NVIDIA GH100 Identity"), "responder"),
    ):
        vendors.ocsp = settings
        with pytest.raises(EvidenceRefused, match=reason):
            check_answer(
                ask(), certificate=certificate, issuer=issuer, now=datetime.now(UTC), nonce=nonce
            )


def test_failures_and_false_answers(vendors: SimulatedVendors) -> None:
    vendors.failures[f"{PCS}/qe"] = 503
    vendors.failures["/v1/rim"] = b"<html>"
    assert httpx.get(f"{vendors.url}{PCS}/qe/identity").status_code == 503
    assert httpx.get(f"{vendors.url}/v1/rim/x").content == b"<html>"
    assert httpx.get(f"{vendors.url}/elsewhere").status_code == 404
    assert vendors.requests[0] == f"GET {PCS}/qe/identity"
    vendors.failures.clear()
    assert httpx.get(f"{vendors.url}{PCS}/qe/identity").status_code == 200
    assert httpx.get(f"{vendors.url}{PCS}/tcbevaluationdatanumbers").status_code == 200


def test_not_an_ocsp_request(vendors: SimulatedVendors) -> None:
    from cryptography.x509 import ocsp

    answer = ocsp.load_der_ocsp_response(httpx.post(vendors.url, content=b"junk").content)
    assert answer.response_status is ocsp.OCSPResponseStatus.MALFORMED_REQUEST
