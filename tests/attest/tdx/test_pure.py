"""The second engine: says what the first one says, on every vector and on made-up platforms."""

from __future__ import annotations

import contextlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cai.attest.anchors import vendor_anchors
from cai.attest.facts import TdxFacts
from cai.attest.tdx.collateral import Collateral, parse_collateral
from cai.attest.tdx.engine import facts_of, run_engine
from cai.attest.tdx.pck import parse_sgx_extension
from cai.attest.tdx.pure import verify_pure
from cai.attest.tdx.quote import Quote, parse_quote
from cai.attest.tdx.signed import verify_collateral
from cai.attest.tdx.verify import ENGINES
from cai.attest.verdict import Outcome
from cai.errors import CaiError, EvidenceRefused, FormatError, InputError, LimitExceeded
from tests.attest.tdx.conftest import REPORT_DATA, Stage

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedPlatform

ROOT = Path(__file__).resolve().parents[3]
EVIDENCE = ROOT / os.environ.get("CAI_VECTORS", "../shared/vectors") / "evidence"
FOLDERS = ("tdx/quotes", "tdx/collateral", "tdx/synthetic", "negative/tdx")

vectors = pytest.mark.skipif(
    not (EVIDENCE / "tdx" / "manifest.json").exists(),
    reason="no evidence vectors (set CAI_VECTORS)",
)


def answers(
    quote: Quote, collateral: Collateral, root: bytes, now: datetime
) -> tuple[TdxFacts | None, TdxFacts | None, str]:
    """What each engine says, and why the second one refuses."""
    first = second = None
    why = ""
    with contextlib.suppress(EvidenceRefused):
        first = facts_of(quote, run_engine(quote, collateral, root=root, now=now), collateral)
    try:
        second = verify_pure(quote, collateral, root=root, now=now)
    except (EvidenceRefused, InputError) as error:
        why = error.message
    return first, second, why


def of_suffix(suffix: str) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (EVIDENCE / folder).glob(suffix))


def root_of(path: Path) -> bytes:
    return x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)


@vectors
def test_both_engines_agree_on_every_pair() -> None:
    vendor = vendor_anchors().tdx_root
    roots = {path.name.split(".")[0]: root_of(path) for path in of_suffix("*.root.pem")}
    everything: list[tuple[str, Collateral]] = []
    for path in of_suffix("*.json"):
        with contextlib.suppress(CaiError):
            item = parse_collateral(path.read_bytes(), where=path.name)
            if item is not None:
                everything.append((path.name, item))
    pairs = accepted = 0
    for path in of_suffix("*.bin"):
        try:
            quote = parse_quote(path.read_bytes())
        except CaiError:
            continue
        for name, item in everything:
            own = {roots.get(path.name.split(".")[0]), roots.get(name.split(".")[0])} - {None}
            for root in (vendor, *own):
                assert root is not None
                middle = item.issued + (item.expires - item.issued) / 2
                close = item.fmspc in path.name or root != vendor or "negative" in str(path)
                for at in (item.issued, middle, item.expires) if close else (middle,):
                    first, second, why = answers(quote, item, root, at)
                    assert first == second, (path.name, name, at, why)
                    pairs += 1
                    accepted += first is not None
    assert pairs > 3000
    assert accepted > 50


@pytest.fixture(scope="module")
def collateral(stage: Stage) -> Collateral:
    (item,) = stage.collateral
    return item


def test_require_agreement(stage: Stage) -> None:
    result = stage.verify(require_agreement=True)
    assert result.facts is not None
    assert result.facts.engines == ENGINES
    named = {item.name: item for item in result.checks}
    assert named["tdx.second_engine"].outcome is Outcome.PASS
    alone = stage.verify()
    assert alone.facts is not None
    assert alone.facts.engines == ENGINES[:1]
    named = {item.name: item for item in alone.checks}
    assert named["tdx.second_engine"].outcome is Outcome.NOT_ASKED


