"""Filling a caller's buffer with authenticated plaintext, or with nothing at all.

Both methods read through this one loop, so that no failure half-way ever leaves bytes behind that
were decrypted but are not to be used.
"""

from __future__ import annotations

from collections.abc import Callable


def fill(
    buffer: memoryview, offset: int, size: int, read_some: Callable[[int, memoryview], int]
) -> int:
    """Fill ``buffer`` from ``offset`` of a file of ``size`` bytes.

    Args:
        buffer: writable memory of any shape.
        offset: first byte that is wanted.
        size: plaintext bytes of the file.
        read_some: writes authenticated bytes from an offset to the start of a view; returns how
            many, at least one.

    Returns:
        Bytes filled: ``len(buffer)``, or fewer at the end of the file.

    Raises:
        Exception: whatever ``read_some`` raises; the buffer is zeroed first.
    """
    view = memoryview(buffer).cast("B")
    view = view[: max(0, min(len(view), size - offset))]
    try:
        done = 0
        while done < len(view):
            done += read_some(offset + done, view[done:])
    except BaseException:
        view[:] = bytes(len(view))
        raise
    return len(view)
