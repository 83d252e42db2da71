"""Loading the Rego engine on a machine that has no compiler.

regopy's shared library lists ``libatomic.so.1`` among the libraries it needs but takes no symbol
from it. A Debian without gcc does not have that file, and the loader then refuses the engine. So
where the file is absent, an empty library of that name is loaded first: the loader finds the name
taken and goes on. Layout: System V ABI, ELF-64 object file format, chapters 4 and 5.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from types import ModuleType

from cai.errors import CaiError

_SONAME = b"libatomic.so.1"

_MACHINES = {"x86_64": 62, "aarch64": 183}
"""ELF machine numbers of the platforms that regopy has wheels for."""

_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_DT_NULL, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = (
    0, 4, 5, 6, 10, 11, 14,
)  # fmt: skip


def load_rego() -> ModuleType:
    """The module ``regopy``, loaded.

    Raises:
        CaiError: the engine cannot be loaded on this machine.
    """
    try:
        ctypes.CDLL(_SONAME.decode())
    except OSError:
        _load_empty_library()
    try:
        import regopy
    except (ImportError, OSError) as error:
        raise CaiError(
            f"the Rego engine cannot be loaded: {error}",
            hint="apt-get install libatomic1",
            code="rego-engine",
        ) from error
    module: ModuleType = regopy
    return module


def _load_empty_library() -> None:
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        return
    try:
        handle = os.memfd_create("libatomic", 0)
        try:
            os.write(handle, empty_library(machine))
            ctypes.CDLL(f"/proc/self/fd/{handle}")
        finally:
            os.close(handle)
    except OSError:
        # A hardened kernel may refuse; loading the engine then says what is missing.
        return


def empty_library(machine: int) -> bytes:
    """The bytes of an ELF-64 shared object that has a name and nothing else.

    Args:
        machine: ELF machine number.
    """
    programs, dynamic_entries = 3, 7
    dynamic_at = 64 + 56 * programs
    symbols_at = dynamic_at + 16 * dynamic_entries
    hash_at = symbols_at + 24
    strings = b"\x00" + _SONAME + b"\x00"
    strings_at = hash_at + 16
    size = strings_at + len(strings)
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack(
        "<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, programs, 64, 0, 0
    )
    dynamic_size = 16 * dynamic_entries
    segments = b"".join(
        struct.pack("<IIQQQQQQ", *segment)
        for segment in (
            (_PT_LOAD, 6, 0, 0, 0, size, size, 0x10000),
            (_PT_DYNAMIC, 6, dynamic_at, dynamic_at, dynamic_at, dynamic_size, dynamic_size, 8),
            (_PT_GNU_STACK, 6, 0, 0, 0, 0, 0, 16),
        )
    )
    dynamic = b"".join(
        struct.pack("<QQ", tag, value)
        for tag, value in (
            (_DT_SONAME, 1), (_DT_HASH, hash_at), (_DT_SYMTAB, symbols_at), (_DT_SYMENT, 24),
            (_DT_STRTAB, strings_at), (_DT_STRSZ, len(strings)), (_DT_NULL, 0),
        )
    )
    # One bucket, one chain entry: the null symbol alone.
    table = struct.pack("<IIII", 1, 1, 0, 0)
    return header + segments + dynamic + bytes(24) + table + strings
