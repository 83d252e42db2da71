"""Rounding the sizes of stored objects, so that they tell little of the files' (``--pad``)."""

from __future__ import annotations

from cai.model.layout import MAX_OBJECT_SIZE


def padded_size(size: int) -> int:
    """The size to store for a file of ``size`` bytes, 12 % more at most (Padmé).

    All sizes of one power of two keep as many significant bits as that power has digits, so a
    length tells O(log log size) bits. From: Nikitin et al., "Reducing Metadata Leakage from
    Encrypted Files and Communication with PURBs", PoPETs 2019, algorithm 1.
    """
    if size < 2:
        return size
    exponent = size.bit_length() - 1
    free = exponent - exponent.bit_length()
    mask = (1 << max(0, free)) - 1
    return min((size + mask) & ~mask, MAX_OBJECT_SIZE)
