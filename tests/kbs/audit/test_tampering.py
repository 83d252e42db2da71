"""Whatever is edited behind the broker's back, the walk over the log finds and names it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Integer, LargeBinary, Table

from cai import merkle
from cai.attest.checkpoint import read_checkpoint
from cai.attest.verdict import Verdict
from cai.errors import CaiError, Tampered
from kbs.audit import tree
from kbs.audit.log import Entry
from kbs.database.tables import (
    AUDIT,
    AUDIT_CHECKPOINT,
    AUDIT_NODE,
    LEASE,
    METADATA,
    RESOURCE,
    SHORT_LIVED,
)
from kbs.logged import logged_tables, verify_log
from tests.kbs.audit.conftest import copy_database
from tests.kbs.world import Site

VOUCHED = [table for table in METADATA.sorted_tables if table.info != SHORT_LIVED]
"""Every table but those whose rows live for minutes."""

MANY = [
    table for table in VOUCHED if table.name not in ("instance", "audit_head", "row_key", "secret")
]
"""Tables with more than one row."""

KEPT = [table for table in VOUCHED if table is not LEASE]
"""Tables whose rows stay; leases end by themselves, and their rows with them."""

COLUMNS = [(table, column.name) for table in VOUCHED for column in table.columns]
NAMES = [f"{table.name}.{column}" for table, column in COLUMNS]


def edit(site: Site, *statements: tuple[str, tuple[Any, ...]]) -> None:
    connection = sqlite3.connect(site.settings.data / "kbs.sqlite")
    try:
        for statement, values in statements:
            connection.execute(statement, values)
        connection.commit()
    finally:
        connection.close()


def rows(site: Site, table: Table) -> list[dict[str, Any]]:
    connection = sqlite3.connect(site.settings.data / "kbs.sqlite")
    connection.row_factory = sqlite3.Row
    order = ", ".join(column.name for column in table.primary_key.columns)
    found = connection.execute(f"SELECT * FROM {table.name} ORDER BY {order}").fetchall()
    connection.close()
    return [dict(row) for row in found]


def where(table: Table, row: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
    names = [column.name for column in table.primary_key.columns]
    return " AND ".join(f"{name} = ?" for name in names), tuple(row[name] for name in names)


def update(table: Table, row: dict[str, Any], **values: Any) -> tuple[str, tuple[Any, ...]]:
    condition, key = where(table, row)
    assigned = ", ".join(f"{name} = ?" for name in values)
    statement = f"UPDATE {table.name} SET {assigned} WHERE {condition}"
    return statement, (*values.values(), *key)


def delete(table: Table, row: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
    condition, key = where(table, row)
    return f"DELETE FROM {table.name} WHERE {condition}", key


def another(table: Table, column: str, value: Any) -> Iterator[Any]:
    """Other values of the same type."""
    kind = table.columns[column].type
    if isinstance(kind, LargeBinary):
        if value:
            yield bytes([value[0] ^ 1]) + value[1:]
            yield value[:-1] + bytes([value[-1] ^ 0x80])
        yield value + b"\x00"
    elif isinstance(kind, Integer):
        yield value + 1
        yield value - 1
    else:
        yield value + "x"
        yield value[:-1] if value else "y"


def named(verdict: Verdict) -> str:
    return "; ".join(f"{item.name}: {item.reason}" for item in verdict.failures)


def place(table: Table, row: dict[str, Any]) -> str:
    """How a failure names a row."""
    match table.name:
        case "audit":
            return f"leaf {row['seq']}"
        case "audit_node":
            return f"node {row['position']} of level {row['level']}"
        case "audit_checkpoint":
            return f"checkpoint of {row['size']} leaves"
        case "audit_head":
            return "database.head"
        case "instance":
            return "instance: the row"
        case "row_key":
            return "secret/row-key"
        case "signing_key":
            return f"secret/{row['name']}-key version {row['version']}"
        case _:
            return f"{table.name}/{row[next(iter(table.primary_key.columns)).name]} version"


def test_an_untouched_database_verifies(full: Site) -> None:
    verdict = verify_log(full.broker.core)
    assert verdict.passed, named(verdict)
    assert verdict.simulated
    assert all(len(rows(full, table)) > 1 for table in MANY)


def test_every_table_is_vouched_for_or_short_lived(full: Site) -> None:
    described = {table.name for table in logged_tables(full.broker.core)}
    own = {"audit", "audit_head", "audit_node", "audit_checkpoint", "instance"}
    assert described | own == {table.name for table in VOUCHED}


@pytest.mark.parametrize(("table", "column"), COLUMNS, ids=NAMES)
def test_a_changed_value_is_named(full: Site, table: Table, column: str) -> None:
    stored = rows(full, table)
    for row in (stored[0], stored[len(stored) // 2], stored[-1]):
        for value in another(table, column, row[column]):
            changed = {**row, column: value}
            try:
                edit(full, update(table, row, **{column: value}))
            except sqlite3.IntegrityError:
                continue  # the value is another row's key
            # A lease that is gone is no failure; one under another name is.
            blamed = changed if table is LEASE else row
            assert place(table, blamed) in named(verify_log(full.broker.core)), value
            condition, key = where(table, changed)
            restored = ", ".join(f"{name} = ?" for name in row)
            edit(
                full,
                (f"UPDATE {table.name} SET {restored} WHERE {condition}",
                 (*row.values(), *key)),
            )  # fmt: skip
    verdict = verify_log(full.broker.core)
    assert verdict.passed, named(verdict)


@pytest.mark.parametrize("table", KEPT, ids=lambda table: table.name)
def test_a_deleted_row_is_named(full: Site, table: Table) -> None:
    stored = rows(full, table)
    for row in {0: stored[0], 1: stored[len(stored) // 2], 2: stored[-1]}.values():
        edit(full, delete(table, row))
        assert place(table, row) in named(verify_log(full.broker.core))
        places = ", ".join("?" for _ in row)
        names = ", ".join(row)
        edit(full, (f"INSERT INTO {table.name} ({names}) VALUES ({places})",
                    tuple(row.values())))  # fmt: skip
    assert verify_log(full.broker.core).passed


@pytest.mark.parametrize("table", MANY, ids=lambda table: table.name)
def test_swapped_rows_are_named(full: Site, table: Table) -> None:
    stored = rows(full, table)
    assert len(stored) > 1
    keys = {column.name for column in table.primary_key.columns}
    for first, second in ((stored[0], stored[-1]), (stored[0], stored[1])):
        mine = {name: value for name, value in first.items() if name not in keys}
        theirs = {name: value for name, value in second.items() if name not in keys}
        if mine == theirs:
            continue
        edit(full, update(table, first, **theirs), update(table, second, **mine))
        assert verify_log(full.broker.core).failures, table.name
        edit(full, update(table, first, **mine), update(table, second, **theirs))
    assert verify_log(full.broker.core).passed


@pytest.mark.parametrize("table", VOUCHED, ids=lambda table: table.name)
def test_an_invented_row_is_named(full: Site, table: Table) -> None:
    row = rows(full, table)[0]
    for column in table.primary_key.columns:
        new = 10**9 if isinstance(column.type, Integer) else f"{row[column.name]}-new"
        row[column.name] = new
    names, places = ", ".join(row), ", ".join("?" for _ in row)
    edit(full, (f"INSERT INTO {table.name} ({names}) VALUES ({places})",
                tuple(row.values())))  # fmt: skip
    assert verify_log(full.broker.core).failures


@pytest.mark.parametrize("table", KEPT, ids=lambda table: table.name)
def test_an_emptied_table_is_named(full: Site, table: Table) -> None:
    edit(full, (f"DELETE FROM {table.name}", ()))
    assert verify_log(full.broker.core).failures


def test_the_place_is_named(full: Site) -> None:
    row = rows(full, RESOURCE)[0]
    edit(full, update(RESOURCE, row, sealed=row["sealed"][:-1] + b"\x00"))
    verdict = verify_log(full.broker.core)
    assert f"resource/{row['path']} version {row['version']}: the row was changed" in named(verdict)


def test_a_leaf_cut_out_is_named(full: Site) -> None:
    edit(full, ("DELETE FROM audit WHERE seq = 5", ()))
    verdict = verify_log(full.broker.core)
    assert "leaf.place: leaf 5 is missing" in named(verdict)
    assert any(item.name == "checkpoint.root" for item in verdict.failures)


def test_the_newest_leaves_cut_off_are_named(full: Site) -> None:
    """With the head and the tree made to fit, the checkpoints still say how long the log was."""
    leaves = [row["leaf"] for row in rows(full, AUDIT)]
    keep = len(leaves) - 4
    hashes = [merkle.leaf_hash(leaf) for leaf in leaves[:keep]]
    frontier: list[bytes] = []
    for place, item in enumerate(hashes):
        frontier, _ = tree.appended(frontier, place, item)
    edit(
        full,
        ("DELETE FROM audit WHERE seq >= ?", (keep,)),
        ("UPDATE audit_head SET size = ?, frontier = ?", (keep, b"".join(frontier))),
    )
    for node in rows(full, AUDIT_NODE):
        if node["position"] + 1 > keep >> node["level"]:
            edit(full, delete(AUDIT_NODE, node))
    found = named(verify_log(full.broker.core))
    assert "leaves were cut off" in found


def test_a_purged_resource_may_be_gone(full: Site) -> None:
    kept = rows(full, RESOURCE)
    core = full.broker.core
    with core.database.decide() as connection:
        change = core.resources.purge(connection, "models/gone/key", 1)
        entry = Entry("resource.purge", {"kind": "system"}, "00" * 16, allowed=True, change=change)
        core.audit.append(connection, entry, core.clock())
    verdict = verify_log(core)
    assert verdict.passed, named(verdict)
    # Destroyed for good: the row must not come back.
    row = next(item for item in kept if item["path"] == "models/gone/key")
    names, places = ", ".join(row), ", ".join("?" for _ in row)
    edit(full, (f"INSERT INTO resource ({names}) VALUES ({places})", tuple(row.values())))
    assert "is back" in named(verify_log(core))


def test_a_rolled_back_database_is_found_by_an_exported_checkpoint(
    full: Site, tmp_path: Path
) -> None:
    """The whole database put back is sound in itself; only what was kept outside shows it."""
    core = full.broker.core
    copy_database(full.settings.data / "kbs.sqlite", tmp_path / "kept.sqlite")
    assert full.admin("POST", "block/launch/" + "c" * 96, {"reason": "stolen"}).status_code == 200
    held = core.checkpoints.latest()
    assert verify_log(core, held=held).passed
    copy_database(tmp_path / "kept.sqlite", full.settings.data / "kbs.sqlite")
    assert verify_log(core).passed
    verdict = verify_log(core, held=held)
    assert [item.name for item in verdict.failures] == ["checkpoint.held"]
    assert "rolled back" in named(verdict)
    # Grown again beyond the old size, the log is still another one.
    while len(rows(full, AUDIT)) <= read_checkpoint(held).size:
        core.record(Entry("test", {"kind": "system"}, "00" * 16, allowed=True))
    verdict = verify_log(core, held=held)
    assert [item.name for item in verdict.failures] == ["checkpoint.held"]
    assert "not those of the checkpoint" in named(verdict)


def test_two_roots_of_one_size_are_never_signed(full: Site) -> None:
    core = full.broker.core
    before = rows(full, AUDIT_CHECKPOINT)
    newest = max(row["size"] for row in before)
    edit(full, ("UPDATE audit_head SET checkpoint = 0", ()))
    with pytest.raises(CaiError):
        core.checkpoints.latest()
    edit(full, ("UPDATE audit_head SET checkpoint = ?", (newest,)))
    assert rows(full, AUDIT_CHECKPOINT) == before


def test_a_rewritten_log_is_not_signed(full: Site) -> None:
    """The broker itself holds the log against what it signed before."""
    core = full.broker.core
    head = rows(full, METADATA.tables["audit_head"])[0]
    bent = bytes([head["frontier"][0] ^ 1]) + head["frontier"][1:]
    edit(full, ("UPDATE audit_head SET frontier = ?", (bent,)))
    core.record(Entry("test", {"kind": "system"}, "00" * 16, allowed=True))
    with pytest.raises(Tampered, match="does not extend"):
        core.checkpoints.latest()
