"""Strict parser of GPU attestation reports (docs/spec-evidence.md §4.1).

A report is an SPDM 1.1 GET_MEASUREMENTS request followed by its MEASUREMENTS response. The request
comes first because the signature covers it: the verifier's nonce is in there. Integers are
little-endian. Other SPDM versions sign other data and are refused.

Parsing proves nothing; ``cai.attest.gpu.verify`` does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cai.errors import FormatError, LimitExceeded

MAX_REPORT = 16 * 1024
"""Largest report that is parsed, bytes; a GPU's is about 4 KiB."""

MAX_VERSION_TEXT = 64
"""Longest driver or VBIOS version text, bytes."""

NONCE_SIZE = 32
REQUEST_SIZE = 37
SIGNATURE_SIZE = 96
DIGEST_SIZE = 48
PDI_SIZE = 8
"""Bytes of a physical device identity."""

GPU_PDIS = 8
"""Entries of a switch's list that name GPUs; what follows is not understood (evidence.md §9)."""

BLOCK_SIZE = 7 + DIGEST_SIZE

REQUEST_HEAD = bytes((0x11, 0xE0, 0x01, 0xFF))
"""SPDM 1.1, GET_MEASUREMENTS, signature requested, all blocks."""

RESPONSE_HEAD = bytes((0x11, 0x60))
"""SPDM 1.1, MEASUREMENTS."""

BLOCK_SPECIFICATION_DMTF = 1

_VERSION = re.compile(r"[0-9A-Fa-f]{2}(\.[0-9A-Fa-f]{2}){4}")

OPAQUE_DRIVER_VERSION = 3
OPAQUE_VBIOS_VERSION = 6
OPAQUE_NVDEC0_STATUS = 11
OPAQUE_CHIP_SKU = 15
OPAQUE_PROJECT = 17
OPAQUE_PROJECT_SKU = 18
OPAQUE_FWID = 20
OPAQUE_PROTECTED_PCIE = 21
OPAQUE_SWITCH_PDIS = 22
OPAQUE_GPU_PDIS = 26
OPAQUE_CHIP_INFO = 35
OPAQUE_FEATURE_FLAG = 36
OPAQUE_INVALID = 255
"""Opaque field types that are used here; all others are kept unread (evidence.md §5.3)."""


@dataclass(frozen=True, slots=True)
class Report:
    """A parsed report.

    Attributes:
        nonce: the 32 bytes of the request.
        measurements: SHA-384 digests by block index, 1 upwards.
        opaque: raw opaque fields by type.
        signed: everything before the signature.
        signature: r ‖ s, 48 bytes each, big-endian.
    """

    nonce: bytes
    measurements: Mapping[int, bytes]
    opaque: Mapping[int, bytes]
    signed: bytes
    signature: bytes

    def text(self, kind: int) -> str:
        """A text field, e.g. the board's project; empty when absent or not printable ASCII."""
        raw = self.opaque.get(kind, b"")
        try:
            return _text(raw, "field")
        except FormatError:
            return ""

    @property
    def driver_version(self) -> str:
        """Driver version, e.g. ``580.95.05``; empty when the report has none."""
        return _text(self.opaque.get(OPAQUE_DRIVER_VERSION, b""), "driver version")

    @property
    def vbios_version(self) -> str:
        """VBIOS version, e.g. ``96.00.74.00.1A``; empty when the report has none."""
        raw = self.opaque.get(OPAQUE_VBIOS_VERSION, b"")
        if not raw:
            return ""
        if len(raw) != 8:
            # A switch spells it out.
            text = _text(raw, "VBIOS version")
            if not _VERSION.fullmatch(text):
                raise FormatError("gpu report: unreadable VBIOS version")
            return text
        # A u32 of the first four parts, then the fifth in the low byte of a second u32.
        parts = (*reversed(raw[:4]), raw[4])
        return ".".join(f"{part:02X}" for part in parts)

    @property
    def fwid(self) -> bytes | None:
        """Digest of the firmware that answered, 48 bytes, or ``None`` in old reports."""
        value = self.opaque.get(OPAQUE_FWID)
        if value is not None and len(value) != DIGEST_SIZE:
            raise FormatError(f"gpu report: FWID has {len(value)} bytes, expected {DIGEST_SIZE}")
        return value

    @property
    def feature_flag(self) -> int | None:
        """Feature flag, or ``None`` in old reports; 2 is a protected-PCIe system."""
        return _integer(self.opaque.get(OPAQUE_FEATURE_FLAG), 2, "feature flag")

    @property
    def protected_pcie_status(self) -> int | None:
        """0xAA on, 0x55 off, ``None`` when the report has no such field."""
        return _integer(self.opaque.get(OPAQUE_PROTECTED_PCIE), 1, "protected-PCIe status")

    @property
    def switch_pdis(self) -> tuple[bytes, ...]:
        """Switches: a GPU lists one per link, byte-reversed; a switch names itself."""
        return _pdis(self.opaque.get(OPAQUE_SWITCH_PDIS, b""), "switch PDIs")

    @property
    def gpu_pdis(self) -> tuple[bytes, ...]:
        """Identities of the GPUs that a switch is linked to: the first eight entries."""
        entries = _pdis(self.opaque.get(OPAQUE_GPU_PDIS, b""), "GPU PDIs")
        return entries[:GPU_PDIS]

    @property
    def nvdec0_status(self) -> int | None:
        """0xAA enabled, 0x55 disabled, ``None`` when the report has no such field."""
        return _integer(self.opaque.get(OPAQUE_NVDEC0_STATUS), 1, "NVDEC0 status")


