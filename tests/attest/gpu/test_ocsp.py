"""Revocation answers: whose they are, about what, and of when; most cases are refused."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cai.attest.gpu.ocsp import (
    ASSUMED_VALIDITY,
    MAX_RESPONSE,
    authenticate_answer,
    build_request,
    check_answer,
    device_links,
    rim_links,
    serial_number,
)
from cai.attest.gpu.ocsp_store import OcspStore, check_revocation, load_ocsp
from cai.attest.verdict import Outcome
from cai.errors import EvidenceRefused, FormatError, InputMissing, LimitExceeded

if TYPE_CHECKING:
    from cai.attest.sim.certificates import Identity
    from cai.attest.sim.nvidia import Foundry, Gpu
    from cai.attest.sim.revocation import OcspSettings, Responder

NONCE = b"\x07" * 32
CURVE = ec.SECP384R1()


@pytest.fixture(scope="session")
def gpu(foundry: Foundry, made: datetime) -> Gpu:
    from cai.attest.sim.nvidia import create_gpu

    return create_gpu(foundry, now=made)


@pytest.fixture(scope="session")
def chain(foundry: Foundry, gpu: Gpu) -> tuple[x509.Certificate, ...]:
    from cai.attest.sim.nvidia import issuers

    parts = (gpu.leaf, gpu.boot_rom, *issuers(foundry, gpu.chip))
    return tuple(part.certificate for part in parts)


def responder(foundry: Foundry, gpu: Gpu, **settings: Any) -> Responder:
    from cai.attest.sim.revocation import OcspSettings, Responder

    chosen: OcspSettings = OcspSettings(**settings)
    return Responder.of(foundry, [gpu], chosen)


def answer(
    foundry: Foundry, gpu: Gpu, now: datetime, *, nonce: bytes | None = None, **settings: Any
) -> bytes:
    """An answer about the GPU's boot ROM."""
    about = responder(foundry, gpu, **settings)
    return about.about(gpu.boot_rom.certificate, now=now, nonce=nonce)


def test_good(foundry: Foundry, gpu: Gpu, chain: Any, now: datetime) -> None:
    data = answer(foundry, gpu, now, nonce=NONCE)
    for nonce in (NONCE, None):
        found = check_answer(data, certificate=chain[1], issuer=chain[2], now=now, nonce=nonce)
        assert found.good
        assert found.produced == now
        assert found.expires == now + timedelta(hours=12)
    assert serial_number(data) == chain[1].serial_number


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha384"])
@pytest.mark.parametrize("nonce", [None, NONCE, b"x"])
def test_request_and_answer(
    foundry: Foundry, gpu: Gpu, chain: Any, now: datetime, algorithm: str, nonce: bytes | None
) -> None:
    request = build_request(chain[1], chain[2], nonce=nonce, algorithm=algorithm)
    parsed = ocsp.load_der_ocsp_request(request)
    assert parsed.serial_number == chain[1].serial_number
    assert parsed.hash_algorithm.name == algorithm
    data = responder(foundry, gpu).answer(request, now=now)
    assert check_answer(data, certificate=chain[1], issuer=chain[2], now=now, nonce=nonce).good


def test_bad_requests(chain: Any) -> None:
    for options in ({"algorithm": "md5"}, {"nonce": b""}, {"nonce": bytes(129)}):
        with pytest.raises(FormatError):
            build_request(chain[1], chain[2], **options)


@pytest.mark.parametrize("nonce", [None, b"\x08" * 32, NONCE[:31]])
def test_another_nonce(
    foundry: Foundry, gpu: Gpu, chain: Any, now: datetime, nonce: bytes | None
) -> None:
    data = answer(foundry, gpu, now, nonce=nonce)
    with pytest.raises(EvidenceRefused, match="nonce"):
        check_answer(data, certificate=chain[1], issuer=chain[2], now=now, nonce=NONCE)


@pytest.mark.parametrize(
    ("status", "text"),
    [("revoked", "keyCompromise"), ("on-hold", "certificateHold"), ("unknown", "unknown")],
)
def test_not_good(
    foundry: Foundry, gpu: Gpu, chain: Any, now: datetime, status: str, text: str
) -> None:
    data = answer(foundry, gpu, now, status={"GH100 A01 GSP BROM": status})
    with pytest.raises(EvidenceRefused, match=text):
        check_answer(data, certificate=chain[1], issuer=chain[2], now=now)
    assert not authenticate_answer(data, certificate=chain[1], issuer=chain[2], now=now).good


def test_times(foundry: Foundry, gpu: Gpu, chain: Any, now: datetime) -> None:
    def good(data: bytes, at: datetime, max_age: timedelta | None = None) -> bool:
        try:
            check_answer(data, certificate=chain[1], issuer=chain[2], now=at, max_age=max_age)
        except EvidenceRefused:
            return False
        return True

    bounded = answer(foundry, gpu, now)
    assert good(bounded, now - timedelta(minutes=4))
    assert not good(bounded, now - timedelta(minutes=6))
    assert good(bounded, now + timedelta(hours=12))
    assert not good(bounded, now + timedelta(hours=12, seconds=1))
    assert good(bounded, now + timedelta(hours=2), timedelta(hours=2))
    assert not good(bounded, now + timedelta(hours=2, seconds=1), timedelta(hours=2))
    open_ended = answer(foundry, gpu, now, lifetime=None)
    assert good(open_ended, now + ASSUMED_VALIDITY)
    assert not good(open_ended, now + ASSUMED_VALIDITY + timedelta(seconds=1))


