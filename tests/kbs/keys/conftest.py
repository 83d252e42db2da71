"""Fixtures: a token of softhsm2, simulators of key services, secret files."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kbs.keys.pkcs11_provider import Mechanism, TokenKey, make_token_key
from kbs.keys.secret_input import SecretInput
from tests.kbs.keys.aliyun_simulator import OpenApiSimulator
from tests.kbs.keys.vault_simulator import VaultSimulator

MODULES = (
    "/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so",
)


def secret_file(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text + "\n")
    path.chmod(0o400)
    return path


def secret_input(directory: Path, name: str, text: str, what: str = "secret") -> SecretInput:
    return SecretInput(what, secret_file(directory, name, text))


@dataclass(frozen=True)
class Token:
    """One softhsm2 token; the library of this process sees all of them."""

    module: Path
    label: str
    pin: Path
    tokens: Path

    def key(self, label: str, mechanism: Mechanism = Mechanism.AES_GCM) -> TokenKey:
        pin = SecretInput("PIN", self.pin)
        return TokenKey(self.module, self.label, label, pin, mechanism)

    def made(self, mechanism: Mechanism = Mechanism.AES_GCM) -> TokenKey:
        where = self.key(f"kek-{uuid.uuid4().hex[:8]}", mechanism)
        make_token_key(where)
        return where


@pytest.fixture(scope="session")
def softhsm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module; its tokens lie in a directory of this test run."""
    module = next((Path(name) for name in MODULES if Path(name).exists()), None)
    if module is None or shutil.which("softhsm2-util") is None:
        pytest.skip("softhsm2 is not installed")
    directory = tmp_path_factory.mktemp("softhsm")
    (directory / "tokens").mkdir()
    configuration = directory / "softhsm2.conf"
    configuration.write_text(
        f"directories.tokendir = {directory / 'tokens'}\nobjectstore.backend = file\n"
        "log.level = ERROR\n"
    )
    # The library reads it when it is first loaded into this process.
    os.environ["SOFTHSM2_CONF"] = str(configuration)
    return module


@pytest.fixture
def token(softhsm: Path, tmp_path: Path) -> Token:
    label = f"kbs-{uuid.uuid4().hex[:8]}"
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", "1234",
         "--so-pin", "5678"],
        check=True, capture_output=True,
    )
    tokens = Path(os.environ["SOFTHSM2_CONF"]).parent / "tokens"
    return Token(softhsm, label, secret_file(tmp_path, "pin", "1234"), tokens)


@pytest.fixture
def vault() -> Iterator[VaultSimulator]:
    with VaultSimulator() as simulator:
        yield simulator


@pytest.fixture
def aliyun() -> Iterator[OpenApiSimulator]:
    with OpenApiSimulator() as simulator:
        yield simulator
