"""Canonical JSON (RFC 8785), as written and as demanded.

Every JSON that CAI signs, hashes or authenticates is in this form, and a stored file's bytes must
equal their own canonical form (decisions §3.3). Two restrictions make it total and unambiguous:
numbers are integers of at most 53 bits (RFC 8785 §3.2.2.3 defines floats through ECMAScript; no
format of ours has one), and strings hold no lone surrogates.
"""

from __future__ import annotations

import json
from typing import Any

from cai.errors import FormatError, LimitExceeded

MAX_INTEGER = 2**53 - 1
"""Largest magnitude that every JSON reader keeps exact (RFC 8785 §3.2.2.3, appendix D)."""

MAX_DEPTH = 64
"""Deepest nesting that is parsed."""

# Made once: json.dumps would make an encoder for every string.
_text = json.JSONEncoder(ensure_ascii=False).encode


def canonical(value: object) -> bytes:
    """Serialise to RFC 8785 bytes.

    Raises:
        FormatError: a value has no canonical form here (float, big integer, lone surrogate,
            non-string member name, unknown type).
    """
    out: list[str] = []
    _write(value, out, 0)
    try:
        return "".join(out).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError("JSON string holds a lone surrogate") from error


def parse(data: bytes, *, what: str, limit: int) -> Any:
    """Parse any JSON from outside: strict UTF-8, no duplicate members, no floats, bounded depth.

    Args:
        data: the bytes.
        what: names the document in errors.
        limit: largest accepted length, bytes.

    Raises:
        LimitExceeded: longer than ``limit`` or nested deeper than ``MAX_DEPTH``.
        FormatError: not JSON, a duplicate member, or a number that is not a small integer.
    """
    if len(data) > limit:
        raise LimitExceeded(f"{what}: {len(data)} bytes, at most {limit} are accepted")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_float=_no_float,
            parse_constant=_no_float,
            parse_int=_small_integer,
        )
    except FormatError as error:
        raise FormatError(f"{what}: {error.message}") from error
    except RecursionError as error:
        raise LimitExceeded(f"{what}: nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise FormatError(f"{what}: not JSON ({error})") from error
    if _depth(value) > MAX_DEPTH:
        raise LimitExceeded(f"{what}: nested deeper than {MAX_DEPTH} levels")
    return value


def parse_canonical(data: bytes, *, what: str, limit: int) -> Any:
    """Parse JSON whose bytes must equal their own canonical form.

    Raises:
        LimitExceeded: as ``parse``.
        FormatError: as ``parse``, or the bytes are another spelling of the same value.
    """
    value = parse(data, what=what, limit=limit)
    if canonical(value) != data:
        raise FormatError(f"{what}: not in canonical form (RFC 8785)")
    return value


def _write(value: object, out: list[str], depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FormatError(f"JSON nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):  # most of what there is
        out.append(_text(value))
    elif value is None:
        out.append("null")
    elif value is True:
        out.append("true")
    elif value is False:
        out.append("false")
    elif isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise FormatError("JSON integer beyond 53 bits")
        out.append(str(int(value)))
    elif isinstance(value, (list, tuple)):
        out.append("[")
        for index, item in enumerate(value):
            if index:
                out.append(",")
            _write(item, out, depth + 1)
        out.append("]")
    elif isinstance(value, dict):
        _write_object(value, out, depth)
    else:
        raise FormatError(f"no JSON form for {type(value).__name__}")


def _write_object(value: dict[Any, Any], out: list[str], depth: int) -> None:
    if not all(isinstance(name, str) for name in value):
        raise FormatError("JSON member name is not a string")
    names = sorted(value) if all(map(str.isascii, value)) else _sorted_names(value)
    out.append("{")
    for index, name in enumerate(names):
        if index:
            out.append(",")
        out.append(_text(name))
        out.append(":")
        _write(value[name], out, depth + 1)
    out.append("}")


def _sorted_names(value: dict[str, Any]) -> list[str]:
    try:
        # RFC 8785 §3.2.3 sorts by UTF-16 code units, which differs from code points beyond the BMP.
        return sorted(value, key=lambda name: name.encode("utf-16-be"))
    except UnicodeEncodeError as error:
        raise FormatError("JSON member name holds a lone surrogate") from error


def _depth(value: object) -> int:
    depth, level = 0, [value]
    while True:
        inner = [item for item in level if isinstance(item, (list, dict))]
        if not inner:
            return depth
        depth += 1
        level = [
            child for item in inner for child in (item.values() if isinstance(item, dict) else item)
        ]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise FormatError(f"duplicate member {name!r}")
        result[name] = value
    return result


def _no_float(text: str) -> Any:
    raise FormatError(f"number {text[:32]} is not an integer")


def _small_integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
        raise FormatError("integer beyond 53 bits")
    return int(text)
