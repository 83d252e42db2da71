"""Telling Python pickles by their content: loading one runs the code in it."""

from __future__ import annotations

HEAD = 512
"""Bytes of a file that are looked at."""

_PROTOCOLS = b"\x02\x03\x04\x05"
_FIRST_OPCODES = b"\x95}](c\x8aXqKJUV)\x8cCBNGMI"
_ZIP = b"PK\x03\x04"


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that begins so is a pickle, or a zip archive of PyTorch with one inside.

    A pickle from protocol 2 on begins with PROTO, its number and an opcode. A safetensors file may
    begin with the same bytes, as part of its header length, but has ``{`` at offset 8.
    """
    if head.startswith(_ZIP):
        return b"data.pkl" in head[:HEAD]
    if len(head) < 3 or head[0] != 0x80 or head[8:9] == b"{":
        return False
    return head[1] in _PROTOCOLS and head[2] in _FIRST_OPCODES
