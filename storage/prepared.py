"""Statements that run with every group of writes: their SQL is made once for each kind of database.

SQLAlchemy looks up, for each execution, what it compiled before, and takes apart the values of each row by name. For 32
rows that costs as much as SQLite takes to insert them. Does not know which statements these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, CursorResult, Dialect, Insert, Select, Update

Values = tuple[Any, ...]


class Prepared:
    """A statement with parameters. `names` says in which order their values come; it must be that of the SQL."""

    def __init__(self, statement: Insert | Update | Select[Any], *names: str) -> None:
        self._statement = statement
        self._names = names
        self._sql: dict[str, str] = {}

    def run(self, connection: Connection, rows: Sequence[Values]) -> CursorResult[Any]:
        """Execute it once for each row of values, which go to the driver as they are."""
        dialect = connection.dialect
        sql = self._sql.get(dialect.name)
        if sql is None:
            sql = self._sql[dialect.name] = self._compiled(dialect)
        return connection.exec_driver_sql(sql, list(rows))

    def _compiled(self, dialect: Dialect) -> str:
        kind: Any = type(dialect)
        positional = kind(paramstyle=dialect.paramstyle if dialect.positional else "format")
        compiled: Any = self._statement.compile(dialect=positional, column_keys=self._names)
        assert tuple(compiled.positiontup) == self._names, compiled.positiontup
        return str(compiled)
