"""Real loaders over a sealed model: from each kind of mount and without one, equal outputs.

vLLM and transformers are run by the interpreter that ``CAI_VLLM_PYTHON`` names; without it those
tests are skipped.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from cai.demo.model import WHEEL_MODULE
from cai.loaders import open_tree
from cai.loaders.vllm import stage_small_files
from cai.model import new_key, seal, write_key_file
from cai.mount import device, place, system
from tests.models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("CAI_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(
    not PYTHON, reason="CAI_VLLM_PYTHON names no interpreter that has vLLM"
)
START_S = 240.0


def minilm() -> Path | None:
    from importlib.util import find_spec

    found = find_spec(WHEEL_MODULE)
    places = (found.submodule_search_locations or []) if found else []
    for place_ in places:
        for config in sorted(Path(place_).rglob("config.json")):
            if (config.parent / "model.safetensors").exists():
                return config.parent
    return None


def kinds() -> dict[str, str]:
    """Each kind of mount, and why it cannot be used here."""
    no_fuse = device.why_unusable() or ""
    no_root = "" if system.is_administrator() else "needs CAP_SYS_ADMIN"
    return {
        "fuse": no_fuse, "tmpfs": no_root,
        "passthrough": no_fuse or device.why_no_passthrough() or "",
    }  # fmt: skip


class Sealed:
    """A model, sealed, and its key."""

    def __init__(self, work: Path, name: str, plain: Path) -> None:
        self.plain, self.sealed, self.key = plain, work / f"{name}.sealed", work / f"{name}.key"
        self.work, self.name = work, name
        key = new_key()
        write_key_file(self.key, key)
        seal(plain, self.sealed, key)

    @contextlib.contextmanager
    def mounted(self, kind: str) -> Iterator[Path]:
        """Mounted in the background by the command line."""
        point = self.work / f"{self.name}-{kind}"
        point.mkdir()
        cai = [sys.executable, "-m", "cai"]
        done = subprocess.run(
            [*cai, "mount", self.sealed, point, "--key-file", self.key, "--kind", kind, "--json"],
            cwd=ROOT, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["kind"] == kind
        try:
            yield point
        finally:
            subprocess.run([*cai, "unmount", "--force", point], cwd=ROOT, check=True)
            assert system.mounted_at(place.resolve(point)) is None
            # The next test may mount the same model in the same place.
            point.rmdir()

    @property
    def loader_settings(self) -> dict[str, str]:
        return {"sealed": str(self.sealed), "key_file": str(self.key)}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("loaders")
    yield folder
    for mounted in system.mounts():
        if mounted.mount_point.is_relative_to(folder) and device.ours(mounted):
            system.unmount(mounted.mount_point, system.MNT_DETACH)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def llama(work: Path) -> Sealed:
    return Sealed(work, "llama", tiny_llama.write(work / "llama"))


@pytest.fixture(scope="module")
def bert(work: Path) -> Sealed:
    plain = minilm()
    if plain is None:
        pytest.skip(f"the wheel of {WHEEL_MODULE} is not installed")
    return Sealed(work, "minilm", plain)


@pytest.fixture(scope="module")
def environment(work: Path) -> dict[str, str]:
    """An environment in which that interpreter finds this package as if it were installed."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    about = work / "site" / "cai_confidential-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: cai-confidential\nVersion: 0\n")
    lines = [f"[{group}]\n" + "\n".join(f"{name} = {at}" for name, at in members.items())
             for group, members in points.items()]  # fmt: skip
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return {**os.environ, "PYTHONPATH": f"{about.parent}:{ROOT}", "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip


def test_the_tiny_llama_is_the_same_everywhere(tmp_path: Path) -> None:
    written = tiny_llama.write(tmp_path / "a")
    again = tiny_llama.write(tmp_path / "b")
    for path in written.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    head = tiny_llama.weights()["lm_head.weight"].ravel()[:4]
    expected = [0.08436106890439987, 0.06177270784974098, 0.007249363232403994, 0.04892750456929207]
    assert head.tolist() == expected


@pytest.mark.fuse
@pytest.mark.parametrize("kind", list(kinds()))
def test_safetensors_maps_the_mount(llama: Sealed, kind: str) -> None:
    if kinds()[kind]:
        pytest.skip(kinds()[kind])
    with llama.mounted(kind) as point, safe_open(point / "model.safetensors", "numpy") as file:
        expected = tiny_llama.weights()
        assert set(file.keys()) == set(expected)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), tensor)


