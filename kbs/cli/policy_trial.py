"""``kbs policy test``: what a policy would decide about a file of evidence, offline."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cai.errors import PolicyDenied, UsageError, from_os_error
from cai.settings import read_settings_file
from cai.terminal import JsonFlag, Terminal, current, verdict_table

if TYPE_CHECKING:
    from cai.attest.verdict import Check
    from kbs.policy.pool import RegoPool
    from kbs.policy.references import References
    from kbs.policy.store import Policies
    from kbs.release.dry_run import DryRun

RESOURCE = "kbs:///default/test/key"
"""The resource that is asked for where none is named."""


def policy_test(
    file: Annotated[
        Path, typer.Argument(help="The policy to try: policy.toml or Rego.", metavar="FILE")
    ],
    evidence: Annotated[Path, typer.Option(help="Evidence file of `cai attest`, or a quote.")],
    *,
    resource: Annotated[str, typer.Option(help="What is asked for.", metavar="URI")] = RESOURCE,
    verification: Annotated[Path | None, typer.Option(help="policy.toml beside FILE.")] = None,
    release: Annotated[Path | None, typer.Option(help="Resource policy beside FILE.")] = None,
    attestation: Annotated[
        list[Path] | None,
        typer.Option(help="Attestation policy beside FILE, named …cpu.rego, …gpu.rego; repeat."),
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="Reference values: a bundle, or {id: value} as JSON.")
    ] = None,
    at: Annotated[str, typer.Option(help="Time of the appraisal, RFC 3339.")] = "",
    collateral: Annotated[
        Path | None, typer.Option(help="Bundle or directory of Intel's collateral.")
    ] = None,
    rims: Annotated[
        Path | None, typer.Option(help="Directory of NVIDIA's reference measurements.")
    ] = None,
    ocsp: Annotated[
        Path | None, typer.Option(help="Directory of NVIDIA's revocation answers.")
    ] = None,
    unsafe_simulated_root: Annotated[
        Path | None, typer.Option(help="Anchors of a simulated platform.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Try a policy on evidence: exit status 0 when it would release, 7 when it would not.

    FILE is one of the three kinds of text; the others are named by options. A layer whose text is
    not given denies, as it does at the broker.
    """
    from cai.attest.evidence_file import MAX_EVIDENCE_FILE, decode_evidence
    from cai.attest.gpu.ocsp_store import load_ocsp
    from cai.attest.gpu.rim_store import load_rims
    from cai.attest.tdx.collateral import CollateralStore, load_collateral
    from kbs.names import ResourceName
    from kbs.policy.pool import RegoPool
    from kbs.release.dry_run import dry_run

    name = ResourceName.parse(resource)
    texts = _Texts(file, verification, release, attestation or [])
    try:
        with evidence.open("rb") as stream:
            data = stream.read(MAX_EVIDENCE_FILE + 1)
    except OSError as error:
        raise from_os_error(error, f"read evidence {evidence}") from error
    pool = RegoPool()
    try:
        found = dry_run(
            decode_evidence(data, where=evidence.name),
            subject=f"dry run of {file.name}",
            resource=name,
            policies=texts.policies(pool),
            references=_references(references),
            pool=pool,
            anchors=_anchors(unsafe_simulated_root),
            collateral=load_collateral(collateral) if collateral else CollateralStore.empty(),
            now=_time_of(at),
            rims=load_rims(rims, if_available=True) if rims else None,
            ocsp=load_ocsp(ocsp, if_available=True) if ocsp else None,
        )
    finally:
        pool.close()
    _tell(current(), found)


def _time_of(text: str) -> datetime:
    from cai.attest.policy_values import parse_moment

    found = parse_moment(text) if text else datetime.now(UTC)
    if found is None:
        raise UsageError(f"{text!r} is not a time", hint="write it as 2027-01-31T00:00:00Z")
    return found


