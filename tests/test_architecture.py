"""Imports run one way (docs/design of the house, README "The house")."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path for package in ("cai", "kbs", "tng") for path in (ROOT / package).rglob("*.py")
)

GROUND = ("cai.errors", "cai.settings", "cai.terminal", "cai.jcs", "cai.merkle", "cai.secret")

ALLOWED: dict[str, tuple[str, ...]] = {
    "cai.attest": (*GROUND, "cai.attest"),
    "cai.model": (*GROUND, "cai.model"),
    "cai.store": (*GROUND, "cai.model", "cai.store"),
    "cai.mount": (*GROUND, "cai.model", "cai.store", "cai.mount"),
    "cai.loaders": (*GROUND, "cai.model", "cai.store", "cai.loaders"),
    "cai.host": (*GROUND, "cai.attest", "cai.model", "cai.store", "cai.mount", "cai.host"),
    "cai.demo": (
        *GROUND, "cai.attest", "cai.model", "cai.store", "cai.mount", "cai.host", "cai.demo",
    ),
    # `cai verify URL` asks as the gateway's client does; nothing else of a gateway is needed here.
    "cai.cli": ("cai", "tng.operation.appraise"),
    "cai.__main__": ("cai.cli",),
    "kbs": (*GROUND, "cai.attest", "kbs"),
    "tng": (*GROUND, "cai.attest", "tng"),
}
"""What the modules of each room may import, by longest matching room."""


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] in ("cai", "kbs", "tng")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    module = module_name(path)
    rooms = sorted((room for room in ALLOWED if within(module, room)), key=len)
    if module == "cai":
        rooms = ["cai.loaders"]  # the public API, deferred
    allowed = ALLOWED[rooms[-1]] if rooms else (*GROUND, "cai.attest.verdict", "cai.__version__")
    for name in imported(path):
        assert name == "cai.__version__" or any(within(name, room) for room in allowed), (
            f"{module} must not import {name}"
        )


def test_the_simulator_is_imported_by_nobody_at_start() -> None:
    """Production images delete cai/attest/sim, so only deferred imports may name it."""
    for path in SOURCES:
        if within(module_name(path), "cai.attest.sim"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not within(node.module, "cai.attest.sim"), path
            if isinstance(node, ast.Import):
                assert not any(within(alias.name, "cai.attest.sim") for alias in node.names), path
