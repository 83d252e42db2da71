"""Reference measurement files (RIM) signed by the simulated NVIDIA.

SWID tags in the vendor's layout and signature profile (docs/spec-evidence.md §4.6), and the answers
of its service that carry them.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from hashlib import sha256, sha384
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding
from lxml import etree

from cai import jcs
from cai.attest.sim.certificates import Identity, raw_signature
from cai.attest.sim.nvidia import DRIVER_VERSION, Chip, Foundry, default_measurements

DRIVER_INDEXES = (7, *range(21, 41))
VBIOS_INDEXES = (*range(7), *range(8, 13))
SWITCH_INDEXES = tuple(range(31))
"""Measurement indexes (block index less one) that files of each role own, as NVIDIA's do."""

SLOTS = 64
"""Measurements that NVIDIA's files list."""

_SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
_HASH = "http://www.w3.org/2001/04/xmlenc#sha384"
_DS = "http://www.w3.org/2000/09/xmldsig#"
_C14N = "http://www.w3.org/2006/12/xml-c14n11"

_NAMESPACES: Any = {None: _SWID, "ns2": _HASH}
"""The library's type stubs know no default namespace."""

Golden = Mapping[int, Sequence[bytes]]
"""Active measurement index to accepted values."""


def driver_rim(foundry: Foundry, chip: Chip, version: str = DRIVER_VERSION) -> bytes:
    """The file of a driver version, with the simulated firmware's values."""
    return make_rim(foundry, chip, version, golden(chip, DRIVER_INDEXES))


def vbios_rim(foundry: Foundry, chip: Chip, version: str = "") -> bytes:
    """The file of a GPU's or a switch's firmware version."""
    indexes = SWITCH_INDEXES if chip.arch == "LS10" else VBIOS_INDEXES
    return make_rim(foundry, chip, version or chip.vbios_version, golden(chip, indexes))


def golden(chip: Chip, indexes: Sequence[int]) -> dict[int, tuple[bytes, ...]]:
    """The simulated firmware's values at these indexes."""
    values = default_measurements(chip)
    return {index: (values[index],) for index in indexes}


def make_rim(
    foundry: Foundry,
    chip: Chip,
    version: str,
    active: Golden,
    *,
    signer: Identity | None = None,
    slots: int = SLOTS,
) -> bytes:
    """A signed reference file.

    Args:
        foundry: signs it.
        chip: what it is about.
        version: driver or firmware version.
        active: accepted values by index; all other indexes are inactive.
        signer: signs in place of the foundry's own signer, whose certificate is still shown.
        slots: measurements that the file lists, active or not.
    """
    root = _document(chip, version, active, slots)
    digest = sha384(_canonical(root)).digest()
    signature = etree.SubElement(root, f"{{{_DS}}}Signature", nsmap={"ds": _DS})
    signed_info = _signed_info(signature, digest)
    value = etree.SubElement(signature, f"{{{_DS}}}SignatureValue")
    key = (signer or foundry.rim_chain[-1]).key
    value.text = base64.b64encode(raw_signature(key, _canonical(signed_info))).decode("ascii")
    data = etree.SubElement(
        etree.SubElement(signature, f"{{{_DS}}}KeyInfo"), f"{{{_DS}}}X509Data"
    )
    for part in (*reversed(foundry.rim_chain), foundry.rim_root):
        certificate = etree.SubElement(data, f"{{{_DS}}}X509Certificate")
        der = part.certificate.public_bytes(Encoding.DER)
        certificate.text = base64.b64encode(der).decode("ascii")
    return bytes(etree.tostring(root))


def rim_id(chip: Chip, version: str, *, driver: bool) -> str:
    """The id under which NVIDIA's service would give the file (evidence.md §5.6)."""
    if driver:
        family = "DRIVER" if chip.arch == "HOPPER" else "CC_DRIVER"
        return f"NV_GPU_{family}_{chip.product}_{version}".upper()
    kind = "SWITCH_BIOS" if chip.arch == "LS10" else "GPU_VBIOS"
    parts = (chip.project, chip.project_sku, chip.chip_sku, version.replace(".", ""))
    return f"NV_{kind}_{'_'.join(parts)}".upper()


def service_answer(identifier: str, document: bytes) -> bytes:
    """What the service answers for an id: JSON with the file in base64."""
    return jcs.canonical(
        {
            "id": identifier,
            "rim": base64.b64encode(document).decode("ascii"),
            "rim_format": "SWID",
            "sha256": sha256(document).hexdigest(),
        }
    )


def _document(chip: Chip, version: str, active: Golden, slots: int) -> etree._Element:
    root = etree.Element(
        f"{{{_SWID}}}SoftwareIdentity",
        nsmap=_NAMESPACES,
        attrib={
            "corpus": "false", "name": chip.product, "patch": "false", "supplemental": "false",
            "tagId": sha384(f"{chip.product} {version}".encode()).hexdigest(), "version": "1.0",
            "tagVersion": "0",
        },
    )  # fmt: skip
    etree.SubElement(
        root, f"{{{_SWID}}}Entity",
        attrib={"name": "SIMULATED", "role": "softwareCreator tagCreator"},
    )  # fmt: skip
    edition = "SWITCH" if chip.arch == "LS10" else "GPU"
    etree.SubElement(
        root, f"{{{_SWID}}}Meta",
        attrib={
            "colloquialVersion": version, "edition": edition, "product": chip.product,
            "revision": "r1", "PayloadType": "direct",
        },
    )  # fmt: skip
    payload = etree.SubElement(root, f"{{{_SWID}}}Payload")
    for index in range(slots):
        values = active.get(index) or (bytes(48),)
        resource = etree.SubElement(payload, f"{{{_SWID}}}Resource")
        resource.set("type", "Measurement")
        resource.set("index", str(index))
        resource.set("active", str(index in active))
        resource.set("alternatives", str(len(values)))
        for number, value in enumerate(values):
            resource.set(f"{{{_HASH}}}Hash{number}", value.hex())
        resource.set("name", f"Measurement_{index}")
        resource.set("size", "48")
    return root


def _signed_info(signature: etree._Element, digest: bytes) -> etree._Element:
    info = etree.SubElement(signature, f"{{{_DS}}}SignedInfo")
    _algorithm(info, "CanonicalizationMethod", _C14N)
    _algorithm(info, "SignatureMethod", "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384")
    reference = etree.SubElement(info, f"{{{_DS}}}Reference", attrib={"URI": ""})
    transforms = etree.SubElement(reference, f"{{{_DS}}}Transforms")
    _algorithm(transforms, "Transform", f"{_DS}enveloped-signature")
    _algorithm(transforms, "Transform", _C14N)
    _algorithm(reference, "DigestMethod", "http://www.w3.org/2001/04/xmldsig-more#sha384")
    value = etree.SubElement(reference, f"{{{_DS}}}DigestValue")
    value.text = base64.b64encode(digest).decode("ascii")
    return info


def _algorithm(parent: etree._Element, name: str, uri: str) -> None:
    etree.SubElement(parent, f"{{{_DS}}}{name}", attrib={"Algorithm": uri})


def _canonical(element: etree._Element) -> bytes:
    # C14N 1.0 equals the 1.1 of the profile for documents without xml: attributes.
    return bytes(etree.tostring(element, method="c14n", exclusive=False, with_comments=False))
