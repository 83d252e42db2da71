"""Sizes, names and limits of the gocryptfs v2 format, and the arithmetic of its blocks (§2, §4)."""

from __future__ import annotations

import re

CONF_FILE = "gocryptfs.conf"
DIRIV_FILE = "gocryptfs.diriv"
LONG_PREFIX = "gocryptfs.longname."
LONG_SUFFIX = ".name"
REVERSE_CONF_FILE = ".gocryptfs.reverse.conf"

IV_SIZE = 16
TAG_SIZE = 16
FILE_ID_SIZE = 16
DIRIV_SIZE = 16
MASTER_KEY_SIZE = 32

BLOCK = 4096
"""Plaintext bytes of a block; the last of a file may have fewer."""

OVERHEAD = IV_SIZE + TAG_SIZE
STORED_BLOCK = BLOCK + OVERHEAD
"""Stored bytes of a full block: IV, ciphertext, tag."""

HEADER_SIZE = 18
"""Stored bytes in front of the first block: version 2, then the file id."""

HEADER_VERSION = b"\x00\x02"

GROUP = 256
"""Blocks under one tag digest of the manifest."""

GROUP_PLAIN = GROUP * BLOCK
GROUP_STORED = GROUP * STORED_BLOCK

DIGEST_SIZE = 32
"""Bytes of one tag digest."""

NAME_MAX = 255
"""Most bytes of a name, and most characters of an encrypted name that is not a long one."""

MIN_LONG_NAME_MAX = 62
"""Smallest ``LongNameMax`` of a configuration."""

MAX_LONG_NAME_FILE = 344
"""Most bytes of a ``.name`` file: base64 of the 256 bytes that a name of 255 bytes is padded to."""

MAX_CONF_FILE = 64 * 1024
"""Largest ``gocryptfs.conf`` that is read, bytes."""

MAX_PASSWORD = 2048
"""Longest password, bytes; what stock gocryptfs accepts."""

MAX_SCRYPT_MEMORY = 1 << 30
"""Most memory that a configuration may make scrypt take, bytes: N = 2^20 at r = 8."""

MAX_SCRYPT_P = 16
"""Most parallel lanes of scrypt; they take time, not memory."""

MAX_FILE = 1 << 40
"""Longest plaintext file, bytes."""

LONG_NAME = re.compile(r"gocryptfs\.longname\.[A-Za-z0-9_-]{43}", re.ASCII)
"""Name of a file or directory whose encrypted name is too long for a directory entry."""


def blocks_in(plain: int) -> int:
    """Number of blocks of a file of ``plain`` bytes."""
    return -(-plain // BLOCK)


def groups_in(plain: int) -> int:
    """Number of groups of a file of ``plain`` bytes."""
    return -(-plain // GROUP_PLAIN)


def stored_size(plain: int) -> int:
    """Stored bytes of a file of ``plain`` bytes."""
    return HEADER_SIZE + plain + OVERHEAD * blocks_in(plain) if plain else 0


def plain_size(stored: int) -> int:
    """Plaintext bytes of a stored file, as stock gocryptfs shows them.

    A last block of 1 to 32 stored bytes is corrupt; like stock, this counts one byte for it, which
    then cannot be read.
    """
    if stored <= HEADER_SIZE:
        return 0
    body = stored - HEADER_SIZE
    whole, rest = divmod(body, STORED_BLOCK)
    if rest:
        return whole * BLOCK + max(1, rest - OVERHEAD)
    return whole * BLOCK


def block_offset(number: int) -> int:
    """Where block ``number`` begins in the stored file."""
    return HEADER_SIZE + number * STORED_BLOCK
