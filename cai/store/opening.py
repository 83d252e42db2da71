"""The store behind a URI: one table of schemes, libraries imported when a scheme is used."""

from __future__ import annotations

from pathlib import Path

from cai.store.access import StoreOptions, find_access
from cai.store.base import Store
from cai.store.retry import SteadyStore
from cai.store.uri import Location, parse_uri


def open_store(uri: str, options: StoreOptions | None = None) -> Store:
    """Open the store behind a URI; its calls are tried again while it is merely away.

    Raises:
        UsageError: not the URI of a store, or an extra is not installed.
        SettingError: endpoint or credentials cannot be meant.
    """
    options = options or StoreOptions()
    location = parse_uri(uri)
    opened = _OPENERS[location.scheme](location, options)
    return SteadyStore(opened, options.attempts)


def _open_file(location: Location, _options: StoreOptions) -> Store:
    from cai.store.local import LocalStore

    return LocalStore(Path(location.path))


def _open_oss(location: Location, options: StoreOptions) -> Store:
    from cai.store.oss import OssStore

    return OssStore(location, find_access("oss", options))


def _open_s3(location: Location, options: StoreOptions) -> Store:
    from cai.store.s3 import S3Store

    return S3Store(location, find_access(location.scheme, options))


def _open_web(location: Location, _options: StoreOptions) -> Store:
    from cai.store.web import WebStore

    return WebStore(location.path)


_OPENERS = {
    "file": _open_file,
    "oss": _open_oss,
    "s3": _open_s3,
    "cos": _open_s3,
    "http": _open_web,
    "https": _open_web,
}
