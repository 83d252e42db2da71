"""``cai host``: the GPU host's services."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cai.errors import UsageError
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
    source, devices = _simulated_tee(
        terminal, unsafe_simulated_tee, unsafe_simulated_image, document,
        debug=unsafe_simulated_debug,
    )
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


def _simulated_tee(
    terminal: Terminal, directory: Path | None, image: str, launch: Launch, *, debug: bool
) -> tuple[QuoteSource, DeviceSource]:
    if directory is None:
        raise UsageError(
            "this version collects evidence from a simulated TEE only",
            hint="--unsafe-simulated-tee DIR (made by `python -m cai.attest.sim create`)",
        )
    # Deferred: production images delete the simulator.
    from cai.attest.sim import GuestSettings, SimulatedPlatform
    from cai.attest.tdx.runtime_events import launch_events

    terminal.warn("SIMULATED TEE: this evidence proves nothing about any hardware")
    platform = SimulatedPlatform.load(directory)
    guest = platform.guest(
        GuestSettings(image=image, debug=debug, rtmr3_events=launch_events(launch.encoded))
    )
    return guest, platform.devices()
