"""The resolved settings of a session, as they are stored. Does not know requests or where they are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from htm_service.dtypes import TORCH_DTYPES
from htm_service.errors import SessionDamaged
from htm_service.records import DType, OnFull, OpenChunk
from storage.base import SessionRow, first_to_keep

Shape = tuple[int, int, torch.dtype]
"""D, C and the dtype of chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
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

    @property
    def shape(self) -> Shape:
        """D, C and the dtype: sessions of one shape share arenas."""
        return self.dim, self.chunk_size, TORCH_DTYPES[self.dtype]

    @property
    def trims(self) -> bool:
        """Whether the oldest chunks make room where `max_tokens` would be passed."""
        return self.on_full == "evict_oldest"

    def first_position(self, length: int) -> int:
        """Where a session of this length begins."""
        if self.max_tokens is None or not self.trims:
            return 0
        return max(0, first_to_keep(length, 0, self.max_tokens, self.chunk_size) or 0)

    @property
    def max_append(self) -> int:
        """Tokens of one append for which there is always room, in a session that trims itself."""
        assert self.max_tokens is not None, "validation asks for it"
        return self.max_tokens - self.chunk_size + 1

    @classmethod
    def of_row(cls, row: SessionRow) -> SessionSettings:
        """What `stored` gave to the store. Raises SessionDamaged for anything else."""
        if (wrong := wrong_with(row.settings)) is not None:
            raise SessionDamaged(f"session {row.id!r} is damaged: its settings cannot be read, {wrong}")
        return cls(**row.settings, max_tokens=row.max_tokens)

    def stored(self) -> dict[str, Any]:
        """As a JSON object for the store, which keeps `max_tokens` itself."""
        stored = asdict(self)
        del stored["max_tokens"]
        return stored


def wrong_with(stored: Mapping[str, Any]) -> str | None:
    """What makes stored settings others than `SessionSettings.stored` gave to the store, or None."""
    names = {one.name for one in fields(SessionSettings)} - {"max_tokens"}
    if lost := sorted(names - stored.keys()):
        return f"they lack {', '.join(lost)}"
    if unknown := sorted(stored.keys() - names):
        return f"they have the unknown {', '.join(map(repr, unknown))}"
    if stored["dtype"] not in list(TORCH_DTYPES):
        return f"their dtype is {stored['dtype']!r}"
    return None
