"""Fuzz targets: every parser that meets bytes from outside, and seeds that reach into it.

A target takes any bytes and either returns or raises an error of ``cai.errors``; anything else is
a bug. Real fuzzing: ``python -m tests.fuzz quote`` with the extra ``fuzz`` (atheris) installed;
the normal test run goes through a small deterministic set of mutations instead.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography.hazmat.primitives.serialization import Encoding

from cai import jcs
from cai.attest import rcar, ttrpc
from cai.attest.agent_client import ProofRequest
from cai.attest.certificates import load_chain, verify_chain
from cai.attest.channel import ChannelEvidence
from cai.attest.evidence_file import decode_evidence
from cai.attest.gpu.certificates import describe
from cai.attest.gpu.ocsp import authenticate_answer
from cai.attest.gpu.report import parse_report
from cai.attest.gpu.rim import claimed_version, verify_rim
from cai.attest.gpu.rim_store import decode_answer
from cai.attest.policy import VerificationPolicy
from cai.attest.reference import parse_measurements
from cai.attest.statement import ChannelStatement
from cai.attest.tdx.collateral import CollateralStore, parse_collateral
from cai.attest.tdx.eventlog import launched, parse_event_log
from cai.attest.tdx.log_records import boot_log_end
from cai.attest.tdx.pck import parse_sgx_extension
from cai.attest.tdx.quote import parse_header, parse_quote
from cai.attest.tdx.verify import verify_quote
from cai.errors import CaiError
from tests.fuzz.ohttp import OHTTP
from tng.channel.frames import Frame, FrameDecoder, FrameType, encode
from tng.channel.hello import offered_protocols
from tng.stock import cbor
from tng.stock.certificate import (
    CocoEvidence,
    bound_key,
    make_certificate,
    parse_certificate,
    runtime_data,
    spki_der,
)
from tng.stock.token import Token, verify_token

WHEN = datetime(2026, 6, 1, tzinfo=UTC)
SEED = b"fuzz"

POLICY = b"""version = 1
profile = "operated"
[tdx]
unsafe_any_mr_td = true
unsafe_any_rtmr0 = true
rtmr1 = ["%(m)s"]
unsafe_any_rtmr2 = true
unsafe_any_rtmr3 = true
xfam = ["e702060000000000"]
[gpu]
count = 1
[guest]
unsafe_any_launch_digest = true
""" % {b"m": b"ab" * 48}

DSTACK_LOG = jcs.canonical(
    [{"imr": 3, "event_type": 0x08000001, "digest": "00" * 48, "event": "x", "event_payload": ""}]
)

Target = Callable[[bytes], object]


@dataclass(frozen=True)
class Seeds:
    """What a simulated platform of a fixed seed gives to start from."""

    quote: bytes
    quote_td15: bytes
    event_log: bytes
    report: bytes
    switch_report: bytes
    chain: bytes
    rim: bytes
    rim_answer: bytes
    ocsp: bytes
    collateral: bytes
    sgx_extension: bytes
    tdx_root: bytes
    gpu_root: bytes
    rim_root: bytes


@cache
def seeds() -> Seeds:
    """Evidence of a guest with GPUs, switches, a launch and everything beside it."""
    from cai.attest.sim import DeviceSettings, GuestSettings, SimulatedPlatform, intel, nvidia, rim
    from cai.attest.tdx.runtime_events import launch_events

    with TemporaryDirectory() as directory:
        platform = SimulatedPlatform.create(Path(directory), now=WHEN, seed=SEED)
        guest = platform.guest(GuestSettings(rtmr3_events=launch_events(b"launch")))
        devices = platform.devices(1, DeviceSettings(protected_pcie=True)).collect(bytes(32))
        chain = load_chain(devices[0].chain, what="chain")
        responder = platform.responder()
        chip = nvidia.CHIPS["HOPPER"]
        pck = parse_quote(guest.quote(bytes(64))).pck_chain
        extension = load_chain(pck, what="chain")[0].extensions
        return Seeds(
            quote=guest.quote(bytes(64)),
            quote_td15=platform.guest(GuestSettings(td15=True)).quote(bytes(64)),
            event_log=guest.event_log() or b"",
            report=devices[0].report,
            switch_report=devices[-1].report,
            chain=devices[0].chain,
            rim=rim.make_rim(platform.foundry, chip, "1.0", rim.golden(chip, (1, 2)), slots=4),
            rim_answer=rim.service_answer("id", b"<x/>"),
            ocsp=responder.about(chain[1], now=WHEN),
            collateral=jcs.canonical(intel.collateral(platform.processor, now=WHEN)),
            sgx_extension=next(
                item.value.value for item in extension
                if item.oid.dotted_string == "1.2.840.113741.1.13.1"
            ),
            tdx_root=platform.processor.root.certificate.public_bytes(Encoding.DER),
            gpu_root=platform.foundry.root.certificate.public_bytes(Encoding.DER),
            rim_root=platform.foundry.rim_root.certificate.public_bytes(Encoding.DER),
        )  # fmt: skip


@cache
def _store() -> CollateralStore:
    item = parse_collateral(seeds().collateral, where="x")
    assert item is not None
    return CollateralStore([item])


def quote(data: bytes) -> object:
    """The strict parser alone."""
    parse_header(data)
    return parse_quote(data)


def verified_quote(data: bytes) -> object:
    """Both engines behind the parser; never an exception, always a verdict."""
    result = verify_quote(
        data, report_data=bytes(64), root=seeds().tdx_root, collateral=_store(), now=WHEN,
        require_agreement=True,
    )  # fmt: skip
    assert result.checks
    return result.facts


def event_log(data: bytes) -> object:
    """Parse, replay, and whatever is read from the events."""
    log = parse_event_log(data)
    return log.replay(), launched(log.runtime_events())


def device_chain(data: bytes) -> object:
    """PEM, identity and chain of a device."""
    chain = load_chain(data, what="chain")
    describe(chain)
    verify_chain(chain, root=seeds().gpu_root, now=WHEN)
    return chain


def reference_file(data: bytes) -> object:
    """XML, signature and content of a reference file."""
    claimed_version(data)
    return verify_rim(data, root=seeds().rim_root, now=WHEN)


def ocsp_answer(data: bytes) -> object:
    """An answer about a boot ROM."""
    chain = load_chain(seeds().chain, what="chain")
    return authenticate_answer(data, certificate=chain[1], issuer=chain[2], now=WHEN)


def stock_certificate(data: bytes) -> object:
    """A peer's certificate, its claims, and the key that they bind."""
    presented = parse_certificate(data)
    if presented.evidence is None:
        return presented
    return bound_key(presented.evidence.claims)


