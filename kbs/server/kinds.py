"""The kinds of error that the broker answers with, and which of them an error of ours is.

A kind is the last segment of ``type`` in an ``ErrorInformation``. Those that Trustee has keep its
names, so that stock clients and operators find what they know; each has a section in
docs/kbs-errors.md and a page on the broker itself, which is where ``type`` points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cai.errors import (
    CaiError,
    EvidenceRefused,
    InputError,
    InputMissing,
    LimitExceeded,
    NoSpace,
    PeerError,
    PolicyDenied,
    Refused,
    StorageError,
    Tampered,
    TooBusy,
    Unauthenticated,
    Undecided,
    UsageError,
    WrongKey,
)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of error.

    Attributes:
        name: last segment of ``type``.
        meaning: what happened, one sentence.
        remedy: what to do about it, one sentence.
        trustee: what Trustee calls it, where that is another name.
    """

    name: str
    meaning: str
    remedy: str
    trustee: str = ""


_KINDS: Final = (
    Kind(
        "PolicyDeny",
        "The evidence is genuine, but a policy, a block or the lack of a policy denies the "
        "request.",
        "The member `detail` names the checks that failed; `kbs audit show` has all of them.",
    ),
    Kind(
        "LeaseRequired",
        "The resource is given only under a lease, and this was a plain GET.",
        "Ask with `POST /kbs/v0/lease`, or store the resource with `lease: optional`.",
        trustee="PolicyDeny",
    ),
    Kind(
        "AttestationError",
        "The attestation was refused: evidence that is not genuine, not fresh or not bound to this "
        "session, or a protocol version that is not served.",
        "The member `detail` names the checks that failed; collect fresh evidence and begin again.",
    ),
    Kind(
        "TokenNotFound",
        "There is no session cookie and no token, or the session is unknown, not attested yet or "
        "expired.",
        "Begin again with `POST /kbs/v0/auth`.",
    ),
    Kind(
        "TokenVerifierError",
        "The attestation token is not a living release token of this broker.",
        "Attest again with this broker; tokens of its attestation service release nothing.",
    ),
    Kind(
        "AdminAuthAccess",
        "The administrator's token is missing, not valid, or does not give the role for this call.",
        "Make a token with a registered key, and check the roles of its owner.",
    ),
    Kind(
        "InvalidRequestPath",
        "The path is not one that is served here.",
        "Resources are `/kbs/v0/resource/<repository>/<type>/<tag>`; mind the path prefix.",
    ),
    Kind(
        "PluginNotFound",
        "There is no such service, or not with this method, on this listener.",
        "Administrative routes are on the admin listener only, unless the broker says otherwise.",
    ),
    Kind(
        "ResourceNotFound",
        "Policies would allow it, but there is no such object.",
        "Check the name; `kbs resource list` shows what there is.",
        trustee="PluginInternalError",
    ),
    Kind(
        "SerdeError",
        "The message does not have the form it must have.",
        "The member `detail` names the first member that is missing or wrong.",
    ),
    Kind(
        "ParsePolicyError",
        "A policy or a setting is not sound and was not stored.",
        "`kbs policy test` shows the same error without sending anything.",
    ),
    Kind(
        "LimitExceeded",
        "The message, or a part of it, is larger than its limit.",
        "The member `detail` names the limit; those of `[limits]` can be set.",
        trustee="HTTPFailed",
    ),
    Kind(
        "TooManyRequests",
        "This address sends more requests than one address may.",
        "Wait for the seconds in `Retry-After`; `[limits] rate` and `burst` set how many.",
        trustee="HTTPFailed",
    ),
    Kind(
        "Busy",
        "The broker does as much at once as it takes on, or what it needs cannot answer now.",
        "Try again after the seconds in `Retry-After`.",
        trustee="HTTPFailed",
    ),
    Kind(
        "AddressNotAllowed",
        "This address is not in the broker's list of networks.",
        "Add its network to `[http] allow`.",
        trustee="HTTPFailed",
    ),
    Kind(
        "Conflict",
        "The object is not in the state that the request expects.",
        "Look at its present state and decide again.",
        trustee="PluginInternalError",
    ),
    Kind(
        "StorageBackendInitialization",
        "The broker cannot use its own store: a row is not the one that was stored, or the "
        "database or disk refused.",
        "Look at the broker's log and run `kbs audit verify`.",
    ),
    Kind(
        "HTTPFailed",
        "The request is not one that this HTTP server understands.",
        "Check the client; the member `detail` says what was wrong.",
    ),
    Kind(
        "PluginInternalError",
        "The broker failed; that is a fault of its own.",
        "The member `request` finds the line in the broker's log.",
    ),
)

KINDS: Final = {kind.name: kind for kind in _KINDS}
"""Every kind by its name."""

_OF_CODE: Final = {
    "protocol-version": "AttestationError",
    "request-path": "InvalidRequestPath",
    "lease-required": "LeaseRequired",
    "no-such-service": "PluginNotFound",
    "address": "AddressNotAllowed",
    "rate": "TooManyRequests",
    "http": "HTTPFailed",
    "conflict": "Conflict",
}
"""Machine codes that say more than the class of the error."""

_OF_CLASS: Final[tuple[tuple[type[CaiError], str], ...]] = (
    (PolicyDenied, "PolicyDeny"),
    (EvidenceRefused, "AttestationError"),
    (Unauthenticated, "TokenNotFound"),
    (Refused, "PolicyDeny"),
    (InputMissing, "ResourceNotFound"),
    (LimitExceeded, "LimitExceeded"),
    (InputError, "SerdeError"),
    (UsageError, "ParsePolicyError"),
    (TooBusy, "Busy"),
    (Undecided, "Busy"),
    (PeerError, "Busy"),
    (NoSpace, "StorageBackendInitialization"),
    (Tampered, "StorageBackendInitialization"),
    (WrongKey, "StorageBackendInitialization"),
    (StorageError, "StorageBackendInitialization"),
)
"""Classes of errors, most special first."""

KEPT_BY_TRUSTEE: Final = frozenset({"InvalidRequestPath", "PluginNotFound"})
"""What Trustee answers with 404; everything else is 401 there."""


def kind_of(error: CaiError, *, admin: bool) -> Kind:
    """The kind of an error.

    Args:
        error: what happened.
        admin: on an administrative route.
    """
    code = error.machine_code
    if admin and isinstance(error, Refused) and not isinstance(error, PolicyDenied):
        return KINDS["AdminAuthAccess"]
    if code in _OF_CODE:
        return KINDS[_OF_CODE[code]]
    if isinstance(error, Unauthenticated) and code.startswith("token"):
        return KINDS["TokenVerifierError"]
    if error.http_status == 409:
        return KINDS["Conflict"]
    if error.http_status == 503:
        return KINDS["Busy"]
    for cls, name in _OF_CLASS:
        if isinstance(error, cls):
            return KINDS[name]
    return KINDS["PluginInternalError"]


def status_of(error: CaiError, kind: Kind) -> int:
    """The HTTP status of an error."""
    # A row or key that does not authenticate is this service's trouble, not the caller's.
    if isinstance(error, (Tampered, WrongKey)):
        return 500
    if kind.name == "AddressNotAllowed":
        return 403
    if kind.name == "TooManyRequests":
        return 429
    return error.http_status


def page(kind: Kind) -> str:
    """The page of a kind, plain text."""
    lines = [kind.name, "", kind.meaning, kind.remedy]
    if kind.trustee:
        lines.append(f"Under `compat: trustee` it is called {kind.trustee}.")
    return "\n".join(lines) + "\n"