def test_disagreement_is_refused(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    import cai.attest.tdx.verify as module

    def elsewhere(*arguments: Any, **options: Any) -> TdxFacts:
        return replace(verify_pure(*arguments, **options), tcb_status="OutOfDate")

    monkeypatch.setattr(module, "verify_pure", elsewhere)
    result = stage.verify(require_agreement=True)
    assert result.facts is None
    (failed,) = [item for item in result.checks if item.outcome is Outcome.FAIL]
    assert (failed.name, failed.observed) == ("tdx.second_engine", "tcb_status")

    def refuses(*arguments: Any, **options: Any) -> TdxFacts:
        raise EvidenceRefused("because")

    monkeypatch.setattr(module, "verify_pure", refuses)
    assert stage.failures(require_agreement=True) == {"tdx.second_engine"}
    assert stage.failures() == set()


def test_every_flipped_byte_is_refused_or_white_space(
    stage: Stage, collateral: Collateral
) -> None:
    """The second engine alone: what it accepts is the same quote with other white space."""
    data = parse_quote(stage.quote).data
    root, now = stage.anchors.tdx_root, stage.now
    # The certificates are flipped byte by byte where chains are tested.
    certificates = data.index(b"-----BEGIN")
    for at in (*range(certificates), *range(certificates, len(data), 7)):
        altered = bytearray(data)
        altered[at] ^= 0x01 if data[at] not in b"\n" else 0x2A
        try:
            quote = parse_quote(bytes(altered))
            verify_pure(quote, collateral, root=root, now=now)
        except (EvidenceRefused, InputError):
            continue
        assert data[at : at + 1].isspace(), at


STATUSES = st.sampled_from([
    "UpToDate", "SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded",
    "OutOfDate", "OutOfDateConfigurationNeeded", "Revoked",
])  # fmt: skip
QE_STATUSES = st.sampled_from(["UpToDate", "UpToDate", "OutOfDate", "Revoked"])
MODULE_STATUSES = st.sampled_from(["UpToDate", "OutOfDate", "OutOfDate", "Revoked"])
DATES = st.sampled_from(
    ["2025-05-14T00:00:00Z", "2024-03-13T00:00:00Z", "2024-11-13T00:00:00Z"]
)
ADVISORIES = st.lists(st.sampled_from(["INTEL-SA-1", "INTEL-SA-2", "INTEL-SA-3"]), max_size=2)
TCB_SVN = st.tuples(st.integers(3, 8), st.sampled_from([0, 1, 1, 3]), st.integers(2, 4))


def near(base: bytes) -> st.SearchStrategy[list[dict[str, int]]]:
    change = st.lists(st.tuples(st.integers(0, 15), st.sampled_from([-1, -1, 1])), max_size=2)

    def component(changes: list[tuple[int, int]]) -> list[dict[str, int]]:
        values = list(base)
        for place, by in changes:
            values[place] = max(0, values[place] + by)
        return [{"svn": value} for value in values]

    return change.map(component)


def levels(name: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    status = MODULE_STATUSES if name == "module" else QE_STATUSES
    level = st.fixed_dictionaries({
        "tcb": st.fixed_dictionaries({"isvsvn": st.integers(3, 8)}),
        "tcbDate": DATES, "tcbStatus": status,
        "advisoryIDs": ADVISORIES,
    })  # fmt: skip
    return st.lists(level, min_size=1, max_size=3).map(
        lambda items: sorted(items, key=lambda item: -item["tcb"]["isvsvn"])
    )


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any], bytes, bytes]:
    from cai.attest.sim import tcb

    zero = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    platform = st.fixed_dictionaries({
        "tcb": st.fixed_dictionaries({
            "sgxtcbcomponents": near(tcb.CPU_SVN), "pcesvn": st.integers(12, 14),
            "tdxtcbcomponents": near(tcb.TEE_TCB_SVN),
        }),
        "tcbDate": DATES,
        "tcbStatus": STATUSES, "advisoryIDs": ADVISORIES,
    })  # fmt: skip
    info = {
        "tcbLevels": draw(st.lists(platform, min_size=1, max_size=4)),
        "tdxModuleIdentities": [
            {"id": name, **zero, "tcbLevels": draw(levels("module"))}
            for name in draw(st.sampled_from([["TDX_01"], ["TDX_03", "TDX_01"], ["tdx_03"]]))
        ],
    }
    identity = {"tcbLevels": draw(levels("qe"))} if draw(st.booleans()) else {}
    svn, svn2 = (bytes(draw(TCB_SVN)) + bytes(13) for _ in range(2))
    return info, identity, svn, svn2


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(world=worlds(), td15=st.booleans())
def test_both_engines_judge_made_up_platforms_alike(
    stage: Stage, platform: SimulatedPlatform, world: Any, td15: bool
) -> None:
    from cai.attest.sim import GuestSettings, intel
    from cai.attest.sim.tcb import CollateralSettings

    info, identity, svn, svn2 = world
    fields = {"tcb_svn": svn, **({"tee_tcb_svn2": svn2} if td15 else {})}
    quote = parse_quote(platform.guest(GuestSettings(td15=td15, fields=fields)).quote(REPORT_DATA))
    members = intel.collateral(
        platform.processor, now=stage.now,
        settings=CollateralSettings(tcb_info=info, qe_identity=identity),
    )  # fmt: skip
    item = parse_collateral(json.dumps(members).encode(), where="made up")
    assert item is not None
    first, second, why = answers(quote, item, stage.anchors.tdx_root, stage.now)
    assert first == second, (why, first and first.tcb_status, second and second.tcb_status)