def parse_report(data: bytes) -> Report:
    """Parse a report, every byte of it.

    Raises:
        LimitExceeded: longer than ``MAX_REPORT``.
        FormatError: any field or length is not as the layout says, or something follows.
    """
    if len(data) > MAX_REPORT:
        raise LimitExceeded(f"gpu report: {len(data)} bytes, at most {MAX_REPORT} are accepted")
    if data[:4] != REQUEST_HEAD:
        raise FormatError("gpu report: does not start with an SPDM 1.1 GET_MEASUREMENTS request")
    if len(data) < REQUEST_SIZE + 8 or data[REQUEST_SIZE : REQUEST_SIZE + 2] != RESPONSE_HEAD:
        raise FormatError("gpu report: no SPDM 1.1 MEASUREMENTS response after the request")
    blocks = data[REQUEST_SIZE + 4]
    start = REQUEST_SIZE + 8
    record = _part(data, start, int.from_bytes(data[start - 3 : start], "little"), "measurements")
    position = start + len(record)
    position += len(_part(data, position, NONCE_SIZE, "responder nonce"))
    size = int.from_bytes(_part(data, position, 2, "opaque length"), "little")
    opaque = _part(data, position + 2, size, "opaque data")
    position += 2 + size
    signature = _part(data, position, SIGNATURE_SIZE, "signature")
    if position + SIGNATURE_SIZE != len(data):
        raise FormatError("gpu report: bytes after the signature")
    report = Report(
        nonce=data[4 : 4 + NONCE_SIZE],
        measurements=_measurements(record, blocks),
        opaque=_opaque(opaque),
        signed=data[:position],
        signature=signature,
    )
    # Read the decoded fields once, so that no later use of a parsed report can raise.
    _ = report.driver_version, report.vbios_version, report.fwid
    _ = report.feature_flag, report.nvdec0_status, report.protected_pcie_status
    _ = report.switch_pdis, report.gpu_pdis
    return report


def _measurements(record: bytes, count: int) -> Mapping[int, bytes]:
    if len(record) != count * BLOCK_SIZE:
        raise FormatError(f"gpu report: {len(record)} bytes of measurements for {count} blocks")
    found: dict[int, bytes] = {}
    for start in range(0, len(record), BLOCK_SIZE):
        block = record[start : start + BLOCK_SIZE]
        index, specification = block[0], block[1]
        sizes = int.from_bytes(block[2:4], "little"), int.from_bytes(block[5:7], "little")
        if specification != BLOCK_SPECIFICATION_DMTF or sizes != (3 + DIGEST_SIZE, DIGEST_SIZE):
            raise FormatError(f"gpu report: block {index} is not a DMTF block with a SHA-384 value")
        if index in found:
            raise FormatError(f"gpu report: block {index} stands twice")
        found[index] = block[7:]
    if sorted(found) != list(range(1, count + 1)) or not found:
        raise FormatError("gpu report: blocks are not numbered from 1 without gaps")
    return MappingProxyType(found)


def _opaque(data: bytes) -> Mapping[int, bytes]:
    found: dict[int, bytes] = {}
    position = 0
    while position < len(data):
        head = _part(data, position, 4, "opaque field head")
        kind, size = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:], "little")
        if kind == OPAQUE_INVALID:
            raise FormatError("gpu report: an opaque field is marked as invalid")
        if kind in found:
            raise FormatError(f"gpu report: opaque field {kind} stands twice")
        found[kind] = _part(data, position + 4, size, f"opaque field {kind}")
        position += 4 + size
    return MappingProxyType(found)


def _part(data: bytes, start: int, size: int, what: str) -> bytes:
    if start + size > len(data):
        raise FormatError(f"gpu report: ends inside {what}")
    return data[start : start + size]


def _integer(raw: bytes | None, size: int, what: str) -> int | None:
    if raw is None:
        return None
    if len(raw) != size:
        raise FormatError(f"gpu report: {what} has {len(raw)} bytes, expected {size}")
    return int.from_bytes(raw, "little")


def _pdis(raw: bytes, what: str) -> tuple[bytes, ...]:
    if len(raw) % PDI_SIZE:
        raise FormatError(f"gpu report: {what} have {len(raw)} bytes, no multiple of {PDI_SIZE}")
    return tuple(raw[at : at + PDI_SIZE] for at in range(0, len(raw), PDI_SIZE))


def _text(raw: bytes, what: str) -> str:
    if len(raw) > MAX_VERSION_TEXT:
        raise FormatError(f"gpu report: {what} is longer than {MAX_VERSION_TEXT} bytes")
    text = raw.rstrip(b"\x00")
    if not all(0x21 <= byte <= 0x7E for byte in text):
        raise FormatError(f"gpu report: {what} is not printable ASCII")
    return text.decode("ascii")
