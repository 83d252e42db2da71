"""The verdict of a running egress, for somebody who wants to see it before sending a prompt.

Nothing of a request is sent: a session is made as for one, its proof is judged, a stream is opened
and given up at once.
"""

from __future__ import annotations

import io
from typing import Any

from cai.attest.verdict import Verdict
from cai.errors import FormatError, Refused, UsageError
from tng.config.entries import parse
from tng.operation.assembly import make_peers
from tng.operation.journal import Journal
from tng.peers.destination import BadRequest, Destination, parse_authority

SCHEMES = ("http://", "https://")
"""How a peer may be written; both mean the port that an ingress would dial."""


def parse_peer(url: str) -> Destination:
    """``http://HOST:PORT``.

    Raises:
        UsageError: it is anything else.
    """
    hint = "write the egress as http://HOST:PORT"
    for scheme in SCHEMES:
        if url.startswith(scheme):
            authority = url.removeprefix(scheme).removesuffix("/")
            try:
                return parse_authority(authority, default_port=None)
            except BadRequest as error:
                raise UsageError(f"{url!r} is no peer: {error.message}", hint=hint) from error
    raise UsageError(f"{url!r} is no peer", hint=hint)


async def appraise_peer(peer: Destination, verify: dict[str, Any]) -> Verdict:
    """Dial a peer in whichever dialect it speaks and judge its proof.

    Args:
        peer: the egress.
        verify: as in an ingress entry.

    Returns:
        The verdict, whether it passes or not.

    Raises:
        SettingError: ``verify`` is not usable.
        PeerUnreachable, PeerWithoutEvidence, CaiError: there is no verdict.
    """
    entry = {
        "mapping": {
            "in": {"host": "127.0.0.1", "port": 0},
            "out": {"host": peer.host, "port": peer.port},
        },
        "verify": verify,
    }
    config = parse({"add_ingress": [entry]}, where="cai verify")
    config.require_served()
    peers = make_peers(config.ingress[0], Journal(io.StringIO()), lambda: ())
    try:
        stream, proven = await peers.open(peer)
        stream.reset()
    except Refused as error:
        if error.verdict is None:
            raise
        return error.verdict
    except FormatError as error:
        raise FormatError(f"{peer} does not speak the protocol: {error.message}") from error
    finally:
        await peers.close()
    return proven.verdict
