"""Questions that the evidence vectors ask, and the product's answers.

A folder of vectors has up to four manifests. Each entry says what to look at and when; its member
``expect`` says what is right. An answer here is made without ``expect``'s verdict in sight, by the
same verifier for every entry; nothing knows an entry by its name.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cai.attest.anchors import vendor_anchors
from cai.attest.certificates import load_chain
from cai.attest.evidence import DeviceEvidence
from cai.attest.facts import Facts
from cai.attest.gpu.certificates import describe
from cai.attest.gpu.ocsp import check_answer
from cai.attest.gpu.rim import verify_rim
from cai.attest.gpu.rim_store import RimStore
from cai.attest.gpu.verify import GpuResult, verify_devices
from cai.attest.policy import VerificationPolicy
from cai.attest.tdx.collateral import CollateralStore, parse_collateral
from cai.attest.tdx.eventlog import parse_event_log
from cai.attest.tdx.quote import parse_quote
from cai.attest.tdx.verify import TdxResult, verify_quote
from cai.attest.verdict import Outcome
from cai.errors import CaiError

MANIFESTS = ("tdx", "gpu", "negative/tdx", "negative/gpu")

UNDATED = datetime(2026, 11, 20, tzinfo=UTC)
"""When entries that list no time are verified."""

ORDINALS = {"leaf": 0, "first": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "root": -1}

POLICY = """
version = 1
profile = "operated"
[tdx]
unsafe_any_mr_td = true
unsafe_any_rtmr0 = true
unsafe_any_rtmr1 = true
unsafe_any_rtmr2 = true
unsafe_any_rtmr3 = true
unsafe_any_xfam = true
mr_config_id = ["{mr_config_id}"]
mr_owner = ["{mr_owner}"]
mr_owner_config = ["{mr_owner_config}"]
[gpu]
count = 0
[guest]
unsafe_any_launch_digest = true
unsafe_without_facts = true
"""
"""The default policy with measurements not asked, as the vectors' readme defines ``expect``."""

Entry = Mapping[str, Any]
Answer = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask.

    Attributes:
        name: for people.
        ask: makes the answer: ``verdict`` and whatever else the product reports.
        expected: members that the answer must have.
    """

    name: str
    ask: Callable[[], Answer]
    expected: Answer


@dataclass(frozen=True)
class Folder:
    """A folder of vectors.

    Attributes:
        path: holds the manifests; files are named relative to it.
        base: where names that it does not define itself are looked up.
    """

    path: Path
    base: Folder | None = None
    manifests: Mapping[str, Mapping[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        found = {}
        for name in MANIFESTS:
            path = self.path / name / "manifest.json"
            if path.exists():
                found[name] = json.loads(path.read_text())
        object.__setattr__(self, "manifests", found)

    def read(self, name: str) -> bytes:
        path = self.path / name
        if not path.exists() and self.base is not None:
            return self.base.read(name)
        return path.read_bytes()

    def named(self, manifest: str, section: str, name: str) -> Entry | None:
        items = self.manifests.get(manifest, {}).get(section, {})
        for key, item in entries(items):
            if key == name:
                return item
        return None if self.base is None else self.base.named(manifest, section, name)

    def root(self, name: str) -> bytes:
        certificate = x509.load_pem_x509_certificate(self.read(name))
        return certificate.public_bytes(Encoding.DER)


def entries(section: Any) -> Iterator[tuple[str, Entry]]:
    """Name and entry, whether a section is a list or an object."""
    if isinstance(section, dict):
        yield from section.items()
    else:
        for item in section:
            yield item.get("name") or item.get("file", "?"), item


def questions(folder: Folder) -> Iterator[Question]:
    """Every question that a folder asks."""
    for manifest, sections in folder.manifests.items():
        for section, items in sections.items():
            maker = MAKERS.get((manifest.rpartition("/")[2], section))
            for name, entry in entries(items):
                where = f"{manifest}/{section}/{name}"
                if maker is not None:
                    for question in maker(folder, entry):
                        yield Question(f"{where}{question.name}", question.ask, question.expected)
                elif isinstance(entry, dict) and "expect" in entry:
                    yield Question(where, lambda: {"verdict": "nobody can ask this"},
                                   entry["expect"])  # fmt: skip


# TDX


def tdx_questions(folder: Folder, entry: Entry) -> Iterator[Question]:
    """Quote, collateral and time; further pairs; the same under the vendor's root."""
    first = entry.get("expect")
    for place, expect in enumerate([first, *(entry.get("also") or [])]):
        if not expect or "verdict" not in expect:
            continue
        merged = {**entry, **expect}
        wanted = {name: expect[name] for name in ("verdict", "status", "advisory_ids")
                  if name in expect}  # fmt: skip
        root = folder.root(merged["root"]) if merged.get("root") else vendor_anchors().tdx_root
        yield Question(
            f"[{place}]", lambda merged=merged, root=root: ask_tdx(folder, merged, root), wanted
        )
        for member in ("under_vendor_root", "under_vendor_roots"):
            if member in expect:
                yield Question(
                    f"[{place}]-vendor",
                    lambda merged=merged: ask_tdx(folder, merged, vendor_anchors().tdx_root),
                    {"verdict": expect[member]},
                )


