"""One genuine report, chain and reference file with every byte flipped: no crash, no acceptance.

By default a part of the bytes is flipped; ``CAI_EVERY_BYTE=1`` flips all of them, each bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cai.attest.anchors import vendor_anchors
from cai.attest.evidence import DeviceEvidence
from cai.attest.gpu.report import parse_report
from cai.attest.gpu.rim import claimed_version, verify_rim
from cai.attest.gpu.verify import verify_devices
from cai.errors import EvidenceRefused, FormatError, LimitExceeded

ROOT = Path(__file__).resolve().parents[3]
GPU = ROOT / os.environ.get("CAI_VECTORS", "../shared/vectors") / "evidence" / "gpu"
NAME = "hopper-550.90.07"
RIM = "driver-550.144.03.xml"
NOW = datetime(2026, 3, 1, tzinfo=UTC)
WHITE = b" \t\r\n"
EVERY_BYTE = bool(os.environ.get("CAI_EVERY_BYTE"))

pytestmark = pytest.mark.skipif(
    not (GPU / "rims" / RIM).exists(), reason=f"no evidence vectors in {GPU} (set CAI_VECTORS)"
)


def flips(data: bytes, stride: int) -> Iterator[tuple[int, bytes]]:
    """Copies of the data with one bit changed, or one byte turned over."""
    for at in range(0, len(data), 1 if EVERY_BYTE else stride):
        masks = [1 << bit for bit in range(8)] if EVERY_BYTE else [1 << (at // stride) % 8]
        for mask in (*masks, 0xFF):
            if EVERY_BYTE or mask != 0xFF or at % (8 * stride) == 0:
                yield at, data[:at] + bytes((data[at] ^ mask,)) + data[at + 1 :]


def accepted(report: bytes, chain: bytes, nonce: bytes) -> bool:
    device = DeviceEvidence("HOPPER", "", report, chain)
    result = verify_devices((device,), nonce=nonce, root=vendor_anchors().gpu_root, now=NOW)
    return result.facts is not None


def test_report() -> None:
    report = (GPU / "reports" / f"{NAME}.bin").read_bytes()
    chain = (GPU / "chains" / f"{NAME}.pem").read_bytes()
    nonce = parse_report(report).nonce
    assert accepted(report, chain, nonce)
    for at, altered in flips(report, 17):
        assert not accepted(altered, chain, nonce), f"flip at {at} was accepted"
    for size in range(0, len(report), 1 if EVERY_BYTE else 97):
        assert not accepted(report[:size], chain, nonce)
        assert not accepted(report + bytes(size + 1), chain, nonce)


@pytest.mark.filterwarnings("ignore:Parsed a serial number", "ignore:Attribute's length")
def test_chain() -> None:
    report = (GPU / "reports" / f"{NAME}.bin").read_bytes()
    chain = (GPU / "chains" / f"{NAME}.pem").read_bytes()
    nonce = parse_report(report).nonce
    for at, altered in flips(chain, 7):
        assert not accepted(report, altered, nonce), f"flip at {at} was accepted"
    plain = chain.rstrip(b"\n")
    for other in (plain, plain + b"\n", plain + b"\0", plain + b"\n\0"):
        assert accepted(report, other, nonce)
    for other in (b"\n" + chain, plain + b"\n\n", plain + b"\r\n", plain + b"\0\0", plain + b" ",
                  chain.replace(b"\n", b"\r\n"), chain.replace(b"\n", b"\n\n", 1)):  # fmt: skip
        assert not accepted(report, other, nonce)


def test_reference_file() -> None:
    data = (GPU / "rims" / RIM).read_bytes()
    root = vendor_anchors().rim_root
    assert root is not None
    assert verify_rim(data, root=root, now=NOW).version == "550.144.03"
    for _, altered in flips(data, 19):
        # White space after the document is the one thing that may differ (spec-evidence §4.6).
        if altered.rstrip(WHITE) != data.rstrip(WHITE):
            with pytest.raises((FormatError, LimitExceeded, EvidenceRefused)):
                verify_rim(altered, root=root, now=NOW)
        try:
            claimed_version(altered)
        except (FormatError, LimitExceeded):
            continue
    for size in range(0, len(data.rstrip(WHITE)), 1 if EVERY_BYTE else 997):
        with pytest.raises((FormatError, LimitExceeded, EvidenceRefused)):
            verify_rim(data[:size], root=root, now=NOW)
