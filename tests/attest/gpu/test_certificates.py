"""Device identity: model, architecture and firmware digest out of certificates."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from cai.attest.gpu.certificates import OID_FWID, OID_TCB_INFO, _fwid_of_identity, describe
from cai.attest.gpu.certificates import _fwid_of_tcb_info as fwid_of_tcb_info
from cai.errors import FormatError

if TYPE_CHECKING:
    from cai.attest.sim.certificates import Identity

NOW = datetime(2026, 6, 1, tzinfo=UTC)
SHA384 = bytes.fromhex("0609608648016503040202")
SHA256 = bytes.fromhex("0609608648016503040201")
DIGEST = bytes(range(48))


def der(tag: int, content: bytes) -> bytes:
    from cai.attest.sim.certificates import der as encode

    return encode(tag, content)


def pair(digest: bytes = DIGEST, algorithm: bytes = SHA384) -> bytes:
    return der(0x30, algorithm + der(0x04, digest))


def identity_value(last: bytes | None = None) -> bytes:
    return der(0x30, der(0x02, b"\x01") + der(0x30, b"") + (pair() if last is None else last))


def tcb_info_value(*lists: bytes) -> bytes:
    return der(0x30, der(0x80, b"NVIDIA") + b"".join(lists) + der(0x87, b"\x00\x80"))


def make(
    model: str = "GH100 A01 GSP BROM", leaf: str = "GH100 A01 GSP FMC LF",
    curve: ec.EllipticCurve | None = None, values: dict[x509.ObjectIdentifier, bytes] | None = None,
) -> list[x509.Certificate]:
    from cai.attest.sim.certificates import issue

    p384 = ec.SECP384R1()
    root = issue("root", curve=p384, now=NOW, ca=True)
    boot_rom = issue(model, curve=p384, now=NOW, issuer=root, ca=True)
    extensions = [
        x509.UnrecognizedExtension(oid, value)
        for oid, value in (values or {OID_FWID: identity_value()}).items()
    ]
    end: Identity = issue(
        leaf, curve=curve or p384, now=NOW, issuer=boot_rom, extensions=extensions
    )
    return [end.certificate, boot_rom.certificate, root.certificate]


def test_hopper() -> None:
    chain = make()
    device = describe(chain)
    assert (device.arch, device.hwmodel, device.fwid) == ("HOPPER", "GH100 A01 GSP BROM", DIGEST)
    assert device.ueid == str(chain[0].serial_number)


def test_blackwell_takes_the_first_digest() -> None:
    value = tcb_info_value(der(0xA6, pair() + pair(bytes(48))))
    device = describe(make("GB100 A01 GSP BROM", "GB100 A01 GSP FMC LF", values={
        OID_TCB_INFO: value,
    }))
    assert (device.arch, device.fwid) == ("BLACKWELL", DIGEST)


def test_a_switch_and_an_unknown_chip() -> None:
    assert describe(make("LS_10 A01 FSP BROM", "LS_10 A01 FSP FMC LF")).arch == "LS10"
    assert describe(make("XY100 A01", "XY100 LF")).arch == ""


def test_no_digest_is_none() -> None:
    other = x509.ObjectIdentifier("1.3.6.1.4.1.99999.1")
    assert describe(make(values={other: b"\x05\x00"})).fwid is None


def test_refused_chains() -> None:
    with pytest.raises(FormatError, match="at least 3"):
        describe(make()[:2])
    with pytest.raises(FormatError, match="a leaf of"):
        describe(make(leaf="GB100 A01 GSP FMC LF"))
    with pytest.raises(FormatError, match="P-384"):
        describe(make(curve=ec.SECP256R1()))
    with pytest.raises(FormatError, match="two firmware digests"):
        describe(make(values={
            OID_FWID: identity_value(), OID_TCB_INFO: tcb_info_value(der(0xA6, pair())),
        }))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x30",
        b"\x30\x05\x00",
        b"\x30\x80\x00\x00",
        b"\x30\x85\x01\x01\x01\x01\x01",
        der(0x31, b""),
        der(0x30, b""),
        der(0x31, pair()),
        identity_value(pair(algorithm=SHA256)),
        identity_value(pair(digest=bytes(47))),
        identity_value(der(0x30, SHA384)),
        identity_value(der(0x30, SHA384 + der(0x03, DIGEST))),
        identity_value() + b"\x00",
        identity_value()[:-1],
    ],
    ids=lambda value: value.hex()[:24],
)
def test_malformed_identities(value: bytes) -> None:
    with pytest.raises(FormatError):
        _fwid_of_identity(value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        tcb_info_value(),
        tcb_info_value(der(0xA6, pair()), der(0xA6, pair())),
        tcb_info_value(der(0xA6, b"")),
        tcb_info_value(der(0xA6, pair(algorithm=SHA256))),
        tcb_info_value(der(0xA6, pair(digest=b""))),
    ],
    ids=lambda value: value.hex()[:24],
)
def test_malformed_tcb_info(value: bytes) -> None:
    with pytest.raises(FormatError):
        fwid_of_tcb_info(value)


@given(st.binary(max_size=200), st.integers(0, 250), st.binary(min_size=1, max_size=3))
def test_der_leaks_nothing(noise: bytes, at: int, patch: bytes) -> None:
    good = identity_value()
    for value in (noise, good[:at] + patch + good[at + len(patch) :], good[:at]):
        for reader in (_fwid_of_identity, fwid_of_tcb_info):
            with contextlib.suppress(FormatError):
                assert len(reader(value)) == 48
