"""Run as a program: writes groups to the store whose URL is named on the command line until it is killed.

Group number n appends one token with the bytes of n to each of five sessions. It prints n when the store has
reported the group as done.
"""

from __future__ import annotations

import sys
from itertools import count

from storage.base import Append, Appended, CreateSession, SessionRow
from storage.resolve import open_store
from tests.names import named

IDS = ("a", "b", "c", "d", "e")
TOKEN_BYTES = 40_009
"""So much that a group takes a while and the log is folded in now and then."""


def main() -> None:
    """Write until the end."""
    store = open_store(sys.argv[1], lease_s=0.5)
    store.write([CreateSession(SessionRow(id_, {}, 1.0)) for id_ in IDS], now=1.0)
    rows = [row for row in (store.get_session(named(id_)) for id_ in IDS) if row is not None]
    first = rows[0].length
    for number in count(first):
        data = number.to_bytes(4, "big") + bytes(TOKEN_BYTES - 4)
        done = store.write([Append(row.sid, 1, data, payloads=[b"%d" % number]) for row in rows], now=2.0)
        assert done == [Appended(number, number + 1)] * len(IDS)
        print(number, flush=True)


if __name__ == "__main__":
    main()
