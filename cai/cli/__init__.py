"""The command line of the model's owner and of the GPU host: one module a verb.

Heavy imports are deferred into the verbs, so that ``cai --help`` and completion stay fast.
"""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from cai.terminal import run_app

VERBS: tuple[str, ...] = (
    "encrypt", "decrypt", "check", "inspect", "rotate", "reseal", "push", "pull", "ls",
    "mount", "unmount", "host", "measure", "attest", "verify", "collateral", "demo",
)
"""Verbs in the order of ``cai --help``; each is the function of that name in its module."""


def build() -> typer.Typer:
    """The command-line application with every verb."""
    app = typer.Typer(
        name="cai",
        help="Seal a model, open it only in a guest that proved itself.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    for verb in VERBS:
        module = import_module(f"cai.cli.{verb}")
        group = getattr(module, "app", None)
        if group is None:
            app.command(verb)(getattr(module, verb))
        else:
            app.add_typer(group)
    return app


def main() -> None:
    """Entry point of the console script ``cai``."""
    sys.exit(run_app("cai", build()))
