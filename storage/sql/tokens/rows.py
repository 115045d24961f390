"""Rows of appends: gathered, then inserted by one statement per table, with the lengths that follow from them.

Runs within a transaction. Does not know where appends come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from sqlalchemy import Connection, bindparam, insert, update

from storage.base import StoreError
from storage.sql.prepared import Prepared, Values
from storage.sql.tables import blocks, idempotency, payloads, sessions

T = TypeVar("T")

BLOCK_BYTES = 64 << 10
"""A longer append is stored as several blocks, and blocks are joined up to this: bounds what a small read costs."""
SIDS_AT_ONCE = 500
"""Sessions looked up by one statement: databases bound the number of parameters."""

INSERT_BLOCKS = Prepared(insert(blocks), "log", "start", "num_tokens", "episode", "checksum", "data")
_INSERT_PAYLOADS = Prepared(insert(payloads), "log", "position", "body")
_INSERT_KEYS = Prepared(insert(idempotency), "sid", "key", "digest", "start", "length", "created_at")
_UPDATE_LENGTH = Prepared(
    update(sessions)
    .where(sessions.c.sid == bindparam("of_sid"), sessions.c.length == bindparam("from_length"))
    .values(
        length=bindparam("to_length"),
        num_bytes=bindparam("to_num_bytes"),
        updated_at=bindparam("at"),
        first_position=bindparam("to_first_position"),
    ),
    *("to_length", "to_num_bytes", "at", "to_first_position", "of_sid", "from_length"),
)


@dataclass(slots=True)
class Rows:
    """See the head of this module. The values of each are in the order of the statements above."""

    blocks: list[Values] = field(default_factory=list)
    payloads: list[Values] = field(default_factory=list)
    keys: list[Values] = field(default_factory=list)
    lengths: list[Values] = field(default_factory=list)

    def add_payloads(self, log: int, start: int, bodies: Sequence[bytes | None]) -> None:
        """The payloads of tokens that follow each other from `start` on."""
        self.payloads.extend((log, position, body) for position, body in enumerate(bodies, start) if body is not None)

    def insert(self, connection: Connection) -> None:
        """Insert blocks, payloads and keys."""
        for statement, rows in (
            (INSERT_BLOCKS, self.blocks),
            (_INSERT_PAYLOADS, self.payloads),
            (_INSERT_KEYS, self.keys),
        ):
            if rows:
                statement.run(connection, rows)

    def update(self, connection: Connection) -> None:
        """Set the lengths. Raises StoreError when a session's length is not what it was known to be."""
        if self.lengths and _UPDATE_LENGTH.run(connection, self.lengths) != len(self.lengths):
            raise StoreError("a session was changed by something else than its owner; the group is refused")


def portions(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of at most `size`."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some
