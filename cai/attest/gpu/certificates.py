"""Device certificates: which GPU signed, and which firmware held the key (spec-evidence §4.2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from cai.attest.certificates import LIBRARY_ERRORS, common_name
from cai.errors import FormatError

MIN_CHAIN = 3
"""Fewest certificates: leaf, the boot ROM above it, root."""

SWITCH = "LS10"
"""Architecture of NVSwitches; every other one is a GPU's."""

ARCHITECTURES = {
    "GH1": "HOPPER", "GB1": "BLACKWELL", "GB2": "BLACKWELL", "LS_": SWITCH, "LS1": SWITCH,
}  # fmt: skip
"""Architecture by the first characters of a chip's name, as the common name above a leaf has it
(``GH100``, ``LS_10``) and as reference files have it (``GH100``, ``LS10``)."""

OID_FWID = x509.ObjectIdentifier("2.23.133.5.4.1")
"""TCG composite device identity: the value ends in a SHA-384 firmware digest (Hopper)."""

OID_TCB_INFO = x509.ObjectIdentifier("2.23.133.5.4.1.1")
"""DICE TcbInfo: context tag 6 lists (algorithm, digest) pairs (Blackwell)."""

FWID_SIZE = 48

PDI_DIGITS = 18
"""Length of a device's serial number in the subject above its leaf, hex digits."""

_SHA384 = bytes.fromhex("0609608648016503040202")
"""DER of the object identifier of SHA-384."""

_TAG_OCTETS, _TAG_SEQUENCE, _TAG_FWIDS = 0x04, 0x30, 0xA6


@dataclass(frozen=True, slots=True)
class Device:
    """What a device's certificates say; true only once their chain is verified.

    Attributes:
        arch: ``HOPPER``, ``BLACKWELL``, ``LS10`` (a switch), or empty when unknown.
        hwmodel: common name of the certificate above the leaf.
        chip: its first word, e.g. ``GH100``.
        ueid: serial number of the leaf, decimal.
        fwid: firmware digest that the boot ROM certified for the leaf's key; ``None`` if absent.
        key: the leaf's P-384 key.
        key_info: DER SubjectPublicKeyInfo of ``key``.
        boot_rom_info: DER SubjectPublicKeyInfo of the key above the leaf, which is burnt into the
            device and outlives its firmware.
        pdi: physical device identity as the certificate above the leaf names it, 8 bytes, in the
            order in which switches list it; ``None`` when it names none.
    """

    arch: str
    hwmodel: str
    chip: str
    ueid: str
    fwid: bytes | None
    key: ec.EllipticCurvePublicKey
    key_info: bytes
    boot_rom_info: bytes
    pdi: bytes | None


def describe(chain: Sequence[x509.Certificate]) -> Device:
    """Read the identity of a device from its chain, leaf first.

    The architecture comes from the certificate above the leaf, which NVIDIA's provisioner signed;
    the device names its leaf itself, so the two names must agree.

    Raises:
        FormatError: too short, another kind of key, disagreeing names, unreadable firmware digest.
    """
    if len(chain) < MIN_CHAIN:
        raise FormatError(f"device chain: {len(chain)} certificates, at least {MIN_CHAIN} expected")
    leaf, boot_rom = chain[0], chain[1]
    model, chip = common_name(boot_rom), common_name(leaf).partition(" ")[0]
    if model.partition(" ")[0] != chip:
        raise FormatError(f"device chain: a leaf of {chip!r} under {model!r}")
    try:
        key = leaf.public_key()
        boot_rom_key = boot_rom.public_key()
    except LIBRARY_ERRORS as error:
        raise FormatError(f"device chain: unusable leaf key ({error})") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FormatError("device chain: the leaf's key is not on P-384")
    return Device(
        arch=ARCHITECTURES.get(model[:3], ""),
        hwmodel=model,
        chip=chip,
        ueid=str(leaf.serial_number),
        fwid=_fwid(leaf),
        key=key,
        key_info=key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        boot_rom_info=boot_rom_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        pdi=_pdi(boot_rom),
    )


