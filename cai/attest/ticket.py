"""The admission ticket: what a key broker says of a guest that it admitted (docs/spec-lease.md §4).

The broker signs one at every release and renewal, with an Ed25519 key of its own. A gateway hands
it to clients together with its evidence, so that the broker's allow-lists and revocations reach
clients that never speak to the broker (decisions §4). Verification is pure: bytes, the key that the
verifier pinned, what the channel showed, and a time in; a verdict out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cai import merkle
from cai.attest.checkpoint import read_checkpoint
from cai.attest.ticket_form import (
    TIME,
    AuditProof,
    Ticket,
    TicketClaims,
    platform_id,
    policy_hash,
    ticket_digest,
)
from cai.attest.verdict import Check, Verdict, check, not_asked
from cai.errors import FormatError, InputError, Tampered

__all__ = [
    "AuditProof",
    "ChannelView",
    "Ticket",
    "TicketClaims",
    "platform_id",
    "policy_hash",
    "ticket_digest",
    "verify_ticket",
]

MAX_SKEW_S = 60
"""How far a broker's clock may be ahead of the verifier's, seconds."""


@dataclass(frozen=True, slots=True)
class ChannelView:
    """What a verifier saw of the guest that the ticket must be about; empty is not asked.

    Attributes:
        channel_key: SHA-256 of the SubjectPublicKeyInfo that the channel proved, hex.
        launch_digest: of the statement, hex.
        platform: ``platform_id`` of the quote, hex.
        models: ``model_root`` of each served model, hex; ``None`` is not asked.
        ticket_digest: SHA-256 of the ticket as the statement has it, hex.
        nonce: the nonce that the guest itself sent, hex.
    """

    channel_key: str = ""
    launch_digest: str = ""
    platform: str = ""
    models: tuple[str, ...] | None = None
    ticket_digest: str = ""
    nonce: str = ""


def verify_ticket(
    data: bytes,
    *,
    keys: Sequence[bytes],
    view: ChannelView,
    simulated: bool,
    now: datetime | None,
    log_keys: Sequence[bytes] = (),
    subject: str = "admission ticket",
) -> tuple[Verdict, Ticket | None]:
    """Verify a ticket (spec-lease §5).

    Args:
        data: the ticket's bytes.
        keys: the broker's ticket keys that the verifier pinned, 32 bytes each; usually one, two
            while a key is rotated.
        view: what the channel showed.
        simulated: whether the verifier's own trust anchors are a simulator's.
        now: the verifier's clock, timezone-aware; ``None`` only for the guest itself, which knows
            by its own nonce that the ticket is fresh, and whose clock its host sets.
        log_keys: keys of the broker's audit log, 32 bytes each; without one the ticket's own
            signature alone vouches for the checkpoint.
        subject: what the verdict is about.

    Returns:
        The verdict, and the ticket if and only if it passed.
    """
    # (1) The bytes are a ticket, in its one canonical form.
    try:
        ticket = Ticket.parse(data)
    except InputError as error:
        form = check("ticket.form", passed=False, reason=error.message)
        return Verdict(subject, (form,), simulated=simulated), None
    claims = ticket.claims
    checks = [check("ticket.form", passed=True)]
    # (2) It is signed by a key that the verifier pinned; the ticket itself names none.
    checks.append(
        check(
            "ticket.signature",
            passed=any(ticket.signed_by(_public(key)) for key in keys),
            reason="the signature is not by a pinned key",
        )
    )
    # (3) Now lies within its life.
    checks += _moment(claims, now)
    # (4) It is of the realm that the verifier's trust anchors are of.
    realm = "simulated" if simulated else "production"
    checks.append(_equal("ticket.realm", claims.realm, realm, "it is of another realm"))
    # (5) It is about this channel: key, launch, platform, models, and the quote names it.
    checks += _binding(claims, data, view)
    # (6) The decision is in the log that the checkpoint speaks of.
    checks.append(_inclusion(ticket.audit))
    # (7) That checkpoint is signed by the log, where the verifier pinned its key as well.
    checks.append(_log(claims, ticket.audit, log_keys))
    verdict = Verdict(subject, tuple(checks), simulated=simulated or claims.realm == "simulated")
    return verdict, ticket if verdict.passed else None


def _public(key: bytes) -> Ed25519PublicKey:
    try:
        return Ed25519PublicKey.from_public_bytes(key)
    except ValueError as error:
        raise FormatError("a ticket key has 32 bytes (Ed25519)") from error


def _moment(claims: TicketClaims, now: datetime | None) -> list[Check]:
    if now is None:
        return [not_asked("ticket.issued"), not_asked("ticket.expired")]
    return [
        check(
            "ticket.issued",
            passed=claims.issued <= now + timedelta(seconds=MAX_SKEW_S),
            observed=claims.issued.strftime(TIME),
            expected=f"not after {now.strftime(TIME)}",
            reason=f"it was issued more than {MAX_SKEW_S} s in the future",
        ),
        check(
            "ticket.expired",
            passed=now < claims.expires,
            observed=claims.expires.strftime(TIME),
            expected=f"after {now.strftime(TIME)}",
            reason="the ticket has expired",
        ),
    ]


def _binding(claims: TicketClaims, data: bytes, view: ChannelView) -> list[Check]:
    other = "the ticket is about another guest"
    keys = () if not view.channel_key else (view.channel_key,)
    return [
        _within("ticket.channel_key", keys or None, claims.channel_keys,
                "the ticket does not admit this channel key"),
        _equal("ticket.launch", view.launch_digest, claims.launch_digest, other),
        _equal("ticket.platform", view.platform, claims.platform, other),
        _within("ticket.models", view.models, claims.models,
                "a model is served that the ticket does not admit"),
        _equal("ticket.statement", view.ticket_digest, ticket_digest(data), other),
        _equal("ticket.nonce", view.nonce, claims.nonce, "it answers another request"),
    ]  # fmt: skip


def _equal(name: str, seen: str, admitted: str, reason: str) -> Check:
    if not seen:
        return not_asked(name, observed=admitted)
    same = seen == admitted
    return check(name, passed=same, observed=seen, expected=admitted or "none", reason=reason)


def _within(
    name: str, seen: tuple[str, ...] | None, admitted: tuple[str, ...], reason: str
) -> Check:
    if seen is None:
        return not_asked(name, observed=", ".join(admitted))
    return check(
        name, passed=set(seen) <= set(admitted), observed=", ".join(seen) or "none",
        expected=", ".join(admitted) or "none", reason=reason,
    )  # fmt: skip


def _inclusion(audit: AuditProof) -> Check:
    proof = audit.proof
    try:
        checkpoint = read_checkpoint(proof.note)
    except InputError as error:
        return check("ticket.audit", passed=False, reason=error.message)
    found = merkle.root_from_path(audit.leaf, proof.index, checkpoint.size, proof.path)
    return check(
        "ticket.audit",
        passed=proof.size == checkpoint.size and found == checkpoint.root,
        observed=f"leaf {proof.index} of {checkpoint.size} in {checkpoint.origin}",
        reason="the path does not lead from the decision to the checkpoint",
    )


def _log(claims: TicketClaims, audit: AuditProof, keys: Sequence[bytes]) -> Check:
    if not keys:
        return not_asked("ticket.log", reason="no key of the log is pinned")
    try:
        audit.proof.verify(audit.leaf, keys, instance=claims.kbs)
    except (InputError, Tampered) as error:
        return check("ticket.log", passed=False, reason=error.message)
    return check("ticket.log", passed=True)
