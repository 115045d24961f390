"""The device's half of one session: whether it is resident, its chunks there, and what waits to go into them.

    state      chunks                      pending                         becomes
    cold       none                        not kept: the store has it      loading, when a reader wants it
    loading    grow as the loader reads    kept until all was read         resident, or cold when that fails
    resident   all keys, some contents     goes in when a reader wants     cold, when it is offloaded, lacks what was
               (none yet: no token came)   it, or a chunk is full or begun appended, or was deleted

The device thread owns all of it but four things. The store's thread alone writes `extent` and `is_deleted`, once a
write is on disk, and adds to `pending`; the device thread takes from there. That closes the races: what the store's
thread does not add because a session is cold was on disk before, so a load that begins later reads it; what it adds
while one is offloaded or loaded is in the store too, so the device thread may throw it away, or know it by its
position when it was read already. Whoever finds that something lacks takes the session off the device: it is
loaded again.
A truncation gives positions again, so a position alone does not tell a token. Truncations are numbered: the store's
thread counts one in `num_begun` before it is on disk, and in `extent` once it is; the device thread counts in
`num_seen` those that its chunks are as of. What was read from the store holds if none was begun since `num_seen`.
Does not know the loop's half (`sessions/session.py`), stores, batches or attention.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from htm_service.dtypes import from_bytes, itemsize
from htm_service.memory.chunks import Chunks
from htm_service.records import Residency
from htm_service.session_settings import SessionSettings
from storage.base import Block, SessionKey, SessionRow

MAX_PENDING_BYTES = 64 << 20
"""Of one session that wait for the device thread; with more its chunks are read from the store again."""


class Extent(NamedTuple):
    """The tokens that a session has on disk: positions first_position .. length-1."""

    first_position: int
    length: int
    num_truncated: int = 0
    """How often it was truncated since it came into memory."""


@dataclass(frozen=True, slots=True)
class EpisodeRun:
    """Tokens from position `start` on, until the next run, were appended under `episode`."""

    start: int
    episode: int | None


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens [T, D] that are durable from position `start` on, on the CPU."""

    start: int
    tokens: Tensor
    episode: int | None

    def after(self, position: int) -> NewTokens:
        """Those from `position` on, which is not before `start`."""
        skip = position - self.start
        return NewTokens(position, self.tokens[skip:], self.episode) if skip else self


def joined(blocks: Sequence[Block], settings: SessionSettings) -> list[NewTokens]:
    """The tokens of blocks that follow each other, neighbours of one episode as one.

    Tokens that came one by one are made a tensor, and later put on the device, in few steps.
    """
    runs = (list(run) for _, run in itertools.groupby(blocks, key=operator.attrgetter("episode")))
    return [
        NewTokens(run[0].start, from_bytes([block.data for block in run], settings.dtype, settings.dim), run[0].episode)
        for run in runs
    ]


class Published(NamedTuple):
    """What became of a session, and its extent since: tokens came, a child was forked off it, or it was truncated."""

    extent: Extent
    block: Block | None = None
    child: Resident | None = None
    child_extent: Extent = Extent(0, 0)
    """What the child begins with."""

    @property
    def num_truncated_before(self) -> int:
        """How often the session had been truncated when this happened."""
        is_truncation = self.block is None and self.child is None
        return self.extent.num_truncated - is_truncation


@dataclass(slots=True, eq=False)
class Resident:
    """See the head of this module. `sid` is the store's number for it; of `settings`, what cannot be changed."""

    key: SessionKey
    sid: int
    settings: SessionSettings
    extent: Extent
    is_deleted: bool = False
    pending: deque[Published] = field(default_factory=deque)
    """What is durable and not in `chunks` yet: tokens as they are at rest, and what happened between them."""
    num_begun: int = 0
    num_seen: int = 0
    state: Residency = "cold"
    chunks: Chunks | None = None
    episodes: list[EpisodeRun] = field(default_factory=list)
    parked: list[Any] = field(default_factory=list)
    """Tickets that wait until the session is resident, or its stored sketches are here."""
    token_bytes: int = field(init=False)
    """Bytes of one token, looked at by every append and attend."""

    def __post_init__(self) -> None:
        self.token_bytes = self.settings.dim * itemsize(self.settings.dtype)
        if not self.extent.length:
            self.state = "resident"  # there is nothing to load

    @property
    def id(self) -> str:
        """What callers call it."""
        return self.key.id

    @property
    def held(self) -> Chunks:
        """The chunks of a session that is resident and was wanted."""
        assert self.chunks is not None, f"session {self.id!r} is {self.state}"
        return self.chunks

    @property
    def first_chunk(self) -> int:
        """The first chunk that was not trimmed."""
        return self.extent.first_position // self.settings.chunk_size

    @property
    def num_chunks(self) -> int:
        """Chunks, the open one included."""
        return -(-self.extent.length // self.settings.chunk_size)

    def publish(self, new: Block, first_position: int) -> bool:
        """Let readers see tokens that are on disk, and where the session begins since (the store's thread).

        True when the device thread should put them into the chunks soon: a chunk is full, some were trimmed, or these
        are the first: what waits of a session that never came to the device would be in nobody's budget.
        """
        before, length = self.extent, new.start + new.num_tokens
        if self.state == "resident" and self._num_pending_bytes() > MAX_PENDING_BYTES:
            self.pending.clear()
        self._publish(Published(Extent(first_position, length, before.num_truncated), new))
        size = self.settings.chunk_size
        is_first = not before.length
        return is_first or first_position > before.first_position or length // size > before.length // size

    def publish_truncation(self, first_position: int, length: int) -> None:
        """Let readers see that the tokens after a length are gone; it was counted as begun (the store's thread)."""
        self._publish(Published(Extent(first_position, length, self.extent.num_truncated + 1)))

    def publish_fork(self, child: Resident) -> None:
        """Have a child, of which nobody knows yet, share what there is on the device (the store's thread)."""
        self._publish(Published(self.extent, child=child, child_extent=child.extent))

    def _publish(self, new: Published) -> None:
        if self.state != "cold":
            self.pending.append(new)
        self.extent = new.extent

    def holds(self, num_seen: int) -> bool:
        """Whether what was read of the store as of so many truncations is so on the device, and will be."""
        return self.num_seen == num_seen == self.num_begun

    def take_pending(self) -> list[Published]:
        """What waits now, taken out (the device thread)."""
        blocks: list[Published] = []
        with contextlib.suppress(IndexError):  # the store's thread threw the rest away meanwhile
            for _ in range(len(self.pending)):
                blocks.append(self.pending.popleft())
        return blocks

    def _num_pending_bytes(self) -> int:
        chunks = self.chunks
        return (self.extent.length - (chunks.length if chunks is not None else 0)) * self.token_bytes


class Forked(NamedTuple):
    """What a fork made, and its half on the device."""

    row: SessionRow
    resident: Resident
