"""One session in the engine: its settings, how long it is, and what of it is on the device.

Two sides touch it. The event loop owns `settings`, the times, the counters, `recalls`, and what `behind.py` keeps
here. The device thread owns `memory`, `host_pages`, `state`, `parked`, `pending` and `episodes`, and alone writes
`length` and `first_position`, which anyone may read.
Does not know stores, batches or HTTP.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from htm_service.dtypes import from_bytes
from htm_service.errors import HTMError, SessionDamaged, Unhealthy
from htm_service.memory.chunks import Memory
from htm_service.reads.visibility import EpisodeRun
from htm_service.records import Residency, SessionInfo
from htm_service.session_settings import SessionSettings
from htm_service.sessions.recalls import RecallLog
from storage.base import Block, StoreDamaged, StoreError


@dataclass(slots=True)
class NewTokens:
    """Tokens [T, D] that are durable from position `start` on, on the CPU."""

    start: int
    tokens: Tensor
    episode: int | None


def joined(blocks: Sequence[Block], settings: SessionSettings) -> list[NewTokens]:
    """The tokens of blocks that follow each other, neighbours of one episode as one.

    Tokens that came one by one are made a tensor, and later put on the device, in few steps.
    """
    runs = (list(run) for _, run in itertools.groupby(blocks, key=operator.attrgetter("episode")))
    return [
        NewTokens(run[0].start, from_bytes([block.data for block in run], settings.dtype, settings.dim), run[0].episode)
        for run in runs
    ]


@dataclass(slots=True, eq=False)
class Session:
    """See the head of this module. `sid` is the store's key for it."""

    id: str
    sid: int
    settings: SessionSettings
    created_at: float
    updated_at: float
    last_used_at: float
    length: int
    first_position: int
    recalls: RecallLog
    num_appends: int = 0
    num_attends: int = 0
    num_queries: int = 0
    state: Residency = "cold"
    is_deleted: bool = False
    memory: Memory | None = None
    host_pages: dict[int, int] = field(default_factory=dict)
    """Chunks whose contents are in the host tier, and their pages there."""
    episodes: list[EpisodeRun] = field(default_factory=list)
    parked: list[Any] = field(default_factory=list)
    """Tickets that wait until the session is resident."""
    pending: list[Block] = field(default_factory=list)
    """Durable tokens that are not in `memory` yet, as they are at rest."""
    tip: int | None = None
    """Where the next append begins, as far as that is known before the store says it."""
    num_disk_appends: int = 0
    """Appends that waited for the disk, begun so far."""
    unwritten: dict[Any, int] = field(default_factory=dict)
    """Futures of appends that were acknowledged and are not on disk yet, with where each begins."""
    doomed: set[Any] = field(default_factory=set)
    """Those that follow one that was lost, and so are told with it."""
    loss: HTMError | None = None
    """What is to be told about acknowledged appends that could not be written."""
    num_lost_tokens: int = 0
    damage: str | None = None
    """What a read found wrong with its bytes in the store: it takes no more appends. Set by whoever finds it."""
    num_stored_keys: int = 0
    """Chunks whose summary keys the store has, as far as is known while the session is resident."""

    @property
    def num_chunks(self) -> int:
        """Chunks, the open one included."""
        return -(-self.length // self.settings.chunk_size)

    @property
    def first_chunk(self) -> int:
        """The first chunk that was not evicted."""
        return self.first_position // self.settings.chunk_size

    @property
    def host_bytes(self) -> int:
        """Bytes of its pages in the host tier."""
        return len(self.host_pages) * self.settings.chunk_size * self.settings.dim * self.settings.itemsize

    @property
    def stored_bytes(self) -> int:
        """Bytes of its tokens at rest."""
        return (self.length - self.first_position) * self.settings.dim * self.settings.itemsize

    def is_expired(self, now: float) -> bool:
        """Whether it was idle for longer than its `ttl_s`."""
        return self.settings.ttl_s is not None and now - self.last_used_at > self.settings.ttl_s

    def unreadable(self, error: StoreError) -> HTMError:
        """What a read of this session that failed is answered; damage is remembered."""
        if isinstance(error, StoreDamaged):
            self.damage = str(error)
            return SessionDamaged(str(error))
        return Unhealthy(f"session {self.id!r} cannot be read: {error}")

    def check_sound(self) -> None:
        """Raise SessionDamaged when it is known to be damaged."""
        if self.damage is not None:
            raise SessionDamaged(f"{self.damage}; it takes no more appends")

    def info(self) -> SessionInfo:
        """The session under inspection."""
        memory, length, first_position = self.memory, self.length, self.first_position
        return SessionInfo(
            id=self.id,
            **asdict(self.settings),
            first_position=first_position,
            length=length,
            num_chunks=self.num_chunks,
            num_sealed_chunks=length // self.settings.chunk_size,
            residency=self.state,
            device_bytes=memory.device_bytes if memory is not None else 0,
            device_key_bytes=memory.device_key_bytes if memory is not None else 0,
            host_bytes=self.host_bytes,
            stored_bytes=self.stored_bytes,
            created_at=self.created_at,
            updated_at=self.updated_at,
            last_used_at=self.last_used_at,
            num_appends=self.num_appends,
            num_attends=self.num_attends,
            num_queries=self.num_queries,
            num_lost_tokens=self.num_lost_tokens,
            damage=self.damage,
        )