def test_about_another_certificate(
    foundry: Foundry, gpu: Gpu, chain: Any, now: datetime
) -> None:
    about_provisioner = responder(foundry, gpu).about(chain[2], now=now)
    for certificate, issuer in ((chain[1], chain[2]), (chain[2], chain[4]), (chain[0], chain[1])):
        with pytest.raises(EvidenceRefused):
            check_answer(about_provisioner, certificate=certificate, issuer=issuer, now=now)
    assert check_answer(about_provisioner, certificate=chain[2], issuer=chain[3], now=now).good


def test_error_answers(foundry: Foundry, gpu: Gpu, chain: Any, now: datetime) -> None:
    about = responder(foundry, gpu, unavailable=True)
    request = build_request(chain[1], chain[2])
    for data in (about.answer(request, now=now), about.answer(b"x", now=now)):
        with pytest.raises(EvidenceRefused, match="responder says"):
            check_answer(data, certificate=chain[1], issuer=chain[2], now=now)
        with pytest.raises(EvidenceRefused):
            serial_number(data)


def test_what_is_no_answer(chain: Any, now: datetime) -> None:
    for data in (b"", b"x", b"\x30\x00", b"\x30\x03\x0a\x01\x00", bytes(100)):
        with pytest.raises(FormatError):
            check_answer(data, certificate=chain[1], issuer=chain[2], now=now)
        with pytest.raises(FormatError):
            serial_number(data)
    with pytest.raises(LimitExceeded):
        check_answer(bytes(MAX_RESPONSE + 1), certificate=chain[1], issuer=chain[2], now=now)


def test_every_flipped_byte_is_refused(
    foundry: Foundry, gpu: Gpu, chain: Any, now: datetime
) -> None:
    data = answer(foundry, gpu, now, nonce=NONCE)
    for at in range(len(data)):
        altered = data[:at] + bytes((data[at] ^ (1 << at % 8),)) + data[at + 1 :]
        with pytest.raises((FormatError, LimitExceeded, EvidenceRefused)):
            check_answer(altered, certificate=chain[1], issuer=chain[2], now=now, nonce=NONCE)


def signed_by(
    signer: Identity, chain: Any, now: datetime, *, enclosed: list[x509.Certificate],
    by_name: bool = False,
) -> bytes:  # fmt: skip
    """An answer about the boot ROM by another signer."""
    kind = ocsp.OCSPResponderEncoding.NAME if by_name else ocsp.OCSPResponderEncoding.HASH
    builder = ocsp.OCSPResponseBuilder().add_response(
        cert=chain[1], issuer=chain[2], algorithm=hashes.SHA384(),
        cert_status=ocsp.OCSPCertStatus.GOOD, this_update=now, next_update=None,
        revocation_time=None, revocation_reason=None,
    ).responder_id(kind, signer.certificate)  # fmt: skip
    if enclosed:
        builder = builder.certificates(enclosed)
    return builder.sign(signer.key, hashes.SHA384()).public_bytes(Encoding.DER)


def test_delegated_responders(
    foundry: Foundry, gpu: Gpu, chain: Any, made: datetime, now: datetime
) -> None:
    from cai.attest.sim.certificates import issue

    provisioner = foundry.provisioners[gpu.chip.provisioner]
    purpose = [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING])]

    def delegate(issuer: Identity | None = provisioner, **options: Any) -> Identity:
        made_with: dict[str, Any] = {"extensions": purpose, **options}
        return issue("Responder", curve=CURVE, now=made, issuer=issuer, **made_with)

    def good(signer: Identity, **options: Any) -> bool:
        enclosed = options.pop("enclosed", [signer.certificate])
        data = signed_by(signer, chain, now, enclosed=enclosed, **options)
        try:
            check_answer(data, certificate=chain[1], issuer=chain[2], now=now)
        except EvidenceRefused:
            return False
        return True

    assert good(delegate())
    assert good(delegate(), by_name=True)
    assert good(provisioner, enclosed=[])
    assert not good(delegate(), enclosed=[]), "the responder's certificate is not enclosed"
    assert not good(delegate(extensions=[])), "no purpose"
    other_purpose = [x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])]
    assert not good(delegate(extensions=other_purpose))
    assert not good(delegate(lifetime=-timedelta(days=1))), "expired"
    assert not good(delegate(foundry.root)), "of the issuer's issuer"
    assert not good(delegate(None)), "of nobody"
    assert not good(delegate(foundry.rim_root)), "of another authority"
    # Somebody else under the issuer's own name.
    name = provisioner.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    false = issue(str(name), curve=CURVE, now=made, ca=True)
    assert not good(false, by_name=True)
    assert not good(false, by_name=True, enclosed=[])
    # Not enclosed, but somebody else is.
    assert not good(delegate(), enclosed=[delegate().certificate])
    assert not good(gpu.leaf), "a device cannot vouch for its own boot ROM"
    assert not good(gpu.boot_rom, enclosed=[])


