"""The vectors of docs/spec-audit.md: what is written, what verifies, what fails by which name."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from cai.attest.checkpoint import parse_verifier_key
from kbs.audit.proof import verify_file

VECTORS = Path(__file__).parents[2] / "vectors"
HERE = VECTORS / "audit"
LOG = json.loads((HERE / "log.json").read_text(encoding="utf-8"))
KEYS = [bytes.fromhex(LOG["public_key"])]
FAILURES = json.loads((HERE / "failures.json").read_text(encoding="utf-8"))["failures"]
SOUND = sorted(path.name for path in HERE.glob("*.jsonl"))


def lines_of(name: str) -> list[bytes]:
    return (HERE / name).read_bytes().splitlines()


def test_the_files_are_what_the_program_writes() -> None:
    spec = importlib.util.spec_from_file_location("make_audit", VECTORS / "make_audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.vectors()
    assert set(made) == {path.name for path in HERE.iterdir()}
    for name, contents in made.items():
        assert (HERE / name).read_text(encoding="utf-8") == contents, name


@pytest.mark.parametrize("name", SOUND)
def test_sound_files_verify(name: str) -> None:
    verdict = verify_file(lines_of(name), KEYS)
    assert verdict.passed, verdict.failures


@pytest.mark.parametrize(("name", "held"), [
    ("export.jsonl", "checkpoint-3.txt"), ("export.jsonl", "checkpoint-7.txt"),
    ("export-from-3.jsonl", "checkpoint-3.txt"), ("export-from-3.jsonl", "checkpoint-7.txt"),
    ("export-restored.jsonl", "checkpoint-3.txt"), ("consistency.jsonl", "checkpoint-3.txt"),
    ("inclusion.jsonl", "checkpoint-7.txt"),
])  # fmt: skip
def test_sound_files_extend_what_was_kept(name: str, held: str) -> None:
    verdict = verify_file(lines_of(name), KEYS, held=(HERE / held).read_bytes())
    assert verdict.passed, verdict.failures
    assert "checkpoint.held" in {item.name for item in verdict.checks}


@pytest.mark.parametrize("case", FAILURES, ids=lambda case: case["name"])
def test_each_failure_is_named(case: dict[str, Any]) -> None:
    lines = [line.encode() for line in case["lines"]]
    held = None if case["held"] is None else case["held"].encode()
    verdict = verify_file(lines, KEYS, held=held)
    assert sorted({item.name for item in verdict.failures}) == case["fails"]
    assert all(item.reason for item in verdict.failures)


@pytest.mark.parametrize("name", SOUND)
def test_no_bit_of_a_file_is_free(name: str) -> None:
    """Any other byte, anywhere, fails; a signature's other form would be another file."""
    whole = (HERE / name).read_bytes()
    for place in range(0, len(whole), 7):
        bent = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        assert not verify_file(bent.split(b"\n")[:-1], KEYS).passed, place


def test_nothing_verifies_without_a_key_or_under_another() -> None:
    for name in SOUND:
        assert not verify_file(lines_of(name), []).passed
        assert not verify_file(lines_of(name), [bytes(32)]).passed


def test_the_verifier_key_is_the_public_key() -> None:
    assert parse_verifier_key(LOG["verifier_key"]) == KEYS[0]


def test_rubbish_is_refused() -> None:
    for rubbish in (b"", b"\xff", b"[]", b"{}", b"null", b'{"cai-audit-export":1}', b"{" * 100):
        verdict = verify_file([rubbish], KEYS)
        assert [item.name for item in verdict.failures] == ["file.form"]
