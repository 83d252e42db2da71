"""Known answers and transcripts of Trustee and its relatives, held against the running surfaces."""

from __future__ import annotations

import json
import os
from hashlib import sha384
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cai import jcs
from cai.attest import jwe, rcar
from cai.attest.jwk import PublicJwk, TeeKey, b64u_decode, b64u_encode
from tests.kbs.program import Key
from tests.kbs.world import Site

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

VECTORS = Path(os.environ.get("CAI_VECTORS", "../shared/vectors")) / "trustee"


def vector(name: str) -> Path:
    path = VECTORS / name
    if not path.exists():
        pytest.skip(f"no vectors at {path} (set CAI_VECTORS)")
    return path


def known() -> dict[str, Any]:
    value: dict[str, Any] = json.loads(vector("own/jwe_kat.json").read_text())
    return value


def known_key() -> TeeKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    secret = int.from_bytes(b64u_decode(known()["tee_private_d_b64url"], what="d"))
    return TeeKey(ec.derive_private_key(secret, ec.SECP256R1()))


# Digests and the JWE.


def test_the_constant_of_upstream() -> None:
    digest = sha384(jcs.canonical({"b": 1, "a": "test", "c": {"d": "e"}})).hexdigest()
    assert digest.startswith("e71ce8e70d814ba6639c3612ebee0ff1")


def test_the_digests_of_one_handshake() -> None:
    answers = known()["rcar"]
    key = PublicJwk.parse(known()["tee_pubkey"])
    device = rcar.device_digest(answers["nonce"], key)
    assert device.hex() == answers["device_report_data_sha384_hex"]
    assert device[:32].hex() == answers["nvidia_nonce_hex"]
    primary = rcar.primary_digest(answers["nonce"], key, "")
    assert primary.hex() == answers["primary_report_data_sha384_hex"]


def test_the_known_jwe_opens_here_and_at_a_stock_client() -> None:
    sealed = json.dumps(known()["response"]).encode()
    assert jwe.decrypt(sealed, known_key()).reveal() == known()["plaintext_ascii"].encode()
    stock = Key()
    stock.private = known_key().private_key
    assert stock.open(sealed) == known()["plaintext_ascii"].encode()
    protected = b64u_decode(known()["response"]["protected"], what="protected")
    assert protected.decode() == known()["protected_json"]


# Transcripts: what other services' clients post, answered in their words.


@pytest.mark.parametrize(
    "name", ["coco-as_request.json", "set_policy_check.json",
             "sample_attestation_request_openanolis.json"],
)  # fmt: skip
def test_other_tees_are_refused_by_name(site: Site, name: str) -> None:
    body = vector(f"as-requests/{name}").read_bytes()
    refused = site.call("POST", "/as/attestation", body)
    assert refused.status_code == 400
    assert "is not served here" in refused.json()["detail"]


@pytest.mark.parametrize("name", ["gateway_auth_openanolis.json", "gateway_attest_openanolis.json"])
def test_bodies_of_a_gateway_are_read_strictly(site: Site, name: str) -> None:
    body = vector(f"as-requests/{name}").read_bytes()
    route = "auth" if "auth" in name else "attest"
    _, cookie = site.auth()
    answer = site.call("POST", f"/kbs/v0/{route}", body, cookie=cookie)
    # Its request is one of ours; its evidence, with the member names of 2022, is not.
    assert answer.status_code == (200 if route == "auth" else 400), answer.text


@pytest.mark.parametrize(
    "name", ["other-tee/csv_evidence.json", "other-tee/tpm_evidence.json",
             "as-requests/e2e_evidence.json", "az-tdx-vtpm/evidence-v1.json"],
)  # fmt: skip
def test_evidence_of_other_tees_proves_nothing(site: Site, name: str) -> None:
    evidence = b64u_encode(vector(name).read_bytes())
    entry = {"tee": "tdx", "evidence": evidence, "runtime_data": {"raw": b64u_encode(b"x")}}
    refused = site.call("POST", "/as/attestation", {"verification_requests": [entry]})
    assert refused.status_code in (400, 403)


@pytest.mark.parametrize("name", ["tdx_quote_4.dat", "tdx_quote_5.dat", "tdx_quote_6.dat"])
def test_recorded_quotes_are_refused_in_the_simulated_realm(site: Site, name: str) -> None:
    value = rcar.encode_tdx_evidence(vector(f"tdx/{name}").read_bytes(), None)
    entry = {
        "tee": "tdx", "evidence": b64u_encode(json.dumps(value).encode()),
        "runtime_data": {"raw": b64u_encode(b"x")},
    }  # fmt: skip
    refused = site.call("POST", "/as/attestation", {"verification_requests": [entry]})
    assert (refused.status_code, refused.json()["code"]) == (403, "evidence-refused")
    if name == "tdx_quote_4.dat":
        assert "tdx.debug" in refused.json()["detail"]


# Tokens of other services open nothing, whatever key they bring along.


@pytest.mark.parametrize(
    "name", ["ear_tdx_tng.jwt", "ear_with_additional_device_tng.jwt", "simple_tng.jwt",
             "ear_sample_openanolis.txt", "ear_tdx_openanolis.txt"],
)  # fmt: skip
def test_tokens_of_others_release_nothing(allowed: Site, name: str) -> None:
    token = vector(f"tokens/{name}").read_text().strip()
    refused = allowed.get(None, headers={"Authorization": f"Bearer {token}"})
    assert refused.status_code == 401
    assert refused.json()["type"].endswith("/TokenVerifierError")


@pytest.mark.parametrize("scenario", range(1, 8))
def test_a_key_in_a_header_is_never_used(allowed: Site, scenario: int) -> None:
    jwk = json.loads(vector(f"tokens/jwk-scenarios/scenario0{scenario}-jwk.json").read_text())
    header = b64u_encode(jcs.canonical({"alg": "ES256", "typ": "JWT", "jwk": jwk}))
    token = f"{header}.{b64u_encode(b'{}')}.{b64u_encode(bytes(64))}"
    refused = allowed.get(None, headers={"Authorization": f"Bearer {token}"})
    assert refused.status_code == 401


def members(value: Any) -> set[str]:
    return set(value) if isinstance(value, dict) else set()


def test_our_appraisals_have_the_members_of_a_known_token(
    site: Site, platform: SimulatedPlatform
) -> None:
    from tests.kbs.appraisal.test_service import Asker, parts

    theirs = json.loads(vector("tokens/as_example.token.json").read_text())
    header, ours = parts(Asker(site, platform).ask().text)
    wanted = {"eat_profile", "iat", "exp", "ear.verifier-id", "submods"}
    assert wanted <= members(theirs) & members(ours)
    known_cpu = next(iter(theirs["submods"].values()))
    assert members(known_cpu) - {"ear.veraison.policy-claims"} <= members(ours["submods"]["cpu0"])
    tng = parts(vector("tokens/ear_tdx_tng.jwt").read_text().strip())[0]
    assert members(tng) <= members(header)
    assert members(tng["jwk"]) - {"x5u"} <= members(header["jwk"])


def test_our_key_set_has_the_members_of_a_known_one(site: Site) -> None:
    theirs = json.loads(vector("tokens/as_fixture_expected-jwks.json").read_text())["keys"][0]
    ours = site.call("GET", "/as/.well-known/jwks.json").json()["keys"][0]
    assert members(theirs) <= members(ours)
