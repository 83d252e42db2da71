"""What a token tells: statuses and vectors from policy.toml, from Rego, and from both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from cai.attest.facts import Facts
from cai.attest.jwk import b64u_decode
from cai.attest.policy import VerificationPolicy, policy_for
from cai.attest.verdict import Outcome
from cai.errors import FormatError
from kbs.names import Realm, ResourceName
from kbs.policy.appraisal import Appraisal, appraise, submodules_of
from kbs.policy.names import TeeClass
from kbs.policy.pool import RegoPool
from kbs.policy.references import References
from kbs.policy.rego import RegoPolicy
from kbs.policy.store import Policies
from kbs.policy.templates import template
from kbs.policy.vector import CLAIMS, parse_vector, status_of
from kbs.protocol.token import TokenContext, ear_claims
from kbs.release.decision import judge
from tests.kbs.world import Site, Visitor

NOW = datetime.now(UTC)
KERNEL, PARAMETERS = "05" * 48, "07" * 48
HEAD = "package policy\nimport rego.v1\n"


@pytest.fixture(scope="module")
def pool() -> Iterator[RegoPool]:
    pool = RegoPool()
    yield pool
    pool.close()


@pytest.fixture
def facts(visitor: Visitor) -> Facts:
    return visitor.facts()


def event(kind: str, digest: str, details: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": 2, "type_name": kind, "event": "", "digest_matches_event": False,
        "digests": [{"alg": "SHA-384", "digest": digest}], "details": details,
    }  # fmt: skip


def rego(text: str) -> RegoPolicy:
    return RegoPolicy.stored(text.encode())


def verification(facts: Facts, **changes: Any) -> VerificationPolicy:
    return VerificationPolicy.parse(policy_for(facts, **changes), where="policy.toml")


def made(facts: Facts, pool: RegoPool, values: Any = None, **policies: Any) -> Appraisal:
    return appraise(facts, Policies(**policies), References.of(values or {}), now=NOW, pool=pool)


# Vectors.


def test_a_vector_is_complete_and_spelt_either_way() -> None:
    vector = parse_vector({"file_system": 2, "instance-identity": -1, "hardware": 2.0})
    assert set(vector) == set(CLAIMS)
    assert (vector["file-system"], vector["instance-identity"], vector["hardware"]) == (2, -1, 2)


@pytest.mark.parametrize(
    "value",
    [None, 1, [], "x", {"x": 1}, {"hardware": None}, {"hardware": True}, {"hardware": 2.5},
     {"hardware": 128}, {"hardware": -129}, {"hardware": "2"}],
)  # fmt: skip
def test_other_vectors_are_refused(value: Any) -> None:
    with pytest.raises(FormatError):
        parse_vector(value)


@pytest.mark.parametrize(
    ("tier", "status"),
    [
        (0, "none"), (1, "none"), (-1, "none"), (2, "affirming"), (31, "affirming"),
        (-2, "affirming"), (-32, "affirming"), (32, "warning"), (95, "warning"), (-33, "warning"),
        (-96, "warning"), (96, "contraindicated"), (127, "contraindicated"),
        (-97, "contraindicated"), (-128, "contraindicated"),
    ],
)  # fmt: skip
def test_the_worst_tier_is_the_status(tier: int, status: str) -> None:
    assert status_of({"hardware": tier}) == status
    worse = {"none": "affirming"}.get(status, status)
    assert status_of({"hardware": tier, "executables": 2, "file-system": 0}) == worse
    assert status_of({}) == "none"


# Without attestation policies the vector follows the checks.


def test_without_any_policy_nothing_is_claimed(facts: Facts, pool: RegoPool) -> None:
    found = made(facts, pool)
    assert dict(found.status) == {"cpu0": "none", "gpu0": "none"}
    assert found.checks is None


def test_checks_of_devices_and_of_the_guest_are_told_apart(facts: Facts, pool: RegoPool) -> None:
    assert dict(made(facts, pool, verification=verification(facts)).status) == {
        "cpu0": "affirming", "gpu0": "affirming",
    }  # fmt: skip
    other = verification(facts, launch_digest="cd" * 48)
    assert dict(made(facts, pool, verification=other).status) == {
        "cpu0": "contraindicated", "gpu0": "affirming",
    }  # fmt: skip
    device = replace(facts.devices[0], driver_version="1.0")
    bad = replace(facts, devices=(device,))
    found = made(bad, pool, verification=verification(facts))
    assert dict(found.status) == {"cpu0": "affirming", "gpu0": "contraindicated"}


def test_switches_have_names_of_their_own(facts: Facts) -> None:
    gpu = facts.devices[0]
    switch = replace(gpu, arch="LS10", driver_version="")
    many = replace(facts, devices=(gpu, switch, gpu, switch))
    found = submodules_of(many)
    assert [item.name for item in found] == ["cpu0", "gpu0", "switch0", "gpu1", "switch1"]
    assert found[2].tee_class is TeeClass.SWITCH
    assert found[3].claims["nvidia"]["arch"] == "Hopper"


# Policies of the shape that Trustee's own have: defaults that contradict, reference values for the
# registers, events of the log looked up by their details.

TRUSTEE_SHAPE = HEAD + """
default kernel_state := 33