def test_which_certificates_are_asked_about(foundry: Foundry, chain: Any) -> None:
    links = device_links(chain)
    assert links == ((chain[1], chain[2]), (chain[2], chain[3]), (chain[3], chain[4]))
    rim_chain = tuple(part.certificate for part in (*reversed(foundry.rim_chain),
                                                    foundry.rim_root))  # fmt: skip
    assert [link[0] for link in rim_links(rim_chain)] == list(rim_chain[:-1])


def all_answers(
    foundry: Foundry, gpu: Gpu, now: datetime, settings: OcspSettings | None = None
) -> list[bytes]:
    from cai.attest.sim.revocation import Responder

    about = Responder.of(foundry, [gpu], settings)
    return [about.about(certificate, now=now) for certificate, _ in about.links.values()]


def test_a_store(foundry: Foundry, gpu: Gpu, chain: Any, now: datetime) -> None:
    answers = all_answers(foundry, gpu, now)
    older = answer(foundry, gpu, now - timedelta(hours=3))
    links = device_links(chain)
    found, produced = check_revocation(
        "x", links, store=OcspStore.of([older, *answers]), now=now + timedelta(hours=1)
    )
    assert found.outcome is Outcome.PASS
    assert produced == now
    only_older = [item for item in answers if serial_number(item) != chain[1].serial_number]
    _, produced = check_revocation(
        "x", links, store=OcspStore.of([older, *only_older]), now=now
    )
    assert produced == now - timedelta(hours=3)


def test_the_newest_answer_counts(
    foundry: Foundry, gpu: Gpu, chain: Any, now: datetime
) -> None:
    status = {"GH100 A01 GSP BROM": "revoked"}
    good, revoked = answer(foundry, gpu, now), answer(foundry, gpu, now, status=status)
    link = device_links(chain)[:1]
    later = timedelta(minutes=5)
    for newest, other, outcome in (
        (answer(foundry, gpu, now + later), revoked, Outcome.PASS),
        (answer(foundry, gpu, now + later, status=status), good, Outcome.FAIL),
    ):
        for answers in ([newest, other], [other, newest]):
            found, _ = check_revocation(
                "x", link, store=OcspStore.of(answers), now=now + later
            )
            assert found.outcome is outcome
    # A revocation is for good: it does not expire, whatever the store is there for.
    store = OcspStore.of([revoked], if_available=True)
    found, produced = check_revocation("x", link, store=store, now=now + timedelta(days=30))
    assert (found.outcome, produced) == (Outcome.FAIL, None)


def test_what_a_store_lacks(foundry: Foundry, gpu: Gpu, chain: Any, now: datetime) -> None:
    answers = all_answers(foundry, gpu, now)
    links = device_links(chain)
    forged = signed_by(gpu.leaf, chain, now, enclosed=[])
    cases = [
        ([], now),
        (answers, now + timedelta(days=1)),
        ([item for item in answers if serial_number(item) != chain[3].serial_number], now),
        ([forged, *[item for item in answers if serial_number(item) != chain[1].serial_number]],
         now),
    ]  # fmt: skip
    for given, at in cases:
        for if_available, outcome in ((False, Outcome.FAIL), (True, Outcome.NOT_ASKED)):
            store = OcspStore.of(given, if_available=if_available)
            found, produced = check_revocation("x", links, store=store, now=at)
            assert found.outcome is outcome
            assert produced is None
            assert found.reason


def test_a_directory(
    foundry: Foundry, gpu: Gpu, chain: Any, now: datetime, tmp_path: Path
) -> None:
    for number, data in enumerate(all_answers(foundry, gpu, now)):
        (tmp_path / f"{number}.der").write_bytes(data)
    (tmp_path / "README").write_text("not an answer")
    store = load_ocsp(tmp_path)
    found, _ = check_revocation("x", device_links(chain), store=store, now=now)
    assert found.outcome is Outcome.PASS
    assert not store.if_available
    assert load_ocsp(tmp_path / "0.der", if_available=True).if_available
    (tmp_path / "bad.der").write_bytes(b"x")
    with pytest.raises(FormatError, match=r"bad\.der"):
        load_ocsp(tmp_path)
    with pytest.raises(InputMissing):
        load_ocsp(tmp_path / "none")


def test_a_responder_may_have_a_smaller_curve(
    foundry: Foundry, gpu: Gpu, chain: Any, made: datetime, now: datetime
) -> None:
    from cai.attest.sim.certificates import issue

    provisioner = foundry.provisioners[gpu.chip.provisioner]
    small = issue(
        "Responder", curve=ec.SECP256R1(), now=made, issuer=provisioner,
        extensions=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.OCSP_SIGNING])],
    )  # fmt: skip
    data = signed_by(small, chain, now, enclosed=[small.certificate])
    assert check_answer(data, certificate=chain[1], issuer=chain[2], now=now).good
