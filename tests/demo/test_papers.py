"""What the papers tell people to type exists, and their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

LINES = re.MULTILINE | re.DOTALL
ROOT = Path(__file__).resolve().parents[2]
PAPERS = [ROOT / name for name in (
    "README.md", "SECURITY.md", "CHANGELOG.md", "docs/threat-model.md", "docs/getting-started.md"
)]


def blocks(paper: Path) -> list[str]:
    """Shell commands in the ```sh blocks: here-documents left out, continued lines joined."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", paper.read_text(), LINES):
        text = re.sub(r"<<'END'\n.*?^END\n", "\n", block, flags=LINES)
        found += text.replace("\\\n", " ").splitlines()
    return [line.removesuffix("&").strip() for line in found if not line.startswith("#")]


def commands() -> list[str]:
    lines = [line for paper in PAPERS for line in blocks(paper)]
    return [line for line in lines if line.split()[:1] and line.split()[0] in ("cai", "kbs", "tng")]


def application(program: str) -> Any:
    if program == "cai":
        return typer.main.get_command(import_module("cai.cli").build())
    return typer.main.get_command(import_module(f"{program}.cli").app)


def test_there_is_something_to_type() -> None:
    assert len(commands()) > 12


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_command_in_the_papers_exists_with_its_options(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    command = application(program)
    while hasattr(command, "commands"):
        inner = command.commands.get(words.pop(0))
        assert inner is not None, line
        command = inner
    known = {option for item in command.params for option in (*item.opts, *item.secondary_opts)}
    options = [word for word in words if word.startswith("-")]
    assert not [option for option in options if option not in known], line


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench"])
def test_make_targets_of_the_papers_exist(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_make_commands_of_the_readme_are_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lines = blocks(ROOT / "README.md")
    targets = [line.split()[1] for line in lines if line.startswith("make ")]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_links_between_the_papers_lead_somewhere(paper: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", paper.read_text()):
        if not target.startswith("https://"):
            assert (paper.parent / target).exists(), target
