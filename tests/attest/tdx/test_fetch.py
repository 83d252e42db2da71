"""Fetching collateral from a PCS or PCCS, and bundles of it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai.attest.anchors import vendor_anchors
from cai.attest.tdx.bundle import MAX_MEMBER, MAX_MEMBERS, read_bundle, write_bundle
from cai.attest.tdx.collateral import CollateralStore, load_collateral
from cai.attest.tdx.fetch import (
    INTEL_PCS,
    INTEL_ROOT_CRL,
    MAX_ANSWER,
    Source,
    bundle_of,
    fetch_collateral,
    is_stale,
    refreshed,
    split_signed,
)
from cai.errors import (
    CaiError,
    EvidenceRefused,
    FormatError,
    LimitExceeded,
    PeerError,
    PeerUnreachable,
    UsageError,
)
from tests.attest.tdx.conftest import Stage

if TYPE_CHECKING:
    pass

FMSPC = b"SIMUL\x00".hex()
BASE = "http://pccs.example:8081"

Handler = Callable[[httpx.Request], httpx.Response]


class FakePcs:
    """Answers as a PCCS does, from one collateral file."""

    def __init__(self, members: dict[str, str]) -> None:
        self.members = members
        self.asked: list[httpx.URL] = []
        self.changes: dict[str, Handler] = {}

    def client(self) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(self))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url)
        name = request.url.path.rpartition("/")[2]
        if name in self.changes:
            return self.changes[name](request)
        return self.answer(name)

    def answer(self, name: str) -> httpx.Response:
        own = self.members
        if name == "tcb":
            return signed("tcbInfo", own, "tcb_info", "TCB-Info-Issuer-Chain")
        if name == "identity":
            return signed(
                "enclaveIdentity", own, "qe_identity", "SGX-Enclave-Identity-Issuer-Chain"
            )
        if name == "pckcrl":
            chain = {"SGX-PCK-CRL-Issuer-Chain": quote(own["pck_crl_issuer_chain"])}
            return httpx.Response(200, headers=chain, content=bytes.fromhex(own["pck_crl"]))
        if name == "rootcacrl":
            return httpx.Response(200, text=own["root_ca_crl"].upper())
        return httpx.Response(404)


def signed(name: str, own: dict[str, str], part: str, header: str) -> httpx.Response:
    body = f'{{"{name}":{own[part]},"signature":"{own[part + "_signature"]}"}}'
    return httpx.Response(
        200, headers={header: quote(own[f"{part}_issuer_chain"])}, content=body.encode()
    )


@pytest.fixture
def pcs(stage: Stage) -> FakePcs:
    (item,) = stage.collateral
    return FakePcs(json.loads(item.text))


def fetched(pcs: FakePcs, stage: Stage, **changes: object) -> CollateralStore:
    arguments = {"fmspc": FMSPC, "ca": "platform", "root": stage.anchors.tdx_root,
                 "now": stage.now, **changes}  # fmt: skip
    with pcs.client() as client:
        return CollateralStore([fetch_collateral(client, Source.at(BASE), **arguments)])  # type: ignore[arg-type]


def test_what_is_fetched_verifies_a_quote(pcs: FakePcs, stage: Stage) -> None:
    store = fetched(pcs, stage)
    assert stage.failures(collateral=store) == set()
    (item,) = store
    assert json.loads(item.text) == {**pcs.members}
    paths = [url.path for url in pcs.asked]
    assert paths == [
        "/tdx/certification/v4/tcb", "/tdx/certification/v4/qe/identity",
        "/sgx/certification/v4/pckcrl", "/sgx/certification/v4/rootcacrl",
    ]  # fmt: skip
    assert dict(pcs.asked[0].params) == {"fmspc": FMSPC, "update": "standard"}
    assert dict(pcs.asked[2].params) == {"ca": "platform", "encoding": "der"}


def test_a_generation_can_be_demanded(pcs: FakePcs, stage: Stage) -> None:
    source = Source.at(f"{BASE}/sgx/certification/v4/", eval_data_number=18)
    with pcs.client() as client:
        fetch_collateral(
            client, source, fmspc=FMSPC.upper(), ca="platform", root=stage.anchors.tdx_root,
            now=stage.now,
        )  # fmt: skip
    assert dict(pcs.asked[0].params) == {"fmspc": FMSPC, "tcbEvaluationDataNumber": "18"}
    assert dict(pcs.asked[1].params) == {"tcbEvaluationDataNumber": "18"}


def test_sources() -> None:
    assert Source.at(INTEL_PCS) == Source()
    assert Source.at(INTEL_PCS).root_crl == INTEL_ROOT_CRL
    assert Source.at(BASE + "/").root_crl == f"{BASE}/sgx/certification/v4/rootcacrl"
    assert Source.at(f"{BASE}/prefix/sgx/certification/v4").pcs == f"{BASE}/prefix"
    assert Source.at(BASE, root_crl="http://x/crl").root_crl == "http://x/crl"
    for bad in ("", "ftp://x", "file:///etc/passwd", "https://", "http://x/?a=1"):
        with pytest.raises(UsageError):
            Source.at(bad)


def raises(error: Exception) -> Handler:
    def handler(_request: httpx.Request) -> httpx.Response:
        raise error

    return handler


def gives(**changes: object) -> Handler:
    return lambda _request: httpx.Response(**{"status_code": 200, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "handler", "kind"),
    [
        ("tcb", gives(status_code=404), PeerError),
        ("tcb", gives(status_code=302, headers={"Location": "http://elsewhere"}), PeerError),
        ("tcb", raises(httpx.ConnectError("no")), PeerUnreachable),
        ("identity", raises(httpx.ReadTimeout("no")), PeerUnreachable),
        ("tcb", gives(content=b"{}"), FormatError),
        ("tcb", gives(content=b"\xff"), FormatError),
        ("tcb", gives(content=b" " * (MAX_ANSWER + 1)), LimitExceeded),
        ("pckcrl", gives(content=b"0\x00"), FormatError),
        ("pckcrl", gives(content=b"not a list"), FormatError),
        ("rootcacrl", gives(content=b"<html>"), FormatError),
        ("rootcacrl", gives(content=b""), FormatError),
    ],
)
def test_bad_answers(
    pcs: FakePcs, stage: Stage, name: str, handler: Handler, kind: type[CaiError]
) -> None:
    pcs.changes[name] = handler
    with pytest.raises(kind):
        fetched(pcs, stage)


@pytest.mark.parametrize("name", ["tcb", "identity", "pckcrl"])
def test_a_missing_issuer_chain_is_refused(pcs: FakePcs, stage: Stage, name: str) -> None:
    content = pcs.answer(name).content
    pcs.changes[name] = gives(content=content)
    with pytest.raises(FormatError, match="no header"):
        fetched(pcs, stage)


def test_what_does_not_verify_is_not_kept(pcs: FakePcs, stage: Stage) -> None:
    with pytest.raises(EvidenceRefused):
        fetched(pcs, stage, root=vendor_anchors().tdx_root)
    with pytest.raises(EvidenceRefused):
        fetched(pcs, stage, now=stage.now + timedelta(days=31))
    pcs.members["tcb_info"] = pcs.members["tcb_info"].replace(":19", ":20")
    with pytest.raises(EvidenceRefused, match="signature"):
        fetched(pcs, stage)


def test_another_family_than_asked_for_is_refused(pcs: FakePcs, stage: Stage) -> None:
    with pytest.raises(FormatError, match="another platform family"):
        fetched(pcs, stage, fmspc="00" * 6)
    with pytest.raises(FormatError, match="another platform family"):
        fetched(pcs, stage, ca="processor")
    for bad in ({"fmspc": "zz" * 6}, {"fmspc": "00"}, {"ca": "root"}):
        with pytest.raises(UsageError):
            fetched(pcs, stage, **bad)


def test_the_exact_text_is_cut_out() -> None:
    text = '{ "a" : "\\u0041" , "b":",\\"signature\\":"}'
    body = f'{{"tcbInfo":{text},"signature":"{"AB" * 64}"}}\r\n'.encode()
    assert split_signed(body, "tcbInfo") == (text, "ab" * 64)
    for bad in (
        body.replace(b"tcbInfo", b"tcbinfo"), body[:-4], body.replace(b"AB", b"A", 1),
        body.rstrip()[:-1] + b',"more":1}', b"",
    ):  # fmt: skip
        with pytest.raises(FormatError):
            split_signed(bad, "tcbInfo")


@given(st.binary(max_size=300))
def test_arbitrary_answers_leak_nothing(body: bytes) -> None:
    with pytest.raises(FormatError):
        split_signed(body, "tcbInfo")


def test_only_what_is_stale_is_fetched_again(pcs: FakePcs, stage: Stage) -> None:
    root, now, source = stage.anchors.tdx_root, stage.now, Source.at(BASE)
    kept = CollateralStore(stage.collateral)
    wanted = [(FMSPC.upper(), "platform")]
    with pcs.client() as client:
        items, new = refreshed(client, source, kept, wanted, root=root, now=now)
        assert (len(items), new, pcs.asked) == (1, [], [])
        later = now + timedelta(days=20)
        items, new = refreshed(client, source, kept, (), root=root, now=later)
        assert items == new
        items, new = refreshed(client, source, kept, (), root=root, now=now, anew=True)
        assert len(new) == 1
        empty = CollateralStore.empty()
        items, new = refreshed(client, source, empty, wanted, root=root, now=now)
        assert len(new) == 1
    (item,) = stage.collateral
    assert not is_stale(item, now)
    assert is_stale(item, later)
    assert is_stale(item, item.issued - timedelta(seconds=1))


def test_a_bundle_is_a_store(stage: Stage, tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar"
    path.write_bytes(bundle_of(stage.collateral))
    store = load_collateral(path)
    assert [item.text for item in store] == [item.text for item in stage.collateral]
    assert stage.failures(collateral=store) == set()
    assert bundle_of(store) == path.read_bytes()


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    return info


@pytest.mark.parametrize(
    "info",
    [
        member("../up.json"), member("/etc/passwd.json"), member("a/b.json"), member("a.txt"),
        member(".json"), member("-a.json"), member("a.json", tarfile.SYMTYPE),
        member("a.json", tarfile.LNKTYPE), member("a.json", tarfile.DIRTYPE),
        member("a.json", tarfile.FIFOTYPE), member("a.json", tarfile.CHRTYPE),
        member("a" * 140 + ".json"), member("é.json"),
    ],
    ids=lambda info: f"{info.name[:20]}-{info.type!r}",
)  # fmt: skip
def test_only_plain_files_are_read(info: tarfile.TarInfo) -> None:
    with pytest.raises(FormatError, match="plain"):
        read_bundle(tar_of((info, b"")), "bundle")


def test_bundle_limits() -> None:
    with pytest.raises(FormatError, match="twice"):
        read_bundle(tar_of((member("a.json"), b""), (member("a.json"), b"")), "bundle")
    with pytest.raises(LimitExceeded, match="bytes"):
        read_bundle(tar_of((member("a.json"), bytes(MAX_MEMBER + 1))), "bundle")
    many = [(member(f"{number}.json"), b"") for number in range(MAX_MEMBERS + 1)]
    with pytest.raises(LimitExceeded, match="files"):
        read_bundle(tar_of(*many), "bundle")
    with pytest.raises(FormatError, match="name"):
        write_bundle([("../a.json", b"")])
    assert read_bundle(write_bundle([]), "bundle") == []


@given(st.binary(max_size=2000))
def test_arbitrary_bytes_are_no_bundle(data: bytes) -> None:
    with pytest.raises((FormatError, LimitExceeded)):
        assert read_bundle(data, "bundle") != []


@given(st.integers(0, 1023), st.integers(0, 255), st.integers(0, 1400))
def test_altered_bundles_leak_nothing(at: int, value: int, end: int) -> None:
    data = bytearray(write_bundle([("a.json", b"{}"), ("b.json", b"[]")]))
    data[at] = value
    for altered in (bytes(data), bytes(data[:end])):
        try:
            found = read_bundle(altered, "bundle")
        except (FormatError, LimitExceeded):
            continue
        assert len(found) <= 2
