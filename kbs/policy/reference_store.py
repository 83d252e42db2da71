"""The reference values of one broker: registered keys, signed bundles, single values.

Rows of the table ``reference``: ``key/<tenant>/<name>`` (PEM), ``bundle/<tenant>/<name>`` (the
signed bundle as it came) and ``values/<tenant>`` (single values with their expiries). A tenant's
value wins over everybody's (tenant ``""``), a single value over a bundle's. A bundle counts only
while a registered key of its tenant, or one of everybody's, still verifies it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import Connection

from cai import jcs
from cai.errors import FormatError, InputMissing, LimitExceeded, Refused
from kbs.audit.log import Change
from kbs.policy.names import is_segment
from kbs.policy.references import (
    MAX_BUNDLE,
    TIME_FORMAT,
    Bundle,
    ReferenceKey,
    References,
    ReferenceValue,
    SignedBundle,
    missing,
    parse_time,
    require_current,
)
from kbs.rows import Stored, VersionedRows, VersionNote

KEY: Final = "key"
BUNDLE: Final = "bundle"
VALUES: Final = "values"

SINGLE: Final = "value"
"""Source of a value that no bundle holds."""


@dataclass(frozen=True, slots=True)
class ReferenceName:
    """``key/<tenant>/<name>``, ``bundle/<tenant>/<name>`` or ``values/<tenant>``."""

    kind: str
    tenant: str
    name: str = ""

    @classmethod
    def parse(cls, path: str) -> ReferenceName:
        """Read a row's path.

        Raises:
            FormatError: it has another form.
        """
        kind, _, rest = path.partition("/")
        tenant, _, name = rest.partition("/")
        named = kind in (KEY, BUNDLE) and is_segment(name)
        if (tenant and not is_segment(tenant)) or not (named or (kind == VALUES and not name)):
            raise FormatError(
                f"{path[:64]!r} does not name reference values",
                hint="key/TENANT/NAME, bundle/TENANT/NAME or values/TENANT",
            )
        return cls(kind, tenant, name)

    @property
    def path(self) -> str:
        """The row's path."""
        return f"{self.kind}/{self.tenant}" + (f"/{self.name}" if self.name else "")


