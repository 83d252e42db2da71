"""Trust anchors: the vendors' pinned roots, or a simulator's, never both.

Anchors are arguments everywhere. Only the two constructors here make them, and one of them marks
every result that rests on it as simulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import resources
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cai.attest.certificates import LIBRARY_ERRORS, MAX_PEM, load_chain, organisations
from cai.errors import CaiError, FormatError, InputMissing, Refused, from_os_error

INTEL_SGX_ROOT_SHA256 = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
"""SHA-256 of the DER of "Intel SGX Root CA"."""

NVIDIA_DEVICE_ROOT_SHA256 = "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"
"""SHA-256 of the DER of "NVIDIA Device Identity CA"."""

NVIDIA_RIM_ROOT_SHA256 = "12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1"
"""SHA-256 of the DER of "NVIDIA CoRIM signing Root CA"."""

SIMULATED_ORGANISATION = "SIMULATED"
"""The organisation that every certificate of a simulator names (decisions §1.3)."""

TDX_ROOT_FILE = "tdx-root.pem"
GPU_ROOT_FILE = "gpu-root.pem"
RIM_ROOT_FILE = "rim-root.pem"
COLLATERAL_DIRECTORY = "collateral"
"""Names inside a directory of simulated anchors."""


@dataclass(frozen=True, slots=True)
class TrustAnchors:
    """The roots that a verification trusts.

    Attributes:
        tdx_root: DER of the root of PCK, TCB-info and QE-identity chains.
        gpu_root: DER of the root of device certificates.
        simulated: the roots are a simulator's; every verdict under them says so.
        rim_root: DER of the root of reference measurements (RIM); with ``None`` no reference file
            can be verified, so measurements are not compared.
    """

    tdx_root: bytes
    gpu_root: bytes
    simulated: bool
    rim_root: bytes | None = None


@cache
def vendor_anchors() -> TrustAnchors:
    """The pinned roots of Intel and NVIDIA.

    Raises:
        CaiError: the installed files are not the pinned ones.
    """
    return TrustAnchors(
        tdx_root=_pinned("intel-sgx-root-ca.pem", INTEL_SGX_ROOT_SHA256),
        gpu_root=_pinned("nvidia-device-identity-ca.pem", NVIDIA_DEVICE_ROOT_SHA256),
        simulated=False,
        rim_root=_pinned("nvidia-corim-signing-root-ca.pem", NVIDIA_RIM_ROOT_SHA256),
    )


def simulated_anchors(directory: Path) -> TrustAnchors:
    """The roots of a simulated platform, from its public directory.

    Args:
        directory: holds ``tdx-root.pem``, ``gpu-root.pem`` and, when the simulator also plays
            NVIDIA's reference measurements, ``rim-root.pem``.

    Raises:
        InputMissing, InputError, StorageError: a file cannot be read.
        FormatError, LimitExceeded: a file does not hold exactly one certificate.
        Refused: a root is a vendor's own, or does not say that it is simulated.
    """
    rim = directory / RIM_ROOT_FILE
    return TrustAnchors(
        tdx_root=_simulated_root(directory / TDX_ROOT_FILE),
        gpu_root=_simulated_root(directory / GPU_ROOT_FILE),
        simulated=True,
        rim_root=_simulated_root(rim) if rim.exists() else None,
    )


def _pinned(name: str, digest: str) -> bytes:
    text = resources.files("cai.attest").joinpath("roots", name).read_bytes()
    der = _only_certificate(text, what=name).public_bytes(Encoding.DER)
    if sha256(der).hexdigest() != digest:
        raise CaiError(
            f"the installed vendor root {name} is not the pinned one", hint="reinstall the package"
        )
    return der


def _simulated_root(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_PEM + 1)
    except FileNotFoundError as error:
        raise InputMissing(
            f"simulated root {path} does not exist",
            hint="give the 'anchors' directory of a simulated platform",
        ) from error
    except OSError as error:
        raise from_os_error(error, f"read simulated root {path}") from error
    certificate = _only_certificate(text, what=str(path))
    vendors = vendor_anchors()
    # The key is compared too: a certificate re-issued over a vendor's key is still the vendor's.
    for vendor in (vendors.tdx_root, vendors.gpu_root, vendors.rim_root or b""):
        if vendor and _key(certificate) == _key(x509.load_der_x509_certificate(vendor)):
            raise Refused(
                f"{path} is a hardware vendor's own root, not a simulator's",
                hint="leave the simulated root out to verify real hardware",
            )
    if SIMULATED_ORGANISATION not in organisations(certificate):
        raise Refused(
            f"{path} does not say O={SIMULATED_ORGANISATION}",
            hint="only roots made by the simulator are accepted here",
        )
    return certificate.public_bytes(Encoding.DER)


def _only_certificate(text: bytes, *, what: str) -> x509.Certificate:
    chain = load_chain(text, what=what)
    if len(chain) != 1:
        raise FormatError(f"{what}: {len(chain)} certificates, expected exactly one")
    return chain[0]


def _key(certificate: x509.Certificate) -> bytes:
    try:
        key = certificate.public_key()
    except LIBRARY_ERRORS as error:
        raise FormatError(f"root certificate: unusable public key ({error})") from error
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
