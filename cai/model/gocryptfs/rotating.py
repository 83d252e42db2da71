"""Another password for a model of method gocryptfs, without touching data (spec-gocryptfs §8.3).

The master key stays, and with it the KEK that is derived from it. It is wrapped anew in
``gocryptfs.conf``; the index lists that file, and ``cai.json`` names the index, so those two are
written anew first. The password is the last step: until then the old one opens the model, from
then on the new one, and a run that was killed in between is finished by the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cai.errors import CaiError, InputError, Tampered, UsageError
from cai.model.files import StoredFiles
from cai.model.gocryptfs.config import PASSWORD_LOG2_N, Config, check_password
from cai.model.gocryptfs.layout import CONF_FILE, MAX_CONF_FILE
from cai.model.gocryptfs.model import CipherModel
from cai.model.header import Header, unlock
from cai.model.index import StoredFile, encode_index, index_digest, listed, parse_index
from cai.model.layout import DATA_DIR, HEADER_FILE, INDEX_FILE, MAX_INDEX_FILE
from cai.model.rekeying import RotateReport, clear, only_one, replace_files, report
from cai.model.sealed import open_model
from cai.secret import Secret

_CONF = f"{DATA_DIR}/{CONF_FILE}"


def rotate_password(
    directory: Path, password: Secret, new_password: Secret, *,
    before_commit: Callable[[RotateReport], None] | None = None, log2_n: int = PASSWORD_LOG2_N,
) -> RotateReport:
    """Put a model of method gocryptfs under another password.

    Whoever holds the old password and the old ``gocryptfs.conf`` keeps what it had.

    Args:
        directory: the sealed model.
        password: the one that opens it now.
        new_password: the one that shall.
        before_commit: called before the first step, so that the new password is safe; what it
            raises leaves everything as it was.
        log2_n: cost of scrypt.

    Raises:
        WrongKey: ``password`` does not open the model.
        Tampered, FormatError: the model is not what was sealed.
        UsageError: the two passwords are the same, or the method has no password.
        StorageError, NoSpace: a file cannot be written, or another rotation runs.
    """
    check_password(new_password)
    if password == new_password:
        raise UsageError("the new password is the old password")
    place = directory.resolve()
    with only_one(place):
        clear(place)
        already = opens_with(place, new_password)
        with open_model(place, new_password if already else password) as model:
            if not isinstance(model, CipherModel):
                raise UsageError("a model of this method has no password")
            old_conf = model.files.read(_CONF, limit=MAX_CONF_FILE)
            conf = old_conf
            if not already:
                master_key = model.keys.master.reveal()
                conf = Config.create(new_password, master_key, log2_n=log2_n).encode()
            index = encode_index(_index(model, old_conf) | {_CONF: listed(conf)})
            header = _header(model, index)
            told = replace(
                report(model, model.keys.kek, already=already), index_sha256=header.index_sha256
            )
        if before_commit is not None:
            before_commit(told)
        # The index before the header that names it, so that the other can be told from each.
        replace_files(place, {INDEX_FILE: index, HEADER_FILE: header.encode()})
        if not already:
            replace_files(place, {_CONF: conf}, mode=0o400)
    return told


def opens_with(directory: Path, password: Secret) -> bool:
    """Whether a password opens the cipher directory of a model; ``False`` on any doubt."""
    try:
        files = StoredFiles(directory)
        try:
            Config.parse(files.read(_CONF, limit=MAX_CONF_FILE)).unlock(password)
        finally:
            files.close()
    except (CaiError, InputError):
        return False
    return True


def _index(model: CipherModel, conf: bytes) -> dict[str, StoredFile]:
    """The files of the model, authenticated, also where a killed run left the index half-way."""
    data = model.files.read(INDEX_FILE, limit=MAX_INDEX_FILE)
    index = parse_index(data)
    if index_digest(data) != model.header.index_sha256:
        # The one of the header differs from it at most in the file that was to be replaced.
        before = index | {_CONF: listed(conf)}
        if index_digest(encode_index(before)) != model.header.index_sha256:
            raise Tampered(
                f"{INDEX_FILE} was altered: it is not the one that {HEADER_FILE} names",
                path=INDEX_FILE,
            )
    return index


def _header(model: CipherModel, index: bytes) -> Header:
    _, keys = unlock(model.header, model.keys.kek)
    unsigned = replace(
        model.header, index_sha256=index_digest(index), index_size=len(index), mac=""
    )
    return replace(unsigned, mac=keys.mac(unsigned))
