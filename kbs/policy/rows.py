"""The policies of everybody, for callers that name no resource; gone once none is left."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import Connection

from kbs.names import ResourceName
from kbs.policy.store import Policies, PolicyStore

__all__ = ["Policies", "current_policies"]

_NOBODY = ResourceName("-", "-", "-")


def current_policies(store: PolicyStore, connection: Connection) -> Policies:
    """The policies that apply where nothing more special is set.

    Raises:
        Tampered: a stored row is not the one that was stored.
    """
    return replace(store.for_resource(connection, _NOBODY), tenant="")