class ReferenceStore:
    """Reads and writes reference values inside the caller's transactions.

    Args:
        rows: of the table ``reference``.
    """

    def __init__(self, rows: VersionedRows) -> None:
        self._rows = rows

    def current(
        self, connection: Connection, *, now: datetime, tenant: str = ""
    ) -> References:
        """The values in force now for one tenant.

        Raises:
            Tampered: a stored row is not the one that was stored.
        """
        listed = self.listed(connection, tenant=tenant)
        values: dict[str, Any] = {}
        for found in listed.values():
            for name, item in found.items():
                if item.expires > now:
                    values[name] = item.value
                else:
                    # What took a value's place and is over does not bring the other one back.
                    values.pop(name, None)
        return References.of(values)

    def listed(
        self, connection: Connection, *, tenant: str = ""
    ) -> dict[str, dict[str, ReferenceValue]]:
        """Every value that a tenant sees, expired ones too, by tenant: everybody's, then its own.

        Raises:
            Tampered: a stored row is not the one that was stored.
        """
        rows = self._all(connection)
        owners = list(dict.fromkeys(("", tenant)))
        return {owner: _values_of(rows, owner) for owner in owners}

    def find(
        self, connection: Connection, name: str, *, now: datetime, tenant: str = ""
    ) -> Any:
        """One value in force.

        Raises:
            InputMissing: there is none.
        """
        values = self.current(connection, now=now, tenant=tenant).values
        if name not in values:
            raise missing(name)
        return values[name]

    def keys(self, connection: Connection, *, tenant: str = "") -> dict[str, ReferenceKey]:
        """The keys that may sign for a tenant, by row path."""
        return _keys(self._all(connection), tenant)

    def bundles(self, connection: Connection) -> dict[ReferenceName, SignedBundle]:
        """Every stored bundle."""
        return {
            name: SignedBundle.parse(stored.contents)
            for name, stored in self._all(connection).items()
            if name.kind == BUNDLE
        }

    def history(self, connection: Connection, name: ReferenceName) -> list[VersionNote]:
        """Every version of a row, oldest first."""
        return self._rows.history(connection, name.path)

    def names(self, connection: Connection) -> list[ReferenceName]:
        """Every row that is there."""
        return list(self._all(connection))

    def put_key(self, connection: Connection, name: ReferenceName, pem: bytes) -> Change:
        """Register a key, or replace it."""
        ReferenceKey.parse(pem)
        return self._rows.put(connection, name.path, pem)

    def put_bundle(
        self, connection: Connection, name: ReferenceName, signed: SignedBundle, *, now: datetime
    ) -> tuple[Change, Bundle, str]:
        """Store a bundle that a registered key signed.

        Returns:
            The change, the bundle, and the row path of the key.

        Raises:
            Refused: no key signed it, it has expired, or it is older than the stored one.
            FormatError: its name is another, or another bundle has one of its values.
        """
        rows = self._all(connection)
        keys = _keys(rows, name.tenant)
        bundle, signer = signed.opened(keys)
        if bundle.name != name.name:
            raise FormatError(f"the bundle's name is {bundle.name}, not {name.name}")
        before = rows.get(name)
        stored = None if before is None else SignedBundle.parse(before.contents)
        require_current(bundle, now, None if stored is None else Bundle.parse(stored.bundle))
        for other, row in rows.items():
            if other.kind != BUNDLE or other.tenant != name.tenant or other == name:
                continue
            shared = set(Bundle.parse(SignedBundle.parse(row.contents).bundle).values)
            if both := sorted(shared & set(bundle.values)):
                raise FormatError(
                    f"bundle {other.name} has {both[0][:64]!r} already",
                    hint="one value comes from one bundle; remove one of the two",
                )
        return self._rows.put(connection, name.path, signed.encode()), bundle, signer

    def put_values(
        self,
        connection: Connection,
        tenant: str,
        values: Mapping[str, Any],
        *,
        expires: datetime,
    ) -> Change:
        """Set single values beside those that are there.

        Raises:
            LimitExceeded: all of a tenant's values are longer than ``MAX_BUNDLE``.
        """
        name = ReferenceName(VALUES, tenant)
        body = _single(self._rows.get(connection, name.path))
        end = expires.strftime(TIME_FORMAT)
        for item, value in values.items():
            body[item] = {"value": value, "expires": end}
        return self._put_single(connection, name, body)

    def remove_values(self, connection: Connection, tenant: str, values: list[str]) -> Change:
        """Take single values away.

        Raises:
            InputMissing: one is not there.
        """
        name = ReferenceName(VALUES, tenant)
        body = _single(self._rows.get(connection, name.path))
        for item in values:
            if item not in body:
                raise InputMissing(
                    f"there is no single reference value {item[:64]!r}",
                    hint="one of a bundle goes with its bundle",
                )
            del body[item]
        return self._put_single(connection, name, body)

    def remove(self, connection: Connection, name: ReferenceName) -> Change:
        """Take a row away: a key, a bundle, or all single values of a tenant.

        Raises:
            InputMissing: there is none.
        """
        return self._rows.remove(connection, name.path)

    def _put_single(
        self, connection: Connection, name: ReferenceName, body: dict[str, Any]
    ) -> Change:
        data = jcs.canonical(body)
        if len(data) > MAX_BUNDLE:
            raise LimitExceeded(f"{len(data)} bytes of single values, at most {MAX_BUNDLE}")
        return self._rows.put(connection, name.path, data)

    def _all(self, connection: Connection) -> dict[ReferenceName, Stored]:
        paths = self._rows.paths(connection)
        rows = self._rows.get_many(connection, paths)
        return {ReferenceName.parse(path): stored for path, stored in rows.items()}


def default_expiry(now: datetime, days: int) -> datetime:
    """The end of values that come without one."""
    return (now + timedelta(days=days)).replace(microsecond=0)


def _keys(rows: Mapping[ReferenceName, Stored], tenant: str) -> dict[str, ReferenceKey]:
    return {
        name.path: ReferenceKey.parse(stored.contents)
        for name, stored in rows.items()
        if name.kind == KEY and name.tenant in ("", tenant)
    }


def _values_of(rows: Mapping[ReferenceName, Stored], tenant: str) -> dict[str, ReferenceValue]:
    found: dict[str, ReferenceValue] = {}
    keys = _keys(rows, tenant)
    for name, stored in sorted(rows.items(), key=lambda item: item[0].path):
        if name.kind != BUNDLE or name.tenant != tenant:
            continue
        try:
            bundle, _ = SignedBundle.parse(stored.contents).opened(keys)
        except Refused:
            # Its key was taken away: nothing that it signed is in force.
            continue
        for item, value in bundle.values.items():
            source = f"{BUNDLE} {name.name}"
            found[item] = ReferenceValue(value, bundle.expires, source, tenant)
    for item, value in _single(rows.get(ReferenceName(VALUES, tenant))).items():
        found[item] = ReferenceValue(value["value"], parse_time(value["expires"]), SINGLE, tenant)
    return found


def _single(stored: Stored | None) -> dict[str, Any]:
    if stored is None:
        return {}
    value = jcs.parse_canonical(stored.contents, what="reference values", limit=MAX_BUNDLE)
    if not isinstance(value, dict):
        raise FormatError("reference values: a stored row is not an object")
    return value