def ask_tdx(folder: Folder, entry: Entry, root: bytes) -> Answer:
    """Verdict and TCB status with one engine; the second engine must change nothing."""
    quote, collateral = _tdx_inputs(folder, entry)
    try:
        item = parse_collateral(collateral, where="collateral")
        store = CollateralStore([item] if item else [])
    except CaiError:
        # What cannot be read cannot be verified with; the quote is refused for want of it.
        store = CollateralStore.empty()
    now = datetime.fromtimestamp(int(entry["at_unix"]), UTC)
    answers = []
    for both in (False, True):
        result = verify_quote(
            quote, report_data=_binding(quote), root=root, collateral=store, now=now,
            require_agreement=both,
        )
        answers.append(_tdx_answer(result, now))
    assert answers[0] == answers[1], "the two engines disagree"
    return answers[0]


def _tdx_inputs(folder: Folder, entry: Entry) -> tuple[bytes, bytes]:
    file, kind = entry.get("file", ""), entry.get("kind", "quote")
    if "collateral_file" in entry:
        collateral = folder.read(entry["collateral_file"])
    elif kind == "collateral":
        collateral = folder.read(file)
    else:
        named = folder.named("tdx", "collateral", entry["collateral"])
        collateral = folder.read(named["file"] if named else entry["collateral"])
    name = entry.get("quote") or file
    genuine = folder.named("tdx", "quotes", name)
    return folder.read(genuine["file"] if genuine else name), collateral


def _binding(quote: bytes) -> bytes:
    """The quote's own report data: what it binds is not what the vectors ask."""
    try:
        return parse_quote(quote).body["report_data"]
    except CaiError:
        return bytes(64)


def _tdx_answer(result: TdxResult, now: datetime) -> Answer:
    if result.facts is None:
        return {"verdict": "fail"}
    facts = result.facts
    policy = VerificationPolicy.parse(POLICY.format(**facts.body).encode(), where="policy.toml")
    checks = policy.appraise(Facts(facts, (), "", simulated=False), now=now)
    failed = any(item.outcome is Outcome.FAIL for item in checks)
    return {
        "verdict": "fail" if failed else "pass",
        "status": facts.tcb_status,
        "advisory_ids": sorted(facts.advisory_ids),
    }


def log_questions(folder: Folder, entry: Entry) -> Iterator[Question]:
    """Which registers of a quote a log replays to."""
    quote = folder.named("tdx", "quotes", str(entry.get("matches_quote")))
    if quote is None or "match" not in entry:
        return
    yield Question("", lambda: ask_log(folder, entry, quote), entry["match"])


def ask_log(folder: Folder, entry: Entry, quote: Entry) -> Answer:
    """Register by register, whether the replay equals the quote."""
    body = parse_quote(folder.read(quote["file"])).body
    values = parse_event_log(folder.read(entry["file"])).replay()
    return {f"rtmr{place}": value == body[f"rtmr_{place}"] for place, value in enumerate(values)}


