"""Policies that come with the key broker, as package data, to start from."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from cai.errors import InputMissing

TEMPLATES: Final = {
    "strict": ("release.rego", "resource policy: a TDX guest with a GPU, every part affirming"),
    "tdx": ("tdx.rego", "resource policy: a sealed TDX guest, with or without GPUs"),
    "tdx-gpu": ("tdx-gpu.rego", "resource policy: sealed, an exact number of GPUs, known drivers"),
    "attestation-cpu": ("attestation-cpu.rego", "attestation policy: reference values of a TDX"),
    "attestation-gpu": ("attestation-gpu.rego", "attestation policy: reference values of a GPU"),
    "deny-all": ("deny-all.rego", "resource policy: nothing for anybody"),
}
"""Name to file and description."""


def template(name: str) -> str:
    """The text of a template.

    Raises:
        InputMissing: there is none of this name.
    """
    if name not in TEMPLATES:
        raise InputMissing(
            f"there is no template {name[:32]!r}", hint=f"known are: {', '.join(TEMPLATES)}"
        )
    return files(__package__).joinpath(TEMPLATES[name][0]).read_text("utf-8")
