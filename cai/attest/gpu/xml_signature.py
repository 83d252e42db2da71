"""The one XML signature profile of NVIDIA's reference files, and nothing else of XML signatures.

XML signatures fail where a verifier checks one part of a document and reads another. So the profile
is fixed (docs/spec-evidence.md §4.6): one enveloped signature over the whole document, one
canonicalisation, one algorithm; and what is read afterwards is parsed anew from the very bytes
whose digest was signed. Whatever canonicalisation drops or does not cover - comments, processing
instructions, document types, text and attributes inside the signature that nobody reads - is
refused, so that no byte of an accepted file can be changed.
"""

from __future__ import annotations

import base64
import binascii
import copy
import hmac
import re
from dataclasses import dataclass
from hashlib import sha384

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from lxml import etree

from cai.attest.certificates import LIBRARY_ERRORS, MAX_CERTIFICATES, load_base64
from cai.errors import EvidenceRefused, FormatError, LimitExceeded

MAX_DOCUMENT = 256 * 1024
"""Largest document that is parsed, bytes; NVIDIA's have about 25 KiB."""

SIGNATURE_SIZE = 96
"""r and s of ECDSA P-384, 48 bytes each, big-endian."""

_DS = "{http://www.w3.org/2000/09/xmldsig#}"
_C14N = "http://www.w3.org/2006/12/xml-c14n11"
_ENVELOPED = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
_ECDSA_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
_SHA384 = "http://www.w3.org/2001/04/xmldsig-more#sha384"
_XML = "{http://www.w3.org/XML/1998/namespace}"

_WHITE = " \t\r\n"

_DECLARATION = re.compile(rb"\A<\?xml version=(['\"])1\.0\1 encoding=\1(?:UTF-8|utf-8)\1\?>\r?\n?")


@dataclass(frozen=True, slots=True)
class SignedDocument:
    """A parsed document and the parts of its signature; nothing is verified yet.

    Attributes:
        content: canonical bytes of the document without its signature: what the digest covers.
        signed_info: canonical bytes of SignedInfo: what the signature covers.
        digest: SHA-384 of ``content`` as SignedInfo claims it.
        signature: r ‖ s.
        chain: certificates, signer first.
    """

    content: bytes
    signed_info: bytes
    digest: bytes
    signature: bytes
    chain: tuple[x509.Certificate, ...]

    def verify(self) -> None:
        """Verify digest and signature under the first certificate's key.

        Whether that certificate is to be trusted is the caller's question.

        Raises:
            EvidenceRefused: digest or signature do not hold, or the key is not on P-384.
        """
        if not hmac.compare_digest(sha384(self.content).digest(), self.digest):
            raise EvidenceRefused("the content is not what was signed (digest)")
        try:
            key = self.chain[0].public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
                raise EvidenceRefused("the signer's key is not on P-384")
            half = SIGNATURE_SIZE // 2
            r, s = (int.from_bytes(self.signature[at : at + half], "big") for at in (0, half))
            key.verify(encode_dss_signature(r, s), self.signed_info, ec.ECDSA(hashes.SHA384()))
        except LIBRARY_ERRORS as error:
            raise EvidenceRefused("not signed by the first certificate (signature)") from error


