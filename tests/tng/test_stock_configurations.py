"""Real TNG configurations, and edge cases measured on its binaries: our verdict beside theirs.

Ours must be the same, or be listed in docs/tng-configuration.md with the reason why it is better or
what is left out. Every name listed here must be explained there.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cai.errors import CaiError
from tng.config.documents import parse_json
from tng.config.entries import parse

VECTORS = Path(os.environ.get("CAI_VECTORS", "../shared/vectors")) / "tng"
EXTRA = os.environ.get("CAI_EXTRA_VECTORS", "")
DOCS = Path(__file__).parents[2] / "docs" / "tng-configuration.md"

pytestmark = pytest.mark.skipif(
    not VECTORS.is_dir(), reason=f"no vectors at {VECTORS} (set CAI_VECTORS)"
)

# What the binaries say when a configuration was sound and only the test machine lacked something.
ENVIRONMENT = (
    "AA socket file", "Failed to fetch cert", "Connection refused", "ECONNREFUSED", "resolve",
    "READY", "serf crate", "Address already", "cgroup v2", "No PEM", "does not exist",
    "Failed to load private key", "Failed to parse reference value payload",
)  # fmt: skip

# Our refusals of what TNG starts: out of scope, or it would protect nothing.
LEFT_OUT = ("hook", "UDP", "gossip", "ita", "policy file", "attestation_policy",
            "reference_values", "is not of this guest")  # fmt: skip


def ours(text: str) -> tuple[bool, str]:
    """Whether a gateway would start, and why not."""
    try:
        parse(parse_json(text.encode(), "c"), where="c").require_served()
    except CaiError as error:
        return False, error.message
    return True, ""


def theirs(verdict: object) -> bool:
    return any(text in str(verdict) for text in ENVIRONMENT)


def edge_cases() -> list[Any]:
    path = VECTORS / "edge_cases.json"
    return json.loads(path.read_text()) if path.is_file() else []


def index() -> list[Any]:
    path = VECTORS / "index.json"
    return json.loads(path.read_text()) if path.is_file() else []


def explained(name: str) -> bool:
    return f"`{name}`" in DOCS.read_text("utf-8")


@pytest.mark.parametrize("case", edge_cases(), ids=lambda case: case["name"])
def test_edge_case(case: dict[str, Any]) -> None:
    text = case["config"] if isinstance(case["config"], str) else json.dumps(case["config"])
    accepted, reason = ours(text)
    stock = any(theirs(verdict) for verdict in case["binary"].values())
    if accepted == stock:
        return
    assert accepted or any(word in reason for word in LEFT_OUT) or explained(case["name"]), reason
    assert not accepted or explained(case["name"]), "accepted here alone, and not explained"


@pytest.mark.parametrize("entry", index(), ids=lambda entry: Path(entry["file"]).stem)
def test_configuration(entry: dict[str, Any]) -> None:
    accepted, reason = ours((VECTORS / entry["file"]).read_text())
    parses = "accept" in entry["parse"].values()
    start = entry["start_2.12.0"]
    stock = parses and (start is None or theirs(start))
    if accepted == stock:
        return
    name = Path(entry["file"]).stem
    assert accepted or any(word in reason for word in LEFT_OUT) or explained(name), reason
    assert not accepted or explained(name), "accepted here alone, and not explained"


@pytest.mark.skipif(not EXTRA, reason="CAI_EXTRA_VECTORS is not set")
def test_extra_configurations_are_read_or_refused_by_name() -> None:
    files = sorted(Path(EXTRA).rglob("*tng*/**/*.json"))
    assert files, f"CAI_EXTRA_VECTORS names no configuration of a gateway: {EXTRA}"
    for file in files:
        accepted, reason = ours(file.read_text("utf-8", "replace"))
        assert accepted or reason, file
