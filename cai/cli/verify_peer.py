"""``cai verify http://HOST:PORT``: the part of that verb that is about a running egress."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cai.errors import UsageError

EXPECTATIONS = ("launch", "service", "owner", "model_root", "content_root")
"""What ``--expect`` can name (decisions §2.4)."""


@dataclass(frozen=True, slots=True)
class PeerOptions:
    """What the command line says of verification; the names are those of its options."""

    policy: Path | None
    collateral: Path | None
    rims: Path | None
    ocsp: Path | None
    unsafe_simulated_root: Path | None
    as_addr: str
    as_policy: tuple[str, ...]
    as_certificate: tuple[Path, ...]
    expect: tuple[str, ...]

    def verify(self) -> dict[str, Any]:
        """The ``verify`` of an ingress entry.

        Raises:
            UsageError: neither a policy nor a service, or both.
        """
        if (self.policy is None) == (not self.as_addr):
            raise UsageError("give --policy FILE, or --as-addr URL of an attestation service")
        expected: dict[str, str] = {}
        for text in self.expect:
            name, equals, value = text.partition("=")
            if not equals or name not in EXPECTATIONS or name in expected:
                raise UsageError(
                    f"--expect {text!r} is not NAME=VALUE", hint=f"NAME is {EXPECTATIONS}, once"
                )
            expected[name] = value
        found: dict[str, Any] = {"binding": "auto"}
        if expected:
            found["expect"] = expected
        files = {
            "policy": self.policy, "collateral": self.collateral, "rims": self.rims,
            "ocsp": self.ocsp, "unsafe_simulated_root": self.unsafe_simulated_root,
        }  # fmt: skip
        given = {name: str(path) for name, path in files.items() if path is not None}
        if self.policy is not None:
            if self.as_policy or self.as_certificate:
                raise UsageError("--as-policy and --as-certificate belong to --as-addr")
            return found | given | {"as_type": "builtin"}
        if given:
            raise UsageError(f"{', '.join(given)} belong to --policy; the service has its own")
        found |= {"as_addr": self.as_addr, "policy_ids": list(self.as_policy)}
        if self.as_certificate:
            found["trusted_certs_paths"] = [str(path) for path in self.as_certificate]
        return found


def verify_peer(peer: str, options: PeerOptions) -> None:
    """Show the verdict of a running egress; exit status as ``cai verify``.

    Raises:
        UsageError: what is given cannot be used.
        CaiError: there is no verdict.
    """
    import asyncio
    from hashlib import sha256

    from cai.cli.verdict_told import tell
    from cai.errors import InputError
    from cai.settings import read_settings_file
    from cai.terminal import current
    from tng.operation.appraise import appraise_peer, parse_peer

    destination = parse_peer(peer)
    verify = options.verify()
    try:
        digest = ""
        if options.policy is not None:
            digest = sha256(read_settings_file(options.policy, what="policy")).hexdigest()
        verdict = asyncio.run(appraise_peer(destination, verify))
    except InputError as error:
        raise UsageError(error.message, hint=error.hint) from error
    tell(current(), verdict, datetime.now(UTC), digest)
