"""Reference measurements (RIM): NVIDIA's signed word on what a GPU's measurements ought to be.

A file is the SWID tag of one driver or firmware version: measurements by index, each with one or
more accepted values. Layout and signature profile: docs/spec-evidence.md §4.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from types import MappingProxyType

from cryptography import x509
from lxml import etree

from cai.attest.certificates import LIBRARY_ERRORS, verify_chain
from cai.attest.gpu.xml_signature import parse_xml, read_signed
from cai.errors import EvidenceRefused, FormatError, LimitExceeded

MAX_INDEX = 254
"""Greatest measurement index; a report's block index, one greater, is a byte."""

MAX_ALTERNATIVES = 64
"""Most accepted values of one measurement."""

MAX_VALUE_SIZE = 64
"""Largest measurement, bytes."""

MAX_TEXT = 128
"""Longest version or product text, characters."""

MAX_CACHED = 1024
"""Most verified files that a cache remembers."""

_SWID = "{http://standards.iso.org/iso/19770/-2/2015/schema.xsd}"
_HASH = "{http://www.w3.org/2001/04/xmlenc#sha384}Hash"


@dataclass(frozen=True, slots=True)
class Rim:
    """A verified reference file.

    Attributes:
        digest: SHA-256 of the file, hex.
        product: chip, e.g. ``GH100``.
        version: driver or VBIOS version; it alone says which of them the file is about.
        measurements: index to accepted values, active ones only.
        chain: signer first, root last.
        valid_from: from when every certificate of the chain is valid.
        valid_until: until when.
    """

    digest: str
    product: str
    version: str
    measurements: Mapping[int, tuple[bytes, ...]]
    chain: tuple[x509.Certificate, ...]
    valid_from: datetime
    valid_until: datetime


@dataclass(slots=True)
class RimCache:
    """Files verified before, by their hash and the root's; each only until its signer expires."""

    _known: dict[tuple[str, bytes], Rim] = field(default_factory=dict)

    def get(self, digest: str, root: bytes, now: datetime) -> Rim | None:
        """A file verified under ``root`` before and still valid at ``now``."""
        rim = self._known.get((digest, root))
        if rim is None or not rim.valid_from <= now <= rim.valid_until:
            return None
        return rim

    def put(self, rim: Rim, root: bytes) -> None:
        """Remember a verified file."""
        if len(self._known) >= MAX_CACHED:
            self._known.pop(next(iter(self._known)), None)
        self._known[rim.digest, root] = rim


def verify_rim(
    data: bytes, *, root: bytes, now: datetime, cache: RimCache | None = None
) -> Rim:
    """Verify a reference file and read it.

    Steps (spec-evidence §4.6): (a) parse to the signature profile; (b) digest over the content,
    signature over SignedInfo; (c) the chain of the signature ends in the pinned root, every member
    valid now, the signer is allowed to sign; (d) read product, version and measurements from the
    signed bytes.

    Args:
        data: the file.
        root: DER of the pinned root of reference measurements.
        now: time of the verification, timezone-aware.
        cache: remembers files between calls; revocation is never cached.

    Raises:
        LimitExceeded, FormatError: not such a file.
        EvidenceRefused: not signed under the root, or not valid now.
    """
    digest = sha256(data).hexdigest()
    known = None if cache is None else cache.get(digest, root, now)
    if known is not None:
        return known
    document = read_signed(data, what="reference file")
    document.verify()
    verify_chain(document.chain, root=root, now=now)
    _may_sign(document.chain[0])
    product, version, measurements = _content(document.content)
    rim = Rim(
        digest=digest,
        product=product,
        version=version,
        measurements=measurements,
        chain=document.chain,
        valid_from=max(item.not_valid_before_utc for item in document.chain),
        valid_until=min(item.not_valid_after_utc for item in document.chain),
    )
    if cache is not None:
        cache.put(rim, root)
    return rim


