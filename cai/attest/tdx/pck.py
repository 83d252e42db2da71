"""What a PCK certificate says of its platform: the SGX extension (docs/spec-evidence.md §2.4).

The extension is DER inside an X.509 extension that the certificate library does not know, so a
small walker reads it: definite lengths in their shortest form, no trailing bytes, no member twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cryptography import x509

from cai.attest.certificates import LIBRARY_ERRORS
from cai.errors import FormatError, LimitExceeded

SGX_EXTENSION = x509.ObjectIdentifier("1.2.840.113741.1.13.1")
"""The extension of a PCK leaf; every arc inside starts with the same identifier."""

MAX_SGX_EXTENSION = 4096
"""Largest extension that is parsed, bytes; real ones have some 550."""

MAX_PCE_SVN = 0xFFFF

_BASE = bytes.fromhex("2a864886f84d010d01")
_SEQUENCE, _OID, _OCTETS, _INTEGER, _ENUMERATED, _BOOLEAN = 0x30, 0x06, 0x04, 0x02, 0x0A, 0x01
_FLAGS = {b"\x07\x01": "dynamic_platform", b"\x07\x02": "cached_keys", b"\x07\x03": "smt_enabled"}
COMPONENTS = 16
"""Components of a CPU SVN."""


@dataclass(frozen=True, slots=True)
class PckExtension:
    """A platform as its provisioning certificate names it.

    Attributes:
        ppid: identity of the processor package, 16 bytes.
        components: SVN of each of the 16 components.
        pce_svn: SVN of the provisioning enclave.
        pce_id: 2 bytes.
        fmspc: platform family, 6 bytes.
        sgx_type: 0 standard, 1 scalable, 2 scalable with integrity.
        platform_instance_id: 16 bytes, or empty (Processor CA).
        flags: ``dynamic_platform``, ``cached_keys``, ``smt_enabled``: true, false, undefined.
    """

    ppid: bytes
    components: tuple[int, ...]
    pce_svn: int
    pce_id: bytes
    fmspc: bytes
    sgx_type: int
    platform_instance_id: bytes
    flags: Mapping[str, str]


def pck_extension(certificate: x509.Certificate) -> PckExtension:
    """Read the SGX extension of a PCK leaf.

    Raises:
        FormatError: it is absent, malformed, incomplete, or names something twice.
        LimitExceeded: longer than ``MAX_SGX_EXTENSION``.
    """
    try:
        found = certificate.extensions.get_extension_for_oid(SGX_EXTENSION).value
    except (*LIBRARY_ERRORS, x509.ExtensionNotFound) as error:
        raise FormatError("PCK certificate: no SGX extension") from error
    if not isinstance(found, x509.UnrecognizedExtension):
        raise FormatError("PCK certificate: no SGX extension")
    return parse_sgx_extension(found.value)


def parse_sgx_extension(data: bytes) -> PckExtension:
    """Parse the extension's DER.

    Raises:
        FormatError, LimitExceeded: as ``pck_extension``.
    """
    if len(data) > MAX_SGX_EXTENSION:
        raise LimitExceeded(f"SGX extension: {len(data)} bytes")
    top = _members(_only(data, _SEQUENCE))
    tcb = _members(_value(top, b"\x02", _SEQUENCE))
    configuration = _members(_value(top, b"\x07", _SEQUENCE)) if b"\x07" in top else {}
    components = tuple(
        _integer(_value(tcb, bytes((2, place)), _INTEGER), most=0xFF)
        for place in range(1, COMPONENTS + 1)
    )
    flags = {
        name: "undefined" if arc not in configuration else _boolean(
            _value(configuration, arc, _BOOLEAN)
        )
        for arc, name in _FLAGS.items()
    }  # fmt: skip
    instance = b""
    if b"\x06" in top:
        instance = _sized(_value(top, b"\x06", _OCTETS), 16, "platform instance id")
    _sized(_value(tcb, b"\x02\x12", _OCTETS), 16, "CPU SVN")
    return PckExtension(
        ppid=_sized(_value(top, b"\x01", _OCTETS), 16, "PPID"),
        components=components,
        pce_svn=_integer(_value(tcb, b"\x02\x11", _INTEGER), most=MAX_PCE_SVN),
        pce_id=_sized(_value(top, b"\x03", _OCTETS), 2, "PCE id"),
        fmspc=_sized(_value(top, b"\x04", _OCTETS), 6, "FMSPC"),
        sgx_type=_integer(_value(top, b"\x05", _ENUMERATED), most=2),
        platform_instance_id=instance,
        flags=MappingProxyType(flags),
    )


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each DER element, which together fill ``data``."""
    position = 0
    while position < len(data):
        header = data[position : position + 2]
        if len(header) < 2:
            raise FormatError("SGX extension: ends inside a header")
        tag, size = header
        position += 2
        if size >= 0x80:
            count = size & 0x7F
            size = int.from_bytes(data[position : position + count], "big")
            # The shortest form only: one spelling for one value.
            if count not in (1, 2) or size < (0x80 if count == 1 else 0x100):
                raise FormatError("SGX extension: a length is not in its shortest form")
            position += count
        if position + size > len(data):
            raise FormatError("SGX extension: ends inside a value")
        yield tag, data[position : position + size]
        position += size


def _only(data: bytes, tag: int) -> bytes:
    elements = list(_elements(data))
    if len(elements) != 1 or elements[0][0] != tag:
        raise FormatError(f"SGX extension: expected one element of tag {tag:#04x}")
    return elements[0][1]


def _members(data: bytes) -> dict[bytes, tuple[int, bytes]]:
    """``SEQUENCE {identifier, value}`` elements by the arcs below the extension's own."""
    members: dict[bytes, tuple[int, bytes]] = {}
    for tag, pair in _elements(data):
        parts = list(_elements(pair)) if tag == _SEQUENCE else []
        if len(parts) != 2 or parts[0][0] != _OID or not parts[0][1].startswith(_BASE):
            raise FormatError("SGX extension: a member is not an identifier and a value")
        arc = parts[0][1][len(_BASE) :]
        if arc in members:
            raise FormatError(f"SGX extension: member {arc.hex()} stands twice")
        members[arc] = parts[1]
    return members


def _value(members: Mapping[bytes, tuple[int, bytes]], arc: bytes, tag: int) -> bytes:
    found = members.get(arc)
    if found is None or found[0] != tag:
        raise FormatError(f"SGX extension: member {arc.hex()} is missing or of another type")
    return found[1]


def _sized(value: bytes, size: int, name: str) -> bytes:
    if len(value) != size:
        raise FormatError(f"SGX extension: {name} has {len(value)} bytes, expected {size}")
    return value


def _integer(value: bytes, *, most: int) -> int:
    if not 1 <= len(value) <= 3:
        raise FormatError("SGX extension: an integer has an unexpected size")
    number = int.from_bytes(value, "big", signed=True)
    if not 0 <= number <= most:
        raise FormatError("SGX extension: an integer is out of its range")
    return number


def _boolean(value: bytes) -> str:
    if len(value) != 1:
        raise FormatError("SGX extension: a boolean has an unexpected size")
    return "true" if value[0] else "false"
