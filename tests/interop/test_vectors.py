"""Conformance: every entry of the evidence vectors gets its expected answer, at its own time.

``CAI_VECTORS`` names the shared vectors, ``CAI_EXTRA_VECTORS`` further folders of the same shape
(separated as in PATH): each holds the manifests itself or in a folder ``evidence``.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.interop.conformance import MANIFESTS, Folder, Question, questions

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / os.environ.get("CAI_VECTORS", "../shared/vectors")


def folders() -> list[Folder]:
    """The shared folder first; names of its entries are known to the extra ones."""
    found: list[Folder] = []
    extra = os.environ.get("CAI_EXTRA_VECTORS", "")
    for path in (VECTORS, *(Path(item) for item in extra.split(os.pathsep) if item)):
        inner = path / "evidence"
        folder = Folder(inner if inner.is_dir() else path, found[0] if found else None)
        if folder.manifests:
            found.append(folder)
        elif path != VECTORS:
            raise FileNotFoundError(f"CAI_EXTRA_VECTORS: no manifest in {path}")
    return found


FOLDERS = folders()
QUESTIONS = [
    pytest.param(question, id=f"{place}:{question.name}")
    for place, folder in enumerate(FOLDERS)
    for question in questions(folder)
]

needs_vectors = pytest.mark.skipif(
    not FOLDERS, reason=f"no evidence vectors in {VECTORS} (set CAI_VECTORS)"
)


@needs_vectors
@pytest.mark.parametrize("question", QUESTIONS)
def test_expected_answer(question: Question) -> None:
    answer = question.ask()
    wanted = dict(question.expected)
    if wanted.get("verdict") == "open":
        assert answer["verdict"] in ("pass", "fail")
        return
    if wanted.get("verdict") == "fail":
        # What is refused before its chain verifies has no status to report.
        for name in ("status", "advisory_ids"):
            if name not in answer:
                wanted.pop(name, None)
    if "advisory_ids" in wanted:
        wanted["advisory_ids"] = sorted(wanted["advisory_ids"])
    assert {name: answer.get(name) for name in wanted} == wanted


@needs_vectors
def test_every_entry_with_an_expectation_is_asked() -> None:
    """No entry is left out: each one with ``expect`` has at least one question."""
    for folder in FOLDERS:
        asked = Counter(
            next(manifest for manifest in sorted(MANIFESTS, key=len, reverse=True)
                 if question.name.startswith(manifest))
            for question in questions(folder)
        )  # fmt: skip
        for manifest, sections in folder.manifests.items():
            items = [
                item for section in sections.values()
                for item in (section.values() if isinstance(section, dict) else section)
            ]
            expecting = sum(isinstance(item, dict) and bool(item.get("expect")) for item in items)
            assert asked[manifest] >= expecting > 0


@needs_vectors
def test_nobody_knows_an_entry_by_its_name() -> None:
    """The runner and the product hold no name of an entry."""
    names = {
        str(item["name"])
        for folder in FOLDERS
        for sections in folder.manifests.values()
        for section in sections.values()
        for item in (section.values() if isinstance(section, dict) else section)
        if isinstance(item, dict) and len(str(item.get("name", ""))) > 8
    }
    sources = [*(ROOT / "cai" / "attest").rglob("*.py"), Path(__file__).with_name("conformance.py")]
    for path in sources:
        text = path.read_text()
        assert not [name for name in names if name in text], path
