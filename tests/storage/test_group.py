"""The statements of a group: looked up by index, however many keys are remembered."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from storage.base import Append, Store
from tests.storage.contract import create, token, write


def test_no_statement_of_a_group_reads_a_whole_table(path: Path, sqlite_store: Store) -> None:
    """Keys were once looked up without their sessions: each group read all keys of the last 24 hours."""
    sids = [create(sqlite_store, f"s{n}").sid for n in range(5)]
    statements: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        appends = [Append(sid, 1, token(1), [b"{}"], idempotency_key=f"k{sid}", digest=b"d") for sid in sids]
        write(sqlite_store, *appends)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    verbs = [statement.split()[0] for statement, _ in statements]
    assert verbs == ["BEGIN", "SELECT", "SELECT", "SELECT", "INSERT", "INSERT", "INSERT", "UPDATE"]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        for statement, parameters in statements[1:]:
            some = parameters[0] if isinstance(parameters, list) else parameters
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", some)]
            assert not any(step.startswith("SCAN") for step in plan), (statement, plan)
