"""Strict parser of TDX quotes, version 4 and 5 (docs/spec-evidence.md §2).

It stands in front of the verification engine, which leaves several bytes of a quote unlooked at:
the outer certification type, a signature length that is a little too large, anything that follows.
Here every byte has a place, and only zero padding may follow the signature section.

Parsing proves nothing; ``cai.attest.tdx.verify`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cai.errors import FormatError, LimitExceeded

MAX_QUOTE = 16 * 1024
"""Largest quote that is parsed, bytes, padding included."""

HEADER_SIZE = 48
TEE_TDX = 0x81
"""TEE type of TDX; 0 is SGX."""

KEY_ECDSA_P256 = 2
"""Attestation key type ECDSA P-256, the only one in use."""

INTEL_QE_VENDOR = bytes.fromhex("939a7233f79c4ca9940a0db3957f0607")
"""QE vendor id of Intel's quoting enclave."""

TD10, TD15 = 2, 3
"""Body types of a version 5 quote that are accepted; version 4 always has a TD 1.0 body."""

QE_REPORT_SIZE = 384
SIGNATURE_SIZE = 64
KEY_SIZE = 64
CERTIFICATION_QE_REPORT = 6
CERTIFICATION_PEM_CHAIN = 5
"""Certification data types: the outer one wraps the QE report, the inner one is the PCK chain."""

_TD10_LAYOUT = (
    ("tcb_svn", 16), ("mr_seam", 48), ("mrsigner_seam", 48), ("seam_attributes", 8),
    ("td_attributes", 8), ("xfam", 8), ("mr_td", 48), ("mr_config_id", 48), ("mr_owner", 48),
    ("mr_owner_config", 48), ("rtmr_0", 48), ("rtmr_1", 48), ("rtmr_2", 48), ("rtmr_3", 48),
    ("report_data", 64),
)  # fmt: skip
BODY_LAYOUT: Mapping[int, tuple[tuple[str, int], ...]] = MappingProxyType(
    {TD10: _TD10_LAYOUT, TD15: (*_TD10_LAYOUT, ("tee_tcb_svn2", 16), ("mr_service_td", 48))}
)
"""Body fields in order, with their sizes in bytes, named as Trustee names its claims."""

HEADER_LAYOUT = (
    ("version", 2), ("att_key_type", 2), ("tee_type", 4), ("reserved", 4), ("vendor_id", 16),
    ("user_data", 20),
)  # fmt: skip
"""Header fields in order, with their sizes in bytes, named as Trustee names its claims."""


@dataclass(frozen=True, slots=True)
class Header:
    """The 48 header bytes; integers little-endian.

    Attributes:
        version: 4 or 5 in a TDX quote.
        key_type: attestation key type.
        tee_type: ``TEE_TDX`` for TDX.
        fields: every field's bytes by Trustee's name.
    """

    version: int
    key_type: int
    tee_type: int
    fields: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class Quote:
    """A parsed quote.

    Attributes:
        header: its header.
        body_type: ``TD10`` or ``TD15``.
        body: every body field's bytes by Trustee's name.
        data: the quote without padding.
        signed: what the attestation key signs: header, version 5 descriptor, body.
        signature: r ‖ s, big-endian.
        attestation_key: x ‖ y, big-endian.
        qe_report: SGX report of the quoting enclave.
        qe_signature: r ‖ s of the PCK key over ``qe_report``.
        auth_data: bytes that ``qe_report`` binds together with ``attestation_key``.
        pck_chain: PEM, PCK leaf first.
    """

    header: Header
    body_type: int
    body: Mapping[str, bytes]
    data: bytes
    signed: bytes
    signature: bytes
    attestation_key: bytes
    qe_report: bytes
    qe_signature: bytes
    auth_data: bytes
    pck_chain: bytes


