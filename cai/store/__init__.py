"""Where sealed models live, by URI scheme; carrying them needs no key (docs/stores.md).

Example::

    store = open_store("oss://bucket/models/minilm", StoreOptions(endpoint="oss-cn-hangzhou…"))
    push(Path("minilm.sealed"), store)
    pull(store, Path("minilm.sealed"), index_sha256=record.index_sha256)
"""

from __future__ import annotations

from cai.store.access import StoreOptions
from cai.store.base import Store
from cai.store.opening import open_store
from cai.store.pulling import PullReport, pull
from cai.store.pushing import PushReport, push
from cai.store.ranged import RangedFiles, open_ranged
from cai.store.uri import Location, parse_uri

__all__ = [
    "Location",
    "PullReport",
    "PushReport",
    "RangedFiles",
    "Store",
    "StoreOptions",
    "open_ranged",
    "open_store",
    "parse_uri",
    "pull",
    "push",
]
