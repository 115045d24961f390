"""Payloads in host memory: those that were appended or read last, so that most answers need not ask the store.

What is here is a copy: the store has it. Of a session tokens go in the order in which they came, and first those of the
session that was asked for longest ago. That a token has no payload is known here too.
One thread: the event loop. Does not know stores or requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ENTRY_BYTES = 150
"""What a token's entry takes besides its payload: a number, an object's head, a place in a table."""


@dataclass(slots=True)
class _Held:
    """Of one session: payloads by position, None where a token has none, in the order in which they came."""

    payloads: dict[int, bytes | None] = field(default_factory=dict)
    num_bytes: int = 0


class PayloadCache:
    """See the head of this module. `max_bytes` 0: nothing is kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_hits = 0
        self.num_misses = 0
        self.num_forgotten = 0
        """How often something was dropped because it is not so any more: what was read before must not come in."""
        self._held: OrderedDict[int, _Held] = OrderedDict()

    def append(self, sid: int, start: int, payloads: Sequence[bytes | None]) -> None:
        """Keep what was appended from position `start` on."""
        self._add(sid, enumerate(payloads, start))

    def add(self, sid: int, positions: Iterable[int], payloads: Mapping[int, bytes]) -> None:
        """Keep what was read of these positions; those that are not among the payloads have none."""
        self._add(sid, ((position, payloads.get(position)) for position in positions))

    def find(self, sid: int, positions: Sequence[int]) -> tuple[dict[int, bytes], list[int]]:
        """The payloads that are here, and the positions of which nothing is known."""
        held = self._held.get(sid)
        if held is None:
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

    def forget(self, sid: int, start: int = 0) -> None:
        """Drop what is kept of a session from position `start` on."""
        self.num_forgotten += 1
        held = self._held.get(sid)
        if held is None:
            return
        if start == 0:
            self.num_bytes -= held.num_bytes
            del self._held[sid]
            return
        for position in [position for position in held.payloads if position >= start]:
            self._drop(held, position)

    def _add(self, sid: int, payloads: Iterable[tuple[int, bytes | None]]) -> None:
        if not self.max_bytes:
            return
        held = self._held.setdefault(sid, _Held())
        self._held.move_to_end(sid)
        for position, body in payloads:
            if position in held.payloads:
                self._drop(held, position)
            held.payloads[position] = body
            self._count(held, _size_of(body))
        while self.num_bytes > self.max_bytes:
            sid, oldest = next(iter(self._held.items()))
            self._drop(oldest, next(iter(oldest.payloads)))
            if not oldest.payloads:
                del self._held[sid]

    def _drop(self, held: _Held, position: int) -> None:
        self._count(held, -_size_of(held.payloads.pop(position)))

    def _count(self, held: _Held, num_bytes: int) -> None:
        held.num_bytes += num_bytes
        self.num_bytes += num_bytes


def _size_of(body: bytes | None) -> int:
    return ENTRY_BYTES + (len(body) if body is not None else 0)
