"""Rego texts: what an upload refuses, and that nothing but a clean true allows."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cai.attest.verdict import Outcome
from cai.errors import CaiError, FormatError, InputError, LimitExceeded
from kbs.names import ResourceName
from kbs.policy.pool import MAX_USES, RegoPool
from kbs.policy.rego import MAX_POLICY, RegoPolicy
from kbs.policy.settings import PolicySettings
from kbs.policy.templates import TEMPLATES, template

HEAD = "package policy\nimport rego.v1\n"
DENY = HEAD + "default allow := false\n"
RESOURCE = ResourceName("models", "minilm", "key")


@pytest.fixture(scope="module")
def pool() -> Iterator[RegoPool]:
    pool = RegoPool(PolicySettings(time_limit_s=1, workers=2))
    yield pool
    pool.close()


def refused(pool: RegoPool, text: str | bytes) -> str:
    data = text if isinstance(text, bytes) else text.encode()
    with pytest.raises(InputError) as caught:
        RegoPolicy.checked_resource(data, pool)
    return caught.value.message


def decided(pool: RegoPool, text: str, claims: Any = None, references: Any = None) -> Any:
    policy = RegoPolicy.stored(text.encode())
    return policy.decide(pool, claims or {}, RESOURCE, references or {})


# What an upload refuses.


@pytest.mark.parametrize(
    "rule",
    [
        "env := opa.runtime().env",
        'env := opa["runtime"]()',
        "f(x) := opa.runtime()",
        "allow if { allow with input as opa.runtime() }",
        'z := $"a{opa.runtime()}"',
        "z := [y | y := opa.runtime().env]",
        'z := http.send({"method": "get", "url": "http://127.0.0.1/"})',
        'z := http["send"]({"method": "get", "url": "http://127.0.0.1/"})',
        'z := net.lookup_ip_addr("localhost")',
        'z := uuid.rfc4122("k")',
        'z := rand.intn("k", 10)',
        'allow if print("secret")',
        'z := rego.parse_module("x", "package x")',
        'allow if { x := opa.runtime; x().env }',
    ],
)
def test_functions_that_reach_out_are_refused(pool: RegoPool, rule: str) -> None:
    assert "policy: " in refused(pool, DENY + rule + "\n")


def test_a_function_is_found_by_the_compiler_and_not_in_the_text(pool: RegoPool) -> None:
    """A text that only speaks of it is fine; the name split over lines is not."""
    text = DENY + '# opa.runtime\nword := "http.send(opa.runtime())"\nraw := `opa.runtime()`\n'
    assert RegoPolicy.checked_resource(text.encode(), pool).text == text
    with pytest.raises(InputError):
        RegoPolicy.checked_resource((DENY + 'z := opa[\n"runtime"]()\n').encode(), pool)


@pytest.mark.parametrize(
    "rule",
    [
        "query_reference_value(id) := 1",
        'query_reference_value("x") := 3',
        "query_reference_value(id) if id",
        "default query_reference_value(_) := 3",
        "query_reference_value.x := 3",
        "query_reference_value(id) := data.x if true",
    ],
)
def test_the_prelude_cannot_be_redefined(pool: RegoPool, rule: str) -> None:
    assert "query_reference_value" in refused(pool, DENY + rule + "\n")


@pytest.mark.parametrize(
    "text",
    [
        "package other\ndefault allow := false\n",
        "package policy.sub\ndefault allow := false\n",
        'package policy["sub"]\ndefault allow := false\n',
        "# package policy\npackage other\ndefault allow := false\n",
        "package policy.query_reference_value\ndefault allow := false\n",
        "package system\ndefault allow := false\n",
        "default allow := false\n",
        DENY + "package other\nx := 1\n",
    ],
)
def test_another_package_is_refused(pool: RegoPool, text: str) -> None:
    refused(pool, text)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"x", b"\xff", b"package policy\n", b"package policy\nallow := {{{\n",
        HEAD.encode() + b"allow if input.x\n", HEAD.encode() + b"default allow := 1\n",
        HEAD.encode() + b'default allow := "true"\n', DENY.encode() + b"\x00",
        HEAD.encode() + b"allow := true\nallow := false\n",
        HEAD.encode() + b"allow if { allow }\n",
        HEAD.encode() + b'default allow := false\nallow if to_number("x") == 1\n',
    ],
)  # fmt: skip
def test_unsound_texts_are_refused(pool: RegoPool, text: bytes) -> None:
    refused(pool, text)


def test_a_long_text_is_refused(pool: RegoPool) -> None:
    with pytest.raises(LimitExceeded):
        RegoPolicy.checked_resource(DENY.encode() + b"#" * MAX_POLICY, pool)


@pytest.mark.parametrize(
    "rule",
    [
        "trust_claims := 1",
        'trust_claims := {"hardwear": 2}',
        'trust_claims := {"hardware": 128}',
        'trust_claims := {"hardware": true}',
        'trust_claims := {"hardware": 2.5}',
        'trust_claims := {"hardware": "2"}',
        "default allow := true",
        "x := 1",
    ],
)
def test_unsound_attestation_policies_are_refused(pool: RegoPool, rule: str) -> None:
    with pytest.raises(FormatError):
        RegoPolicy.checked_attestation((HEAD + rule + "\n").encode(), pool)


def test_an_attestation_policy_without_evidence_may_be_undefined(pool: RegoPool) -> None:
    text = HEAD + 'trust_claims := {"hardware": 2} if input.tdx\n'
    assert RegoPolicy.checked_attestation(text.encode(), pool).text == text


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_are_accepted_and_allow_nothing_by_themselves(pool: RegoPool, name: str) -> None:
    text = template(name).encode()
    if name.startswith("attestation"):
        policy = RegoPolicy.checked_attestation(text, pool)
        answer = policy.evaluate(pool, ("trust_claims",), data={}, claims={}, references={})
        assert set(answer.values["trust_claims"].values()) == {97}
    else:
        RegoPolicy.checked_resource(text, pool)
        assert decided(pool, text.decode()).outcome is Outcome.FAIL


# Nothing but a clean true allows.


@pytest.mark.parametrize(
    ("rule", "observed"),
    [
        ("allow := false", "false"),
        ("allow := 1", "1"),
        ('allow := "true"', '"true"'),
        ("allow := [true]", "[true]"),
        ("allow := null", "null"),
        ("allow if input.missing", "undefined"),
        ("allow := true\nallow := false", "allow: evaluation failed"),
        ("allow if { 1 / 0 }", "allow: evaluation failed"),
        ('allow if not bad\nbad if to_number("x") == 1', "allow: evaluation failed"),
        ("x := 1", "undefined"),
    ],
)
def test_everything_else_denies(pool: RegoPool, rule: str, observed: str) -> None:
    check = decided(pool, HEAD + rule + "\n")
    assert check.outcome is Outcome.FAIL
    assert check.observed == observed


def test_true_allows(pool: RegoPool) -> None:
    path = 'data["resource-path"] == ["models", "minilm", "key"]'
    text = DENY + f'allow if {{ input.a == "ü"; {path} }}\n'
    assert decided(pool, text, {"a": "ü"}).outcome is Outcome.PASS
    assert decided(pool, text, {"a": "u"}).outcome is Outcome.FAIL


LOOP = """
allow if {
	xs := numbers.range(1, 3000)
	some x in xs
	some y in xs
	some z in xs
	x + y + z == -1
}
"""


def test_a_loop_is_ended_and_denies(pool: RegoPool) -> None:
    start = time.monotonic()
    check = decided(pool, HEAD + LOOP)
    assert check.outcome is Outcome.FAIL
    assert check.observed is not None
    assert "took too long" in check.observed or "ended its process" in check.observed
    assert time.monotonic() - start < 10
    # The next one is served by another process.
    assert decided(pool, HEAD + "allow := true\n").outcome is Outcome.PASS


def test_memory_is_bounded_and_running_out_of_it_denies() -> None:
    small = RegoPool(PolicySettings(memory_limit_mib=128, time_limit_s=60))
    try:
        hungry = "allow if count([x | some x in numbers.range(1, 30000000)]) > 1\n"
        check = decided(small, HEAD + hungry)
        assert check.observed == "the evaluation needs too much memory"
        assert check.outcome is Outcome.FAIL
        assert decided(small, HEAD + "allow := true\n").outcome is Outcome.PASS
    finally:
        small.close()


def test_the_environment_is_empty(pool: RegoPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a policy that got past the upload sees nothing."""
    monkeypatch.setenv("PLANTED_SECRET", "planted-7f3a")
    fresh = RegoPool()
    try:
        text = HEAD + "allow := opa.runtime().env\n"
        answer = fresh.evaluate(text, ("allow",), data={}, input={})
        assert set(answer.values["allow"]) <= {"LC_CTYPE"}
    finally:
        fresh.close()