class _Texts:
    """The policies of one trial."""

    def __init__(
        self, file: Path, verification: Path | None, release: Path | None, attestation: list[Path]
    ) -> None:
        self._verification = verification
        self._release = release
        self._attestation = list(attestation)
        self._file = file

    def policies(self, pool: RegoPool) -> Policies:
        """Every text checked as at upload, and put where it belongs."""
        from cai.attest.policy import VerificationPolicy
        from kbs.policy.rego import RegoPolicy
        from kbs.policy.store import Policies

        self._place(pool)
        verification = release = None
        if self._verification is not None:
            text = read_settings_file(self._verification, what="policy")
            verification = VerificationPolicy.parse(text, where=str(self._verification))
        if self._release is not None:
            text = read_settings_file(self._release, what="policy")
            release = RegoPolicy.checked_resource(text, pool)
        attestation = {
            _class_of(path): RegoPolicy.checked_attestation(
                read_settings_file(path, what="policy"), pool
            )
            for path in self._attestation
        }
        return Policies(verification=verification, release=release, attestation=attestation)

    def _place(self, pool: RegoPool) -> None:
        """Find out which kind of text the file is."""
        from kbs.policy.rego import TRUST_CLAIMS, RegoPolicy

        if self._file.suffix == ".toml":
            if self._verification is not None:
                raise UsageError("FILE is a policy.toml already", hint="leave out --verification")
            self._verification = self._file
            return
        text = read_settings_file(self._file, what="policy")
        policy = RegoPolicy.checked(text, pool)
        rules = {rule.split(".")[2] for rule in pool.inspect(policy.text).rules if "." in rule}
        if TRUST_CLAIMS in rules:
            self._attestation.append(self._file)
        elif self._release is not None:
            raise UsageError("FILE is a resource policy already", hint="leave out --release")
        else:
            self._release = self._file


def _class_of(path: Path) -> Any:
    from kbs.policy.names import TeeClass

    for tee in TeeClass:
        if path.stem.endswith(tee.value):
            return tee
    raise UsageError(
        f"attestation policy {path.name}: of which class?", hint="name it …cpu.rego or …gpu.rego"
    )


def _references(path: Path | None) -> References:
    from cai import jcs
    from kbs.policy.references import MAX_BUNDLE, Bundle, References, checked_values

    if path is None:
        return References()
    data = read_settings_file(path, what="reference values").removesuffix(b"\n")
    value = jcs.parse(data, what=path.name, limit=MAX_BUNDLE)
    if isinstance(value, dict) and "cai-references" in value:
        return References.of(Bundle.parse(data).values)
    return References.of(checked_values(value))


def _anchors(simulated: Path | None) -> Any:
    from cai.attest.anchors import simulated_anchors, vendor_anchors

    return simulated_anchors(simulated) if simulated else vendor_anchors()


def _tell(terminal: Terminal, found: DryRun) -> None:
    from rich.text import Text

    verdict = found.verdict
    decision = "allow" if verdict.passed else "deny"
    body = {**verdict.to_json(), "decision": decision, "layers": _layers(found)}
    hard = replace(found.hard, subject="Layer 1: hard checks")
    terminal.result(body, verdict_table(hard))
    if not terminal.json_output:
        for name, checks in (("2: which guest", _second(found)), ("3: who gets it", _third(found))):
            if found.appraisal is None:
                terminal.out.print(Text(f"\nLayer {name}: not asked"))
                continue
            layer = replace(verdict, subject=f"Layer {name}", checks=checks)
            terminal.out.print("", verdict_table(layer))
            if name.startswith("2"):
                terminal.out.print(Text("\n".join(_statuses(found))))
        mark = " [SIMULATED]" if verdict.simulated else ""
        terminal.out.print(Text(f"\n{decision.upper()}{mark}"))
    if not verdict.passed:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in verdict.failures)
        raise PolicyDenied(f"it would not be released: {reasons}", verdict=verdict)


def _second(found: DryRun) -> tuple[Check, ...]:
    after = found.verdict.checks[len(found.hard.checks) :]
    return tuple(item for item in after if not _of_release(item.name))


def _third(found: DryRun) -> tuple[Check, ...]:
    after = found.verdict.checks[len(found.hard.checks) :]
    return tuple(item for item in after if _of_release(item.name))


def _of_release(name: str) -> bool:
    return name.startswith("release.") or name == "policy.release"


def _statuses(found: DryRun) -> list[str]:
    if found.appraisal is None:
        return []
    lines = []
    for item in found.appraisal.submodules:
        claims = ", ".join(f"{name} {value}" for name, value in item.vector.items() if value)
        lines.append(f"{item.submodule.name}: {item.status} ({claims or 'nothing claimed'})")
    return lines


def _layers(found: DryRun) -> dict[str, Any]:
    submodules: list[Any] = []
    if found.appraisal is not None:
        submodules = [
            {
                "name": item.submodule.name, "status": item.status, "vector": dict(item.vector),
                "policy_sha256": item.policy_digest,
            }
            for item in found.appraisal.submodules
        ]  # fmt: skip
    asked = found.appraisal is not None
    return {
        "1": "pass" if found.hard.passed else "fail",
        "2": _outcome(_second(found)) if asked else "not asked",
        "3": _outcome(_third(found)) if asked else "not asked",
        "submodules": submodules,
    }


def _outcome(checks: tuple[Check, ...]) -> str:
    outcomes = {item.outcome.value for item in checks}
    return "fail" if "fail" in outcomes else "pass" if "pass" in outcomes else "not asked"
