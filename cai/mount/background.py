"""Goes on in the background once a mount is usable, and tells the caller so, or why not.

The child has no terminal and no output from the start: its workers would keep the caller's pipes
open for as long as the mount lives. So errors come back through a pipe, and what happens later goes
to the system log or to a file.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from logging.handlers import SysLogHandler
from pathlib import Path
from typing import Any

from cai import jcs
from cai.errors import CaiError, from_exit_status, from_os_error
from cai.mount import worker

MAX_REPORT = 64 * 1024
"""Longest report of the child, bytes."""

SYSTEM_LOG = Path("/dev/log")

Report = dict[str, Any]
Serve = Callable[[Callable[[Report], None]], None]
"""What the child does; it calls its argument once, when the mount is usable."""

log = logging.getLogger("cai.mount")


def start(serve: Serve, *, log_file: Path | None = None) -> Report:
    """Run ``serve`` in a child that stays when this process ends.

    Args:
        serve: what the child does.
        log_file: where it logs; by default to the system log, if there is one.

    Returns:
        What the child reported when it was ready.

    Raises:
        CaiError: what ended the child before it was ready.
    """
    handler = _handler(log_file)
    reading, writing = os.pipe()
    try:
        pid = os.fork()
    except OSError as error:
        raise from_os_error(error, "go into the background") from error
    if pid == 0:
        os.close(reading)
        _child(serve, writing, handler)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            line = pipe.readline(MAX_REPORT)
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    report: Report = jcs.parse(line, what="report", limit=MAX_REPORT) if line else {}
    if "ready" in report:
        return dict(report["ready"])
    _pid, status = os.waitpid(pid, 0)
    raise _error(report, os.waitstatus_to_exitcode(status))


def _error(report: Report, status: int) -> CaiError:
    if not report:
        return CaiError(f"the background process ended with status {status}")
    error = from_exit_status(status, str(report["message"]), report.get("hint"))
    error.machine_code = str(report["code"])
    return error


def _child(serve: Serve, writing: int, handler: logging.Handler) -> None:
    """Never returns: nothing of the parent's stack may run in the child."""
    status = 1

    def ready(report: Report) -> None:
        nonlocal writing
        worker.PRIVATE.discard(writing)
        _send(writing, {"ready": report})
        writing = -1

    try:
        os.setsid()
        os.chdir("/")
        worker.PRIVATE.add(writing)
        _leave_terminal(handler)
        serve(ready)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except CaiError as error:
        status = error.exit_status
        if writing >= 0:
            _send(writing, error.to_json())
        else:
            log.error("%s", error.message)
    except BaseException:
        log.exception("the mount's process failed")
    finally:
        os._exit(status)


def _send(writing: int, report: Report) -> None:
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(jcs.canonical(report) + b"\n")


def _leave_terminal(handler: logging.Handler) -> None:
    root = logging.getLogger()
    root.handlers = [handler]
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def _handler(log_file: Path | None) -> logging.Handler:
    handler: logging.Handler = logging.NullHandler()
    try:
        if log_file is not None:
            handler = logging.FileHandler(log_file, encoding="utf-8")
        elif SYSTEM_LOG.is_socket():
            handler = SysLogHandler(str(SYSTEM_LOG))
    except OSError as error:
        raise from_os_error(error, f"open {log_file or SYSTEM_LOG} for logging") from error
    stamp = "" if log_file is None else "%(asctime)s "
    handler.setFormatter(logging.Formatter(f"{stamp}cai: %(levelname)s: %(message)s"))
    return handler
