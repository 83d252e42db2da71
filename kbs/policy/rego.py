"""Layer three: the owner's Rego policy decides whether a resource is released.

The policy is ``package policy`` with a rule ``allow``. ``input`` is the claims of a freshly made
token, ``data`` is ``{"plugin": "resource", "resource-path": [repository, type, tag], "query": {}}``
(Trustee's resource policy). Only the JSON value ``true`` allows: an undefined rule, an error, a
conflict or any other value denies.
"""

from __future__ import annotations

import threading
from hashlib import sha256
from typing import Any

from cai import jcs
from cai.attest.verdict import Check, check
from cai.errors import FormatError, LimitExceeded
from kbs.names import ResourceName
from kbs.policy.rego_library import load_rego

MAX_POLICY = 256 * 1024
"""Largest policy text, bytes."""

CHECK_NAME = "release.allow"
"""Name of the check in verdicts and audit rows."""

# One evaluation takes about 3 ms, so it is not worth finding out how much state the evaluator's C++
# library shares between threads.
_EVALUATOR = threading.Lock()


class ReleasePolicy:
    """A policy text that was checked when it was stored.

    Attributes:
        text: the Rego text.
        digest: SHA-256 of its exact bytes, hex.
    """

    def __init__(self, text: str, digest: str) -> None:
        self.text = text
        self.digest = digest

    @classmethod
    def parse(cls, data: bytes) -> ReleasePolicy:
        """Check a policy text.

        Raises:
            LimitExceeded: longer than ``MAX_POLICY``.
            FormatError: not UTF-8, not Rego, or ``allow`` has no boolean default.
        """
        if len(data) > MAX_POLICY:
            raise LimitExceeded(f"policy: {len(data)} bytes, at most {MAX_POLICY} are accepted")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError("policy: not UTF-8") from error
        if "\x00" in text:
            raise FormatError("policy: holds a zero byte")
        value, problem = _evaluate(text, {}, {})
        if problem or not isinstance(value, bool):
            raise FormatError(
                f"policy: {problem or 'data.policy.allow is not true or false'}",
                hint="write `package policy` and `default allow := false`",
            )
        return cls(text, sha256(data).hexdigest())

    @classmethod
    def stored(cls, data: bytes) -> ReleasePolicy:
        """A policy that ``parse`` accepted before it was sealed into the database.

        Raises:
            FormatError: not UTF-8; it was stored by something else.
        """
        try:
            return cls(data.decode("utf-8"), sha256(data).hexdigest())
        except UnicodeDecodeError as error:
            raise FormatError("stored policy: not UTF-8") from error

    def decide(self, claims: dict[str, Any], resource: ResourceName) -> Check:
        """The check that the policy makes of one request."""
        data = {
            "plugin": "resource",
            "resource-path": [resource.repository, resource.type, resource.tag],
            "query": {},
        }
        value, problem = _evaluate(self.text, claims, data)
        observed = problem or ("undefined" if value is None else _shown(value))
        return check(
            CHECK_NAME,
            passed=value is True and not problem,
            observed=observed,
            expected="true",
            reason="the release policy does not allow it",
        )


def _shown(value: object) -> str:
    """A policy's answer as short text."""
    try:
        return jcs.canonical(value).decode("utf-8")[:64]
    except FormatError:
        return type(value).__name__


def _evaluate(text: str, claims: dict[str, Any], data: dict[str, Any]) -> tuple[Any, str]:
    """Value of ``data.policy.allow`` (``None`` when undefined), and what went wrong, if anything.

    Everything that the evaluator can raise or print ends as a problem text here.
    """
    regopy = load_rego()
    with _EVALUATOR:
        try:
            interpreter = regopy.Interpreter()
            interpreter.log_level = regopy.LogLevel.NONE
            interpreter.add_module("policy", text)
            interpreter.add_data_json(jcs.canonical(data).decode("utf-8"))
            # As canonical JSON: the evaluator does not decode \u escapes, and RFC 8785 has none
            # outside control characters.
            interpreter.set_input_term(jcs.canonical(claims).decode("utf-8"))
            output = interpreter.query("answer = data.policy.allow")
            if not output.ok():
                return None, "evaluation failed"
            results = output.results
        except (regopy.RegoError, ValueError, TypeError, KeyError, IndexError, OSError):
            # ValueError: the evaluator printed an error where JSON was expected.
            return None, "evaluation failed"
    if len(results) != 1:
        return None, "more than one answer"
    return results[0].bindings.get("answer"), ""