def stock_evidence(data: bytes) -> object:
    """What the certificate's extension carries, without the certificate."""
    return bound_key(CocoEvidence.decode(data).claims)


def token(data: bytes) -> object:
    """A token of an attestation service, verified against no root."""
    parsed = Token.parse(data.decode("latin-1"))
    assert verify_token(parsed, roots=(), policy_ids=("default",), now=WHEN)
    return parsed.runtime_claims


def hello(data: bytes) -> object:
    """A client's first message; what is not complete yet is an answer too."""
    return offered_protocols(b"\x16" + data[1:]) if data else None


def frames(data: bytes) -> object:
    """Frames of a session, in two pieces."""
    decoder = FrameDecoder()
    half = len(data) // 2
    return decoder.feed(data[:half]) + decoder.feed(data[half:])


@cache
def _stock_seeds() -> tuple[bytes, bytes, bytes]:
    """A certificate, its evidence, and a first message that offers protocols."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from tng.channel.tls import TlsSession, client_context

    key = ec.derive_private_key(7, ec.SECP256R1())
    text = runtime_data(spki_der(key.public_key()))
    evidence = CocoEvidence("tdx", b"{}", b"{}", text)
    session = TlsSession(client_context(), server=False)
    session.start()
    certificate = make_certificate(key, evidence, now=WHEN).der
    return certificate, evidence.encode(), session.outgoing()


def _token_seed() -> bytes:
    parts = (b'{"alg":"ES256"}', b'{"exp":1,"submods":{"cpu0":{"ear.status":"affirming"}}}', b"s")
    return b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)


TARGETS: Mapping[str, Target] = {
    "quote": quote,
    "verified-quote": verified_quote,
    "event-log": event_log,
    "log-area": boot_log_end,
    "gpu-report": parse_report,
    "device-chain": device_chain,
    "reference-file": reference_file,
    "rim-answer": decode_answer,
    "ocsp-answer": ocsp_answer,
    "collateral": lambda data: parse_collateral(data, where="x"),
    "sgx-extension": parse_sgx_extension,
    "evidence-file": lambda data: decode_evidence(data, where="x"),
    "channel-evidence": ChannelEvidence.decode,
    "statement": ChannelStatement.decode,
    "policy": lambda data: VerificationPolicy.parse(data, where="x"),
    "measurements": lambda data: parse_measurements(data, where="x"),
    "rcar-request": rcar.Request.parse,
    "rcar-challenge": rcar.Challenge.parse,
    "rcar-attestation": rcar.Attestation.parse,
    "agent-prove": ProofRequest.decode,
    "ttrpc-header": ttrpc.Header.decode,
    "ttrpc-request": ttrpc.Request.decode,
    "cbor": cbor.decode,
    "stock-certificate": stock_certificate,
    "stock-evidence": stock_evidence,
    "token": token,
    "hello": hello,
    "frames": frames,
    **{name: target for name, (target, _seeds) in OHTTP.items()},
}
"""Every target by its name on the command line."""


def corpus(name: str) -> tuple[bytes, ...]:
    """Inputs that reach deep into a target."""
    have = seeds()
    evidence = {
        "cai-evidence": 1, "quote": "AAAA", "devices": [],
    }  # fmt: skip
    known: Mapping[str, tuple[bytes, ...]] = {
        "quote": (have.quote, have.quote_td15),
        "verified-quote": (have.quote, have.quote_td15),
        "event-log": (have.event_log, DSTACK_LOG),
        "log-area": (have.event_log,),
        "gpu-report": (have.report, have.switch_report),
        "device-chain": (have.chain,),
        "reference-file": (have.rim,),
        "rim-answer": (have.rim_answer,),
        "ocsp-answer": (have.ocsp,),
        "collateral": (have.collateral,),
        "sgx-extension": (have.sgx_extension,),
        "evidence-file": (jcs.canonical(evidence), have.quote),
        "policy": (POLICY,),
        "measurements": (b'{"mr_td":["00"],"profile":"sealed"}',),
        "rcar-request": (rcar.Request(tee="tdx").encode(),),
        "cbor": (_stock_seeds()[1],),
        "stock-certificate": (_stock_seeds()[0],),
        "stock-evidence": (_stock_seeds()[1],),
        "token": (_token_seed(),),
        "hello": (_stock_seeds()[2],),
        "frames": (encode(Frame(FrameType.DATA, 1, b"hello")) * 2,),
        "rcar-challenge": (jcs.canonical(rcar.Challenge.for_nonce(bytes(32)).to_json()),),
    }
    if name in OHTTP:
        return OHTTP[name][1]
    return known.get(name, (b"{}", b"\x00" * 16))


def mutations(data: bytes, *, count: int, seed: int) -> Iterator[bytes]:
    """Deterministic damage: flips, cuts, repeats, inserted and overwritten runs."""
    source = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _step in range(source.choice((1, 1, 2, 5))):
            place = source.randrange(len(changed) + 1)
            size = source.choice((1, 2, 4, 8, 48))
            match source.randrange(6):
                case 0 if changed:
                    changed[place % len(changed)] ^= 1 << source.randrange(8)
                case 1:
                    del changed[place:]
                case 2:
                    del changed[place : place + size]
                case 3:
                    changed[place:place] = changed[place : place + size]
                case 4:
                    changed[place : place + size] = source.choice((b"\xff", b"\x00")) * size
                case _:
                    changed[place:place] = source.randbytes(size)
        yield bytes(changed)


def survives(target: Target, data: bytes) -> bool:
    """Whether a target accepts; errors of ours are answers, all others escape."""
    try:
        target(data)
    except CaiError:
        return False
    return True
