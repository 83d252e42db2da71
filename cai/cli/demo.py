"""``cai demo``: the whole way, once, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from cai.errors import UsageError
from cai.terminal import JsonFlag, current


def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Seal this model instead of the one that the demo's wheel carries."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Play in this new directory and keep it."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="reference (numpy, embeddings) or vllm.")
    ] = "reference",
    vllm_python: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Python interpreter that has vLLM.")
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Seal, release, mount, serve and ask a real model on this machine; then try what must fail.

    Needs no TEE, no GPU, no Docker and no network. The TEE is SIMULATED, and every line that rests
    on it says so.
    """
    from cai.demo.model import find_model, require_extra
    from cai.demo.parties import Parties
    from cai.demo.stage import Engine, Stage, working_directory
    from cai.demo.story import perform
    from cai.demo.telling import Teller

    chosen = Engine(engine, _interpreter(engine, vllm_python))
    require_extra()
    terminal = current()
    started = time.monotonic()
    with working_directory(keep) as work, Parties(work) as parties:
        stage = Stage(work, find_model(model), chosen, parties, Teller(terminal))
        try:
            played = perform(stage)
        finally:
            stage.ports.close()
    seconds = round(time.monotonic() - started, 2)
    kept = str(work) if keep else None
    refused = len(played["refusals"])
    terminal.result(
        {"cai-demo": 1, "ok": True, "simulated": True, "seconds": seconds, "kept": kept, **played},
        f"\n  All acts played in {seconds:.0f} s; {refused} of {refused} attacks refused; "
        "no process and no mount is left."
        + (f"\n  Everything is kept in {kept}." if kept else ""),
    )


def _interpreter(engine: str, vllm_python: Path | None) -> str:
    if engine not in ("reference", "vllm"):
        raise UsageError(f"no engine {engine!r}", hint="--engine reference or --engine vllm")
    if (engine == "vllm") != (vllm_python is not None):
        raise UsageError(
            "--engine vllm and --vllm-python PATH go together",
            hint="cai demo --engine vllm --vllm-python /opt/vllm/bin/python",
        )
    return str(vllm_python.absolute()) if vllm_python else "python"
