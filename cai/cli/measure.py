"""``cai measure``: write ``launch.json`` and say what a policy must name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cai.terminal import JsonFlag, current


def measure(
    env: Annotated[Path, typer.Option("--env", help="cai.env with the host's settings.")],
    owner_key: Annotated[
        str, typer.Option("--owner-key", help="The owner's Ed25519 public key, 64 hex digits.")
    ],
    service: Annotated[str, typer.Option("--service", help="Name of the service.")] = "model",
    kbs: Annotated[
        str, typer.Option("--kbs", help="Which key broker: cai, or trustee for a stock one.")
    ] = "cai",
    kbs_key: Annotated[
        str, typer.Option("--kbs-key", help="The broker's ticket key to pin, 64 hex digits.")
    ] = "",
    dialect: Annotated[
        list[str] | None,
        typer.Option("--dialect", help="cai/1 (default) or rats-tls, for stock TNG; repeatable."),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where launch.json is written.")
    ] = Path("launch.json"),
    json_output: JsonFlag = False,
) -> None:
    """Write launch.json for these settings and print the values a policy names."""
    from cai.attest.tdx.runtime_events import launch_events, replay
    from cai.errors import from_os_error
    from cai.host.launch import parse_launch, write_launch
    from cai.host.settings import load_host_settings

    encoded = write_launch(
        load_host_settings(env),
        owner_key=owner_key,
        service_id=service,
        kbs=kbs,
        kbs_key=kbs_key,
        dialects=tuple(dialect or ("cai/1",)),
    )
    try:
        output.write_bytes(encoded)
    except OSError as error:
        raise from_os_error(error, f"write {output}") from error
    launch = parse_launch(encoded)
    rtmr3 = replay(launch_events(encoded)).hex()
    current().result(
        {"launch": str(output), "launch_digest": launch.digest, "rtmr3": rtmr3},
        f"launch_digest {launch.digest}\nrtmr3         {rtmr3}",
    )
