"""Sealed models against stock gocryptfs, age and rclone: one run, interleaved rounds, ratios.

    python -m bench.formats [--size MIB] [--rounds N] [--full] [--json FILE] [--only NAME,…]

Needs root, /dev/fuse and gocryptfs; age and rclone are measured when they are installed. Source and
output lie in memory, so that no disk is measured. Each line is the median over the rounds, and its
ratio to the stock measurement that it is compared with; ratios inside one run are what counts. The
CPU seconds are those of all processes for a GiB (for a million reads, where reads are counted).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cai.mount import system

MIB = 1024 * 1024
PYTHON = [sys.executable]
CAI = [*PYTHON, "-m", "cai"]
FILE = "model.safetensors"
ROOT = Path(__file__).resolve().parent.parent
READ_AHEAD_KIB = "4096"

TARGETS = {
    "encrypt/native": ("encrypt/stock", 5.5), "encrypt/gocryptfs": ("encrypt/stock", 4.5),
    "materialise/native plain": ("materialise/stock plain", 2.5),
    "materialise/native huge": ("materialise/stock huge", 6.0),
    "materialise/gocryptfs huge": ("materialise/stock huge", 2.0),
    "seq/native": ("seq/stock", 2.2), "mmap/native": ("mmap/stock", 2.5),
    "warm/native": ("warm/plain file", 0.7),
    "seq/pass-through": ("seq/plain file", 0.7), "mmap/pass-through": ("mmap/plain file", 0.7),
    "random/native": ("random/stock", 0.5), "random/pass-through": ("random/plain file", 0.7),
}  # fmt: skip
"""What each is compared with, and the least ratio."""


class Account:
    """CPU time of this process and all that come from it, servers in the background included.

    On a machine that others use too, wall time says little and this says more: what takes half the
    CPU time can be twice as fast where the cores are free.
    """

    def __init__(self) -> None:
        self._file: Path | None = None
        self._start = 0.0
        for top, name, joining in (
            ("/sys/fs/cgroup/cpuacct", "cpuacct.usage", "cgroup.procs"),
            ("/sys/fs/cgroup", "cpu.stat", "cgroup.procs"),
        ):
            group = Path(top) / f"bench-{os.getpid()}"
            with contextlib.suppress(OSError):
                group.mkdir()
                (group / joining).write_text(str(os.getpid()))
                self._file = group / name
                self._now()
                break

    def restart(self) -> None:
        """Count from now on."""
        self._start = self._now()

    def used(self) -> float | None:
        """Seconds since ``restart``, or ``None`` where they cannot be counted."""
        return None if self._file is None else self._now() - self._start

    def close(self) -> None:
        """Leave the group and remove it, once nothing is in it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                (self._file.parent.parent / "cgroup.procs").write_text(str(os.getpid()))
                self._file.parent.rmdir()

    def _now(self) -> float:
        if self._file is None:
            return 0.0
        text = self._file.read_text()
        if self._file.name == "cpuacct.usage":
            return int(text) / 1e9
        return int(text.split()[1]) / 1e6  # usage_usec N


