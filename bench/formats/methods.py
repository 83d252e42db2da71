"""The methods that seal a model and show it: stock gocryptfs, ours, and plain encrypters."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from bench.formats.ground import CAI, FILE, Bench, run
from cai.mount import system

READ_AHEAD_KIB = "4096"

STOCK, NATIVE, GOCRYPTFS = "stock", "native", "gocryptfs"


def encrypt(bench: Bench, method: str) -> None:
    """Seal the model into ``bench.sealed``, anew."""
    out = bench.fresh(bench.sealed.name)
    if method == STOCK:
        out.mkdir()
        run("gocryptfs", "-q", "-init", "-scryptn", "10", "-passfile", bench.secret, out)
        bench.ready()
        start = time.perf_counter()
        with stock_mount(bench) as point:
            run("cp", bench.plain / FILE, point / FILE)
        seconds = time.perf_counter() - start
    else:
        options = ["--method", "gocryptfs"] if method == GOCRYPTFS else []
        bench.ready()
        seconds = run(*CAI, "encrypt", bench.plain, "-o", out, *options, "--key-file", bench.key)
    bench.note(f"encrypt/{method}", bench.size, seconds)


@contextlib.contextmanager
def stock_mount(bench: Bench, *options: str) -> Iterator[Path]:
    """Stock gocryptfs, as its defaults are."""
    point = bench.work / "stock-mnt"
    point.mkdir(exist_ok=True)
    run("gocryptfs", "-q", "-nosyslog", *options, "-passfile", bench.secret, bench.sealed, point)
    try:
        yield point
    finally:
        run("umount", "-l", point)


@contextlib.contextmanager
def tuned_stock(bench: Bench) -> Iterator[Path]:
    """Stock with its read-ahead raised from outside, as ours raises its own."""
    with stock_mount(bench, "-ro", "-kernel_cache") as point:
        mounted = system.mounted_at(point)
        if mounted is not None:
            (Path("/sys/class/bdi") / mounted.device / "read_ahead_kb").write_text(READ_AHEAD_KIB)
        yield point


@contextlib.contextmanager
def our_mount(bench: Bench, kind: str) -> Iterator[Path]:
    """``cai mount`` of a kind."""
    point = bench.work / "our-mnt"
    point.mkdir(exist_ok=True)
    run(*CAI, "mount", bench.sealed, point, "--key-file", bench.key, "--kind", kind)
    try:
        yield point
    finally:
        run(*CAI, "unmount", "--force", point)


def others(bench: Bench) -> None:
    """Plain ``cp``, age and rclone: there, and back where there is a way back."""
    if not bench.wanted("encrypt/others", "encrypt/cp", "encrypt/age", "encrypt/rclone"):
        return
    out = bench.fresh(bench.sealed.name)
    out.mkdir()
    bench.ready()
    bench.note("encrypt/cp, no crypto", bench.size, run("cp", bench.plain / FILE, out / "copy"))
    (out / "copy").unlink()
    _age(bench, out)
    _rclone(bench, out)
    shutil.rmtree(out)


def _age(bench: Bench, out: Path) -> None:
    if shutil.which("age") is None:
        bench.skipped["age"] = "not installed"
        return
    keys = bench.work / "age.key"
    if not keys.exists():
        run("age-keygen", "-o", keys)
    recipient = next(
        line.split()[-1] for line in keys.read_text().splitlines() if "public key" in line
    )
    bench.ready()
    seconds = run("age", "-r", recipient, "-o", out / "age", bench.plain / FILE)
    bench.note("encrypt/age", bench.size, seconds)
    bench.ready()
    seconds = run("age", "-d", "-i", keys, "-o", out / "plain", out / "age")
    bench.note("materialise/age plain", bench.size, seconds)
    (out / "age").unlink()
    (out / "plain").unlink()


def _rclone(bench: Bench, out: Path) -> None:
    if shutil.which("rclone") is None:
        bench.skipped["rclone crypt"] = "not installed"
        return
    if "encrypt/rclone crypt" in bench.found:
        return  # slow, and no target hangs on it: once is enough
    secret = subprocess.check_output(["rclone", "obscure", "bench"], text=True).strip()
    remote = f":crypt,remote={out}/rclone,password={secret}:"
    bench.ready()
    bench.note("encrypt/rclone crypt", bench.size, run("rclone", "copy", bench.plain, remote))
    bench.ready()
    seconds = run("rclone", "copy", remote, out / "plain")
    bench.note("materialise/rclone crypt plain", bench.size, seconds)
