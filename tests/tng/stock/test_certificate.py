"""Certificates with evidence: as TNG makes them, and everything that is none."""

from __future__ import annotations

import base64
import datetime as dt
import json
from hashlib import sha256, sha384
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cai import jcs
from cai.errors import CaiError, FormatError, LimitExceeded
from tests.tng.stock.recorded import certificate, recording
from tng.stock import cbor
from tng.stock.certificate import (
    EVIDENCE_OID,
    LIFETIME_S,
    MAX_CERTIFICATE,
    PUBKEY_HASH,
    TAG_EVIDENCE,
    TAG_TOKEN,
    CocoEvidence,
    bound_key,
    make_certificate,
    parse_certificate,
    pubkey_hash,
    runtime_data,
    spki_der,
)

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)


def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize("name", ["rats_tls_background_check", "rats_tls_additional_evidence"])
def test_recorded_evidence(name: str) -> None:
    record, presented = recording(name), parse_certificate(certificate(name))
    told = record["evidence_map"]
    evidence = presented.evidence
    assert evidence is not None
    assert (evidence.tee, evidence.runtime_data) == (told["tee_type"], told["aa_runtime_data"])
    assert evidence.evidence.decode() == told["aa_evidence"]
    additional = evidence.additional.decode() if evidence.additional else None
    assert additional == told["aa_additional_evidence"]
    assert sha256(presented.spki).hexdigest() == record["spki_sha256_hex"]
    # The key is bound as its claim says, and the claim as the report data says.
    assert bound_key(evidence.claims) == sha256(presented.spki).digest()
    assert evidence.report_data.hex() == record["report_data_given_to_AA_hex"]
    assert not presented.token


def test_a_recorded_passport() -> None:
    record = recording("rats_tls_passport")
    presented = parse_certificate(certificate("rats_tls_passport"))
    assert presented.token == record["token"]
    assert presented.evidence is None


def test_our_evidence_is_written_as_tng_writes_it() -> None:
    """Our encoder, given what TNG had, makes TNG's own extension."""
    record = recording("rats_tls_background_check")
    evidence = parse_certificate(certificate("rats_tls_background_check")).evidence
    assert evidence is not None
    made = cbor.encode(cbor.Tagged(TAG_EVIDENCE, [evidence.encode(), b""]))
    assert made.hex() == record["ext_2_23_133_5_4_9_hex"]


def test_a_certificate_of_ours_reads_as_it_was_made() -> None:
    own = key()
    spki = spki_der(own.public_key())
    evidence = CocoEvidence("tdx", b"{}", b"{}", runtime_data(spki, more="1"))
    identity = make_certificate(own, evidence, now=NOW)
    presented = parse_certificate(identity.der)
    assert presented.evidence == evidence
    assert presented.spki == spki
    assert presented.not_after == NOW + dt.timedelta(seconds=LIFETIME_S)
    assert evidence.report_data == sha384(evidence.runtime_data.encode()).digest()
    assert "PRIVATE" not in repr(identity)


def other_key_type() -> bytes:
    return _signed(rsa.generate_private_key(public_exponent=65537, key_size=2048))


def other_curve() -> bytes:
    return _signed(ec.generate_private_key(ec.SECP384R1()))


