"""Payloads in host memory: those that were appended or read last, so that most answers need not ask the store.

What is here is a copy: the store has it. A truncation gives positions again, so what is kept of a session is as of so
many truncations, and is found only by who saw it so. Of a session tokens go in the order in which they came, and first
those of the session that was asked for longest ago; those of deleted sessions and trimmed tokens go at once. That a
token has no payload is known here too.
One thread: the event loop. Does not know stores or requests.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ENTRY_BYTES = 150
"""What a token's entry takes besides its payload: a number, an object's head, a place in a table."""
DROPPED_SHARE = 64
"""Where room is needed, one of so many of a session's entries goes at once."""


@dataclass(slots=True)
class _Held:
    """Of one session as of so many truncations: payloads by position, None where a token has none, in the order in
    which they came.
    """

    num_truncated: int
    payloads: dict[int, bytes | None] = field(default_factory=dict)
    num_bytes: int = 0
    first_position: int = 0
    """Before it nothing is kept: these tokens were trimmed."""


class PayloadCache:
    """See the head of this module. `max_bytes` 0: nothing is kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self.num_forgotten = 0
        """How often something was dropped because it is gone: what was read before must not come in."""
        self._held: OrderedDict[int, _Held] = OrderedDict()

    def append(self, sid: int, start: int, payloads: Sequence[bytes | None]) -> None:
        """Keep what was appended from position `start` on to a session that was never truncated."""
        self._add(sid, 0, enumerate(payloads, start))

    def add(self, sid: int, num_truncated: int, positions: Iterable[int], payloads: Mapping[int, bytes]) -> None:
        """Keep what was read of these positions; those that are not among the payloads have none."""
        self._add(sid, num_truncated, ((position, payloads.get(position)) for position in positions))

    def find(self, sid: int, num_truncated: int, positions: Sequence[int]) -> tuple[dict[int, bytes], list[int]]:
        """The payloads that are here, and the positions of which nothing is known."""
        held = self._held.get(sid)
        if held is None or held.num_truncated != num_truncated:
            self.num_misses += len(positions)
            return {}, list(positions)
        self._held.move_to_end(sid)
        found: dict[int, bytes] = {}
        missing: list[int] = []
        payloads = held.payloads
        for position in positions:
            try:
                body = payloads[position]
            except KeyError:
                missing.append(position)
            else:
                if body is not None:
                    found[position] = body
        self.num_misses += len(missing)
        self.num_hits += len(positions) - len(missing)
        return found, missing

    def forget(self, sid: int) -> None:
        """Drop what is kept of a session: some of it, or all, is gone."""
        self.num_forgotten += 1
        held = self._held.pop(sid, None)
        if held is not None:
            self.num_bytes -= held.num_bytes

    def trim(self, sid: int, first_position: int) -> None:
        """Drop what is kept of the tokens before this position; what is read of them from now on stays out."""
        held = self._held.get(sid)
        if held is None or first_position <= held.first_position:
            return
        gone: Iterable[int] = range(held.first_position, first_position)
        if first_position - held.first_position > len(held.payloads):
            gone = [position for position in held.payloads if position < first_position]
        for position in gone:
            if position in held.payloads:
                self._drop(held, position)
        held.first_position = first_position

    def _add(self, sid: int, num_truncated: int, payloads: Iterable[tuple[int, bytes | None]]) -> None:
        if not self.max_bytes:
            return
        held = self._held.get(sid)
        if held is None or held.num_truncated != num_truncated:
            if held is not None:
                self.forget(sid)
            held = self._held[sid] = _Held(num_truncated)
        self._held.move_to_end(sid)
        for position, body in payloads:
            if position < held.first_position:
                continue
            if position in held.payloads:
                self._drop(held, position)
            held.payloads[position] = body
            self._count(held, _size_of(body))
        while self.num_bytes > self.max_bytes:
            sid, oldest = next(iter(self._held.items()))
            # Several at once: a dict's first entry is looked for past all that were before it.
            for position in list(itertools.islice(oldest.payloads, len(oldest.payloads) // DROPPED_SHARE + 1)):
                self._drop(oldest, position)
            if not oldest.payloads:
                del self._held[sid]

    def _drop(self, held: _Held, position: int) -> None:
        self._count(held, -_size_of(held.payloads.pop(position)))

    def _count(self, held: _Held, num_bytes: int) -> None:
        held.num_bytes += num_bytes
        self.num_bytes += num_bytes


def _size_of(body: bytes | None) -> int:
    return ENTRY_BYTES + (len(body) if body is not None else 0)
