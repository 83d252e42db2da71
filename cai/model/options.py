"""What a writer may choose, and what it reports (docs/spec-format.md §5, §9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime

from cai.model.layout import DEFAULT_CHUNK
from cai.model.manifest import Licence

PICKLE_FLAG = "pickle"
"""Member of ``allow`` under which Python pickles may be sealed."""


@dataclass(frozen=True, slots=True)
class SealOptions:
    """What a writer may choose.

    Attributes:
        model_id: of the model line, 64 hex digits; empty draws a new one.
        revision: from 1, one more than the revision before.
        previous: model root of the revision before, or empty.
        name: free text.
        licence: terms of use.
        provenance: where the model comes from.
        allow: flags, sorted.
        chunk: bytes of a chunk.
        created: when; ``None`` is now.
        workers: threads; 0 chooses by the machine.
        unsafe_entropy: replaces the system's random bytes, for known-answer vectors only.
    """

    model_id: str = ""
    revision: int = 1
    previous: str = ""
    name: str = ""
    licence: Licence = field(default_factory=Licence)
    provenance: Mapping[str, str] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    chunk: int = DEFAULT_CHUNK
    created: datetime | None = None
    workers: int = 0
    unsafe_entropy: Callable[[int], bytes] | None = None


@dataclass(frozen=True, slots=True)
class SealReport:
    """What was sealed; nothing in it is secret."""

    model_id: str
    revision: int
    root: str
    content_root: str
    index_sha256: str
    allow: tuple[str, ...]
    files: int
    directories: int
    symlinks: int
    objects: int
    plaintext_bytes: int
    stored_bytes: int

    def to_json(self) -> dict[str, object]:
        """The report as ``--json`` prints it."""
        return asdict(self) | {"allow": list(self.allow)}
