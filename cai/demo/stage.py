"""Where the demo plays: its directory, its parties, its addresses, and what the acts find out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cai.demo.model import DemoModel
from cai.demo.parties import Parties
from cai.demo.ports import Ports
from cai.demo.telling import Teller
from cai.errors import InputError, UsageError, from_os_error

MAX_WORK_PATH = 70
"""Longest working directory, bytes: Unix socket paths end at 107."""


@dataclass(frozen=True, slots=True)
class Engine:
    """Which inference engine serves.

    Attributes:
        kind: ``reference`` or ``vllm``.
        python: interpreter of the environment that has vLLM; ``python`` for our own.
    """

    kind: str = "reference"
    python: str = "python"


@dataclass
class Stage:
    """One run of the demo.

    Attributes:
        work: working directory of every command that is shown.
        model: the plain model.
        engine: what serves it.
        parties: the processes.
        tell: the story's voice.
        ports: where they listen.
        owner_key: the owner's public key, hex; from act 2.
        model_root: root of the sealed model; from act 2.
        launch_digest: from act 3.
        mount_kind: ``fuse`` or ``tmpfs``; from act 4.
    """

    work: Path
    model: DemoModel
    engine: Engine
    parties: Parties
    tell: Teller
    ports: Ports = field(default_factory=Ports)
    owner_key: str = ""
    model_root: str = ""
    launch_digest: str = ""
    mount_kind: str = ""

    @property
    def kbs_url(self) -> str:
        """Base of the key broker."""
        return f"http://127.0.0.1:{self.ports.kbs.number}"

    @property
    def admin_url(self) -> str:
        """Base of the key broker's admin listener."""
        return f"http://127.0.0.1:{self.ports.admin.number}"

    @property
    def service_url(self) -> str:
        """The service as a client names it: the host's gateway port."""
        return f"http://127.0.0.1:{self.ports.service.number}"

    @property
    def proxy_url(self) -> str:
        """The client's gateway."""
        return f"http://127.0.0.1:{self.ports.proxy.number}"

    @property
    def mount_point(self) -> Path:
        """Where the plaintext appears."""
        return self.work / "mnt"

    @property
    def engine_socket(self) -> Path:
        """Where the engine listens."""
        return self.work / "engine" / "engine.sock"

    @property
    def admin(self) -> list[str]:
        """Options of every admin command."""
        return ["--admin-url", self.admin_url, "--admin-key", "kbs-data/admin.key"]


@contextmanager
def working_directory(keep: Path | None) -> Iterator[Path]:
    """The demo's directory, 0700: a fresh one that goes away, or ``keep``, which stays.

    Raises:
        InputError: ``keep`` is a file or is not empty.
        UsageError: its path is too long for the sockets in it.
        StorageError: it cannot be made.
    """
    if keep is None:
        with _temporary() as made:
            yield _short(made)
        return
    try:
        if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
            raise InputError(f"{keep} exists and is not an empty directory", hint="choose another")
        keep.mkdir(mode=0o700, parents=True, exist_ok=True)
        keep.chmod(0o700)
        work = keep.resolve()
    except OSError as error:
        raise from_os_error(error, f"make {keep}") from error
    yield _short(work)


@contextmanager
def _temporary() -> Iterator[Path]:
    try:
        made = Path(tempfile.mkdtemp(prefix="cai-demo-")).resolve()
    except OSError as error:
        raise from_os_error(error, "make a temporary directory") from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _short(work: Path) -> Path:
    if len(str(work).encode()) > MAX_WORK_PATH:
        raise UsageError(
            f"the path of {work} is longer than {MAX_WORK_PATH} bytes",
            hint="choose a shorter --keep, or a shorter TMPDIR",
        )
    return work
