"""The one error tree of cai, kbs and tng.

Every error that a user can meet is one of these. It carries a message (what happened), a hint (the
next step to take), a stable machine code, the exit status of a command that ends with it and the
HTTP status of a service that answers with it. Parsers convert everything they can meet into one of
these; a built-in exception that leaks out of a parser is a bug.

    CaiError                      internal            exit  1  HTTP 500
    ├── UsageError                usage               exit  2  HTTP 400
    │   └── SettingError          setting             exit  2  HTTP 400
    ├── InputError                input               exit  3  HTTP 400
    │   ├── InputMissing          input-missing       exit  3  HTTP 404
    │   ├── FormatError           format              exit  3  HTTP 400
    │   └── LimitExceeded         limit               exit  3  HTTP 413
    ├── StorageError              storage             exit  4  HTTP 500
    │   ├── NoSpace               no-space            exit  4  HTTP 507
    │   └── Unavailable           unavailable         exit  4  HTTP 503
    ├── WrongKey                  wrong-key           exit  5  HTTP 403
    ├── Tampered                  tampered            exit  6  HTTP 422
    ├── Refused                   refused             exit  7  HTTP 403
    │   ├── EvidenceRefused       evidence-refused    exit  7  HTTP 403
    │   ├── PolicyDenied          policy-denied       exit  7  HTTP 403
    │   └── Unauthenticated       unauthenticated     exit  7  HTTP 401
    ├── PeerError                 peer                exit  8  HTTP 502
    │   ├── PeerUnreachable       peer-unreachable    exit  8  HTTP 502
    │   ├── PeerWithoutEvidence   peer-no-evidence    exit  8  HTTP 502
    │   └── ListenerFailed        listener            exit  8  HTTP 500
    ├── TooBusy                   busy                exit  8  HTTP 503
    ├── Undecided                 undecided           exit 20  HTTP 503
    └── Interrupted               interrupted         exit 130 HTTP 503
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from cai.attest.verdict import Verdict


class CaiError(Exception):
    """Root of the tree; raised itself only for a fault of our own.

    Args:
        message: what happened, one line, no secret in it.
        hint: the next step to take, one line.
        code: a more specific machine code than the class's own.
    """

    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.machine_code = code or type(self).code

    def to_json(self) -> dict[str, object]:
        """The error as the ``--json`` output and the service bodies carry it."""
        body: dict[str, object] = {"code": self.machine_code, "message": self.message}
        if self.hint:
            body["hint"] = self.hint
        return body


class UsageError(CaiError):
    """The command line asks for something that cannot be meant."""

    code, exit_status, http_status = "usage", 2, 400


class SettingError(UsageError):
    """A setting is unknown, missing or out of its range."""

    code = "setting"


class InputError(CaiError):
    """An input is missing or of the wrong kind."""

    code, exit_status, http_status = "input", 3, 400


class InputMissing(InputError):
    """An input does not exist."""

    code, http_status = "input-missing", 404


class FormatError(InputError):
    """Bytes from outside do not have the layout they claim."""

    code = "format"


class LimitExceeded(InputError):
    """A length, count or depth from outside is above its named limit."""

    code, http_status = "limit", 413


class StorageError(CaiError):
    """The file system refused: permission, I/O error, read-only."""

    code, exit_status, http_status = "storage", 4, 500


class NoSpace(StorageError):
    """The file system or memory is full."""

    code, http_status = "no-space", 507


class Unavailable(StorageError):
    """A store or a service behind us cannot answer now; the same call may succeed later."""

    code, http_status = "unavailable", 503


class WrongKey(CaiError):
    """The key given does not open this model, resource or store."""

    code, exit_status, http_status = "wrong-key", 5, 403


class Tampered(CaiError):
    """Authentication failed: stored bytes are not the ones that were sealed.

    Args:
        message: what failed.
        path: the stored file, relative to the sealed model, that holds the bytes.
        hint: the next step to take.
        code: a more specific machine code.
    """

    code, exit_status, http_status = "tampered", 6, 422

    def __init__(
        self, message: str, *, path: str | None = None, hint: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.path = path


class Refused(CaiError):
    """A policy, or a hard rule that no policy can lift, says no.

    Args:
        message: what was refused.
        verdict: the whole list of checks behind the refusal, when there is one.
        hint: the next step to take.
        code: a more specific machine code.
    """

    code, exit_status, http_status = "refused", 7, 403

    def __init__(
        self, message: str, *, verdict: Verdict | None = None, hint: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint, code=code)
        self.verdict = verdict

    def to_json(self) -> dict[str, object]:
        """The error with its verdict."""
        body = super().to_json()
        if self.verdict is not None:
            body["verdict"] = self.verdict.to_json()
        return body


class EvidenceRefused(Refused):
    """Evidence is not genuine, not fresh, not bound, or not of the demanded guest."""

    code = "evidence-refused"


class PolicyDenied(Refused):
    """The owner's policy does not allow it, or there is no policy."""

    code = "policy-denied"


class Unauthenticated(Refused):
    """No session, token or signature that this service knows."""

    code, http_status = "unauthenticated", 401


class PeerError(CaiError):
    """A peer over the network is not usable."""

    code, exit_status, http_status = "peer", 8, 502


class PeerUnreachable(PeerError):
    """Nothing answers at the peer's address."""

    code = "peer-unreachable"


class PeerWithoutEvidence(PeerError):
    """The peer answers, but proves nothing about itself."""

    code = "peer-no-evidence"


class ListenerFailed(PeerError):
    """A socket cannot be listened on."""

    code, http_status = "listener", 500


class TooBusy(CaiError):
    """More is asked of a service at once than it takes on; the same call may succeed later."""

    code, exit_status, http_status = "busy", 8, 503


class Undecided(CaiError):
    """A verification can say neither yes nor no, because something it needs is absent."""

    code, exit_status, http_status = "undecided", 20, 503


class Interrupted(CaiError):
    """The user or the system asked to stop."""

    code, exit_status, http_status = "interrupted", 130, 503


def from_exit_status(status: int, message: str, hint: str | None = None) -> CaiError:
    """The error behind the exit status of one of our own programs, for whoever started it."""
    kinds: tuple[type[CaiError], ...] = (
        UsageError, InputError, StorageError, WrongKey, Tampered, Refused, PeerError, Undecided,
        Interrupted,
    )
    for kind in kinds:
        if kind.exit_status == status:
            return kind(message, hint=hint)
    return CaiError(message, hint=hint)


def from_os_error(error: OSError, doing: str) -> CaiError:
    """Turn an ``OSError`` into the tree.

    Args:
        error: what the system said.
        doing: what was being done, e.g. ``"write OUT/objects/ab"``; it starts the message.

    Returns:
        The error to raise ``from error``.
    """
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{doing}: {reason}", hint="free some space or choose another place")
    if error.errno == errno.ENOENT:
        return InputMissing(f"{doing}: {reason}", hint="check the path")
    if error.errno in (errno.ENOTDIR, errno.EISDIR):
        return InputError(f"{doing}: {reason}", hint="check that the path is of the right kind")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{doing}: {reason}", hint="check the owner and mode of the path")
    return StorageError(f"{doing}: {reason}")
