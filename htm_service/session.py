"""One session in the engine: its settings, how long it is, and what of it is on the device.

Two sides touch it. The event loop owns `settings`, the times, the counters and `recalls`. The device thread
owns `memory`, `state`, `parked`, `pending` and `episodes`, and alone writes `length`, which anyone may read.
Does not know storage, batches or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from htm_service.memory import Memory
from htm_service.recalls import RecallLog
from htm_service.records import DType, OnFull, OpenChunk, Residency, SessionInfo
from htm_service.visibility import EpisodeRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The resolved settings of a session, as they are stored."""

    dim: int
    chunk_size: int
    model: str
    dtype: DType
    open_chunk: OpenChunk
    labels: Mapping[str, str]
    ttl_s: float | None
    on_full: OnFull
    max_tokens: int | None

    def stored(self) -> dict[str, Any]:
        """As a JSON object for the store, which keeps `max_tokens` itself."""
        fields = asdict(self)
        del fields["max_tokens"]
        return fields


@dataclass(slots=True)
class NewTokens:
    """Tokens [T, D] that are durable from position `start` on, waiting to become visible."""

    start: int
    tokens: Tensor
    episode: int | None


@dataclass(slots=True, eq=False)
class Session:
    """See the head of this module. `sid` is the store's key for it."""

    id: str
    sid: int
    settings: Settings
    created_at: float
    updated_at: float
    last_used_at: float
    length: int
    stored_bytes: int
    recalls: RecallLog
    num_appends: int = 0
    num_attends: int = 0
    num_queries: int = 0
    state: Residency = "cold"
    is_deleted: bool = False
    memory: Memory | None = None
    episodes: list[EpisodeRun] = field(default_factory=list)
    parked: list[Any] = field(default_factory=list)
    """Tickets that wait until the session is resident."""
    pending: list[NewTokens] = field(default_factory=list)
    """Appended while the session was loading."""

    @property
    def num_chunks(self) -> int:
        """Chunks, the open one included."""
        return -(-self.length // self.settings.chunk_size)

    def is_expired(self, now: float) -> bool:
        """Whether it was idle for longer than its `ttl_s`."""
        return self.settings.ttl_s is not None and now - self.last_used_at > self.settings.ttl_s

    def info(self) -> SessionInfo:
        """The session under inspection."""
        memory, length = self.memory, self.length
        return SessionInfo(
            id=self.id,
            **asdict(self.settings),
            length=length,
            num_chunks=self.num_chunks,
            num_sealed_chunks=length // self.settings.chunk_size,
            residency=self.state,
            device_bytes=memory.device_bytes if memory is not None else 0,
            stored_bytes=self.stored_bytes,
            created_at=self.created_at,
            updated_at=self.updated_at,
            last_used_at=self.last_used_at,
            num_appends=self.num_appends,
            num_attends=self.num_attends,
            num_queries=self.num_queries,
        )