def _pdi(boot_rom: x509.Certificate) -> bytes | None:
    # The subject's serial number is a byte for the kind of device and the 8 bytes of its PDI.
    try:
        names = boot_rom.subject.get_attributes_for_oid(NameOID.SERIAL_NUMBER)
    except LIBRARY_ERRORS as error:
        raise FormatError(f"certificate subject: {error}") from error
    text = str(names[0].value) if len(names) == 1 else ""
    if len(text) != PDI_DIGITS or not set(text) <= set("0123456789abcdefABCDEF"):
        return None
    return bytes.fromhex(text)[1:]


def _fwid(leaf: x509.Certificate) -> bytes | None:
    found: list[bytes] = []
    try:
        for extension in leaf.extensions:
            if isinstance(extension.value, x509.UnrecognizedExtension):
                if extension.oid == OID_FWID:
                    found.append(_fwid_of_identity(extension.value.value))
                elif extension.oid == OID_TCB_INFO:
                    found.append(_fwid_of_tcb_info(extension.value.value))
    except LIBRARY_ERRORS as error:
        raise FormatError(f"device chain: leaf extensions: {error}") from error
    if len(found) > 1:
        raise FormatError("device chain: two firmware digests in the leaf")
    return found[0] if found else None


def _fwid_of_identity(value: bytes) -> bytes:
    # SEQUENCE { version, device key, SEQUENCE { OID SHA-384, OCTET STRING 48 } }; the digest is
    # what the whole ends in, whichever parts stand before it.
    _only(value, _TAG_SEQUENCE)
    end = _SHA384 + bytes((_TAG_OCTETS, FWID_SIZE))
    if value[: -FWID_SIZE][-len(end) :] != end:
        raise FormatError("device chain: the firmware identity does not end in a SHA-384 digest")
    return value[-FWID_SIZE:]


def _fwid_of_tcb_info(value: bytes) -> bytes:
    # SEQUENCE { …, [6] { SEQUENCE { OID, OCTET STRING }, … }, … }; the first digest is the leaf's.
    lists = [part for tag, part in _elements(_only(value, _TAG_SEQUENCE)) if tag == _TAG_FWIDS]
    if len(lists) != 1:
        raise FormatError("device chain: no single list of firmware digests in TcbInfo")
    pairs = list(_elements(lists[0]))
    if not pairs:
        raise FormatError("device chain: empty list of firmware digests")
    return _algorithm_and_digest(pairs[0])


def _algorithm_and_digest(element: tuple[int, bytes]) -> bytes:
    tag, content = element
    if tag != _TAG_SEQUENCE or not content.startswith(_SHA384):
        raise FormatError("device chain: the firmware digest is not SHA-384")
    digest = _only(content[len(_SHA384) :], _TAG_OCTETS)
    if len(digest) != FWID_SIZE:
        raise FormatError(f"device chain: firmware digest of {len(digest)} bytes")
    return digest


def _only(data: bytes, tag: int) -> bytes:
    elements = list(_elements(data))
    if len(elements) != 1 or elements[0][0] != tag:
        raise FormatError("device chain: unexpected DER in the firmware identity")
    return elements[0][1]


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each DER element in a row; definite lengths up to 65535 only."""
    position = 0
    while position < len(data):
        if position + 2 > len(data):
            raise FormatError("device chain: DER ends inside a head")
        tag, size = data[position], data[position + 1]
        position += 2
        if size >= 0x80:
            width = size - 0x80
            if width not in (1, 2) or position + width > len(data):
                raise FormatError("device chain: unusable DER length")
            size = int.from_bytes(data[position : position + width], "big")
            position += width
        if position + size > len(data):
            raise FormatError("device chain: DER element longer than its frame")
        yield tag, data[position : position + size]
        position += size