def test_reference_values_are_data(pool: RegoPool) -> None:
    text = DENY + 'allow if input.x in query_reference_value("rtmr_1")\n'
    assert decided(pool, text, {"x": "aa"}, {"rtmr_1": ["aa", "bb"]}).outcome is Outcome.PASS
    assert decided(pool, text, {"x": "cc"}, {"rtmr_1": ["aa", "bb"]}).outcome is Outcome.FAIL
    assert decided(pool, text, {"x": "aa"}, {"rtmr_2": ["aa"]}).outcome is Outcome.FAIL
    absent = DENY + 'allow if query_reference_value("none") == null\n'
    assert decided(pool, absent).outcome is Outcome.PASS


def test_one_evaluation_leaves_nothing_for_the_next(pool: RegoPool) -> None:
    text = DENY + "allow if input.first\nallow if data.reference_values.first\n"
    assert decided(pool, text, {"first": True}).outcome is Outcome.PASS
    assert decided(pool, text).outcome is Outcome.FAIL
    assert decided(pool, text, {}, {"first": True}).outcome is Outcome.PASS
    assert decided(pool, text).outcome is Outcome.FAIL


def test_threads_get_their_own_answers(pool: RegoPool) -> None:
    text = HEAD + "allow := input.n\n"
    wrong: list[int] = []

    def ask(number: int) -> None:
        answer = pool.evaluate(text, ("allow",), data={}, input={"n": number})
        if answer.values.get("allow") != number:
            wrong.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_closed_pool_denies() -> None:
    pool = RegoPool()
    pool.close()
    assert decided(pool, HEAD + "allow := true\n").outcome is Outcome.FAIL
    with pytest.raises(CaiError):
        pool.inspect(HEAD)


