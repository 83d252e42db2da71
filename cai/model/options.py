"""What a writer may choose, and what it reports (docs/spec-format.md §5, §9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime

from cai.model.layout import DEFAULT_CHUNK
from cai.model.manifest import Licence

PICKLE_FLAG = "pickle"
"""Member of ``allow`` under which Python pickles may be sealed."""

REMOTE_CODE_FLAG = "remote-code"
"""Member of ``allow`` under which a host may run Python code that comes with the model."""


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
        pad: round the sizes of stored objects up, so that they tell little of the files'.
        created: when; ``None`` is now.
        workers: threads for each file; 0 chooses by the machine.
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
    pad: bool = False
    created: datetime | None = None
    workers: int = 0
    unsafe_entropy: Callable[[int], bytes] | None = None


@dataclass(frozen=True, slots=True)
class SealReport:
    """What was sealed; nothing in it is secret.

    Attributes:
        carried: objects that were taken over from an older revision.
        resumed: objects that an interrupted run had finished.
        written_bytes: stored bytes that this run wrote.
    """

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
    carried: int = 0
    resumed: int = 0
    written_bytes: int = 0

    def to_json(self) -> dict[str, object]:
        """The report as ``--json`` prints it."""
        return asdict(self) | {"allow": list(self.allow)}
