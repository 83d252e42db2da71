"""``cai host``: the GPU host's services."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai.terminal import JsonFlag, Terminal, current

if TYPE_CHECKING:
    from cai.attest.evidence import DeviceSource, QuoteSource
    from cai.host.launch import Launch

app = typer.Typer(
    name="host", help="Attest, fetch the key, mount the model, prove sessions.",
    no_args_is_help=True,
)


@app.callback()
def host() -> None:
    """Keep ``up`` a verb of its own: further verbs of the host stand beside it."""


@app.command()
def up(
    env: Annotated[Path, typer.Option("--env", help="cai.env with the host's settings.")],
    model: Annotated[Path, typer.Option("--model", help="Directory of the sealed model.")],
    launch: Annotated[
        Path, typer.Option("--launch", help="launch.json, written by `cai measure`.")
    ] = Path("launch.json"),
    run_dir: Annotated[
        Path, typer.Option("--run-dir", help="Where the sockets are made (mode 0700).")
    ] = Path("/run/cai"),
    gpu: Annotated[
        bool, typer.Option("--gpu/--no-gpu", help="Collect evidence of the GPUs as well.")
    ] = True,
    unsafe_simulated_tee: Annotated[
        Path | None,
        typer.Option(help="Platform directory of a simulated TEE. Proves nothing about hardware."),
    ] = None,
    unsafe_simulated_image: Annotated[
        str, typer.Option(help="Which guest image the simulated TEE pretends to have booted.")
    ] = "demo",
    unsafe_simulated_debug: Annotated[
        bool, typer.Option(help="Let the simulated guest be a debug guest.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Attest, fetch the key, mount the model and prove every session, in the foreground."""
    from cai.cli.simulated_tee import open_simulated_tee
    from cai.host.agent import Agent
    from cai.host.keeper import HostPlan
    from cai.host.keeper import up as bring_up
    from cai.host.launch import MAX_LAUNCH, parse_launch
    from cai.host.settings import load_host_settings
    from cai.settings import read_settings_file

    terminal = current()
    settings = load_host_settings(env)
    document = parse_launch(read_settings_file(launch, what="launch file")[: MAX_LAUNCH + 1])
    document.require_settings(settings)
    if unsafe_simulated_tee is None:
        source, devices = _real_tee(terminal, document, gpu=gpu)
    else:
        tee = open_simulated_tee(
            terminal, unsafe_simulated_tee, image=unsafe_simulated_image,
            launch=document.encoded, debug=unsafe_simulated_debug,
        )
        source, devices = tee.source, tee.devices
    agent = Agent(launch=document, source=source, gpus=devices)
    plan = HostPlan(settings=settings, agent=agent, model=model, run_dir=run_dir)

    def ready(description: object) -> None:
        mark = "SIMULATED guest: " if source.simulated else ""
        terminal.result(
            dict(description),  # type: ignore[call-overload]
            f"{mark}model mounted at {settings.mount_point}; sessions are proved at "
            f"{plan.channel_socket}",
        )

    terminal.say(f"attesting to {settings.trustee_url}")
    asyncio.run(bring_up(plan, ready))


def _real_tee(
    terminal: Terminal, launch: Launch, *, gpu: bool
) -> tuple[QuoteSource, DeviceSource]:
    """This machine: measure the launch, verify the GPUs here, and only then open them."""
    from datetime import UTC, datetime

    from cai.attest.anchors import vendor_anchors
    from cai.attest.gpu.collect import NoDevices, NvidiaDevices
    from cai.attest.self_check import admit_devices
    from cai.attest.tdx.collect import TdxGuest
    from cai.attest.tdx.runtime_events import launch_events

    guest = TdxGuest()
    guest.measure_launch(launch_events(launch.encoded))
    if not gpu:
        terminal.warn("no GPU evidence is collected (--no-gpu); a policy may demand it")
        return guest, NoDevices()
    devices = NvidiaDevices()
    admit_devices(devices, anchors=vendor_anchors(), now=datetime.now(UTC))
    return guest, devices
