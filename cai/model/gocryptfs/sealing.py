"""Sealing by method gocryptfs: everything or nothing (spec-gocryptfs §8).

What is refused and when the output appears are decided here; the work is ``CipherDirectory``'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cai.errors import UsageError
from cai.model.gocryptfs.carrying import OlderCipher
from cai.model.gocryptfs.config import PASSWORD_LOG2_N, Config, check_password
from cai.model.gocryptfs.directory import CipherDirectory
from cai.model.gocryptfs.keys import CipherKeys
from cai.model.gocryptfs.layout import MASTER_KEY_SIZE
from cai.model.gocryptfs.model import CipherModel
from cai.model.gocryptfs.origins import CipherOrigin, PlainTree, SealedTree
from cai.model.gocryptfs.papers import Papers
from cai.model.manifest import Manifest
from cai.model.members import valid_flags
from cai.model.options import PICKLE_FLAG, SealOptions, SealReport
from cai.model.progress import ProgressBar, silent
from cai.model.sealed import SealedModel
from cai.model.sealing import check_places, following, refuse_pickles
from cai.model.stage import Stage, output_error, refuse_occupied
from cai.secret import Secret

BeforeCommit = Callable[[SealReport], None]


def seal_gocryptfs(
    source: Path, out: Path, password: Secret, *, options: SealOptions | None = None,
    progress: ProgressBar = silent, before_commit: BeforeCommit | None = None,
    against: SealedModel | None = None, sign: Callable[[str], bytes] | None = None,
    review: Callable[[Manifest], None] | None = None, log2_n: int = PASSWORD_LOG2_N,
) -> SealReport:
    """Seal the tree at ``source`` into ``out``, whose ``data`` stock gocryptfs mounts.

    Args:
        source: the plain tree.
        out: where the sealed model shall appear; missing or an empty directory.
        password: of the cipher directory.
        options: what a writer may choose; ``chunk`` and ``pad`` mean nothing here.
        progress: shows the plaintext bytes done.
        before_commit: called when everything is written and before it appears.
        against: the revision before, opened; the new one is under its master key, and what did
            not change since is not encrypted again.
        sign: gives the bytes of ``manifest.sig`` for the model root.
        review: called with the manifest before it is written.
        log2_n: cost of scrypt.

    Raises:
        UsageError: ``out`` is inside ``source``, or occupied; or ``against`` is of another method.
        InputMissing, InputError: the source is missing or cannot be sealed.
        Refused: it holds a Python pickle and ``allow`` does not hold ``pickle``.
        LimitExceeded: more than the format holds.
        Tampered: the index of ``against`` is not what was sealed.
        StorageError, NoSpace: the file system refused.
    """
    chosen = options or SealOptions()
    _check(chosen, password)
    check_places(source, out)
    origin = PlainTree(source)
    if PICKLE_FLAG not in chosen.allow:
        refuse_pickles(source, origin.scan())
    keys, older = CipherKeys.of(os.urandom(MASTER_KEY_SIZE)), None
    if against is not None:
        if not isinstance(against, CipherModel):
            raise UsageError("files of another method than gocryptfs are not carried over")
        if not chosen.model_id:
            chosen = following(against, chosen)
        keys, older = against.keys, OlderCipher(against)
    config = Config.create(password, keys.master.reveal(), log2_n=log2_n)
    return _run(
        origin, out, keys, config, chosen, older, progress, before_commit, sign, review
    )


def reseal_gocryptfs(
    model: CipherModel, out: Path, password: Secret, *, options: SealOptions | None = None,
    progress: ProgressBar = silent, before_commit: BeforeCommit | None = None,
    sign: Callable[[str], bytes] | None = None, log2_n: int = PASSWORD_LOG2_N,
) -> SealReport:
    """Seal an opened model anew, as its next revision: new master key, every byte another.

    Plaintext goes through memory only. What the manifest says of the model stays.

    Args:
        model: the sealed model; all of it is verified on the way.
        out: where the new one shall appear.
        password: of the new cipher directory; the old one's or another.
        options: of these count time and workers.
        progress: shows the plaintext bytes done.
        before_commit: as in ``seal_gocryptfs``.
        sign: as in ``seal_gocryptfs``.
        log2_n: cost of scrypt.

    Raises:
        UsageError: ``out`` is inside the sealed model, or occupied.
        Tampered: something is not what was sealed; nothing has appeared.
        StorageError, NoSpace: the file system refused.
    """
    manifest, directory = model.manifest, model.files.directory
    place = out.parent.resolve() / out.name
    if directory is not None and directory.resolve() in (place, *place.parents):
        raise UsageError(f"the output {out} is inside the sealed model {directory}")
    refuse_occupied(out)
    chosen = replace(
        following(model, options or SealOptions()), name=manifest.name, licence=manifest.licence,
        allow=manifest.allow, provenance=manifest.provenance,
    )
    _check(chosen, password)
    keys = CipherKeys.of(os.urandom(MASTER_KEY_SIZE))
    config = Config.create(password, keys.master.reveal(), log2_n=log2_n)
    return _run(
        SealedTree(model), out, keys, config, chosen, None, progress, before_commit, sign, None
    )


def _run(
    origin: CipherOrigin, out: Path, keys: CipherKeys, config: Config, options: SealOptions,
    older: OlderCipher | None, progress: ProgressBar, before_commit: BeforeCommit | None,
    sign: Callable[[str], bytes] | None, review: Callable[[Manifest], None] | None,
) -> SealReport:
    with Stage(out) as stage:
        try:
            tree = CipherDirectory(origin, stage.path, keys, config, older=older)
            try:
                tree.write(progress, options.workers)
            finally:
                tree.close()
            report = Papers(stage.path, tree, keys, options, sign, review).write()
        except OSError as error:
            raise output_error(error, f"write {out}") from error
        if before_commit is not None:
            before_commit(report)
        stage.commit()
    return report


def _check(options: SealOptions, password: Secret) -> None:
    check_password(password)
    if not valid_flags(list(options.allow)):
        raise UsageError(f"allow flags {list(options.allow)} are not sorted, different flags")