default machine_state := 97

default settings_state := 36

trust_claims := {
	"executables": kernel_state,
	"hardware": machine_state,
	"configuration": settings_state,
	"file-system": 0,
	"instance-identity": 0,
	"runtime-opaque": 0,
	"storage-opaque": 0,
	"sourced-data": 0,
}

measured(kind, pick) := {item.digest |
	some entry in input.tdx.uefi_event_logs
	entry.type_name == kind
	pick in entry.details.device_paths
	some item in entry.digests
}

kernel_state := 3 if {
	input.tdx.quote.body.rtmr_1 in query_reference_value("rtmr_1")
	input.tdx.quote.body.rtmr_2 in query_reference_value("rtmr_2")
	some digest in measured("EV_EFI_BOOT_SERVICES_APPLICATION", "File(kernel)")
	digest == query_reference_value("tdvfkernel")
	some entry in input.tdx.uefi_event_logs
	entry.type_name == "EV_EVENT_TAG"
	entry.details.string == "LOADED_IMAGE::LoadOptions"
	entry.digests[_].digest == query_reference_value("tdvfkernelparams")
} else := 4 if {
	input.tdx.quote.body.rtmr_1 in query_reference_value("rtmr_1")
	input.tdx.quote.body.rtmr_2 in query_reference_value("rtmr_2")
}

machine_state := 2 if {
	input.tdx.quote.header.tee_type == "81000000"
	input.tdx.quote.header.vendor_id == "939a7233f79c4ca9940a0db3957f0607"
	input.tdx.quote.body.mr_td in query_reference_value("mr_td")
	input.tdx.tcb_status == "UpToDate"
	input.tdx.collateral_expiration_status == "0"
}

settings_state := 2 if {
	input.tdx.td_attributes.debug == false
	input.tdx.quote.body.xfam in query_reference_value("xfam")
}

