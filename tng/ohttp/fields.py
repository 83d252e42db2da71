"""Which header fields go where: inside, outside, and never on.

The inner message is HTTP/1.1 at both ends; what frames it or belongs to one hop is made anew there
and never taken from the wire (request smuggling).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cai.errors import FormatError
from tng.ingress.http1 import HOP_BY_HOP

Field = tuple[bytes, bytes]

NEVER_OUTSIDE = frozenset(
    {
        b"content-type", b"content-length", b"content-encoding", b"transfer-encoding",
        b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"proxy-authenticate",
        b"proxy-authorization", b"proxy-connection", b"x-tng-ohttp-api", b"server", b"host",
        b"date", b"accept-encoding",
    }
)  # fmt: skip
"""Fields that are never copied between the inner and the outer message."""

_DROPPED = HOP_BY_HOP | {b"transfer-encoding", b"trailer", b"expect", b"http2-settings"}


def inner(fields: Iterable[Field]) -> list[Field]:
    """The fields that travel inside, or are written at the far end.

    Raises:
        FormatError: a doubled or malformed length, a doubled host, or a field that ``connection``
            names though the message cannot do without it.
    """
    listed = [(name.lower(), value) for name, value in fields]
    named = {
        token.strip().lower()
        for name, value in listed
        if name == b"connection"
        for token in value.split(b",")
    }
    if named & {b"host", b"content-length"}:
        raise FormatError("connection names a header that belongs to the message")
    kept = [(name, value) for name, value in listed if name not in _DROPPED | named]
    for once in (b"host", b"content-length"):
        values = [value for name, value in kept if name == once]
        if len(values) > 1:
            raise FormatError(f"{once.decode()} is given twice")
        if once == b"content-length" and values and not _is_length(values[0]):
            raise FormatError("content-length is not one number")
    return kept


def outside(fields: Iterable[Field], names: Sequence[str] | None) -> list[Field]:
    """The inner fields that are copied outside; ``None`` means all that may be."""
    wanted = None if names is None else {name.encode("utf-8", "replace") for name in names}
    return [
        (name, value)
        for name, value in fields
        if name not in NEVER_OUTSIDE and (wanted is None or name in wanted)
    ]


def forwarded(fields: Sequence[Field], outer: Iterable[Field], address: str) -> list[Field]:
    """The inner fields with the client's address added, as far as anybody claims to know it.

    Args:
        fields: of the inner request.
        outer: of the outer one, to which a load balancer adds.
        address: from which the outer request came.
    """
    chain = [
        value
        for source in (fields, outer)
        for name, value in source
        if name.lower() == b"x-forwarded-for" and value.strip()
    ]
    if not address:
        return list(fields)
    text = address.encode("ascii", "replace")
    kept = [pair for pair in fields if pair[0] not in (b"x-forwarded-for", b"x-real-ip")]
    return [*kept, (b"x-forwarded-for", b", ".join([*chain, text])), (b"x-real-ip", text)]


def _is_length(value: bytes) -> bool:
    return value.isdigit() and len(value) <= 18