class _Reader:
    """Takes bytes off the front; running out is a ``FormatError`` that names the part."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self.position, self._what = data, 0, what

    def take(self, size: int, part: str) -> bytes:
        end = self.position + size
        if end > len(self._data):
            raise FormatError(f"{self._what}: ends inside {part}")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def integer(self, size: int, part: str) -> int:
        return int.from_bytes(self.take(size, part), "little")

    def fields(self, layout: tuple[tuple[str, int], ...]) -> Mapping[str, bytes]:
        return MappingProxyType({name: self.take(size, name) for name, size in layout})

    @property
    def left(self) -> int:
        return len(self._data) - self.position


def parse_header(data: bytes) -> Header:
    """Parse the header alone, of any quote, without judging its values.

    Raises:
        FormatError: fewer than 48 bytes.
    """
    fields = _Reader(data, "quote").fields(HEADER_LAYOUT)
    return Header(
        version=int.from_bytes(fields["version"], "little"),
        key_type=int.from_bytes(fields["att_key_type"], "little"),
        tee_type=int.from_bytes(fields["tee_type"], "little"),
        fields=fields,
    )


def parse_quote(data: bytes) -> Quote:
    """Parse a TDX quote, every byte of it.

    Raises:
        LimitExceeded: longer than ``MAX_QUOTE``.
        FormatError: any field, length or padding is not as the layout says.
    """
    if len(data) > MAX_QUOTE:
        raise LimitExceeded(f"quote: {len(data)} bytes, at most {MAX_QUOTE} are accepted")
    header = parse_header(data)
    if header.version not in (4, 5):
        raise FormatError(f"quote: version {header.version}, expected 4 or 5")
    if header.key_type != KEY_ECDSA_P256:
        raise FormatError(f"quote: attestation key type {header.key_type}, expected 2 (P-256)")
    if header.tee_type != TEE_TDX:
        raise FormatError(f"quote: TEE type {header.tee_type:#x}, expected 0x81 (TDX)")
    if header.fields["vendor_id"] != INTEL_QE_VENDOR:
        raise FormatError("quote: unknown QE vendor")
    reader = _Reader(data, "quote")
    reader.take(HEADER_SIZE, "header")
    body_type = TD10 if header.version == 4 else _body_type(reader)
    body = reader.fields(BODY_LAYOUT[body_type])
    signed = data[: reader.position]
    length = reader.integer(4, "signature length")
    section = reader.take(length, "signature section")
    end = reader.position
    # Intel's services pad with zeros (70 to some 3000 bytes seen); anything else is not ours.
    if any(data[end:]):
        raise FormatError("quote: bytes other than zero padding after the signature section")
    return _with_section(section, header, body_type, body, data[:end], signed)


def _body_type(reader: _Reader) -> int:
    body_type = reader.integer(2, "body type")
    size = reader.integer(4, "body size")
    if body_type not in BODY_LAYOUT:
        raise FormatError(f"quote: body type {body_type}, expected 2 (TD 1.0) or 3 (TD 1.5)")
    expected = sum(length for _, length in BODY_LAYOUT[body_type])
    if size != expected:
        raise FormatError(f"quote: body size {size}, expected {expected} for type {body_type}")
    return body_type


def _with_section(
    section: bytes, header: Header, body_type: int, body: Mapping[str, bytes], data: bytes,
    signed: bytes,
) -> Quote:
    reader = _Reader(section, "quote signature section")
    signature = reader.take(SIGNATURE_SIZE, "quote signature")
    attestation_key = reader.take(KEY_SIZE, "attestation key")
    outer = reader.integer(2, "certification data type")
    if outer != CERTIFICATION_QE_REPORT:
        raise FormatError(f"quote: outer certification data type {outer}, expected 6")
    if reader.integer(4, "certification data size") != reader.left:
        raise FormatError("quote: outer certification data does not fill the signature section")
    qe_report = reader.take(QE_REPORT_SIZE, "QE report")
    qe_signature = reader.take(SIGNATURE_SIZE, "QE report signature")
    auth_data = reader.take(reader.integer(2, "auth data size"), "auth data")
    inner = reader.integer(2, "certification data type")
    if inner != CERTIFICATION_PEM_CHAIN:
        raise FormatError(f"quote: inner certification data type {inner}, expected 5 (PEM chain)")
    if reader.integer(4, "certificate chain size") != reader.left:
        raise FormatError("quote: the certificate chain does not fill the signature section")
    pck_chain = reader.take(reader.left, "certificate chain")
    return Quote(
        header=header, body_type=body_type, body=body, data=data, signed=signed,
        signature=signature, attestation_key=attestation_key, qe_report=qe_report,
        qe_signature=qe_signature, auth_data=auth_data, pck_chain=pck_chain,
    )  # fmt: skip
