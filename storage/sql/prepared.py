"""Statements that run with every group of writes: their SQL is made once, and goes to the driver directly.

SQLAlchemy looks up, for each execution, what it compiled before, takes apart the values of each row by name, and
makes a context and a result: for a group that costs as much as SQLite takes to write it. Does not know which statements
these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Delete, Dialect, Insert, Select, Update
from sqlalchemy.exc import DBAPIError

Values = tuple[Any, ...]


def execute(connection: Connection, sql: str, rows: Sequence[Values] = ((),)) -> Any:
    """Execute SQL of the driver's own kind once for each row of values; its cursor. Raises as SQLAlchemy does."""
    try:
        cursor = connection.connection.cursor()
        if len(rows) == 1:
            cursor.execute(sql, rows[0])
        else:
            cursor.executemany(sql, rows)
    except connection.dialect.loaded_dbapi.Error as error:
        raise DBAPIError.instance(sql, None, error, connection.dialect.loaded_dbapi.Error) from error
    return cursor


class Prepared:
    """A statement with parameters. `names` says in which order their values come; it must be that of the SQL."""

    def __init__(self, statement: Insert | Update | Delete | Select[Any], *names: str) -> None:
        self._statement = statement
        self._names = names
        self._sql: dict[str, str] = {}

    def run(self, connection: Connection, rows: Sequence[Values]) -> int:
        """Execute it once for each row of values, which go to the driver as they are; how many rows it changed."""
        cursor = execute(connection, self._sql_for(connection.dialect), rows)
        num_rows: int = cursor.rowcount
        cursor.close()
        return num_rows

    def first(self, connection: Connection, values: Values) -> Any:
        """The first row that it finds, or None."""
        cursor = execute(connection, self._sql_for(connection.dialect), [values])
        row = cursor.fetchone()
        cursor.close()
        return row

    def all(self, connection: Connection, values: Values) -> list[Any]:
        """All rows that it finds."""
        cursor = execute(connection, self._sql_for(connection.dialect), [values])
        rows: list[Any] = cursor.fetchall()
        cursor.close()
        return rows

    def _sql_for(self, dialect: Dialect) -> str:
        sql = self._sql.get(dialect.name)
        if sql is None:
            sql = self._sql[dialect.name] = self._compiled(dialect)
        return sql

    def _compiled(self, dialect: Dialect) -> str:
        kind: Any = type(dialect)
        positional = kind(paramstyle=dialect.paramstyle if dialect.positional else "format")
        compiled: Any = self._statement.compile(dialect=positional, column_keys=self._names)
        assert tuple(compiled.positiontup) == self._names, compiled.positiontup
        return str(compiled)
