"""Two distributions: the product without its simulator, and the simulator (decisions §1.3)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIMULATOR = ROOT / "packaging" / "simulator"
INSIDE = "cai/attest/sim/"

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("hatchling") is None, reason="hatchling is not installed"
)


def project(folder: Path) -> dict[str, object]:
    value: dict[str, object] = tomllib.loads((folder / "pyproject.toml").read_text())
    return value


def test_configuration() -> None:
    product, simulator = project(ROOT), project(SIMULATOR)
    target = product["tool"]["hatch"]["build"]["targets"]  # type: ignore[index]
    assert "/cai/attest/sim" in target["wheel"]["exclude"]
    assert "/cai/attest/sim" in target["sdist"]["exclude"]
    included = simulator["tool"]["hatch"]["build"]["targets"]["wheel"]  # type: ignore[index]
    assert included["force-include"] == {"../../cai/attest/sim": "cai/attest/sim"}
    version = product["project"]["version"]  # type: ignore[index]
    assert simulator["project"]["version"] == version  # type: ignore[index]
    needed = simulator["project"]["dependencies"]  # type: ignore[index]
    assert needed == [f"cai-confidential=={version}"]
    everything = str(product["project"])
    assert "simulator" not in everything, "no extra of the product brings the simulator"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The product's wheel and the simulator's, built without a network."""
    out = tmp_path_factory.mktemp("wheels")
    for folder in (ROOT, SIMULATOR):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    (product,) = out.glob("cai_confidential-*.whl")
    (simulator,) = out.glob("cai_confidential_simulator-*.whl")
    return product, simulator


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@needs_builder
def test_the_product_has_no_simulator(wheels: tuple[Path, Path]) -> None:
    product, simulator = map(names, wheels)
    assert not [name for name in product if name.startswith(INSIDE)]
    assert {"cai/attest/verify.py", "cai/attest/roots/intel-sgx-root-ca.pem"} <= product
    assert simulator
    assert all(name.startswith(INSIDE) for name in simulator)
    assert not product & simulator
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / INSIDE).rglob("*.py")
    }
    assert simulator == sources


@needs_builder
def test_a_production_installation_cannot_simulate(
    wheels: tuple[Path, Path], tmp_path: Path
) -> None:
    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        # -P keeps this checkout off the path; only what was unpacked stands in for `cai`.
        command = [sys.executable, "-P", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    product, simulator = wheels
    with zipfile.ZipFile(product) as archive:
        archive.extractall(tmp_path / "site")
    where = python("-c", "import cai, cai.attest.verify, cai.attest.policy; print(cai.__file__)")
    assert str(tmp_path) in where.stdout, where.stderr
    assert "No module named cai.attest.sim" in python("-m", "cai.attest.sim").stderr
    host = python("-m", "cai", "attest", "--unsafe-simulated-tee", str(tmp_path))
    assert host.returncode == 2
    assert "not part of this installation" in host.stderr
    with zipfile.ZipFile(simulator) as archive:
        archive.extractall(tmp_path / "site")
    made = python("-m", "cai.attest.sim", "create", str(tmp_path / "sim"))
    assert made.returncode == 0, made.stderr
    assert "SIMULATED" in made.stdout
