"""The process that evaluates Rego, so that a policy's trouble is never the broker's.

A policy can loop, eat memory or make the engine's C++ library call ``terminate``; all of that ends
this process and nothing else. It starts with an empty environment, so ``opa.runtime`` would have
nothing to show, and with limits on memory, processor time, files and open descriptors. It reads a
request and writes an answer, each as a frame: four bytes of length, big-endian, and that much JSON.
It can be asked two things, ``evaluate`` and ``inspect``; ``kbs.policy.pool`` is the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from kbs.policy.rego_library import load_rego

PRELUDE = "prelude.rego"
"""File of the prelude, beside this module."""

PRELUDE_RULE = "query_reference_value"
"""The one function that the prelude defines."""

MAX_FRAME = 8 * 1024 * 1024
"""Longest frame, bytes."""

MAX_PROBLEM = 512
"""Longest description of what went wrong, characters."""

SPARE_SECONDS = 2
"""After its parent's time-out a worker ends itself, should nobody have ended it; seconds."""

_DESCRIPTORS = 64
_LENGTH = 4


def main() -> None:
    """Serve requests until the pipe closes. Arguments: time limit in seconds, memory in MiB."""
    seconds, mebibytes = int(sys.argv[1]), int(sys.argv[2])
    # Whatever the engine prints must not become part of an answer.
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    regopy = load_rego()
    limit(mebibytes)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while (request := _read(requests)) is not None:
        # The kernel ends the process, even while it is in the engine's code.
        signal.setitimer(signal.ITIMER_REAL, seconds + SPARE_SECONDS)
        answer = serve(regopy, request)
        signal.setitimer(signal.ITIMER_REAL, 0)
        data = json.dumps(answer).encode("ascii")
        if len(data) > MAX_FRAME:
            data = json.dumps({"problem": "the answer is too long"}).encode("ascii")
        answers.write(len(data).to_bytes(_LENGTH, "big") + data)
        answers.flush()


def limit(mebibytes: int) -> None:
    """Give up what an evaluation does not need."""
    # The engine's allocator has reserved hundreds of GiB of addresses by now, so this bounds only
    # what is mapped beside it; what is really used is watched by the parent (kbs.policy.pool).
    memory = _address_space() + mebibytes * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # If memory runs out all the same, this process is the one to go.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_DESCRIPTORS, _DESCRIPTORS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FRAME, MAX_FRAME))


def _address_space() -> int:
    """Addresses that this process has mapped, bytes."""
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    return pages * resource.getpagesize()


def serve(regopy: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    try:
        if request["do"] == "inspect":
            return _inspect(regopy, request["text"])
        return _evaluate(regopy, request)
    except (regopy.RegoError, MemoryError, RecursionError) as error:
        return {"problem": _message(error)}
    except (ValueError, TypeError, KeyError, IndexError, OSError) as error:
        return {"problem": f"evaluation failed ({type(error).__name__})"}


def _evaluate(regopy: Any, request: dict[str, Any]) -> dict[str, Any]:
    interpreter = _loaded(regopy, request["text"])
    interpreter.add_data_json(request["data"])
    interpreter.set_input_term(request["input"])
    values: dict[str, Any] = {}
    for rule in request["rules"]:
        output = interpreter.query(f"answer = data.policy.{rule}")
        # Not ok: a conflict, or a built-in function's error.
        if not output.ok() or len(output.results) != 1:
            return {"problem": f"{rule}: evaluation failed"}
        bindings = output.results[0].bindings
        if "answer" in bindings:
            values[rule] = bindings["answer"]
    return {"values": values, "problem": ""}


def _inspect(regopy: Any, text: str) -> dict[str, Any]:
    """What a policy is made of, as the engine's own compiler sees it.

    The whole of ``data`` is compiled, so that rules which no query reaches count as well.
    """
    plan = _plan(regopy, text)
    functions = plan["funcs"]["funcs"]
    calls = sorted({item["name"] for item in plan["static"]["builtin_funcs"]})
    interpreter = regopy.Interpreter()
    return {
        "problem": "",
        "rules": sorted({".".join(item["path"]) for item in functions}),
        "calls": calls,
        "absent": [name for name in calls if not interpreter.is_builtin(name)],
        # Each clause of a function compiles to a block of its own.
        "redefines": _prelude_blocks(plan) != _prelude_blocks(_plan(regopy, "package policy\n")),
    }


def _plan(regopy: Any, text: str) -> dict[str, Any]:
    interpreter = _loaded(regopy, text)
    bundle = interpreter.build("answer = data")
    if not bundle.ok():
        raise ValueError("it does not compile")
    with tempfile.TemporaryDirectory(prefix="kbs-policy-") as directory:
        interpreter.save_bundle(directory, bundle)
        plan: dict[str, Any] = json.loads(Path(directory, "plan.json").read_bytes())
    return plan


def _prelude_blocks(plan: dict[str, Any]) -> int:
    functions = plan["funcs"]["funcs"]
    return sum(len(item["blocks"]) for item in functions if PRELUDE_RULE in item["path"])


def _loaded(regopy: Any, text: str) -> Any:
    interpreter = regopy.Interpreter()
    interpreter.log_level = regopy.LogLevel.NONE
    # Without it a failing built-in is undefined, and `not` of it is true.
    interpreter.strict_built_in_errors = True
    interpreter.add_module("prelude", Path(__file__).with_name(PRELUDE).read_text("utf-8"))
    interpreter.add_module("policy", text)
    return interpreter


def _message(error: BaseException) -> str:
    """The engine's own words, without its syntax tree."""
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = str(error)
    _, found, rest = text.partition("(errormsg ")
    if found:
        # `<length>:<text>)`: the length is in bytes.
        size, _, message = rest.partition(":")
        if size.isdigit():
            return message.encode("utf-8")[: int(size)].decode("utf-8", "replace")[:MAX_PROBLEM]
    return "evaluation failed"


def _read(stream: BinaryIO) -> dict[str, Any] | None:
    head = stream.read(_LENGTH)
    if len(head) != _LENGTH:
        return None
    value = json.loads(stream.read(int.from_bytes(head, "big")))
    return value if isinstance(value, dict) else None


if __name__ == "__main__":
    main()
