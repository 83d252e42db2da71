"""The mount as a process of its own: it holds the key, the agent beside it does not.

The key goes through a pipe, so it is in no argument list, environment or file.
"""

from __future__ import annotations

import asyncio
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from cai import jcs
from cai.errors import CaiError, StorageError, from_exit_status
from cai.secret import Secret

READY_S = 600.0
"""Longest wait for a mount to be usable, seconds; materialising a large model takes long."""

STOP_S = 15.0
"""Longest wait for an unmount before the process is killed, seconds."""

MAX_LINE = 64 * 1024
"""Longest line that the mount says of itself, bytes."""


class ModelMount:
    """A running ``cai mount --foreground``.

    Attributes:
        kind: ``fuse`` or ``tmpfs``.
    """

    def __init__(self, process: Process, kind: str) -> None:
        self._process = process
        self.kind = kind

    @classmethod
    async def start(
        cls, model: Path, mount_point: Path, key: Secret, *, expect_root: str
    ) -> ModelMount:
        """Mount and wait until it is usable.

        Raises:
            CaiError: the mount's own error, with its exit status.
        """
        read_end, write_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "cai", "mount", str(model), str(mount_point),
                "--key-file", f"/dev/fd/{read_end}", "--expect-root", expect_root,
                "--foreground", "--json",
                stdin=asyncio.subprocess.DEVNULL, stdout=PIPE,
                pass_fds=(read_end,), start_new_session=True,
            )
            os.write(write_end, key.reveal().hex().encode("ascii") + b"\n")
        finally:
            os.close(read_end)
            os.close(write_end)
        return cls(process, await _ready(process, mount_point))

    @property
    def exit_status(self) -> int | None:
        """How the process ended, or ``None`` while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait for the process to end."""
        return await self._process.wait()

    async def stop(self) -> None:
        """Unmount; nothing is readable afterwards."""
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


async def _ready(process: Process, mount_point: Path) -> str:
    assert process.stdout is not None  # noqa: S101 - PIPE was asked for
    try:
        async with asyncio.timeout(READY_S):
            line = await process.stdout.readline()
    except TimeoutError as error:
        process.kill()
        raise StorageError(f"mount at {mount_point} was not ready in {READY_S:.0f} s") from error
    said = jcs.parse(line, what="mount", limit=MAX_LINE) if line else {}
    if isinstance(said, dict) and isinstance(said.get("kind"), str):
        return str(said["kind"])
    status = await process.wait()
    raise _mount_error(said, status, mount_point)


def _mount_error(said: object, status: int, mount_point: Path) -> CaiError:
    reason = said.get("error") if isinstance(said, dict) else None
    message = f"mount at {mount_point} ended with status {status}"
    hint = None
    if isinstance(reason, dict):
        message = str(reason.get("message", message))
        hint = reason.get("hint")
    return from_exit_status(status, message, hint if isinstance(hint, str) else None)