def test_a_busy_pool_denies_after_its_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RegoPool(PolicySettings(workers=1, wait_limit_s=1, time_limit_s=3))
    slow = threading.Thread(target=decided, args=(pool, HEAD + LOOP))
    slow.start()
    try:
        time.sleep(0.2)
        check = decided(pool, HEAD + "allow := true\n")
        assert check.observed == "too many evaluations are waiting"
        assert check.outcome is Outcome.FAIL
    finally:
        slow.join()
        pool.close()


def test_a_worker_ends_with_its_pipe() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-I", "-m", "kbs.policy.worker", "1", "512"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={},
    )  # fmt: skip
    assert worker.stdin is not None
    worker.stdin.close()
    assert worker.wait(timeout=30) == 0
    assert worker.stdout is not None
    worker.stdout.close()


def test_processes_are_replaced_after_many_uses() -> None:
    pool = RegoPool(PolicySettings(workers=1))
    try:
        decided(pool, HEAD + "allow := true\n")
        worker = pool._idle[0]
        worker.uses = MAX_USES
        decided(pool, HEAD + "allow := true\n")
        assert pool._idle == []
        assert decided(pool, HEAD + "allow := true\n").outcome is Outcome.PASS
        assert pool._idle[0] is not worker
    finally:
        pool.close()