@needs_vllm
@pytest.mark.fuse
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_equal_outputs_from_everywhere(
    name: str, environment: dict[str, str], work: Path, request: pytest.FixtureRequest
) -> None:
    model: Sealed = request.getfixturevalue(name)
    options: dict[str, Any] = {"runner": "pooling"} if name == "bert" else {}
    small = work / f"{name}-small"
    small.mkdir(mode=0o700)
    with open_tree(model.sealed, model.key) as tree:
        stage_small_files(tree, small)
    assert not list(small.rglob("*.safetensors"))
    through = {
        **options, "load_format": "cai", "model_loader_extra_config": model.loader_settings
    }  # fmt: skip
    jobs: list[dict[str, Any]] = [
        {"from": "plain", "kind": "vllm", "model": str(model.plain), "options": options},
        {"from": "cai", "kind": "vllm", "model": str(small), "options": through},
        {"from": "plain", "kind": "transformers", "model": str(model.plain)},
        {"from": "cai", "kind": "transformers", **model.loader_settings},
    ]
    with contextlib.ExitStack() as mounts:
        for kind, obstacle in kinds().items():
            if not obstacle:
                point = str(mounts.enter_context(model.mounted(kind)))
                jobs.append({"from": kind, "kind": "vllm", "model": point, "options": options})
                jobs.append({"from": kind, "kind": "transformers", "model": point})
        done = subprocess.run(
            [PYTHON, ROOT / "tests/e2e/vllm_outputs.py"], input=json.dumps(jobs), text=True,
            capture_output=True, env=environment, timeout=800,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    for kind in ("vllm", "transformers"):
        found = {
            job["from"]: output
            for job, output in zip(jobs, json.loads(done.stdout), strict=True)
            if job["kind"] == kind
        }
        assert len(found) >= 2
        assert found["plain"]
        for source, output in found.items():
            assert output == found["plain"], (kind, source)


@needs_vllm
@pytest.mark.timeout(400)
def test_the_server_over_a_sealed_model(
    llama: Sealed, environment: dict[str, str], work: Path
) -> None:
    address, log = work / "engine.sock", work / "engine.log"
    command = [
        PYTHON, "-m", "cai.loaders.vllm", str(llama.sealed), "--key-file", str(llama.key), "--",
        "--uds", str(address), "--max-model-len", "128", "--enforce-eager",
        "--served-model-name", "tiny",
    ]  # fmt: skip
    before = set(Path("/dev/shm").glob("cai-*"))
    with (
        log.open("wb") as out,
        subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=work) as server,
    ):
        try:
            answer = chat(address, server, log)
            assert len(answer["choices"][0]["message"]["content"]) > 0
            assert llama.key.read_text().strip() not in log.read_text(errors="replace")
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
    assert set(Path("/dev/shm").glob("cai-*")) == before


def chat(address: Path, server: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    body = {"model": "tiny", "max_tokens": 8, "temperature": 0,
            "messages": [{"role": "user", "content": "hello"}]}  # fmt: skip
    end = time.monotonic() + START_S
    while True:
        try:
            connection = http.client.HTTPConnection("localhost", timeout=60)
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(str(address))
            connection.request(
                "POST", "/v1/chat/completions", json.dumps(body),
                {"Content-Type": "application/json"},
            )  # fmt: skip
            response = connection.getresponse()
            said = response.read()
            assert response.status == 200, said
            return dict(json.loads(said))
        except OSError:
            assert server.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < end, log.read_text(errors="replace")[-4000:]
            time.sleep(0.5)