def _signed(own: Any, extension: bytes | None = None) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name)
        .public_key(own.public_key()).serial_number(1)
        .not_valid_before(NOW).not_valid_after(NOW + dt.timedelta(hours=1))
    )  # fmt: skip
    if extension is not None:
        builder = builder.add_extension(
            x509.UnrecognizedExtension(EVIDENCE_OID, extension), critical=False
        )
    return builder.sign(own, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.mark.parametrize("make", [other_key_type, other_curve])
def test_other_keys_are_refused(make: Any) -> None:
    with pytest.raises(FormatError, match="P-256"):
        parse_certificate(make())


@pytest.mark.parametrize("der", [b"", b"\x30", b"x" * 100, b"\x30\x82\xff\xff" + bytes(50)])
def test_what_is_no_certificate(der: bytes) -> None:
    with pytest.raises(FormatError):
        parse_certificate(der)


def test_one_that_is_too_long() -> None:
    with pytest.raises(LimitExceeded):
        parse_certificate(bytes(MAX_CERTIFICATE + 1))


def evidence_map(**changes: Any) -> bytes:
    members: dict[str, Any] = {
        "tee_type": "tdx", "aa_evidence": b"{}", "aa_additional_evidence": None,
        "aa_runtime_data": "{}", "aa_runtime_data_hash_algo": 7,
    }  # fmt: skip
    return cbor.encode({name: item for name, item in (members | changes).items() if item != "-"})


def tagged(body: cbor.Value, tag: int = TAG_EVIDENCE) -> bytes:
    return cbor.encode(cbor.Tagged(tag, body))


@pytest.mark.parametrize(
    "extension",
    [
        b"",
        b"\xff",
        cbor.encode([b"x", b""]),  # no tag
        tagged([evidence_map()]),  # no claims
        tagged([evidence_map(), b"", b""]),
        tagged([evidence_map(), b""], tag=0xC0C002),
        tagged([7, b""]),
        tagged(b"x"),
        tagged([cbor.encode([1]), b""]),  # no map
        tagged([evidence_map(tee_type=b"tdx"), b""]),
        tagged([evidence_map(tee_type="-"), b""]),
        tagged([evidence_map(aa_evidence="{}"), b""]),
        tagged([evidence_map(aa_runtime_data=b"{}"), b""]),
        tagged([evidence_map(aa_additional_evidence="x"), b""]),
        tagged([evidence_map(aa_runtime_data_hash_algo=1), b""]),  # SHA-256
        tagged([evidence_map(aa_runtime_data_hash_algo="-"), b""]),
        tagged([b"\xff\xfe", b""], tag=TAG_TOKEN),  # a token that is no ASCII
        tagged([evidence_map(), b""]) + b"\x00",
    ],
)
def test_evidence_of_another_form(extension: bytes) -> None:
    with pytest.raises(FormatError):
        parse_certificate(_signed(key(), extension))


def test_a_certificate_without_evidence_has_none() -> None:
    presented = parse_certificate(_signed(key()))
    assert presented.evidence is None
    assert presented.token == ""


@pytest.mark.parametrize("text", ["", "[]", "1", "{", '{"a":1,"a":2}'])
def test_runtime_data_that_is_no_object(text: str) -> None:
    evidence = CocoEvidence("tdx", b"{}", None, text)
    with pytest.raises(CaiError):
        _ = evidence.claims


def test_runtime_data_is_canonical() -> None:
    evidence = CocoEvidence("tdx", b"{}", None, '{"b":1, "a":2}')
    with pytest.raises(CaiError):
        _ = evidence.claims


def test_no_claim_binds_no_key() -> None:
    assert bound_key({}) is None


@pytest.mark.parametrize(
    "value",
    [
        "", "!", 7, [], {}, "ä", "AA==",
        base64.b64encode(cbor.encode([1])).decode(),
        base64.b64encode(cbor.encode([7, bytes(48)])).decode(),  # SHA-384
        base64.b64encode(cbor.encode([1, "text"])).decode(),
        base64.b64encode(cbor.encode([1, bytes(32), 0])).decode(),
        base64.b64encode(cbor.encode({"1": bytes(32)})).decode(),
    ],
)  # fmt: skip
def test_a_key_claim_of_another_form(value: object) -> None:
    with pytest.raises(FormatError):
        bound_key({PUBKEY_HASH: value})


def test_the_key_claim_known_answer() -> None:
    record = recording("rats_tls_background_check")
    claim = json.loads(record["evidence_map"]["aa_runtime_data"])[PUBKEY_HASH]
    spki = parse_certificate(certificate("rats_tls_background_check")).spki
    assert pubkey_hash(spki) == claim
    assert runtime_data(spki) == jcs.canonical({PUBKEY_HASH: claim}).decode()
