"""Trustworthiness vectors (AR4SI): what an attestation policy claims, and the status of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cai.errors import FormatError

CLAIMS: Final = (
    "configuration", "executables", "file-system", "hardware", "instance-identity",
    "runtime-opaque", "sourced-data", "storage-opaque",
)  # fmt: skip
"""Names of the claims."""

_NAMES: Final = {
    **{name: name for name in CLAIMS}, **{name.replace("-", "_"): name for name in CLAIMS},
}  # fmt: skip

NONE, AFFIRMING, WARNING, CONTRAINDICATED = "none", "affirming", "warning", "contraindicated"

CONTRADICTED: Final = 97
"""The value that we give to what an own check refused."""

LEAST, MOST = -128, 127
"""A claim is a signed byte."""


def parse_vector(value: Any) -> dict[str, int]:
    """The vector that a policy's ``trust_claims`` says; what it leaves out is 0.

    Raises:
        FormatError: not an object, an unknown claim, or a value that is no signed byte.
    """
    if not isinstance(value, Mapping):
        raise FormatError("trust_claims is not an object")
    vector = dict.fromkeys(CLAIMS, 0)
    for name, number in value.items():
        if name not in _NAMES:
            raise FormatError(f"trust_claims names {str(name)[:32]!r}, which is no claim")
        whole = isinstance(number, float) and number.is_integer()
        tier = int(number) if whole else number
        if type(tier) is not int or not LEAST <= tier <= MOST:
            raise FormatError(f"trust_claims: {name} is no whole number from {LEAST} to {MOST}")
        vector[_NAMES[name]] = tier
    return vector


def status_of(vector: Mapping[str, int]) -> str:
    """The worst tier of a vector: status of a submodule."""
    tiers = [_tier(value) for value in vector.values()]
    order = (NONE, AFFIRMING, WARNING, CONTRAINDICATED)
    return max(tiers, key=order.index, default=NONE)


def _tier(value: int) -> str:
    # draft-ietf-rats-ar4si: -1 to 1 claims nothing, then 32 values each side.
    if -1 <= value <= 1:
        return NONE
    if -32 <= value <= 31:
        return AFFIRMING
    if -96 <= value <= 95:
        return WARNING
    return CONTRAINDICATED
