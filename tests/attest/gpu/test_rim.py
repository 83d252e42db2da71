"""Reference files: the signature profile, the chain, and what is read; most cases are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cai.attest.anchors import vendor_anchors
from cai.attest.gpu import rim as rim_module
from cai.attest.gpu.rim import MAX_CACHED, Rim, RimCache, claimed_version, verify_rim
from cai.attest.gpu.xml_signature import MAX_DOCUMENT
from cai.errors import CaiError, EvidenceRefused, FormatError, LimitExceeded

if TYPE_CHECKING:
    from cai.attest.sim.nvidia import Foundry

SWID = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
HASH = "http://www.w3.org/2001/04/xmlenc#sha384"
VALUE = "ab" * 48


def document(
    *, head: str = 'name="GH100"', meta: str = 'product="GH100" colloquialVersion="1.0"',
    resource: str = "", body: str | None = None, after: str = "",
) -> str:  # fmt: skip
    """Content with one measurement, any part of it replaced."""
    resource = resource or (
        f'<Resource type="Measurement" index="7" active="True" alternatives="1" size="48"'
        f' h:Hash0="{VALUE}"/>'
    )
    body = f"<Payload>{resource}</Payload>" if body is None else body
    return (
        f'<SoftwareIdentity xmlns="{SWID}" xmlns:h="{HASH}" {head}><Meta {meta}/>{body}{after}'
        "</SoftwareIdentity>"
    )


def measurement(**changes: str) -> str:
    members = {
        "type": "Measurement", "index": "7", "active": "True", "alternatives": "1",
        "size": "48", "h:Hash0": VALUE,
    } | {name.replace("Hash", "h:Hash"): text for name, text in changes.items()}  # fmt: skip
    attributes = " ".join(f'{name}="{text}"' for name, text in members.items() if text != "-")
    return f"<Resource {attributes}/>"


def test_a_good_file(driver_rim: bytes, rim_root: bytes, now: datetime) -> None:
    rim = verify_rim(driver_rim, root=rim_root, now=now)
    assert (rim.product, rim.version) == ("GH100", "580.95.05")
    assert sorted(rim.measurements) == [7, *range(21, 41)]
    assert all(len(values) == 1 for values in rim.measurements.values())
    assert rim.valid_from < now < rim.valid_until
    assert claimed_version(driver_rim) == rim.version


def test_a_plain_declaration_is_accepted(
    driver_rim: bytes, rim_root: bytes, now: datetime
) -> None:
    plain = b'<?xml version="1.0" encoding="UTF-8"?>'
    for line in (plain, plain + b"\n", plain.replace(b'"', b"'").replace(b"UTF", b"utf")):
        assert verify_rim(line + driver_rim, root=rim_root, now=now).version == "580.95.05"


def test_of_another_vendor(driver_rim: bytes, device_root: bytes, now: datetime) -> None:
    vendor = vendor_anchors().rim_root
    assert vendor is not None
    for root in (vendor, device_root, b""):
        with pytest.raises(EvidenceRefused, match="not the pinned root"):
            verify_rim(driver_rim, root=root, now=now)


def test_out_of_its_window(driver_rim: bytes, rim_root: bytes, now: datetime) -> None:
    for days in (-10, 5000):
        with pytest.raises(EvidenceRefused, match="not valid"):
            verify_rim(driver_rim, root=rim_root, now=now + timedelta(days=days))


def insert(mark: str, text: str) -> Callable[[str], str]:
    """Put text behind the first mark."""
    return lambda data: data.replace(mark, mark + text, 1)


def swap(old: str, new: str) -> Callable[[str], str]:
    def edit(data: str) -> str:
        assert old in data
        return data.replace(old, new, 1)

    return edit


def certificates(order: Callable[[list[str]], list[str]]) -> Callable[[str], str]:
    def edit(data: str) -> str:
        block = re.compile(r"<ds:X509Certificate>[^<]*</ds:X509Certificate>")
        found = block.findall(data)
        first = data.index(found[0])
        return data[:first] + "".join(order(found)) + block.sub("", data[first:])

    return edit


EDITS = {
    # What canonicalisation drops or never sees.
    "comment": insert("</Payload>", "<!-- -->"),
    "comment in the digest": insert("<ds:DigestValue>", "<!-- -->"),
    "comment before": lambda data: "<!-- -->" + data,
    "comment after": lambda data: data + "<!-- -->",
    "processing instruction": insert("</Payload>", "<?x y?>"),
    "processing instruction before": lambda data: "<?x y?>" + data,
    "document type": lambda data: "<!DOCTYPE SoftwareIdentity>" + data,
    "entity": lambda data: '<!DOCTYPE S [<!ENTITY a "b">]>' + data.replace("GH100", "&a;", 1),
    "character data section": insert("</Payload>", "<![CDATA[x]]>"),
    "declaration of another encoding": lambda data:
        '<?xml version="1.0" encoding="latin-1"?>' + data,
    "declaration of another version": lambda data:
        '<?xml version="1.1" encoding="UTF-8"?>' + data,
    "second declaration": lambda data: '<?xml version="1.0" encoding="UTF-8"?>' * 2 + data,
    "white space before": lambda data: "\n" + data,
    "byte order mark": lambda data: "\ufeff" + data,
    "something after": lambda data: data + "x",
    "xml:base": swap('corpus="false"', 'corpus="false" xml:base="http://x/"'),
    "xml:id": swap("<ds:KeyInfo>", '<ds:KeyInfo xml:id="a">'),
    # Another shape of the signature.
    "no signature": lambda data: re.sub(r"<ds:Signature .*</ds:Signature>", "", data),
    "two signatures": lambda data: re.sub(r"(<ds:Signature .*</ds:Signature>)", r"\1\1", data),
    "signature not below the root": lambda data: re.sub(
        r"(</Payload>)(<ds:Signature .*</ds:Signature>)", r"\2\1", data),
    "text in the signature": insert("</ds:SignedInfo>", "x"),
    "text in the key information": insert("<ds:KeyInfo>", "x"),
    "object": insert("</ds:KeyInfo>", "<ds:Object>x</ds:Object>"),
    "id of the signature": swap('<ds:SignatureValue>', '<ds:SignatureValue Id="a">'),
    "no key information": lambda data: re.sub("<ds:KeyInfo>.*</ds:KeyInfo>", "", data),
    "key value": insert("<ds:KeyInfo>", "<ds:KeyName>x</ds:KeyName>"),
    "white space that is none": insert("<ds:SignatureValue>", "\u00a0"),
    # Another profile.
    "other canonicalisation": swap("xml-c14n11", "xml-c14n11#WithComments"),
    "exclusive canonicalisation": lambda data: data.replace(
        "http://www.w3.org/2006/12/xml-c14n11", "http://www.w3.org/2001/10/xml-exc-c14n#"),
    "other signature method": swap("ecdsa-sha384", "ecdsa-sha256"),
    "message code as method": swap("2001/04/xmldsig-more#ecdsa-sha384",
                                   "2000/09/xmldsig#hmac-sha1"),
    "other digest method": swap("xmldsig-more#sha384", "xmldsig-more#sha224"),
    "other reference": swap('URI=""', 'URI="#x"'),
    "reference without URI": swap(' URI=""', ""),
    "reference with a type": swap('URI=""', 'URI="" Type="x"'),
    "two references": lambda data: re.sub("(<ds:Reference .*</ds:Reference>)", r"\1\1", data),
    "no transforms": lambda data: re.sub("<ds:Transforms>.*</ds:Transforms>", "", data),
    "transform too many": insert("<ds:Transforms>", '<ds:Transform Algorithm="x"/>'),
    "XPath transform": swap("xmldsig#enveloped-signature", "xmldsig#base64"),
    # Another chain.
    "reversed certificates": certificates(lambda found: found[::-1]),
    "no root": certificates(lambda found: found[:-1]),
    "no signer": certificates(lambda found: found[1:]),
    "no intermediate": certificates(lambda found: [found[0], *found[2:]]),
    "only the signer": certificates(lambda found: found[:1]),
    "no certificate": certificates(lambda _: []),
    "too many certificates": certificates(lambda found: found * 3),
    "not base64": insert("<ds:X509Certificate>", "*"),
    # Other content under the old signature.
    "edited value": swap("Hash0=\"", "Hash0=\"00"),
    "switched off": swap('active="True"', 'active="False"'),
    "other version": swap("580.95.05", "580.95.06"),
    "second payload": insert("</Payload>", "<Payload/>"),
    "white space in the content": insert("</Payload>", " "),
    "text behind the signature": insert("</ds:Signature>", " "),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_refused(
    name: str, driver_rim: bytes, rim_root: bytes, now: datetime
) -> None:
    edited = EDITS[name](driver_rim.decode())
    assert edited.encode() != driver_rim
    with pytest.raises((FormatError, LimitExceeded, EvidenceRefused)):
        verify_rim(edited.encode(), root=rim_root, now=now)


@pytest.mark.parametrize("data", [b"", b"x", b"<a/>", b"<a", b"\xff\xfe<\x00a", b"<a>" * 5000])
def test_what_is_no_file_at_all(data: bytes, rim_root: bytes, now: datetime) -> None:
    for encoded in (data, data.decode("latin-1").encode("utf-16")):
        with pytest.raises(FormatError):
            verify_rim(encoded, root=rim_root, now=now)
        with pytest.raises(FormatError):
            claimed_version(encoded)


def test_too_long(driver_rim: bytes, rim_root: bytes, now: datetime) -> None:
    with pytest.raises(LimitExceeded):
        verify_rim(driver_rim + b" " * MAX_DOCUMENT, root=rim_root, now=now)


def test_wrapping(driver_rim: bytes, rim_root: bytes, now: datetime) -> None:
    """The genuine document inside the signature of an edited one, and the other way round."""
    genuine = driver_rim.decode()
    evil = genuine.replace(VALUE[:2], "cd").replace('active="True"', 'active="False"')
    signature = genuine[genuine.index("<ds:Signature ") : genuine.index("</SoftwareIdentity>")]
    bare = evil.replace(signature, "")
    outer, end = bare.replace("</SoftwareIdentity>", ""), "</SoftwareIdentity>"
    inside = f"<ds:Object>{genuine}</ds:Object></ds:Signature>"
    for wrapped in (
        outer + signature.replace("</ds:Signature>", inside) + end,
        outer + genuine + end,
        genuine.replace(end, bare + end),
    ):
        with pytest.raises((FormatError, EvidenceRefused)):
            verify_rim(wrapped.encode(), root=rim_root, now=now)


def test_signed_content_is_read(
    sign_content: Callable[[str], bytes], rim_root: bytes, now: datetime
) -> None:
    two = measurement(alternatives="2", Hash1="CD" * 48)
    off = measurement(index="8", active="False", Hash0="00" * 48)
    data = sign_content(document(resource=two + off))
    rim = verify_rim(data, root=rim_root, now=now)
    assert dict(rim.measurements) == {7: (b"\xab" * 48, b"\xcd" * 48)}


CONTENT = {
    "other root": document().replace("SoftwareIdentity", "Software"),
    "other namespace": document().replace(SWID, "http://x/"),
    "no name": document(head=""),
    "two products": document(meta='product="GB100" colloquialVersion="1.0"'),
    "no version": document(meta='product="GH100"'),
    "empty version": document(meta='product="GH100" colloquialVersion=""'),
    "long version": document(meta=f'product="GH100" colloquialVersion="{"1" * 200}"'),
    "version with a space": document(meta='product="GH100" colloquialVersion="1 0"'),
    "no payload": document(body=""),
    "two payloads": document(after=f"<Payload>{measurement()}</Payload>"),
    "nested payload": document(body=f"<X><Payload>{measurement()}</Payload></X>"),
    "payload in the payload": document(resource=f"<Payload/>{measurement()}"),
    "two metas": document(after='<Meta product="GH100" colloquialVersion="2.0"/>'),
    "nothing active": document(resource=measurement(active="False")),
    "empty payload": document(body="<Payload/>"),
    "other resource": document(resource=measurement(type="File")),
    "no type": document(resource=measurement(type="-")),
    "other element": document(resource=f"<File/>{measurement()}"),
    "index twice": document(resource=measurement() + measurement()),
    "index twice, one off": document(resource=measurement() + measurement(active="False")),
    "index too large": document(resource=measurement(index="255")),
    "negative index": document(resource=measurement(index="-1")),
    "no index": document(resource=measurement(index="-")),
    "index of other digits": document(resource=measurement(index="\u0667")),
    "active in lower case": document(resource=measurement(active="true")),
    "no state": document(resource=measurement(active="-")),
    "value too few": document(resource=measurement(alternatives="2")),
    "value too many": document(resource=measurement(Hash1=VALUE)),
    "values with a gap": document(resource=measurement(alternatives="2", Hash2=VALUE)),
    "no alternatives": document(resource=measurement(alternatives="0", Hash0="-")),
    "too many alternatives": document(resource=measurement(alternatives="65")),
    "short value": document(resource=measurement(Hash0="ab" * 47)),
    "value that is no hex": document(resource=measurement(Hash0="xy" * 48)),
    "value with white space": document(resource=measurement(Hash0="ab " * 32)),
    "other size": document(resource=measurement(size="32")),
    "no size": document(resource=measurement(size="-")),
    "size zero": document(resource=measurement(size="0", Hash0="")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENT)
def test_signed_nonsense_is_refused(
    name: str, sign_content: Callable[[str], bytes], rim_root: bytes, now: datetime
) -> None:
    data = sign_content(CONTENT[name])
    with pytest.raises((FormatError, LimitExceeded)):
        verify_rim(data, root=rim_root, now=now)


def test_signers(foundry: Foundry, rim_root: bytes, made: datetime, now: datetime) -> None:
    from cai.attest.sim.certificates import issue
    from cai.attest.sim.nvidia import CHIPS
    from cai.attest.sim.rim import make_rim

    product, signers, signer = foundry.rim_chain
    curve = ec.SECP384R1()

    def signed_by(*chain: object) -> bytes:
        return make_rim(
            replace(foundry, rim_chain=chain), CHIPS["HOPPER"], "1", {7: [bytes(48)]}
        )

    assert verify_rim(signed_by(product, signers, signer), root=rim_root, now=now)
    other = issue("HCC RIM L4 Signer", curve=curve, now=made, issuer=foundry.root)
    authority = issue("HCC RIM L4 Signer", curve=curve, now=made, issuer=signers, ca=True)
    for chain in (
        (product, signers, other),  # of another root
        (product, signers, authority),  # a CA
        (product, signers),  # a CA as the signer
        (signer, signer, signer),
    ):
        with pytest.raises((EvidenceRefused, FormatError, LimitExceeded)):
            verify_rim(signed_by(*chain), root=rim_root, now=now)
    data = make_rim(foundry, CHIPS["HOPPER"], "1", {7: [bytes(48)]}, signer=other)
    with pytest.raises(EvidenceRefused, match="signature"):
        verify_rim(data, root=rim_root, now=now)


def test_a_cache_remembers_only_what_still_holds(
    driver_rim: bytes, rim_root: bytes, device_root: bytes, now: datetime,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cache = RimCache()
    first = verify_rim(driver_rim, root=rim_root, now=now, cache=cache)
    calls: list[bytes] = []

    def counted(data: bytes, *, what: str) -> object:
        calls.append(data)
        raise FormatError(what)

    monkeypatch.setattr(rim_module, "read_signed", counted)
    assert verify_rim(driver_rim, root=rim_root, now=now, cache=cache) is first
    assert calls == []
    for root, moment, data in (
        (device_root, now, driver_rim),
        (rim_root, first.valid_until + timedelta(seconds=1), driver_rim),
        (rim_root, first.valid_from - timedelta(seconds=1), driver_rim),
        (rim_root, now, driver_rim + b"\n"),
    ):
        with pytest.raises(FormatError):
            verify_rim(data, root=root, now=moment, cache=cache)
    assert len(calls) == 4


def test_a_cache_is_bounded(driver_rim: bytes, rim_root: bytes, now: datetime) -> None:
    cache = RimCache()
    rim = verify_rim(driver_rim, root=rim_root, now=now)
    for number in range(MAX_CACHED + 5):
        cache.put(replace(rim, digest=str(number)), rim_root)
    assert cache.get("0", rim_root, now) is None
    newest = cache.get(str(MAX_CACHED + 4), rim_root, now)
    assert isinstance(newest, Rim)


def test_failures_are_not_remembered(driver_rim: bytes, rim_root: bytes, now: datetime) -> None:
    cache = RimCache()
    broken = driver_rim.replace(b'active="True"', b'active="False"', 1)
    for _ in range(2):
        with pytest.raises(CaiError):
            verify_rim(broken, root=rim_root, now=now, cache=cache)