# GPU


def report_questions(folder: Folder, entry: Entry) -> Iterator[Question]:
    """Report and chain; and with reference files, where an entry names some."""
    expect = entry["expect"]
    if "report_and_chain" in expect:
        # Signature and chain are asked; firmware of 2023 does not name its digest.
        yield Question(
            "-report", lambda: alone(ask_report(folder, entry, without_fwid=True)),
            {"verdict": expect["report_and_chain"]},
        )  # fmt: skip
    if "rims" in expect:
        wanted = expect["rims"]
        yield Question(
            "-rims", lambda: ask_rims(folder, entry, wanted["rims"]),
            {name: wanted[name] for name in ("verdict", "compared", "mismatch") if name in wanted},
        )  # fmt: skip


def alone(result: GpuResult) -> Answer:
    """The answer about one device by itself: whether it is part of a whole is not asked."""
    return {"verdict": "pass" if result.alone(0) else "fail"}


def ask_report(
    folder: Folder, entry: Entry, *, rims: tuple[bytes, ...] = (), vendor: bool = False,
    without_fwid: bool = False,
) -> GpuResult:  # fmt: skip
    """Verify one device under the roots that its entry names, or the vendor's."""
    anchors = vendor_anchors()
    roots: tuple[bytes, bytes | None] = anchors.gpu_root, anchors.rim_root
    if entry.get("device_root") and not vendor:
        roots = folder.root(entry["device_root"]), folder.root(entry["rim_root"])
    report = folder.read(entry["report"])
    nonce = bytes.fromhex(entry.get("expected_nonce") or entry.get("nonce") or "00" * 32)
    return verify_devices(
        (_device(report, folder.read(entry["chain"]), entry.get("arch")),),
        nonce=nonce, root=roots[0], rim_root=roots[1], now=_at(entry),
        rims=RimStore.of(rims) if rims else None, unsafe_without_fwid=without_fwid,
    )  # fmt: skip


def ask_rims(folder: Folder, entry: Entry, names: list[str]) -> Answer:
    """How many values were compared and which differ."""
    files = []
    for name in names:
        found = folder.named("gpu", "rims", name)
        files.append(folder.read(found["file"] if found else name))
    result = ask_report(folder, entry, rims=tuple(files), without_fwid=True)
    (comparison,) = result.comparisons
    if comparison is None:
        return alone(result)
    mismatch = [index for index, _source in comparison.mismatches]
    return {**alone(result), "compared": comparison.compared, "mismatch": mismatch}


def whole_questions(folder: Folder, entry: Entry) -> Iterator[Question]:
    """A device with both reference files, alone, beside others, and under the vendor's roots."""
    expect = entry["expect"]

    def ask(*, vendor: bool = False) -> Answer:
        try:
            rims = tuple(folder.read(entry[name]) for name in ("driver_rim", "vbios_rim")
                         if entry.get(name))  # fmt: skip
            return verdict_of(ask_report(folder, entry, rims=rims, vendor=vendor))
        except CaiError:
            return {"verdict": "fail"}

    yield Question("", ask, {"verdict": expect["verdict"]})
    for member in ("under_vendor_root", "under_vendor_roots"):
        if member in expect:
            yield Question(
                "-vendor", lambda: ask(vendor=True), {"verdict": expect[member]}
            )
    others = expect.get("together_with", {})
    for other, verdict in others.items() if isinstance(others, dict) else ():
        yield Question(
            f"+{other}", lambda other=other: _ask_pair(folder, entry, other), {"verdict": verdict}
        )


def _ask_pair(folder: Folder, entry: Entry, other: str) -> Answer:
    second = folder.named("gpu", "synthetic", other)
    assert second is not None
    devices = tuple(
        _device(folder.read(item["report"]), folder.read(item["chain"]), item.get("arch"))
        for item in (entry, second)
    )
    root = folder.root(entry["device_root"])
    nonce = bytes.fromhex(entry["expected_nonce"])
    return verdict_of(verify_devices(devices, nonce=nonce, root=root, now=_at(entry)))


