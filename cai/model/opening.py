"""Opening whatever method a directory is sealed with: native, gocryptfs, or bare gocryptfs.

The method is taken from what lies there; a caller that insists on a root never gets a directory
that has none.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from cai.errors import Tampered
from cai.model.checking import CheckReport, check
from cai.model.gocryptfs.checking import check_stock
from cai.model.gocryptfs.keys import read_password_file
from cai.model.gocryptfs.layout import CONF_FILE
from cai.model.gocryptfs.stock import StockModel, is_cipher_directory, open_stock
from cai.model.gocryptfs.unsealing import unseal_gocryptfs
from cai.model.keys import read_key_file
from cai.model.layout import GOCRYPTFS, HEADER_FILE
from cai.model.progress import ProgressBar, silent
from cai.model.sealed import SealedModel, open_model, read_header
from cai.model.unsealing import unseal
from cai.secret import Secret

AnyModel = SealedModel | StockModel


class Method(StrEnum):
    """How a directory is sealed."""

    CAI = "cai"
    GOCRYPTFS = "gocryptfs"
    STOCK = "gocryptfs without a manifest"


def method_of(directory: Path) -> Method:
    """How a directory is sealed, as it says itself; nothing of that is authenticated.

    Raises:
        InputMissing, InputError, FormatError, StorageError: it is not sealed in a known way.
    """
    if not (directory / HEADER_FILE).exists() and is_cipher_directory(directory):
        return Method.STOCK
    return Method.GOCRYPTFS if read_header(directory).method == GOCRYPTFS else Method.CAI


def read_key(directory: Path, key_file: Path) -> Secret:
    """The key of a model out of a file: a KEK in hex, or for gocryptfs a password.

    A key file that 'cai encrypt --key-out' wrote is right for both.

    Raises:
        InputMissing, StorageError: a file cannot be read.
        InputError, FormatError, LimitExceeded: it holds no key of this method.
    """
    if method_of(directory) is Method.CAI:
        return read_key_file(key_file)
    return read_password_file(key_file)


def open_any(
    directory: Path, key: Secret, *, expect_root: str | None = None, min_revision: int = 0,
    owner_key: str | None = None,
) -> AnyModel:
    """Open a model of any method.

    Args:
        directory: the sealed model, or a bare cipher directory.
        key: the KEK, or for gocryptfs the password.
        expect_root: the ``model_root`` to insist on, hex.
        min_revision: the oldest revision to accept.
        owner_key: whose signature over the manifest to insist on, hex.

    Raises:
        Tampered: with code ``root-mismatch`` also for a directory that has no root to insist on.
        CaiError: as ``open_model`` and ``open_stock``.
    """
    if method_of(directory) is not Method.STOCK:
        return open_model(
            directory, key, expect_root=expect_root, min_revision=min_revision,
            owner_key=owner_key,
        )
    _refuse_demands(directory, expect_root, min_revision, owner_key)
    return open_stock(directory, key)


def check_any(
    directory: Path, key: Secret, *, expect_root: str | None = None, min_revision: int = 0,
    index_sha256: str | None = None, workers: int = 0, progress: ProgressBar = silent,
    owner_key: str | None = None,
) -> CheckReport:
    """Check a model of any method; of a bare cipher directory, what can be checked.

    Raises:
        Tampered: naming the stored file that is not what was sealed.
        CaiError: as ``check`` and ``open_stock``.
    """
    if method_of(directory) is not Method.STOCK:
        return check(
            directory, key, expect_root=expect_root, min_revision=min_revision,
            index_sha256=index_sha256, workers=workers, progress=progress, owner_key=owner_key,
        )
    _refuse_demands(directory, expect_root or index_sha256, min_revision, owner_key)
    with open_stock(directory, key) as model:
        found = check_stock(model, workers=workers, progress=progress)
    return CheckReport(
        model_id="", revision=0, root="", content_root=found["content_root"],
        content_verified=False, index_sha256="", files=found["files"], objects=found["files"],
        plaintext_bytes=found["plaintext_bytes"],
    )


def unseal_any(
    model: AnyModel, out: Path, *, workers: int = 0, progress: ProgressBar = silent
) -> int:
    """Write the plain tree of an opened model of any method; arguments and errors as ``unseal``."""
    if isinstance(model, StockModel):
        return unseal_gocryptfs(model, out, workers=workers, progress=progress)
    return unseal(model, out, workers=workers, progress=progress)


def _refuse_demands(
    directory: Path, root: str | None, min_revision: int, owner_key: str | None
) -> None:
    if root is not None or min_revision > 0 or owner_key is not None:
        raise Tampered(
            f"{directory} has no manifest, so it cannot be the model that is demanded",
            path=CONF_FILE, code="root-mismatch",
            hint="give the directory that 'cai encrypt' wrote, with its cai.json",
        )
