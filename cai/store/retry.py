"""A store whose every call is tried again, with growing pauses, while the peer is merely away."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from cai.errors import InputMissing, PeerUnreachable
from cai.store.base import Blob, FoundPart, Listed, Pace, Stat, Store, Upload, unpaced

ATTEMPTS = 7
"""Tries of one call, the first one included."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 8.0
"""The pause after the first failure, and where doubling stops; seconds. About 16 s in all."""

NO_UPLOAD = "no-upload"
"""Machine code of the error for an upload that the store does not know (any more)."""

_Result = TypeVar("_Result")


def pauses(attempts: int = ATTEMPTS) -> Iterator[float]:
    """The pauses between ``attempts`` tries, each drawn between half and all of its length."""
    pause = FIRST_PAUSE_S
    for _ in range(attempts - 1):
        yield pause * random.uniform(0.5, 1.0)  # noqa: S311 - spreads retries, guards nothing
        pause = min(LONGEST_PAUSE_S, 2 * pause)


def steadily(action: Callable[[], _Result], attempts: int = ATTEMPTS) -> _Result:
    """Call ``action`` until it does not raise ``PeerUnreachable``.

    Raises:
        PeerUnreachable: the last try failed as well.
        CaiError: any other error, at once.
    """
    for pause in pauses(attempts):
        try:
            return action()
        except PeerUnreachable:
            time.sleep(pause)
    return action()


class SteadyStore:
    """Wraps a store; see the module."""

    def __init__(self, store: Store, attempts: int = ATTEMPTS) -> None:
        self._store = store
        self._attempts = attempts
        self.uri = store.uri
        self.writable = store.writable

    def stat(self, path: str) -> Stat | None:
        """See ``Store.stat``."""
        return steadily(lambda: self._store.stat(path), self._attempts)

    def names(self, *, recursive: bool) -> Iterator[Listed]:
        """See ``Store.names``; the whole listing is one try."""
        return iter(
            steadily(lambda: list(self._store.names(recursive=recursive)), self._attempts)
        )

    def read(self, path: str, offset: int, length: int, pace: Pace = unpaced) -> Blob:
        """See ``Store.read``."""
        return steadily(lambda: self._store.read(path, offset, length, pace), self._attempts)

    def put(self, path: str, data: bytes, label: str, pace: Pace = unpaced) -> None:
        """See ``Store.put``."""
        steadily(lambda: self._store.put(path, data, label, pace), self._attempts)

    def begin(self, path: str, size: int, label: str) -> Upload:
        """See ``Store.begin``."""
        upload = steadily(lambda: self._store.begin(path, size, label), self._attempts)
        return _SteadyUpload(upload, self._attempts)

    def pending(self) -> Mapping[str, list[Upload]]:
        """See ``Store.pending``."""
        found = steadily(self._store.pending, self._attempts)
        return {
            path: [_SteadyUpload(upload, self._attempts) for upload in uploads]
            for path, uploads in found.items()
        }

    def furnish(self, folders: Iterable[str], links: Mapping[str, str]) -> None:
        """See ``Store.furnish``."""
        self._store.furnish(folders, links)

    def remove(self, path: str) -> None:
        """See ``Store.remove``."""
        steadily(lambda: self._store.remove(path), self._attempts)

    def close(self) -> None:
        """See ``Store.close``."""
        self._store.close()


class _SteadyUpload:
    def __init__(self, upload: Upload, attempts: int) -> None:
        self._upload = upload
        self._attempts = attempts

    def found(self, size: int, part: int) -> Mapping[int, FoundPart]:
        return steadily(lambda: self._upload.found(size, part), self._attempts)

    def send(self, number: int, data: bytes, md5: bytes, pace: Pace) -> None:
        steadily(lambda: self._upload.send(number, data, md5, pace), self._attempts)

    def complete(self, count: int) -> None:
        tries = 0

        def once() -> None:
            nonlocal tries
            tries += 1
            try:
                self._upload.complete(count)
            except InputMissing as error:
                # The answer to an earlier try got lost: the upload is gone because it is done. The
                # caller looks at what appeared in any case.
                if tries == 1 or error.machine_code != NO_UPLOAD:
                    raise

        steadily(once, self._attempts)

    def abort(self) -> None:
        steadily(self._upload.abort, self._attempts)