@dataclass
class Bench:
    """The folders of one run and what was measured.

    Attributes:
        work: a tmpfs of our own, without large pages.
        size: bytes of the model's weights.
        found: name to measurements, MB/s or reads a second.
        cpu: name to CPU seconds of all processes for a GiB, or for a million reads.
        account: counts CPU time.
        skipped: name to reason.
    """

    work: Path
    size: int
    only: tuple[str, ...] = ()
    found: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    account: Account = field(default_factory=Account)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def plain(self) -> Path:
        return self.work / "plain"

    @property
    def secret(self) -> Path:
        return self.work / "password"

    @property
    def key(self) -> Path:
        return self.work / "key"

    def note(self, name: str, amount: float, seconds: float) -> None:
        """Note a measurement, and the CPU time since the last call of ``account.restart``."""
        self.found.setdefault(name, []).append(amount / seconds)
        used = self.account.used()
        if used is not None:
            unit = 1e6 if name.startswith("random") else 1024 * MIB
            self.cpu.setdefault(name, []).append(used / amount * unit)

    def wanted(self, name: str) -> bool:
        return not self.only or any(name.startswith(part) for part in self.only)

    def fresh(self, name: str) -> Path:
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def run(*command: str | Path) -> float:
    """Run a command; wall seconds."""
    # Not a pipe: what goes into the background would keep it open.
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        done = subprocess.run(
            [str(part) for part in command], check=False, stdin=subprocess.DEVNULL, stdout=said,
            stderr=said, cwd=ROOT, timeout=1800,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        if done.returncode:
            said.seek(0)
            raise SystemExit(f"{command[:4]}: {said.read().decode(errors='replace')}")
    return seconds


def available_memory() -> int:
    """Bytes that can be taken without swapping (proc(5), MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def tmpfs(path: Path, size: int, huge: str) -> Iterator[Path]:
    """A tmpfs on ``path``."""
    path.mkdir(exist_ok=True)
    system.mount("bench", path, "tmpfs", 0, f"size={size},huge={huge},mode=0700")
    try:
        yield path
    finally:
        system.unmount(path, system.MNT_DETACH)


def write_model(path: Path, size: int) -> None:
    """A safetensors file that no compression makes smaller."""
    path.mkdir()
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    block = bytearray(os.urandom(64 * MIB))
    with (path / FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for number in range(-(-size // len(block))):
            for start in range(0, len(block), 4096):
                block[start] = (block[start] + number) & 0xFF
            file.write(block[: min(len(block), size - number * len(block))])


# --- encrypting --------------------------------------------------------------------------------


def stock_init(bench: Bench, folder: Path) -> None:
    folder.mkdir()
    run("gocryptfs", "-q", "-init", "-scryptn", "10", "-passfile", bench.secret, folder)


@contextlib.contextmanager
def stock_mount(bench: Bench, folder: Path, *options: str) -> Iterator[Path]:
    point = bench.work / "stock-mnt"
    point.mkdir(exist_ok=True)
    run("gocryptfs", "-q", "-nosyslog", *options, "-passfile", bench.secret, folder, point)
    try:
        yield point
    finally:
        run("umount", "-l", point)


def encrypt_stock(bench: Bench) -> None:
    folder = bench.fresh("stock")
    stock_init(bench, folder)
    bench.account.restart()
    start = time.perf_counter()
    with stock_mount(bench, folder) as point:
        run("cp", bench.plain / FILE, point / FILE)
    bench.note("encrypt/stock", bench.size, time.perf_counter() - start)


def encrypt_ours(bench: Bench, name: str, *options: str | Path) -> None:
    out = bench.fresh(name)
    bench.account.restart()
    seconds = run(*CAI, "encrypt", bench.plain, "-o", out, *options)
    bench.note(f"encrypt/{name}", bench.size, seconds)


def encrypt_others(bench: Bench) -> None:
    out = bench.fresh("other")
    out.mkdir()
    bench.account.restart()
    bench.note("encrypt/cp, no crypto", bench.size, run("cp", bench.plain / FILE, out / "copy"))
    (out / "copy").unlink()
    if shutil.which("age") is None:
        bench.skipped["encrypt/age"] = "age is not installed"
    else:
        keys = bench.work / "age.key"
        if not keys.exists():
            run("age-keygen", "-o", keys)
        recipient = next(
            line.split()[-1] for line in keys.read_text().splitlines() if "public key" in line
        )
        bench.account.restart()
        seconds = run("age", "-r", recipient, "-o", out / "age", bench.plain / FILE)
        bench.note("encrypt/age", bench.size, seconds)
        (out / "age").unlink()
    if shutil.which("rclone") is None:
        bench.skipped["encrypt/rclone crypt"] = "rclone is not installed"
    else:
        secret = subprocess.check_output(["rclone", "obscure", "bench"], text=True).strip()
        remote = f":crypt,remote={out}/rclone,password={secret}:"
        bench.account.restart()
        seconds = run("rclone", "copy", bench.plain, remote)
        bench.note("encrypt/rclone crypt", bench.size, seconds)
    shutil.rmtree(out)


# --- materialising -----------------------------------------------------------------------------


def materialise(bench: Bench) -> None:
    room = bench.size + 64 * MIB
    for pages, huge in (("plain", "never"), ("huge", "within_size")):
        name = f"materialise/stock {pages}"
        if bench.wanted(name):
            with tmpfs(bench.work / "target", room, huge) as target:
                bench.account.restart()
                start = time.perf_counter()
                with stock_mount(bench, bench.work / "stock", "-ro") as point:
                    run("cp", point / FILE, target / FILE)
                bench.note(name, bench.size, time.perf_counter() - start)
        for method in ("native", "gocryptfs"):
            name = f"materialise/{method} {pages}"
            if bench.wanted(name) and (bench.work / method).exists():
                bench.account.restart()
                seconds = run(
                    *PYTHON, "-m", "bench.materialise", bench.work / method, bench.key, huge
                )
                bench.note(name, bench.size, seconds)


# --- reading through mounts --------------------------------------------------------------------


def read(bench: Bench, name: str, way: str, path: Path) -> None:
    bench.account.restart()
    done = subprocess.check_output(
        [*PYTHON, "-m", "bench.reading", way, str(path)], cwd=ROOT, text=True
    )
    count, seconds = done.split()
    bench.note(name, float(count), float(seconds))


@contextlib.contextmanager
def our_mount(bench: Bench, method: str, kind: str) -> Iterator[Path]:
    point = bench.work / "our-mnt"
    point.mkdir(exist_ok=True)
    run(*CAI, "mount", bench.work / method, point, "--key-file", bench.key, "--kind", kind)
    try:
        yield point
    finally:
        run(*CAI, "unmount", "--force", point)


@contextlib.contextmanager
def tuned_stock(bench: Bench) -> Iterator[Path]:
    """Stock with its read-ahead raised from outside, as ours raises its own."""
    with stock_mount(bench, bench.work / "stock", "-ro", "-kernel_cache") as point:
        mounted = system.mounted_at(point)
        if mounted is not None:
            (Path("/sys/class/bdi") / mounted.device / "read_ahead_kb").write_text(READ_AHEAD_KIB)
        yield point


Mounter = Callable[[], contextlib.AbstractContextManager[Path]]


def read_all(bench: Bench) -> None:
    mounts: dict[str, Mounter] = {
        "stock": lambda: stock_mount(bench, bench.work / "stock", "-ro"),
        "stock, read-ahead raised": lambda: tuned_stock(bench),
        "native": lambda: our_mount(bench, "native", "fuse"),
        "gocryptfs": lambda: our_mount(bench, "gocryptfs", "fuse"),
        "pass-through": lambda: our_mount(bench, "native", "passthrough"),
        "plain file": lambda: contextlib.nullcontext(bench.plain),
        "plain file, large pages": lambda: contextlib.nullcontext(bench.work / "plain-huge"),
    }
    for name, mounter in mounts.items():
        method = {"native": "native", "gocryptfs": "gocryptfs"}.get(name, "stock")
        if not (bench.work / method).exists():
            continue
        for way in ("seq", "mmap", "random"):
            if not bench.wanted(f"{way}/{name}"):
                continue
            with mounter() as point:
                if name == "pass-through":
                    bench.account.restart()
                    start = time.perf_counter()
                    with (point / FILE).open("rb"):
                        bench.note(
                            "first open/pass-through", bench.size, time.perf_counter() - start
                        )
                read(bench, f"{way}/{name}", way, point / FILE)
                if way == "seq":
                    read(bench, f"warm/{name}", "seq", point / FILE)


# --- many files, memory ------------------------------------------------------------------------


def many_files(bench: Bench) -> dict[str, float]:
    """CPU seconds to open a model of 200 files, list it and read the first byte of each."""
    plain = bench.fresh("many")
    plain.mkdir()
    for number in range(200):
        (plain / f"part-{number:03}.safetensors").write_bytes(os.urandom(100_000))
    out = bench.fresh("many.sealed")
    run(*CAI, "encrypt", plain, "-o", out, "--key-file", bench.key)
    done = subprocess.check_output(
        [*PYTHON, "-m", "bench.materialise", out, bench.key, "first-bytes"], cwd=ROOT, text=True
    )
    whole, work = (float(part) for part in done.split())
    return {"whole process": whole, "without starting Python": work}


def peak_memory(bench: Bench, sizes: tuple[int, ...]) -> dict[str, float]:
    """Peak MiB (proportional set size) of sealing, checking and serving a sparse file."""
    from tests.e2e.process_memory import PeakPss

    found = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("CAI_BENCH_DISK")) as disk:
        for gib in sizes:
            plain, out = Path(disk) / "sparse", Path(disk) / "sparse.sealed"
            plain.mkdir()
            with (plain / FILE).open("wb") as file:
                file.truncate(gib * 1024 * MIB)
            for verb, command in {
                "encrypt": [*CAI, "encrypt", plain, "-o", out, "--key-file", bench.key],
                "check": [*CAI, "check", out, "--key-file", bench.key],
            }.items():
                with (
                    subprocess.Popen(
                        [str(part) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL
                    ) as process,
                    PeakPss(process.pid) as memory,
                ):
                    if process.wait():
                        raise SystemExit(f"{verb} of {gib} GiB failed")
                found[f"{verb} {gib} GiB"] = memory.peak / MIB
            shutil.rmtree(plain)
            shutil.rmtree(out)
    return found


# --- the run -----------------------------------------------------------------------------------


def one_round(bench: Bench) -> None:
    if bench.wanted("encrypt") or not (bench.work / "stock").exists():
        encrypt_stock(bench)
        encrypt_ours(bench, "native", "--key-file", bench.key)
        try:
            encrypt_ours(bench, "gocryptfs", "--method", "gocryptfs", "--key-file", bench.key)
        except SystemExit as error:
            bench.skipped["gocryptfs method"] = str(error).splitlines()[-1]
            bench.fresh("gocryptfs")
        if bench.wanted("encrypt/others"):
            encrypt_others(bench)
    materialise(bench)
    read_all(bench)


def report(bench: Bench, extra: dict[str, dict[str, float]]) -> dict[str, object]:
    rows = {}
    for name, values in bench.found.items():
        median = statistics.median(values)
        unit = "reads/s" if name.startswith("random") else "MB/s"
        value = median if unit == "reads/s" else median / 1e6
        against, least = TARGETS.get(name, (name.split("/")[0] + "/stock", 0.0))
        other = bench.found.get(against)
        ratio = median / statistics.median(other) if other else None
        low, high = min(values), max(values)
        spread = f"{(high - low) / median * 100:.0f} %"
        cost, cost_ratio = bench.cpu.get(name), None
        if cost and against in bench.cpu:
            cost_ratio = statistics.median(bench.cpu[against]) / statistics.median(cost)
        rows[name] = {
            "cpu": cost and round(statistics.median(cost), 3),
            "cpu_ratio": cost_ratio and round(cost_ratio, 2),
            "value": round(value, 1), "unit": unit, "spread": spread, "against": against,
            "ratio": ratio and round(ratio, 2), "target": least,
        }  # fmt: skip
        mark = "" if not least or ratio is None else ("ok" if ratio >= least else "MISSED")
        shown = "" if ratio is None else f"{ratio:6.2f}x of {against}"
        goal = f" (target {least}x: {mark})" if least else ""
        spent = "" if not cost else f"{statistics.median(cost):7.2f} CPU s"
        spent += "" if cost_ratio is None else f" ({cost_ratio:.2f}x less)"
        print(f"{name:34} {value:10.0f} {unit:8} ±{spread:6} {spent:26} {shown}{goal}")
    for title, values in extra.items():
        for name, number in values.items():
            print(f"{title}: {name}: {number:.2f}")
    for name, reason in bench.skipped.items():
        print(f"{name}: not measured: {reason}")
    return {"size": bench.size, "rows": rows, "extra": extra, "skipped": bench.skipped}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--size", type=int, default=512, help="MiB of weights")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--full", action="store_true", help="4 GiB, and memory at 1, 4, 16 GiB")
    options.add_argument("--json", type=Path)
    options.add_argument("--only", default="", help="names, or beginnings of names, with commas")
    given = options.parse_args()
    size = 4096 * MIB if given.full else given.size * MIB
    # Source, three sealed copies and one more on the way, and the source again on large pages.
    needed = 6 * size + 2048 * MIB
    if needed > available_memory():
        options.error(
            f"{needed / MIB / 1024:.0f} GiB of memory are needed, "
            f"{available_memory() / MIB / 1024:.0f} are available; choose a smaller --size"
        )
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    load = os.getloadavg()[0]
    with tmpfs(folder, 5 * size + 1024 * MIB, "never") as work:
        bench = Bench(work, size, tuple(part for part in given.only.split(",") if part))
        write_model(bench.plain, size)
        bench.secret.write_text("bench\n")
        bench.key.write_text(os.urandom(32).hex() + "\n")
        extra: dict[str, dict[str, float]] = {}
        with tmpfs(work / "plain-huge", size + 64 * MIB, "within_size") as huge:
            shutil.copyfile(bench.plain / FILE, huge / FILE)
            for number in range(given.rounds):
                print(f"round {number + 1} of {given.rounds}", file=sys.stderr)
                one_round(bench)
        if bench.wanted("many"):
            extra["open, list, first byte of 200 files, CPU s"] = many_files(bench)
        for name in ("stock", "native", "gocryptfs"):
            bench.fresh(name)
        if bench.wanted("memory"):
            extra["peak memory, MiB"] = peak_memory(bench, (1, 4, 16) if given.full else (1,))
    folder.rmdir()
    bench.account.close()
    print(f"{size / MIB:.0f} MiB, {os.cpu_count()} cores, load before {load:.1f}, "
          f"Linux {os.uname().release}")  # fmt: skip
    result = report(bench, extra)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
