"""The fuzz targets over a small deterministic set, and under hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, corpus, mutations, survives

ROUNDS = {"verified-quote": 300, "reference-file": 300, "device-chain": 300, "collateral": 300}
"""Mutations of targets that verify signatures; the others get ``USUAL_ROUNDS``."""

USUAL_ROUNDS = 1000

WHOLE = {
    "quote", "verified-quote", "event-log", "log-area", "gpu-report", "device-chain",
    "reference-file", "rim-answer", "ocsp-answer", "collateral", "sgx-extension", "policy",
    "rcar-request", "rcar-challenge", "cbor", "stock-certificate", "stock-evidence", "token",
    "hello", "frames",
    "ohttp-request", "ohttp-key-list", "ohttp-key-request", "ohttp-key-answer",
    "ohttp-metadata", "binary-request", "binary-response",
}
"""Targets whose first seed is accepted, so that mutations start from the inside."""


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_mutated_seeds(name: str) -> None:
    target = TARGETS[name]
    for place, data in enumerate(corpus(name)):
        if name in WHOLE:
            assert survives(target, data)
        for changed in mutations(data, count=ROUNDS.get(name, USUAL_ROUNDS), seed=place):
            survives(target, changed)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_cut_of_a_seed(name: str) -> None:
    target = TARGETS[name]
    data = corpus(name)[0]
    step = max(1, len(data) // 60)
    for size in range(0, len(data), step):
        survives(target, data[:size])


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_any_bytes(name: str) -> None:
    target, start = TARGETS[name], corpus(name)[0]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        head=st.integers(min_value=0, max_value=len(start)),
        junk=st.binary(max_size=200),
        tail=st.integers(min_value=0, max_value=len(start)),
    )
    def splice(head: int, junk: bytes, tail: int) -> None:
        survives(target, junk)
        survives(target, start[:head] + junk + start[tail:])

    splice()


def test_mutations_repeat() -> None:
    first = list(mutations(b"0123456789", count=50, seed=1))
    assert first == list(mutations(b"0123456789", count=50, seed=1))
    assert len(set(first)) > 30


def test_a_target_that_leaks_is_noticed() -> None:
    def leaky(data: bytes) -> object:
        return data.decode("ascii")

    with pytest.raises(UnicodeDecodeError):
        survives(leaky, b"\xff")