def rim_questions(folder: Folder, entry: Entry) -> Iterator[Question]:
    """A reference file by itself, a day after the start of its validity."""
    expect = entry["expect"]
    at = datetime.fromisoformat(expect["at"]) + timedelta(days=1) if "at" in expect else UNDATED
    root = folder.root(entry["root"]) if entry.get("root") else vendor_anchors().rim_root

    def ask() -> Answer:
        assert root is not None
        try:
            verify_rim(folder.read(entry["file"]), root=root, now=at)
        except CaiError:
            return {"verdict": "fail"}
        return {"verdict": "pass"}

    yield Question("", ask, {"verdict": expect["verdict"]})


def list_questions(folder: Folder, entry: Entry) -> Iterator[Question]:
    """A list of devices, with whatever must be presented at once."""
    expect = entry.get("expect")
    if not expect:
        return
    beside = expect.get("together_with") or entry.get("together_with") or []
    beside = [beside] if isinstance(beside, str) else beside
    files = list(dict.fromkeys([entry["file"], *beside]))
    yield Question(
        "", lambda: verdict_of(_ask_list(folder, files)), {"verdict": expect["verdict"]}
    )


def _ask_list(folder: Folder, files: list[str]) -> GpuResult:
    items = [item for name in files for item in json.loads(folder.read(name))]
    devices = tuple(
        DeviceEvidence(
            item["arch"], "", base64.b64decode(item["evidence"]),
            base64.b64decode(item["certificate"]),
        )
        for item in items
    )  # fmt: skip
    return verify_devices(
        devices, nonce=bytes.fromhex(items[0]["nonce"]), root=vendor_anchors().gpu_root,
        now=UNDATED,
    )  # fmt: skip


def ocsp_questions(folder: Folder, entry: Entry) -> Iterator[Question]:
    """An answer about one certificate of the synthetic chain."""
    chain_file = entry.get("chain", "gpu/synthetic/chain.pem")

    def ask() -> Answer:
        chain = load_chain(folder.read(chain_file), what="chain")
        nonce = bytes.fromhex(entry.get("request_nonce", ""))
        try:
            check_answer(
                folder.read(entry["file"]),
                certificate=chain[_place(entry.get("subject", "third"))],
                issuer=chain[_place(entry.get("issuer", "fourth"))],
                now=_at(entry), nonce=nonce or None,
            )  # fmt: skip
        except CaiError:
            return {"verdict": "fail"}
        return {"verdict": "pass"}

    yield Question("", ask, {"verdict": entry["expect"]["verdict"]})


def verdict_of(result: GpuResult) -> dict[str, Any]:
    """``pass`` where every check passed."""
    failed = any(item.outcome is Outcome.FAIL for item in result.checks)
    assert failed == (result.facts is None), "facts if and only if every check passed"
    return {"verdict": "fail" if failed else "pass"}


def _device(report: bytes, chain: bytes, label: str | None) -> DeviceEvidence:
    if label is None:
        # The label is unauthenticated; where an entry has none, what the certificate says is taken.
        try:
            label = describe(load_chain(chain, what="chain")).arch
        except CaiError:
            label = "HOPPER"
    return DeviceEvidence(label, "", report, chain)


def _at(entry: Entry) -> datetime:
    return datetime.fromisoformat(entry["at"]) if entry.get("at") else UNDATED


def _place(words: str) -> int:
    return next(place for word, place in ORDINALS.items() if word in words.split())


MAKERS: Mapping[tuple[str, str], Callable[[Folder, Entry], Iterator[Question]]] = {
    ("tdx", "quotes"): tdx_questions,
    ("tdx", "synthetic"): tdx_questions,
    ("tdx", "tampered"): tdx_questions,
    ("tdx", "eventlog"): log_questions,
    ("gpu", "reports"): report_questions,
    ("gpu", "rims"): rim_questions,
    ("gpu", "evidence"): list_questions,
    ("gpu", "lists"): list_questions,
    ("gpu", "synthetic"): whole_questions,
    ("gpu", "tampered"): whole_questions,
    ("gpu", "synthetic_ocsp"): ocsp_questions,
}
"""Who asks, by the last part of the manifest's folder and the section."""
