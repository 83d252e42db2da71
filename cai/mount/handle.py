"""What every kind of mount gives its caller: where it is, and how to await or make its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self


class Kind(StrEnum):
    """How a tree is shown."""

    AUTO = "auto"
    FUSE = "fuse"
    PASSTHROUGH = "passthrough"
    TMPFS = "tmpfs"


class Mount(ABC):
    """A model that is mounted, until ``unmount`` or the end of the ``with`` block.

    Attributes:
        mount_point: absolute path, without symlinks.
        kind: any but ``Kind.AUTO``.
        reason: why this kind, when it was chosen and not asked for; else empty.
    """

    kind: Kind

    def __init__(self, mount_point: Path, *, reason: str = "") -> None:
        self.mount_point = mount_point
        self.reason = reason

    @abstractmethod
    def unmount(self) -> None:
        """Take it away, also from those who have files of it open. A second call does nothing.

        Raises:
            StorageError: the kernel refused.
        """

    @abstractmethod
    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is gone, whoever took it away.

        Args:
            timeout: seconds, or ``None`` for no limit.

        Returns:
            Whether it is gone.

        Raises:
            StorageError: it ended by a failure of its server.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.unmount()
