"""``cai attest``: what this guest says of itself, and its own verdict on it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cai.errors import InputMissing, UsageError, from_os_error
from cai.terminal import JsonFlag, Terminal, current, verdict_table

if TYPE_CHECKING:
    from cai.attest.evidence import DeviceSource, QuoteSource
    from cai.attest.reference import Measurements
    from cai.attest.self_check import VerifyingWith
    from cai.attest.verdict import Verdict

app = typer.Typer(
    name="attest", help="Show this guest's evidence and its own verdict.",
    invoke_without_command=True,
)

FAIL, UNDECIDED = 10, 20
"""Exit status when a check failed, and when something to verify with is absent."""

CollateralOption = Annotated[
    Path | None, typer.Option(help="Bundle or directory of 'cai collateral fetch'.")
]
RimsOption = Annotated[
    Path | None, typer.Option(help="Directory of NVIDIA's reference measurements.")
]
OcspOption = Annotated[
    Path | None, typer.Option(help="Directory of NVIDIA's revocation answers.")
]
TeeOption = Annotated[
    Path | None,
    typer.Option(help="Platform directory of a simulated TEE. Proves nothing about hardware."),
]
ImageOption = Annotated[
    str, typer.Option(help="Which guest image the simulated TEE pretends to have booted.")
]
LaunchOption = Annotated[
    Path | None, typer.Option(help="launch.json, written by `cai measure`.")
]
GpuOption = Annotated[
    bool, typer.Option("--gpu/--no-gpu", help="Ask the GPUs as well.")
]


@dataclass(frozen=True, slots=True)
class _Machine:
    """Where evidence comes from and what it is verified with."""

    source: QuoteSource
    devices: DeviceSource | None
    using: VerifyingWith


@app.callback()
def attest(
    context: typer.Context,
    doctor: Annotated[
        bool, typer.Option("--doctor", help="Say what is missing on this host and how to fix it.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the evidence to this new file.")
    ] = None,
    collateral: CollateralOption = None,
    rims: RimsOption = None,
    ocsp: OcspOption = None,
    gpu: GpuOption = True,
    launch: LaunchOption = None,
    unsafe_simulated_tee: TeeOption = None,
    unsafe_simulated_image: ImageOption = "demo",
    json_output: JsonFlag = False,
) -> None:
    """Collect this guest's evidence and judge it: exit 0 pass, 10 fail, 20 cannot decide."""
    if context.invoked_subcommand is not None:
        return
    from hashlib import sha384

    from cai.attest.evidence_file import undecided
    from cai.attest.self_check import collect_own, judge_own
    from cai.settings import read_settings_file

    terminal = current()
    if doctor:
        _diagnose(terminal, collateral, rims)
        return
    machine = _machine(
        terminal, collateral, rims, ocsp, launch, unsafe_simulated_tee, unsafe_simulated_image,
        gpu=gpu,
    )  # fmt: skip
    measured = b"" if launch is None else read_settings_file(launch, what="launch file")
    digest = sha384(measured).hexdigest() if measured else ""
    file = collect_own(machine.source, machine.devices, launch_digest=digest)
    verdict, _facts = judge_own(file, machine.using, now=datetime.now(UTC))
    if output is not None:
        _write_new(output, file.encode())
    absent = bool(undecided(verdict))
    decision = "pass" if verdict.passed else "undecided" if absent else "fail"
    _tell(terminal, verdict, decision, {"evidence": None if output is None else str(output)})
    if decision != "pass":
        raise typer.Exit(UNDECIDED if absent else FAIL)


@app.command()
def reference(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where policy.toml is written.")
    ] = Path("policy.toml"),
    rego: Annotated[
        Path, typer.Option("--rego", help="Where the matching release policy is written.")
    ] = Path("release.rego"),
    measurements: Annotated[
        Path | None,
        typer.Option(help="Measurements of boot artefacts (JSON), in place of this guest's own."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Guest profile to demand: sealed or operated.")
    ] = "operated",
    resource: Annotated[
        str, typer.Option(help="repository/type/tag that the release policy is for.")
    ] = "",
    collateral: CollateralOption = None,
    rims: RimsOption = None,
    ocsp: OcspOption = None,
    gpu: GpuOption = True,
    launch: LaunchOption = None,
    unsafe_simulated_tee: TeeOption = None,
    unsafe_simulated_image: ImageOption = "demo",
    json_output: JsonFlag = False,
) -> None:
    """Write policy.toml and a release policy that name exactly this guest; review before use."""
    from cai.attest.policy import VerificationPolicy
    from cai.attest.reference import parse_measurements, policy_text, release_rego
    from cai.settings import read_settings_file

    terminal = current()
    simulated = False
    if measurements is not None:
        found = parse_measurements(
            read_settings_file(measurements, what="measurements"), where=str(measurements)
        )
    else:
        machine = _machine(
            terminal, collateral, rims, ocsp, launch, unsafe_simulated_tee,
            unsafe_simulated_image, gpu=gpu,
        )  # fmt: skip
        found = _own_measurements(machine, profile, launch)
        simulated = machine.source.simulated
    policy = policy_text(found).encode("utf-8")
    digest = VerificationPolicy.parse(policy, where=str(output)).digest
    _write_new(output, policy)
    _write_new(rego, release_rego(found, resource=resource or None).encode("utf-8"))
    mark = " [SIMULATED]" if simulated else ""
    terminal.result(
        {"policy": str(output), "rego": str(rego), "digest": digest, "simulated": simulated},
        f"wrote {output} and {rego}{mark}\nread both before you sign or load them",
    )