def claimed_version(data: bytes) -> str:
    """The version a file claims to be of, before anything is verified; only to choose files by.

    Raises:
        LimitExceeded, FormatError: not such a file.
    """
    meta = _root(data).find(f"{_SWID}Meta")
    if meta is None:
        raise FormatError("reference file: no Meta")
    return _text(meta, "colloquialVersion")


def _may_sign(signer: x509.Certificate) -> None:
    try:
        usage = signer.extensions.get_extension_for_class(x509.KeyUsage).value
    except (x509.ExtensionNotFound, *LIBRARY_ERRORS) as error:
        raise EvidenceRefused("the signer of the reference file has no key usage") from error
    if not usage.digital_signature:
        raise EvidenceRefused("the signer of the reference file may not sign documents")


def _root(data: bytes) -> etree._Element:
    root = parse_xml(data, what="reference file")
    if root.tag != f"{_SWID}SoftwareIdentity":
        raise FormatError("reference file: not a SoftwareIdentity")
    return root


def _content(signed: bytes) -> tuple[str, str, Mapping[int, tuple[bytes, ...]]]:
    root = _root(signed)
    meta, payload = _only(root, "Meta"), _only(root, "Payload")
    product = _text(root, "name")
    if _text(meta, "product") != product:
        raise FormatError("reference file: two product names")
    seen: set[int] = set()
    active: dict[int, tuple[bytes, ...]] = {}
    for resource in payload:
        index, values = _resource(resource)
        if index in seen:
            raise FormatError(f"reference file: measurement {index} stands twice")
        seen.add(index)
        if values is not None:
            active[index] = values
    if not active:
        raise FormatError("reference file: no active measurement")
    return product, _text(meta, "colloquialVersion"), MappingProxyType(active)


def _resource(resource: etree._Element) -> tuple[int, tuple[bytes, ...] | None]:
    if resource.tag != f"{_SWID}Resource" or resource.get("type") != "Measurement":
        raise FormatError("reference file: something other than a measurement in the payload")
    index = _integer(resource, "index", 0, MAX_INDEX)
    state = resource.get("active")
    if state not in ("True", "False"):
        raise FormatError(f"reference file: measurement {index} is neither active nor not")
    count = _integer(resource, "alternatives", 1, MAX_ALTERNATIVES)
    size = _integer(resource, "size", 1, MAX_VALUE_SIZE)
    hashes = {str(name): str(text) for name, text in resource.attrib.items()
              if str(name).startswith(_HASH)}  # fmt: skip
    if state == "False":
        return index, None
    if hashes.keys() != {f"{_HASH}{number}" for number in range(count)}:
        raise FormatError(f"reference file: measurement {index} does not have {count} values")
    values = tuple(_hex(hashes[f"{_HASH}{number}"], size, index) for number in range(count))
    return index, values


def _hex(text: str, size: int, index: int) -> bytes:
    if len(text) != 2 * size or not set(text) <= set("0123456789abcdefABCDEF"):
        raise FormatError(f"reference file: measurement {index} has no value of {size} bytes")
    return bytes.fromhex(text)


def _only(root: etree._Element, name: str) -> etree._Element:
    found = list(root.iter(f"{_SWID}{name}"))
    if len(found) != 1 or found[0].getparent() is not root:
        raise FormatError(f"reference file: not exactly one {name}")
    return found[0]


def _text(element: etree._Element, name: str) -> str:
    text = element.get(name)
    if not text or len(text) > MAX_TEXT or not all(0x21 <= ord(char) <= 0x7E for char in text):
        raise FormatError(f"reference file: unusable {name}")
    return str(text)


def _integer(element: etree._Element, name: str, least: int, most: int) -> int:
    text = element.get(name) or ""
    if not text.isascii() or not text.isdigit() or len(text) > 4:
        raise FormatError(f"reference file: {name} is no number")
    value = int(text)
    if not least <= value <= most:
        raise LimitExceeded(f"reference file: {name} is {value}, expected {least} to {most}")
    return value
