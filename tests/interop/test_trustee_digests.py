"""Trustee's digests: the recorded known answers of its wire format."""

from __future__ import annotations

import json
import os
from hashlib import sha384
from pathlib import Path
from typing import Any

import pytest

from cai import jcs
from cai.attest import rcar
from cai.attest.jwk import TeeKey
from cai.attest.statement import stock_report_data

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / os.environ.get("CAI_VECTORS", "../shared/vectors")
KAT = VECTORS / "trustee" / "own" / "jwe_kat.json"


@pytest.fixture(scope="module")
def kat() -> dict[str, Any]:
    if not KAT.exists():
        pytest.skip(f"no shared vector {KAT}")
    value: dict[str, Any] = json.loads(KAT.read_text())
    return value


def test_digests(kat: dict[str, Any]) -> None:
    known, key = kat["rcar"], rcar.PublicJwk.parse(kat["tee_pubkey"])
    nonce = known["nonce"]
    device = rcar.device_digest(nonce, key)
    primary = rcar.primary_digest(nonce, key, "")
    assert device.hex() == known["device_report_data_sha384_hex"]
    assert primary.hex() == known["primary_report_data_sha384_hex"]
    assert device[:32].hex() == known["nvidia_nonce_hex"]
    assert stock_report_data(primary) == primary + bytes(16)


@pytest.mark.parametrize("part", ["device", "primary"])
def test_hashed_text(kat: dict[str, Any], part: str) -> None:
    """The recorded runtime data are canonical, and hash to the recorded digest."""
    text = kat["rcar"][f"{part}_runtime_jcs"].encode()
    assert jcs.canonical(json.loads(text)) == text
    assert sha384(text).hexdigest() == kat["rcar"][f"{part}_report_data_sha384_hex"]


def test_every_part_is_bound(kat: dict[str, Any]) -> None:
    known, key = kat["rcar"], rcar.PublicJwk.parse(kat["tee_pubkey"])
    right = known["primary_report_data_sha384_hex"]
    assert rcar.primary_digest(known["nonce"], key, "{}").hex() != right
    assert rcar.primary_digest("AA==", key, "").hex() != right
    assert rcar.primary_digest(known["nonce"], TeeKey.generate().jwk, "").hex() != right
