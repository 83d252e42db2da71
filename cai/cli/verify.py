"""``cai verify``: every check of a guest's evidence, from a file or from a running peer."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai.cli.verdict_told import tell
from cai.errors import InputError, UsageError
from cai.terminal import JsonFlag, current

if TYPE_CHECKING:
    from cai.attest.anchors import TrustAnchors
    from cai.attest.verdict import Verdict




def verify(
    peer: Annotated[
        str | None,
        typer.Argument(help="A running egress instead of a file.", metavar="[http://HOST:PORT]"),
    ] = None,
    evidence: Annotated[
        Path | None,
        typer.Option("--evidence", help="Evidence file of 'cai attest', or a bare quote."),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="The owner's policy.toml.")
    ] = None,
    as_addr: Annotated[
        str, typer.Option("--as-addr", help="Attestation service that judges a peer, no policy.")
    ] = "",
    as_policy: Annotated[
        list[str] | None, typer.Option("--as-policy", help="A policy id of that service.")
    ] = None,
    as_certificate: Annotated[
        list[Path] | None,
        typer.Option("--as-certificate", help="PEM that its tokens must lead to."),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option("--expect", help="NAME=VALUE of a peer: launch, service, owner, model_root…"),
    ] = None,
    at: Annotated[
        str, typer.Option("--at", help="Time of the verification, RFC 3339; now without it.")
    ] = "",
    collateral: Annotated[
        Path | None,
        typer.Option("--collateral", help="Bundle or directory of 'cai collateral fetch'."),
    ] = None,
    rims: Annotated[
        Path | None, typer.Option("--rims", help="Directory of NVIDIA's reference measurements.")
    ] = None,
    ocsp: Annotated[
        Path | None, typer.Option("--ocsp", help="Directory of NVIDIA's revocation answers.")
    ] = None,
    report_data: Annotated[
        str, typer.Option("--report-data", help="What the quote must carry, 128 hex digits.")
    ] = "",
    unsafe_simulated_root: Annotated[
        Path | None,
        typer.Option(
            "--unsafe-simulated-root", help="Anchors of a simulated platform; never for real hosts."
        ),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Verify evidence: exit status 0 pass, 10 fail, 20 cannot decide, 2 wrong usage.

    With http://HOST:PORT the evidence is that of a running egress: it is dialled and has to prove
    itself as to an ingress, and no request is sent.
    """
    if peer is not None:
        from cai.cli.verify_peer import PeerOptions, verify_peer

        if evidence is not None or at or report_data:
            raise UsageError("--evidence, --at and --report-data are about a file, not a peer")
        verify_peer(
            peer,
            PeerOptions(
                policy, collateral, rims, ocsp, unsafe_simulated_root, as_addr,
                tuple(as_policy or ()), tuple(as_certificate or ()), tuple(expect or ()),
            ),
        )  # fmt: skip
        return
    if evidence is None or policy is None:
        raise UsageError("give --evidence FILE and --policy FILE, or http://HOST:PORT of a peer")
    if as_addr or as_policy or as_certificate or expect:
        raise UsageError("--as-…, and --expect, are about a peer, not a file")
    try:
        verdict, moment, digest = _verify(
            evidence, policy, at, collateral, rims, ocsp, report_data, unsafe_simulated_root
        )
    except InputError as error:
        # A file that is absent or malformed here is the caller's; evidence never gets this far.
        raise UsageError(error.message, hint=error.hint) from error
    tell(current(), verdict, moment, digest)


def _verify(
    evidence: Path, policy: Path, at: str, collateral: Path | None, rims: Path | None,
    ocsp: Path | None, report_data: str, simulated: Path | None,
) -> tuple[Verdict, datetime, str]:
    from cai.attest.evidence_file import MAX_EVIDENCE_FILE, decode_evidence, verify_file
    from cai.attest.gpu.ocsp_store import load_ocsp
    from cai.attest.gpu.rim_store import load_rims
    from cai.attest.policy import VerificationPolicy
    from cai.attest.tdx.collateral import CollateralStore, load_collateral
    from cai.attest.verdict import Verdict, check
    from cai.errors import CaiError, from_os_error
    from cai.settings import read_settings_file

    wanted = VerificationPolicy.parse(
        read_settings_file(policy, what="policy"), where=str(policy)
    )
    anchors = _anchors(simulated)
    moment = time_of(at)
    expected = report_data_of(report_data)
    store = load_collateral(collateral) if collateral else CollateralStore.empty()
    # What is missing in either is not asked, so that the policy's check can say "cannot decide".
    references = load_rims(rims, if_available=True) if rims else None
    answers = load_ocsp(ocsp, if_available=True) if ocsp else None
    try:
        with evidence.open("rb") as file:
            data = file.read(MAX_EVIDENCE_FILE + 1)
    except OSError as error:
        raise from_os_error(error, f"read evidence {evidence}") from error
    subject = f"evidence {evidence.name}"
    try:
        found = decode_evidence(data, where=evidence.name)
    except CaiError as error:
        failed = check("evidence.form", passed=False, reason=error.message)
        return Verdict(subject, (failed,), anchors.simulated), moment, wanted.digest
    verdict, _ = verify_file(
        found, subject=subject, expected_report_data=expected, policy=wanted, anchors=anchors,
        collateral=store, now=moment, rims=references, ocsp=answers,
    )  # fmt: skip
    if simulated is not None:
        verdict = verdict.extended((), unsafe=("unsafe_simulated_root", *verdict.unsafe))
    return verdict, moment, wanted.digest



def _anchors(simulated: Path | None) -> TrustAnchors:
    from cai.attest.anchors import simulated_anchors, vendor_anchors

    return simulated_anchors(simulated) if simulated else vendor_anchors()


def time_of(text: str) -> datetime:
    """The time of ``--at``, or now.

    Raises:
        UsageError: not RFC 3339 with a zone.
    """
    from cai.attest.policy_values import parse_moment

    if not text:
        return datetime.now(UTC)
    found = parse_moment(text)
    if found is None:
        raise UsageError(f"{text!r} is not a time", hint="write it as 2027-01-31T00:00:00Z")
    return found


def report_data_of(text: str) -> bytes | None:
    """The bytes of ``--report-data``, or ``None``.

    Raises:
        UsageError: not 128 hex digits.
    """
    if not text:
        return None
    if len(text) != 128 or not set(text.lower()) <= set("0123456789abcdef"):
        raise UsageError("--report-data takes 128 hex digits")
    return bytes.fromhex(text)