def _own_measurements(machine: _Machine, profile: str, launch: Path | None) -> Measurements:
    from hashlib import sha384

    from cai.attest.reference import measurements_of
    from cai.attest.self_check import collect_own, judge_own
    from cai.errors import EvidenceRefused
    from cai.settings import read_settings_file

    if launch is None:
        raise UsageError("a policy names what was launched", hint="--launch launch.json")
    encoded = read_settings_file(launch, what="launch file")
    file = collect_own(machine.source, machine.devices)
    verdict, facts = judge_own(file, machine.using, now=datetime.now(UTC))
    # Values of a guest that does not verify are nobody's reference.
    verdict.require()
    if facts is None:
        raise EvidenceRefused("this guest's evidence gives no facts", verdict=verdict)
    return measurements_of(facts, profile=profile, launch_digest=sha384(encoded).hexdigest())


def _diagnose(terminal: Terminal, collateral: Path | None, rims: Path | None) -> None:
    from cai.attest.doctor import diagnose
    from cai.attest.gpu.collect import NvmlDriver
    from cai.attest.gpu.rim_store import load_rims
    from cai.attest.tdx.collateral import load_collateral
    from cai.attest.tdx.collect import LinuxFiles

    verdict = diagnose(
        LinuxFiles(),
        NvmlDriver(),
        now=datetime.now(UTC),
        rims=load_rims(rims) if rims else None,
        collateral=load_collateral(collateral) if collateral else None,
    )
    missing = [item.name for item in verdict.failures]
    _tell(terminal, verdict, "fail" if missing else "pass", {"missing": missing})
    if missing:
        raise typer.Exit(FAIL)


def _machine(
    terminal: Terminal, collateral: Path | None, rims: Path | None, ocsp: Path | None,
    launch: Path | None, simulated: Path | None, image: str, *, gpu: bool,
) -> _Machine:  # fmt: skip
    from cai.attest.anchors import simulated_anchors, vendor_anchors
    from cai.attest.gpu.ocsp_store import load_ocsp
    from cai.attest.gpu.rim_store import load_rims
    from cai.attest.self_check import VerifyingWith
    from cai.attest.tdx.collateral import CollateralStore, load_collateral
    from cai.cli.simulated_tee import open_simulated_tee
    from cai.settings import read_settings_file

    source: QuoteSource
    devices: DeviceSource | None
    anchors = vendor_anchors()
    if simulated is None:
        from cai.attest.gpu.collect import NvidiaDevices
        from cai.attest.tdx.collect import TdxGuest

        source, devices = TdxGuest(), NvidiaDevices() if gpu else None
        devices = _with_driver(terminal, devices)
    else:
        measured = None if launch is None else read_settings_file(launch, what="launch file")
        tee = open_simulated_tee(terminal, simulated, image=image, launch=measured)
        source, devices, public = tee.source, tee.devices if gpu else None, tee.anchors
        anchors = simulated_anchors(public)
        collateral = collateral or public / "collateral"
        rims, ocsp = rims or public / "rims", ocsp or public / "ocsp"
    using = VerifyingWith(
        anchors,
        load_collateral(collateral) if collateral else CollateralStore.empty(),
        load_rims(rims) if rims else None,
        load_ocsp(ocsp) if ocsp else None,
    )
    return _Machine(source, devices, using)


def _with_driver(terminal: Terminal, devices: DeviceSource | None) -> DeviceSource | None:
    """The devices, unless this machine has no driver to ask; then say so and go on."""
    if devices is not None:
        try:
            devices.facts()
        except InputMissing as error:
            terminal.warn(f"no GPU evidence: {error.message}")
            return None
    return devices


def _tell(
    terminal: Terminal, verdict: Verdict, decision: str, more: dict[str, object]
) -> None:
    terminal.result(verdict.to_json() | {"decision": decision} | more, verdict_table(verdict))
    if terminal.json_output:
        return
    lines = [f"{name:<22} {value}" for name, value in verdict.hardware.items() if value]
    lines += [f"{item.name}: {item.reason}" for item in verdict.failures]
    lines += [f"residual risk: {risk}" for risk in verdict.residual_risks]
    words = {"pass": "PASS", "fail": "FAIL", "undecided": "CANNOT DECIDE"}
    lines.append(words[decision] + (" [SIMULATED]" if verdict.simulated else ""))
    terminal.out.print(Text("\n".join(["", *lines])))


def _write_new(path: Path, data: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError as error:
        raise UsageError(f"{path} exists already", hint="name another file") from error
    except OSError as error:
        raise from_os_error(error, f"write {path}") from error
