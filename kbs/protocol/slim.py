"""Tokens without the evidence that their digests stand for, so that they fit into an HTTP header.

Event logs, the text of additional evidence and the measurements of eight GPUs are hundreds of
kilobytes. Policies have seen them before a token is signed; whoever needs them later has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_ANNOTATED: Final = "ear.veraison.annotated-evidence"

_LEFT_OUT: Final = {
    "tdx": frozenset({"uefi_event_logs"}),
    "nvidia": frozenset({"measurements"}),
    "runtime_data_claims": frozenset({"additional-evidence"}),
}
"""Members of the annotated evidence, and what is left out of each."""


def slim(claims: Mapping[str, Any]) -> dict[str, Any]:
    """The claims of a token without long evidence; the claims themselves stay as they are."""
    submodules = {}
    for name, submodule in claims["submods"].items():
        annotated = dict(submodule[_ANNOTATED])
        for part, unwanted in _LEFT_OUT.items():
            if isinstance(annotated.get(part), Mapping):
                annotated[part] = {
                    member: value
                    for member, value in annotated[part].items()
                    if member not in unwanted
                }
        submodules[name] = {**submodule, _ANNOTATED: annotated}
    return {**claims, "submods": submodules}
