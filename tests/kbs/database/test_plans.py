"""What a guest can ask for costs the same in a small database and in a large one."""

from __future__ import annotations

import re
from typing import Any

import pytest
from sqlalchemy import event

from tests.kbs.world import Site, Visitor

SMALL = {"instance", "row_key", "signing_key", "audit_head", "alembic_version"}
"""Tables that stay small, whatever guests do."""

NOW_AND_THEN = re.compile(r"SELECT count\(\*\).*FROM session", re.DOTALL)
"""The count of sessions, once in a while for the whole process."""


class Statements:
    """Every statement that a broker sends."""

    def __init__(self, site: Site) -> None:
        self._engine = site.broker.core.database.engine
        self.seen: dict[str, Any] = {}
        event.listen(self._engine, "before_cursor_execute", self._note)

    def _note(self, _connection: Any, _cursor: Any, statement: str, parameters: Any,
              _context: Any, _many: bool) -> None:  # fmt: skip
        self.seen.setdefault(statement, parameters)

    def scanned(self) -> dict[str, list[str]]:
        """Tables that a statement reads from end to end, by statement."""
        found: dict[str, list[str]] = {}
        event.remove(self._engine, "before_cursor_execute", self._note)
        with self._engine.connect() as connection:
            for statement, parameters in self.seen.items():
                if statement.split()[0] not in ("SELECT", "UPDATE", "DELETE", "INSERT"):
                    continue
                first = parameters[0] if isinstance(parameters, list) else parameters
                plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", first)
                steps = [row[3] for row in plan]
                tables = [
                    step.split()[1] for step in steps
                    if step.startswith("SCAN") and step.split()[1] not in SMALL
                    and "CONSTANT ROW" not in step and "SUBQUERY" not in step
                    and not step.split()[1].startswith("(")
                ]  # fmt: skip
                if tables and not NOW_AND_THEN.search(statement):
                    found[statement] = tables
        return found


def test_a_handshake_reads_no_table_from_end_to_end(allowed: Site, visitor: Visitor) -> None:
    statements = Statements(allowed)
    _, cookie = visitor.attested(allowed)
    visitor.open(allowed.get(cookie))
    assert allowed.get(cookie, "models/minilm/none").status_code == 404
    assert len(statements.seen) > 10
    assert statements.scanned() == {}


def test_a_scan_would_be_seen(site: Site) -> None:
    statements = Statements(site)
    with site.broker.core.database.read() as connection:
        connection.exec_driver_sql("SELECT * FROM audit WHERE leaf = x'00'")
    assert list(statements.scanned().values()) == [["audit"]]


@pytest.mark.parametrize("name", ["session", "audit"])
def test_the_large_tables_have_their_indexes(site: Site, name: str) -> None:
    with site.broker.core.database.read() as connection:
        rows = connection.exec_driver_sql(f"PRAGMA index_list({name})").all()
    assert rows
