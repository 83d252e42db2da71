"""Strict PEM and chains to one pinned root."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from cai.attest.certificates import (
    MAX_CERTIFICATES,
    MAX_PEM,
    common_name,
    load_chain,
    organisations,
    verify_chain,
)
from cai.errors import EvidenceRefused, FormatError, LimitExceeded

if TYPE_CHECKING:
    from cai.attest.sim.certificates import Identity

NOW = datetime(2026, 6, 1, tzinfo=UTC)
CURVE = ec.SECP256R1()


def issue(name: str, **options: Any) -> Identity:
    from cai.attest.sim.certificates import issue as make

    return make(name, curve=CURVE, now=NOW, **options)


@pytest.fixture(scope="module")
def family() -> dict[str, Identity]:
    root = issue("root", ca=True, ca_path_length=1)
    middle = issue("middle", ca=True, ca_path_length=0, issuer=root)
    return {
        "root": root,
        "middle": middle,
        "leaf": issue("leaf", issuer=middle),
        "deep": issue("deep", ca=True, issuer=middle),
        "impostor": issue("root", ca=True),
    }


def chain(family: dict[str, Identity], *names: str) -> list[x509.Certificate]:
    return [family[name].certificate for name in names]


def pem(family: dict[str, Identity], *names: str) -> bytes:
    return b"".join(family[name].pem for name in names)


def check(certificates: list[x509.Certificate], root: Identity, now: datetime = NOW) -> None:
    verify_chain(certificates, root=root.certificate.public_bytes(Encoding.DER), now=now)


def test_load_in_order(family: dict[str, Identity]) -> None:
    loaded = load_chain(pem(family, "leaf", "middle", "root") + b"\x00", what="chain")
    assert list(loaded) == chain(family, "leaf", "middle", "root")
    assert [common_name(item) for item in loaded] == ["leaf", "middle", "root"]
    assert organisations(loaded[0]) == ("SIMULATED",)
    assert load_chain(pem(family, "leaf").strip(), what="chain") == loaded[:1]


def test_white_space_is_all_that_may_differ(family: dict[str, Identity]) -> None:
    text = pem(family, "leaf")
    assert load_chain(b"\n\n" + text.replace(b"\n", b"\r\n"), what="chain")
    body = text.splitlines()
    for bad in (
        b"junk\n" + text,
        text + b"junk",
        text + b"\x00\x00",
        text.replace(b"BEGIN", b"BEGlN"),
        text.replace(b"CERTIFICATE", b"PRIVATE KEY"),
        text[:-5],
        b"\n".join([body[0], b"%%%%", *body[1:]]),
        b"\n".join([body[0], *body[1:-1], b"====", body[-1]]),
        b"\n".join([body[0], b"AAAA", body[-1]]),
        b"",
        b"\x00",
    ):
        with pytest.raises(FormatError):
            load_chain(bad, what="chain")


def test_stray_bits_of_base64_are_refused(family: dict[str, Identity]) -> None:
    for _ in range(200):
        text = issue("padded").pem
        if b"=\n" in text and b"==\n" not in text:
            break
    at = text.index(b"=\n") - 1
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    same = alphabet[alphabet.index(text[at]) | 1]
    altered = text[:at] + bytes((same,)) + text[at + 1 :]
    assert altered != text
    with pytest.raises(FormatError, match="stray bits"):
        load_chain(altered, what="chain")


def test_limits(family: dict[str, Identity]) -> None:
    leaf = pem(family, "leaf")
    assert len(load_chain(leaf * MAX_CERTIFICATES, what="chain")) == MAX_CERTIFICATES
    with pytest.raises(LimitExceeded):
        load_chain(leaf * (MAX_CERTIFICATES + 1), what="chain")
    with pytest.raises(LimitExceeded):
        load_chain(leaf.ljust(MAX_PEM + 1), what="chain")


def test_a_good_chain(family: dict[str, Identity]) -> None:
    check(chain(family, "leaf", "middle", "root"), family["root"])


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["root"], "no issuer"),
        (["leaf", "middle"], "not the pinned root"),
        (["leaf", "middle", "impostor"], "not the pinned root"),
        (["leaf", "root"], "is not signed by"),
        (["middle", "leaf", "root"], "is not signed by|is a CA"),
        (["leaf", "middle", "middle", "root"], "is not signed by"),
        (["middle", "root"], "is a CA where the leaf should be"),
        (["deep", "middle", "root"], "is a CA where the leaf should be"),
    ],
)
def test_refused_chains(family: dict[str, Identity], names: list[str], reason: str) -> None:
    with pytest.raises(EvidenceRefused, match=reason):
        check(chain(family, *names), family["root"])


def test_a_root_of_the_same_name_does_not_sign(family: dict[str, Identity]) -> None:
    with pytest.raises(EvidenceRefused, match="is not signed by"):
        check(chain(family, "leaf", "middle", "impostor"), family["impostor"])


def test_path_length(family: dict[str, Identity]) -> None:
    under = issue("under", issuer=family["deep"])
    certificates = [under.certificate, *chain(family, "deep", "middle", "root")]
    with pytest.raises(EvidenceRefused, match="path length"):
        check(certificates, family["root"])


def test_an_end_entity_issues_nothing(family: dict[str, Identity]) -> None:
    forged = issue("forged", issuer=family["leaf"])
    with pytest.raises(EvidenceRefused, match="not allowed to issue"):
        check([forged.certificate, *chain(family, "leaf", "middle", "root")], family["root"])


def test_validity(family: dict[str, Identity]) -> None:
    for days in (-2, 4000):
        with pytest.raises(EvidenceRefused, match="is not valid at"):
            check(chain(family, "leaf", "middle", "root"), family["root"],
                  NOW + timedelta(days=days))  # fmt: skip


def test_unknown_critical_extension(family: dict[str, Identity]) -> None:
    key = ec.generate_private_key(CURVE)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "odd")])
    odd = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(family["middle"].certificate.subject)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
        .add_extension(odd, critical=True)
        .sign(family["middle"].key, family["leaf"].certificate.signature_hash_algorithm)
    )
    with pytest.raises(EvidenceRefused, match="unknown critical extension"):
        check([certificate, *chain(family, "middle", "root")], family["root"])


@given(st.binary(max_size=400))
def test_arbitrary_bytes_leak_nothing(data: bytes) -> None:
    with pytest.raises((FormatError, LimitExceeded)):
        load_chain(data, what="chain")


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(at=st.integers(0, 5000), patch=st.binary(min_size=1, max_size=4))
def test_altered_der_leaks_nothing(family: dict[str, Identity], at: int, patch: bytes) -> None:
    import base64

    der = family["leaf"].certificate.public_bytes(Encoding.DER)
    at %= len(der)
    altered = base64.b64encode(der[:at] + patch + der[at + len(patch) :])
    text = b"-----BEGIN CERTIFICATE-----\n" + altered + b"\n-----END CERTIFICATE-----\n"
    with contextlib.suppress(FormatError, LimitExceeded):
        loaded = load_chain(text, what="chain")
        common_name(loaded[0])
        organisations(loaded[0])
        if loaded[0].public_bytes(Encoding.DER) != der:
            with pytest.raises(EvidenceRefused):
                check([loaded[0], *chain(family, "middle", "root")], family["root"])
