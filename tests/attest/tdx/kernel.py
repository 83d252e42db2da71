"""A kernel for tests: configfs-tsm entries and RTMR sysfs files over a directory of plain files."""

from __future__ import annotations

import errno
from collections.abc import Callable
from hashlib import sha384
from pathlib import Path

from cai.attest.tdx.collect import MEASUREMENTS, REPORTS, LinuxFiles


class FakeKernel(LinuxFiles):
    """What Linux does when an entry is made, ``inblob`` is written and a register is extended.

    Args:
        root: directory that becomes the root of ``sys``.
        quote: makes the outblob from 64 bytes of report data.
        rtmr: whether this kernel shows measurement registers (Linux 6.16).
    """

    def __init__(
        self, root: Path, quote: Callable[[bytes], bytes], *, rtmr: bool = True,
        provider: bytes = b"tdx_guest\n",
    ) -> None:
        super().__init__(root)
        self.root, self.make_quote, self.provider = root, quote, provider
        self.interference = 0
        self.entries: list[str] = []
        (root / REPORTS).mkdir(parents=True)
        if rtmr:
            (root / MEASUREMENTS).mkdir(parents=True)
            for number in range(4):
                (root / MEASUREMENTS / f"rtmr{number}:sha384").write_bytes(bytes(48))

    def make_directory(self, path: str) -> None:
        super().make_directory(path)
        self.entries.append(path)
        for name, content in (("provider", self.provider), ("generation", b"0\n"),
                              ("inblob", b""), ("outblob", b"")):  # fmt: skip
            (self.root / path / name).write_bytes(content)

    def remove_directory(self, path: str) -> None:
        for item in (self.root / path).iterdir():
            item.unlink()
        super().remove_directory(path)

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        if path.endswith("/inblob"):
            if len(data) > 64:
                raise OSError(errno.EINVAL, "Invalid argument")
            generation = target.with_name("generation")
            step = 1
            if self.interference:
                self.interference -= 1
                step = 2
            generation.write_bytes(b"%d\n" % (int(generation.read_bytes()) + step))
            target.with_name("outblob").write_bytes(self.make_quote(data))
        elif path.endswith(":sha384"):
            if len(data) != 48:
                raise OSError(errno.EINVAL, "Invalid argument")
            if not target.exists():
                raise OSError(errno.ENOENT, "No such file or directory")
            target.write_bytes(sha384(target.read_bytes() + data).digest())
        else:
            super().write(path, data)
