"""The loop's half of one session: its settings, times, counters, and the accounts of its recalls.

What of it is on the device is `memory/resident.py`'s, which this one holds; `length` and `first_position` are there,
because whoever makes tokens visible writes them. Runs on the event loop. Does not know stores, batches or HTTP.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from htm_service.errors import SessionDamaged
from htm_service.memory.resident import Resident
from htm_service.records import SessionInfo
from htm_service.session_settings import SessionSettings
from htm_service.sessions.recalls import RecallLog
from storage.base import SessionKey


@dataclass(slots=True, eq=False)
class Session:
    """See the head of this module. Times are seconds since the epoch."""

    resident: Resident
    settings: SessionSettings
    created_at: float
    updated_at: float
    last_used_at: float
    recalls: RecallLog
    num_appends: int = 0
    num_attends: int = 0
    num_queries: int = 0
    damage: str | None = None
    """What a read found wrong with its bytes in the store: it takes no more appends."""
    num_stored_keys: int = 0
    """Chunks whose summary keys the store has, as far as compaction knows."""

    @property
    def key(self) -> SessionKey:
        """Its name."""
        return self.resident.key

    @property
    def id(self) -> str:
        """What callers call it."""
        return self.resident.key.id

    @property
    def sid(self) -> int:
        """The store's number for it."""
        return self.resident.sid

    @property
    def length(self) -> int:
        """Tokens that were appended."""
        return self.resident.extent.length

    @property
    def first_position(self) -> int:
        """Where its tokens begin: those before were trimmed."""
        return self.resident.extent.first_position

    @property
    def first_chunk(self) -> int:
        """The first chunk that was not trimmed."""
        return self.resident.first_chunk

    @property
    def num_chunks(self) -> int:
        """Chunks, the open one included."""
        return self.resident.num_chunks

    def is_expired(self, now: float) -> bool:
        """Whether it was idle for longer than its `ttl_s`."""
        return self.settings.ttl_s is not None and now - self.last_used_at > self.settings.ttl_s

    def check_sound(self) -> None:
        """Raise SessionDamaged when it is known to be damaged."""
        if self.damage is not None:
            raise SessionDamaged(f"{self.damage}; it takes no more appends")

    def info(self) -> SessionInfo:
        """The session under inspection."""
        resident, chunks = self.resident, self.resident.chunks
        first_position, length, _ = resident.extent
        return SessionInfo(
            id=self.id,
            **asdict(self.settings),
            first_position=first_position,
            length=length,
            num_chunks=self.num_chunks,
            num_sealed_chunks=length // self.settings.chunk_size,
            residency="cold" if chunks is None else resident.state,
            device_bytes=0 if chunks is None else chunks.device_bytes,
            device_key_bytes=0 if chunks is None else chunks.device_key_bytes,
            stored_bytes=(length - first_position) * resident.token_bytes,
            created_at=self.created_at,
            updated_at=self.updated_at,
            last_used_at=self.last_used_at,
            num_appends=self.num_appends,
            num_attends=self.num_attends,
            num_queries=self.num_queries,
            damage=self.damage,
        )