extensions := [{
	"name": "ear.trustee.identifiers",
	"key": -18,
	"value": {"validated": {"container_images": ["demo"]}},
}]
"""


def shaped_values(facts: Facts) -> dict[str, Any]:
    body = facts.tdx.body
    return {
        "rtmr_1": [body["rtmr_1"]], "rtmr_2": ["00" * 48, body["rtmr_2"]],
        "mr_td": [body["mr_td"]], "xfam": [body["xfam"]],
        "tdvfkernel": KERNEL, "tdvfkernelparams": PARAMETERS,
    }  # fmt: skip


def with_log(facts: Facts) -> Facts:
    return replace(
        facts,
        event_claims=(
            event("EV_EFI_BOOT_SERVICES_APPLICATION", KERNEL, {"device_paths": ["File(kernel)"]}),
            event("EV_EVENT_TAG", PARAMETERS, {"string": "LOADED_IMAGE::LoadOptions"}),
        ),
    )


def test_a_policy_of_trustees_shape_affirms(facts: Facts, pool: RegoPool) -> None:
    assert RegoPolicy.checked_attestation(TRUSTEE_SHAPE.encode(), pool)
    cpu = {TeeClass.CPU: rego(TRUSTEE_SHAPE)}
    found = made(with_log(facts), pool, shaped_values(facts), attestation=cpu)
    item = found.submodules[0]
    assert item.status == "affirming"
    assert (item.vector["executables"], item.vector["hardware"]) == (3, 2)
    assert item.vector["configuration"] == 2
    assert item.extensions[0]["name"] == "ear.trustee.identifiers"
    assert item.policy_digest == cpu[TeeClass.CPU].digest
    assert found.attestation[0].outcome is Outcome.PASS
    # Without the log the registers alone are worth a little less.
    found = made(facts, pool, shaped_values(facts), attestation=cpu)
    assert found.submodules[0].vector["executables"] == 4


@pytest.mark.parametrize("missing", ["rtmr_1", "rtmr_2", "mr_td", "xfam"])
def test_a_missing_reference_value_affirms_nothing(
    facts: Facts, pool: RegoPool, missing: str
) -> None:
    values = shaped_values(facts)
    del values[missing]
    cpu = {TeeClass.CPU: rego(TRUSTEE_SHAPE)}
    found = made(with_log(facts), pool, values, attestation=cpu)
    assert found.submodules[0].status in ("warning", "contraindicated")


def test_the_templates_affirm_what_their_values_name(facts: Facts, pool: RegoPool) -> None:
    gpu, body = facts.devices[0], facts.tdx.body
    names = ("mr_td", "mr_seam", "rtmr_0", "rtmr_1", "rtmr_2", "xfam")
    values: dict[str, Any] = {name: [body[name]] for name in names}
    values |= {
        "gpu_models": [gpu.hwmodel], "gpu_driver_versions": [gpu.driver_version],
        "gpu_vbios_versions": [gpu.vbios_version], "gpu_count": 1,
    }  # fmt: skip
    attestation = {
        TeeClass.CPU: rego(template("attestation-cpu")),
        TeeClass.GPU: rego(template("attestation-gpu")),
    }
    found = made(facts, pool, values, attestation=attestation)
    assert set(found.status.values()) == {"affirming"}
    for name in values:
        if name == "gpu_count":
            continue
        less = {other: value for other, value in values.items() if other != name}
        assert "contraindicated" in made(facts, pool, less, attestation=attestation).status.values()
    release = decide(facts, pool, values, template("tdx-gpu"), attestation)
    assert release.passed
    for changed in ({"gpu_count": 2}, {"gpu_driver_versions": ["1"]}, {"gpu_count": "1"}):
        assert not decide(facts, pool, values | changed, template("tdx-gpu"), {}).passed
    operated = replace(facts, guest={**facts.guest, "profile": "operated"})
    for name in ("tdx", "tdx-gpu"):
        assert not decide(operated, pool, values, template(name), attestation).passed


def decide(
    facts: Facts, pool: RegoPool, values: Any, release: str, attestation: Any
) -> Any:
    verdict, _ = judge(
        facts, resource=ResourceName("a", "b", "c"), realm=Realm.SIMULATED,
        policies=Policies(
            verification=None, release=rego(release), attestation=attestation,
            unsafe_rego_only=True,
        ),
        references=References.of(values), pool=pool, hardware={}, now=NOW,
        claims=lambda appraisal: ear_claims(
            appraisal, CONTEXT, evidence={}, simulated=facts.simulated
        ),
    )  # fmt: skip
    return verdict


CONTEXT = TokenContext("CAI-SIMULATED", "id", "release", NOW, 1, "ref")


def test_rego_alone_decides_only_where_that_is_allowed(facts: Facts, pool: RegoPool) -> None:
    praise = {tee: rego(HEAD + 'trust_claims := {"hardware": 2}\n') for tee in TeeClass}
    allow = HEAD + "allow := true\n"
    assert decide(facts, pool, {}, allow, praise).passed
    assert not decide(facts, pool, {}, allow, {TeeClass.GPU: praise[TeeClass.GPU]}).passed


# What goes wrong in an attestation policy contradicts.


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("x := 1", True),
        ("trust_claims := {} if input.tdx", True),
        ("trust_claims := 1", False),
        ('trust_claims := {"hardwear": 2}', False),
        ('trust_claims := {"hardware": 2}\ntrust_claims := {"hardware": 3}', False),
        ('trust_claims := {"hardware": 1 / 0}', False),
        ('trust_claims := {"hardware": 2}\nextensions := 1', False),
        ('trust_claims := {"hardware": 2}\nextensions := [{"name": "ear.status", "key": 1,'
         ' "value": "affirming"}]', False),
    ],
)  # fmt: skip
def test_nothing_unsound_affirms(
    facts: Facts, pool: RegoPool, text: str, passed: bool
) -> None:
    cpu = {TeeClass.CPU: rego(HEAD + text + "\n")}
    found = made(facts, pool, verification=verification(facts), attestation=cpu)
    assert found.attestation[0].outcome is (Outcome.PASS if passed else Outcome.FAIL)
    assert found.submodules[0].status == ("none" if passed else "contraindicated")


def test_praise_does_not_outweigh_a_failed_check(facts: Facts, pool: RegoPool) -> None:
    praise = rego(HEAD + 'trust_claims := {"hardware": 2, "executables": 2}\n')
    other = verification(facts, launch_digest="cd" * 48)
    found = made(facts, pool, verification=other, attestation={TeeClass.CPU: praise})
    assert found.submodules[0].status == "contraindicated"
    assert found.submodules[0].vector["hardware"] == 97


# What stands in the token.


def test_the_token_tells_of_the_policy(allowed: Site, visitor: Visitor) -> None:
    answer, _ = visitor.attested(allowed)
    claims = json.loads(b64u_decode(answer.json()["token"].split(".")[1], what="token"))
    cpu = claims["submods"]["cpu0"]
    assert cpu["ear.status"] == "affirming"
    assert cpu["ear.appraisal-policy-id"] == "default"
    digest = allowed.admin("GET", "verification-policy").json()["sha256"]
    assert cpu["cai.policy-sha256"] == digest
    assert set(cpu["ear.trustworthiness-vector"]) == set(CLAIMS)
    assert claims["aud"] == allowed.broker.instance.id
    assert claims["iss"] == "CAI-SIMULATED"
    assert cpu["simulated"] is True
    assert "quote_sha256" in cpu["ear.veraison.annotated-evidence"]["evidence"]