def test_collateral_by_itself(stage: Stage, collateral: Collateral) -> None:
    root = stage.anchors.tdx_root
    verify_collateral(collateral, root=root, now=stage.now)
    with pytest.raises(EvidenceRefused, match=r"root|issuer"):
        verify_collateral(collateral, root=vendor_anchors().tdx_root, now=stage.now)
    for at in (datetime(2020, 1, 1, tzinfo=UTC), datetime(2060, 1, 1, tzinfo=UTC)):
        with pytest.raises(EvidenceRefused, match="valid"):
            verify_collateral(collateral, root=root, now=at)


@pytest.mark.parametrize("part", ["tcb_info", "qe_identity"])
def test_signed_texts_are_exact(stage: Stage, collateral: Collateral, part: str) -> None:
    """The same JSON with one more space is another text."""
    members = json.loads(collateral.text)
    members[part] = members[part].replace(":", ": ", 1)
    altered = parse_collateral(json.dumps(members).encode(), where="file")
    assert altered is not None
    with pytest.raises(EvidenceRefused, match="signature is wrong"):
        verify_collateral(altered, root=stage.anchors.tdx_root, now=stage.now)


@given(st.binary(max_size=120))
def test_arbitrary_extensions_leak_nothing(data: bytes) -> None:
    with pytest.raises((FormatError, LimitExceeded)):
        parse_sgx_extension(data)


def test_every_flipped_byte_of_an_extension_leaks_nothing(platform: SimulatedPlatform) -> None:
    from cai.attest.tdx.pck import SGX_EXTENSION, pck_extension

    certificate = platform.processor.pck.certificate
    assert pck_extension(certificate).fmspc == b"SIMUL\x00"
    value = certificate.extensions.get_extension_for_oid(SGX_EXTENSION).value
    assert isinstance(value, x509.UnrecognizedExtension)
    for at in range(len(value.value)):
        for bit in (0x01, 0x80):
            altered = bytearray(value.value)
            altered[at] ^= bit
            with contextlib.suppress(FormatError):
                parse_sgx_extension(bytes(altered))
    for end in range(len(value.value)):
        with pytest.raises(FormatError):
            parse_sgx_extension(value.value[:end])
    with pytest.raises(FormatError, match="no SGX extension"):
        pck_extension(platform.processor.root.certificate)


def test_a_platform_that_is_named_twice_is_refused(platform: SimulatedPlatform) -> None:
    from cai.attest.sim.certificates import der

    pair = der(0x30, der(0x06, bytes.fromhex("2a864886f84d010d0101")) + der(0x04, bytes(16)))
    with pytest.raises(FormatError, match="twice"):
        parse_sgx_extension(der(0x30, pair + pair))
