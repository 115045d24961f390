"""The oldest whole chunks of a session that is full make room for an append.

Positions and chunks keep their numbers. Of what other sessions share only the session's own view is cut. Does not know
what tokens say.
"""

from __future__ import annotations

from sqlalchemy import Connection

from storage.sql.tokens.deletion import leave
from storage.sql.tokens.removal import remove
from storage.sql.tokens.spans import cut, lay, layout_of


def trim(connection: Connection, log: int, first_position: int, chunk_size: int) -> int:
    """Delete what lies before `first_position`, a chunk's begin, of a log that is one session's and all it has; how
    many bytes of tokens that was.
    """
    return remove(connection, log, 0, first_position, chunk_size)[0]


def trim_branch(connection: Connection, sid: int, chunk_size: int) -> None:
    """Let go of what lies before the first position of a session, as its row says it, that shares tokens."""
    layout = layout_of(connection, sid)
    assert layout is not None, "it has just been appended to"
    if layout.shared:
        lay(connection, sid, layout._replace(shared=cut(layout.shared, layout.first_position, layout.length)))
    leave(connection, sid, layout.logs, chunk_size)