def parse_xml(data: bytes, *, what: str) -> etree._Element:
    """Parse XML without any of its features that reach outside or hide content.

    Raises:
        LimitExceeded: longer than ``MAX_DOCUMENT``.
        FormatError: not UTF-8, not well-formed, a document type, a comment, a processing
            instruction, or an ``xml:`` attribute.
    """
    if len(data) > MAX_DOCUMENT:
        raise LimitExceeded(f"{what}: {len(data)} bytes, at most {MAX_DOCUMENT} are accepted")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{what}: not UTF-8") from error
    # Before the parser sees it: no document type, no comment, no processing instruction, no
    # declaration but the plain one, which could otherwise name another encoding.
    body = _DECLARATION.sub(b"", data, count=1)
    if not body.startswith(b"<"):
        raise FormatError(f"{what}: does not begin with an element")
    for mark in (b"<?", b"<!"):
        if mark in body:
            raise FormatError(f"{what}: {mark.decode()}… is not accepted")
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, dtd_validation=False,
        huge_tree=False, recover=False, encoding="utf-8",
    )  # fmt: skip
    try:
        root = etree.fromstring(body, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise FormatError(f"{what}: not well-formed XML") from error
    for element in root.iter():
        if not isinstance(element.tag, str):
            raise FormatError(f"{what}: something other than elements and text")
        if any(str(name).startswith(_XML) for name in element.attrib):
            raise FormatError(f"{what}: xml: attributes are not accepted")
    return root


def read_signed(data: bytes, *, what: str) -> SignedDocument:
    """Split a signed document into what its signature covers and the signature's own parts.

    Raises:
        LimitExceeded: too long, or too many certificates.
        FormatError: not exactly the profile.
    """
    root = parse_xml(data, what=what)
    signatures = list(root.iter(f"{_DS}Signature"))
    if len(signatures) != 1 or signatures[0].getparent() is not root:
        raise FormatError(f"{what}: not exactly one signature, as a child of the root")
    signature = signatures[0]
    signed_info, value, key_info = _children(signature, "SignedInfo", "SignatureValue", "KeyInfo")
    digest = _base64(_digest_value(signed_info), what=what)
    raw = _base64(value, what=what)
    if len(digest) != 48 or len(raw) != SIGNATURE_SIZE:
        raise FormatError(f"{what}: digest of {len(digest)} or signature of {len(raw)} bytes")
    (x509_data,) = _children(key_info, "X509Data")
    if not 2 <= len(x509_data) <= MAX_CERTIFICATES:
        raise LimitExceeded(f"{what}: {len(x509_data)} certificates, expected 2 to"
                            f" {MAX_CERTIFICATES}")  # fmt: skip
    certificates = _children(x509_data, *["X509Certificate"] * len(x509_data))
    chain = tuple(load_base64(_packed(item), what=what) for item in certificates)
    return SignedDocument(
        content=_canonical(_without_signature(root), what=what),
        signed_info=_canonical(signed_info, what=what),
        digest=digest,
        signature=raw,
        chain=chain,
    )


def _digest_value(signed_info: etree._Element) -> etree._Element:
    canonicalisation, method, reference = _children(
        signed_info, "CanonicalizationMethod", "SignatureMethod", "Reference", attributes={}
    )
    _algorithm(canonicalisation, _C14N)
    _algorithm(method, _ECDSA_SHA384)
    transforms, digest_method, value = _children(
        reference, "Transforms", "DigestMethod", "DigestValue", attributes={"URI": ""}
    )
    enveloped, canonical = _children(transforms, "Transform", "Transform")
    _algorithm(enveloped, _ENVELOPED)
    _algorithm(canonical, _C14N)
    _algorithm(digest_method, _SHA384)
    return value


def _children(
    element: etree._Element, *names: str, attributes: dict[str, str] | None = None
) -> list[etree._Element]:
    """The children of an element, which must be exactly these, with white space between them."""
    found = list(element)
    if [item.tag for item in found] != [_DS + name for name in names]:
        raise FormatError(f"XML signature: {_name(element)} does not hold {', '.join(names)}")
    if {str(name): str(text) for name, text in element.attrib.items()} != (attributes or {}):
        raise FormatError(f"XML signature: unexpected attributes of {_name(element)}")
    texts = [element.text, *(item.tail for item in found)]
    if any(text and text.strip(_WHITE) for text in texts):
        raise FormatError(f"XML signature: unexpected text in {_name(element)}")
    return found


def _algorithm(element: etree._Element, algorithm: str) -> None:
    _children(element, attributes={"Algorithm": algorithm})


def _packed(element: etree._Element) -> bytes:
    if len(element) or element.attrib:
        raise FormatError(f"XML signature: {_name(element)} holds more than text")
    text = element.text or ""
    return text.translate(dict.fromkeys(map(ord, _WHITE))).encode("utf-8")


def _base64(element: etree._Element, *, what: str) -> bytes:
    text = _packed(element)
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise FormatError(f"{what}: {_name(element)} is not base64") from error
    if base64.b64encode(value) != text:
        raise FormatError(f"{what}: {_name(element)} is base64 with stray bits")
    return value


def _without_signature(root: etree._Element) -> etree._Element:
    """A copy without the signature; the text behind it belongs to the document and stays."""
    content = copy.deepcopy(root)
    signature = content.find(f"{_DS}Signature")
    if signature is None:  # pragma: no cover - the caller has found it
        raise FormatError("XML signature: none")
    previous, tail = signature.getprevious(), signature.tail or ""
    if previous is not None:
        previous.tail = (previous.tail or "") + tail
    else:
        content.text = (content.text or "") + tail
    content.remove(signature)
    return content


def _canonical(element: etree._Element, *, what: str) -> bytes:
    # C14N 1.0 and 1.1 differ only in xml: attributes, and documents with those are refused.
    try:
        text: bytes = etree.tostring(element, method="c14n", with_comments=False)
    except (etree.LxmlError, ValueError) as error:
        raise FormatError(f"{what}: cannot be made canonical (relative namespace?)") from error
    return text


def _name(element: etree._Element) -> str:
    return etree.QName(element).localname
