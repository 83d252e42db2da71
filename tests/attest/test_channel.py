"""Channel evidence: what binds a session to a guest, and every way to get it wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cai import jcs, merkle
from cai.attest.anchors import TrustAnchors, simulated_anchors, vendor_anchors
from cai.attest.channel import (
    MAX_GPU_AGE_S,
    ChannelEvidence,
    Expectation,
    Role,
    leaf_data,
    verify_channel,
)
from cai.attest.evidence import Evidence
from cai.attest.facts import Facts
from cai.attest.policy import VerificationPolicy, policy_for
from cai.attest.statement import (
    ChannelStatement,
    GpuFacts,
    Purpose,
    ServedModel,
    report_data,
)
from cai.attest.tdx.collateral import CollateralStore, load_collateral
from cai.attest.verdict import Binding, Outcome, Verdict
from cai.attest.verify import verify_evidence
from cai.errors import CaiError, FormatError

if TYPE_CHECKING:
    from cai.attest.sim import SimulatedGuest, SimulatedPlatform

NONCE = bytes(range(32))
SPKI = b"subject public key"
EKM = bytes(reversed(range(32)))
LEAF = leaf_data(Role.SERVER, 0, SPKI, EKM)
GUEST = {"profile": "operated", "launched_by": "agent"}


@dataclass
class World:
    """A simulated guest, its devices, the roots, and a policy that names it."""

    guest: SimulatedGuest
    platform: SimulatedPlatform
    anchors: TrustAnchors
    collateral: CollateralStore
    policy: VerificationPolicy
    devices: tuple
    facts: dict[str, str]

    def statement(self, leaves: list[bytes], **changes: object) -> ChannelStatement:
        evidence = Evidence(b"", self.devices)
        statement = ChannelStatement(
            launch_digest="ab" * 48,
            service_id="demo",
            owner_key="cd" * 32,
            models=(ServedModel("01" * 32, "02" * 32),),
            gpu=GpuFacts(evidence.gpu_digest.hex(), NONCE.hex(), 5),
            guest_facts=self.facts,
            ticket_digest="",
            dialects=("cai/1",),
            boot_id="05" * 16,
            epoch=1,
            session_root=merkle.root(leaves).hex(),
            session_size=len(leaves),
        )
        return replace(statement, **changes)  # type: ignore[arg-type]

    def prove(
        self, leaves: list[bytes], index: int = 0, purpose: Purpose = Purpose.CHANNEL,
        **changes: object,
    ) -> ChannelEvidence:
        encoded = self.statement(leaves, **changes).encode()
        quote = self.guest.quote(report_data(encoded, purpose))
        path = tuple(merkle.inclusion_path(leaves, index))
        return ChannelEvidence(encoded, Evidence(quote, self.devices), index, path)

    def verify(
        self, evidence: ChannelEvidence, leaf: bytes = LEAF, expect: Expectation | None = None,
        at: datetime | None = None, anchors: TrustAnchors | None = None,
    ) -> tuple[Verdict, Facts | None]:
        return verify_channel(
            evidence, leaf, subject="test guest", policy=self.policy,
            expect=expect or Expectation(), anchors=anchors or self.anchors,
            collateral=self.collateral, now=at or datetime.now(UTC),
        )


@pytest.fixture(scope="module")
def world(platform: SimulatedPlatform, platform_dir: Path) -> World:
    from cai.attest.sim import GuestSettings

    guest = platform.guest(GuestSettings())
    gpus = platform.devices()
    devices = gpus.collect(NONCE)
    anchors = simulated_anchors(platform_dir / "anchors")
    collateral = load_collateral(platform_dir / "anchors" / "collateral")
    binding = bytes(64)
    verdict, facts = verify_evidence(
        Evidence(guest.quote(binding), devices), subject="guest", report_data=binding,
        gpu_nonce=NONCE, anchors=anchors, collateral=collateral, now=datetime.now(UTC),
    )
    verdict.require()
    assert facts is not None
    told = {**GUEST, **gpus.facts()}
    named = replace(facts, launch_digest="ab" * 48, guest=told)
    policy = VerificationPolicy.parse(policy_for(named), where="policy.toml")
    return World(guest, platform, anchors, collateral, policy, devices, told)


def failed(verdict: Verdict) -> set[str]:
    return {item.name for item in verdict.failures}


def one(leaf: bytes = LEAF) -> list[bytes]:
    return [merkle.leaf_hash(leaf)]


def test_leaf_known_answer() -> None:
    """docs/spec-channel.md §9."""
    leaf = leaf_data(Role.SERVER, 0, b"\xaa", b"\xbb" * 32)
    assert len(leaf) == 70
    assert merkle.leaf_hash(leaf).hex() == (
        "aff50f5aab5159a28ec56ab584c4bfe5bca9dfcd19c112d66e4b6428d11a9214"
    )
    client = leaf_data(Role.CLIENT, 0, b"\xaa", b"\xbb" * 32)
    assert merkle.leaf_hash(client).hex() == (
        "1b11c5ff4f62d0d9a05da47369a7016e51782781b82f728937e7861aa332b926"
    )


def test_a_genuine_session_passes_and_says_so(world: World) -> None:
    verdict, facts = world.verify(world.prove(one()))
    assert verdict.require().binding is Binding.SESSION
    assert verdict.simulated
    assert facts is not None
    assert facts.launch_digest == "ab" * 48
    asked = {item.name: item.outcome for item in verdict.checks}
    assert asked["expect.model_root"] is Outcome.NOT_ASKED


def test_every_session_of_a_batch_passes_and_no_other(world: World) -> None:
    leaves = [merkle.leaf_hash(leaf_data(Role.SERVER, 0, SPKI, bytes([n]) * 32)) for n in range(5)]
    proof = world.prove(leaves, index=3)
    verdict, _ = world.verify(proof, leaf_data(Role.SERVER, 0, SPKI, bytes([3]) * 32))
    assert verdict.passed
    verdict, _ = world.verify(proof, leaf_data(Role.SERVER, 0, SPKI, bytes([2]) * 32))
    assert failed(verdict) == {"channel.session"}


@pytest.mark.parametrize(
    "leaf",
    [
        leaf_data(Role.CLIENT, 0, SPKI, EKM),
        leaf_data(Role.SERVER, 1, SPKI, EKM),
        leaf_data(Role.SERVER, 0, b"another key", EKM),
        leaf_data(Role.SERVER, 0, SPKI, bytes(32)),
        LEAF + b"\x00",
        b"",
    ],
    ids=["role reflected", "other seq", "other key", "other session", "longer", "empty"],
)
def test_a_proof_of_another_session_fails(world: World, leaf: bytes) -> None:
    verdict, facts = world.verify(world.prove(one()), leaf)
    assert failed(verdict) == {"channel.session"}
    assert facts is None


def test_a_node_offered_as_a_leaf_fails(world: World) -> None:
    """The tree below the node is real, but its leaf hash carries another prefix."""
    pair = [merkle.leaf_hash(b"a"), merkle.leaf_hash(b"b")]
    proof = world.prove([merkle.root(pair)])
    verdict, _ = world.verify(proof, pair[0] + pair[1])
    assert "channel.session" in failed(verdict)


TAMPERED: dict[str, tuple[Callable[[ChannelEvidence], ChannelEvidence], set[str]]] = {
    "longer path": (lambda e: replace(e, path=(bytes(32),)), {"channel.session"}),
    "other index": (lambda e: replace(e, index=1), {"channel.session"}),
    "no devices": (
        lambda e: replace(e, evidence=replace(e.evidence, devices=())), {"channel.gpu_digest"},
    ),
    "statement of another epoch": (
        lambda e: replace(e, statement=e.statement.replace(b'"epoch":1', b'"epoch":2')),
        {"tdx.report_data"},
    ),
    "statement with a space": (
        lambda e: replace(e, statement=e.statement.replace(b'"epoch":1', b'"epoch": 1')),
        {"channel.statement"},
    ),
    "statement of another size": (
        lambda e: replace(
            e, statement=e.statement.replace(b'"session_size":1', b'"session_size":2')
        ),
        {"channel.session", "tdx.report_data"},
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_evidence_fails_by_name(world: World, name: str) -> None:
    change, expected = TAMPERED[name]
    verdict, facts = world.verify(change(world.prove(one())))
    assert expected <= failed(verdict)
    assert facts is None


def test_a_quote_for_another_purpose_fails(world: World) -> None:
    verdict, _ = world.verify(world.prove(one(), purpose=Purpose.RELEASE))
    assert "tdx.report_data" in failed(verdict)


def test_swapped_gpu_evidence_fails(world: World) -> None:
    """Genuine reports of another collection, under the same nonce."""
    proof = world.prove(one())
    other = world.platform.devices().collect(bytes(32))
    verdict, _ = world.verify(replace(proof, evidence=replace(proof.evidence, devices=other)))
    assert "channel.gpu_digest" in failed(verdict)
    assert any(name.endswith(".nonce") for name in failed(verdict))


def test_old_gpu_evidence_fails(world: World) -> None:
    gpu = world.statement(one()).gpu
    verdict, _ = world.verify(world.prove(one(), gpu=replace(gpu, age_s=MAX_GPU_AGE_S + 1)))
    assert failed(verdict) == {"channel.gpu_age"}


def test_another_launch_fails_the_policy(world: World) -> None:
    verdict, _ = world.verify(world.prove(one(), launch_digest="ac" * 48))
    assert failed(verdict) == {"guest.launch_digest"}


def test_a_debug_guest_fails(world: World) -> None:
    from cai.attest.sim import GuestSettings

    debug = replace(world, guest=world.platform.guest(GuestSettings(debug=True)))
    verdict, _ = debug.verify(debug.prove(one()))
    assert "tdx.debug" in failed(verdict)


def test_another_image_fails(world: World) -> None:
    from cai.attest.sim import GuestSettings

    other = replace(world, guest=world.platform.guest(GuestSettings(image="other")))
    verdict, _ = other.verify(other.prove(one()))
    assert "tdx.mr_td" in failed(verdict)


def test_a_simulated_guest_never_passes_under_the_vendors_roots(world: World) -> None:
    verdict, facts = world.verify(world.prove(one()), anchors=vendor_anchors())
    assert not verdict.passed
    assert facts is None
    assert not verdict.simulated


@pytest.mark.parametrize("days", [-2, 60])
def test_collateral_outside_its_window_fails(world: World, days: int) -> None:
    verdict, _ = world.verify(world.prove(one()), at=datetime.now(UTC) + timedelta(days=days))
    assert not verdict.passed


MET = Expectation("ab" * 48, "demo", "cd" * 32, "01" * 32, "02" * 32)


def test_a_met_expectation_passes(world: World) -> None:
    verdict, _ = world.verify(world.prove(one()), expect=MET)
    assert verdict.passed
    assert MET.asks_for_model


@pytest.mark.parametrize("member", ["launch", "service", "owner", "model_root", "content_root"])
def test_each_unmet_expectation_fails_by_name(world: World, member: str) -> None:
    verdict, _ = world.verify(world.prove(one()), expect=replace(MET, **{member: "ff" * 32}))
    assert failed(verdict) == {f"expect.{member}"}


def test_a_guest_that_serves_nothing_fails_a_pinned_model(world: World) -> None:
    verdict, _ = world.verify(world.prove(one(), models=()), expect=MET)
    assert failed(verdict) == {"expect.model_root", "expect.content_root"}


def test_the_wire_form_round_trips(world: World) -> None:
    proof = world.prove(one())
    assert ChannelEvidence.decode(proof.encode()) == proof


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("quote", "AAA"), ("quote", "AB=="), ("devices", [{}]), ("devices", {}),
        ("devices", [{"arch": "", "uuid": "", "report": "", "chain": ""}] * 17),
        ("path", ["00"]), ("path", ["AA" * 32]), ("path", ["00" * 32] * 13), ("index", 4096),
        ("index", -1), ("statement", 1), ("extra", 1),
    ],
)
def test_malformed_wire_forms_are_refused(world: World, member: str, value: object) -> None:
    body = jcs.parse(world.prove(one()).encode(), what="evidence", limit=10**6)
    body[member] = value
    with pytest.raises(CaiError):
        ChannelEvidence.decode(jcs.canonical(body))


@given(st.binary(max_size=200))
def test_garbage_never_leaks_a_builtin_exception(data: bytes) -> None:
    with pytest.raises(CaiError):
        ChannelEvidence.decode(data)


@pytest.mark.parametrize(("seq", "size"), [(-1, 32), (2**32, 32), (0, 31), (0, 33)])
def test_leaves_out_of_range(seq: int, size: int) -> None:
    with pytest.raises(FormatError):
        leaf_data(Role.SERVER, seq, SPKI, bytes(size))
