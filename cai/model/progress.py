"""How long work on a model shows its progress, without knowing who watches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from cai.terminal import Advance

ProgressBar = Callable[[str, int | None], AbstractContextManager[Advance]]
"""Shows progress: given a word and a total of bytes; ``Terminal.progress`` is one."""


def silent(_what: str, _total: int | None) -> AbstractContextManager[Advance]:
    """Progress that nobody watches."""
    return nullcontext(lambda _amount: None)
