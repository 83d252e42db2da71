"""Trust anchors: the vendors' are pinned, a simulator's are marked and never the vendors'."""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
from importlib import resources
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from cai.attest import anchors
from cai.attest.anchors import simulated_anchors, vendor_anchors
from cai.attest.certificates import common_name
from cai.errors import CaiError, FormatError, InputMissing, Refused

ROOTS = resources.files("cai.attest").joinpath("roots")


def copy(platform_dir: Path, tmp_path: Path) -> Path:
    for name in ("tdx-root.pem", "gpu-root.pem"):
        (tmp_path / name).write_bytes((platform_dir / "anchors" / name).read_bytes())
    return tmp_path


def test_vendor_roots_are_the_pinned_ones() -> None:
    pinned = vendor_anchors()
    assert not pinned.simulated
    assert sha256(pinned.tdx_root).hexdigest() == anchors.INTEL_SGX_ROOT_SHA256
    assert sha256(pinned.gpu_root).hexdigest() == anchors.NVIDIA_DEVICE_ROOT_SHA256
    names = [
        common_name(x509.load_der_x509_certificate(der))
        for der in (pinned.tdx_root, pinned.gpu_root)
    ]
    assert names == ["Intel SGX Root CA", "NVIDIA Device Identity CA"]


def test_a_swapped_vendor_file_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "INTEL_SGX_ROOT_SHA256", "00" * 32)
    with pytest.raises(CaiError, match="not the pinned one"):
        vendor_anchors.__wrapped__()


def test_simulated_roots_are_marked(platform_dir: Path) -> None:
    loaded = simulated_anchors(platform_dir / "anchors")
    assert loaded.simulated
    assert loaded.tdx_root != vendor_anchors().tdx_root
    assert loaded.gpu_root != vendor_anchors().gpu_root


@pytest.mark.parametrize("target", ["tdx-root.pem", "gpu-root.pem"])
@pytest.mark.parametrize("vendor", ["intel-sgx-root-ca.pem", "nvidia-device-identity-ca.pem"])
def test_a_vendors_root_is_no_simulated_root(
    platform_dir: Path, tmp_path: Path, target: str, vendor: str
) -> None:
    directory = copy(platform_dir, tmp_path)
    (directory / target).write_bytes(ROOTS.joinpath(vendor).read_bytes())
    with pytest.raises(Refused, match="vendor's own root"):
        simulated_anchors(directory)


def test_a_vendors_key_in_another_certificate_is_noticed(
    platform_dir: Path, tmp_path: Path
) -> None:
    vendor = x509.load_der_x509_certificate(vendor_anchors().tdx_root)
    name = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, "SIMULATED")])
    key = vendor.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    now = datetime.now(UTC)
    reissued = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key)
        .serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now.replace(year=now.year + 1))
        .sign(ec.generate_private_key(ec.SECP256R1()), vendor.signature_hash_algorithm)
    )
    directory = copy(platform_dir, tmp_path)
    (directory / "tdx-root.pem").write_bytes(reissued.public_bytes(Encoding.PEM))
    with pytest.raises(Refused, match="vendor's own root"):
        simulated_anchors(directory)


def test_a_root_that_does_not_say_simulated(
    platform_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai.attest.sim import certificates

    monkeypatch.setattr(certificates, "SIMULATED_ORGANISATION", "Intel Corporation")
    other = certificates.issue(
        "Intel SGX Root CA", curve=ec.SECP256R1(), now=datetime.now(UTC), ca=True
    )
    directory = copy(platform_dir, tmp_path)
    (directory / "tdx-root.pem").write_bytes(other.pem)
    with pytest.raises(Refused, match="O=SIMULATED"):
        simulated_anchors(directory)


def test_malformed_directories(platform_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="does not exist"):
        simulated_anchors(tmp_path)
    directory = copy(platform_dir, tmp_path)
    good = (directory / "gpu-root.pem").read_bytes()
    for bad in (b"", b"garbage", good + good):
        (directory / "gpu-root.pem").write_bytes(bad)
        with pytest.raises(FormatError):
            simulated_anchors(directory)
