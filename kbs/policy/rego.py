"""Rego texts of an owner: checked when they are uploaded, evaluated in processes of their own.

Two kinds. A *resource policy* has the rule ``allow``; ``input`` is the claims of a freshly made
token and ``data`` names the resource as Trustee does. An *attestation policy* has the rule
``trust_claims`` and perhaps ``extensions``; ``input`` is the evidence of one submodule. Both may
call ``query_reference_value``. Only the JSON value ``true`` allows: an undefined rule, an error, a
conflict, a time-out or any other value denies (docs/kbs-policies.md).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

from cai import jcs
from cai.attest.verdict import Check, check
from cai.errors import CaiError, FormatError, LimitExceeded
from kbs.names import ResourceName
from kbs.policy.pool import Evaluation, Inspection, RegoPool
from kbs.policy.worker import PRELUDE_RULE

MAX_POLICY = 256 * 1024
"""Largest policy text, bytes."""

CHECK_NAME = "release.allow"
"""Name of the check in verdicts and audit rows."""

ALLOW: Final = "allow"
"""Rule of a resource policy."""

TRUST_CLAIMS: Final = "trust_claims"
"""Rule of an attestation policy."""

EXTENSIONS: Final = "extensions"
"""Further rule of an attestation policy, optional."""

REFERENCES: Final = "reference_values"
"""Member of ``data`` that the prelude reads."""

FAMILIES: Final = frozenset({
    "array", "base64", "base64url", "bits", "crypto", "glob", "graph", "hex", "internal", "io",
    "json", "net", "numbers", "object", "regex", "semver", "strings", "time", "units", "urlquery",
    "uuid", "yaml",
})  # fmt: skip
"""First words of the built-in functions that compute from their arguments alone, and the clock."""

REFUSED: Final = frozenset({
    "internal.print", "print", "trace", "net.lookup_ip_addr", "uuid.rfc4122",
})  # fmt: skip
"""Functions that would be in ``FAMILIES``, or have no family, but reach out, print or guess."""

# Blank lines and comments may stand before the package; it is the first statement of a module, so
# a text that begins so cannot declare another one.
_PACKAGE = re.compile(r"(?:\s|#[^\n]*\n)*package[ \t]+policy[ \t]*(?:\r?\n|$)")


class RegoPolicy:
    """A policy text that was checked when it was stored.

    Attributes:
        text: the Rego text.
        digest: SHA-256 of its exact bytes, hex.
    """

    def __init__(self, text: str, digest: str) -> None:
        self.text = text
        self.digest = digest

    @classmethod
    def checked(cls, data: bytes, pool: RegoPool) -> RegoPolicy:
        """Check what every policy must be.

        Raises:
            LimitExceeded: longer than ``MAX_POLICY``.
            FormatError: not UTF-8, not Rego, another package, a function that reaches out, or the
                prelude again.
        """
        if len(data) > MAX_POLICY:
            raise LimitExceeded(f"policy: {len(data)} bytes, at most {MAX_POLICY} are accepted")
        policy = cls.stored(data)
        if "\x00" in policy.text:
            raise FormatError("policy: holds a zero byte")
        found = pool.inspect(policy.text)
        if found.problem:
            raise FormatError(f"policy: {found.problem}")
        if not _PACKAGE.match(policy.text):
            raise FormatError("policy: it must begin with `package policy`")
        _require_own_rules(found)
        _require_pure(found)
        return policy

    @classmethod
    def checked_resource(cls, data: bytes, pool: RegoPool) -> RegoPolicy:
        """Check a resource policy: ``allow`` must be true or false whatever it is asked.

        Raises:
            LimitExceeded, FormatError: as ``checked``, or ``allow`` has no boolean default.
        """
        policy = cls.checked(data, pool)
        answer = pool.evaluate(policy.text, (ALLOW,), data={}, input={})
        if answer.problem or not isinstance(answer.values.get(ALLOW), bool):
            raise FormatError(
                f"policy: {answer.problem or 'data.policy.allow is not true or false'}",
                hint="write `package policy` and `default allow := false`",
            )
        return policy

    @classmethod
    def checked_attestation(cls, data: bytes, pool: RegoPool) -> RegoPolicy:
        """Check an attestation policy: it evaluates, and its claims have names that there are.

        Raises:
            LimitExceeded, FormatError: as ``checked``, or the claims have another form.
        """
        from kbs.policy.vector import parse_vector

        policy = cls.checked(data, pool)
        found = pool.inspect(policy.text)
        if not any(rule.split(".")[2:3] == [TRUST_CLAIMS] for rule in found.rules):
            raise FormatError(
                "policy: it has no rule trust_claims",
                hint='trust_claims := {"executables": executables, "hardware": hardware}',
            )
        rules = (TRUST_CLAIMS, EXTENSIONS)
        answer = policy.evaluate(pool, rules, data={}, claims={}, references={})
        if answer.problem:
            raise FormatError(f"policy: {answer.problem}")
        if TRUST_CLAIMS in answer.values:
            parse_vector(answer.values[TRUST_CLAIMS])
        return policy

    @classmethod
    def stored(cls, data: bytes) -> RegoPolicy:
        """A policy that was checked before it was sealed into the database.

        Raises:
            FormatError: not UTF-8; it was stored by something else.
        """
        try:
            return cls(data.decode("utf-8"), sha256(data).hexdigest())
        except UnicodeDecodeError as error:
            raise FormatError("policy: not UTF-8") from error

    def evaluate(
        self,
        pool: RegoPool,
        rules: tuple[str, ...],
        *,
        data: Mapping[str, Any],
        claims: Mapping[str, Any],
        references: Mapping[str, Any],
    ) -> Evaluation:
        """The values of rules, with the reference values in force as data."""
        try:
            return pool.evaluate(
                self.text, rules, data={**data, REFERENCES: dict(references)}, input=claims
            )
        except CaiError as error:
            return Evaluation(problem=error.message)

    def decide(
        self,
        pool: RegoPool,
        claims: Mapping[str, Any],
        resource: ResourceName,
        references: Mapping[str, Any],
    ) -> Check:
        """The check that a resource policy makes of one request."""
        data = {
            "plugin": "resource",
            "resource-path": [resource.repository, resource.type, resource.tag],
            "query": {},
        }
        answer = self.evaluate(pool, (ALLOW,), data=data, claims=claims, references=references)
        value = answer.values.get(ALLOW)
        observed = answer.problem or ("undefined" if ALLOW not in answer.values else shown(value))
        return check(
            CHECK_NAME,
            passed=value is True and not answer.problem,
            observed=observed,
            expected="true",
            reason="the resource policy does not allow it",
        )


def shown(value: object) -> str:
    """A policy's answer as short text."""
    try:
        return jcs.canonical(value).decode("utf-8")[:64]
    except FormatError:
        return type(value).__name__


def _require_own_rules(found: Inspection) -> None:
    for rule in found.rules:
        package = rule.split(".")[1:2]
        # Beside the packages the compiler names the query that it was given.
        if package != ["policy"] and not package[0].startswith("query$"):
            raise FormatError(
                f"policy: it defines {rule.partition('.')[2][:64]}, which is another package"
            )
    if found.redefines:
        raise FormatError(f"policy: it defines {PRELUDE_RULE}, which the broker provides")


def _require_pure(found: Inspection) -> None:
    for name in found.calls:
        family, dot, _ = name.partition(".")
        if name in REFUSED or (dot and family not in FAMILIES):
            raise FormatError(
                f"policy: it calls {name[:64]}, which no policy may",
                hint="a policy sees its input, its data and reference values, and nothing else",
            )
    if found.absent:
        raise FormatError(f"policy: it calls {found.absent[0][:64]}, which is not there")
