"""What a kernel is: scoring summary keys, selecting the top-k, and attending in the selected chunks.

Shapes: R query rows, D width, H heads, C chunk size, M chunks of a session, K selected chunks per row.
Kernels are pure: they never change their arguments. They do not know sessions, requests or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from htm_service.arena import Arena


@dataclass(frozen=True, slots=True)
class ChunkBatch:
    """The selected chunks of R rows.

    `pages` [R, K] int64 (any page where `weights` is 0), `visible` [R, K, C] bool, `weights` [R, K] float32,
    `heads` [R, H, D] float32: the absorbed queries a_h; `positions` [C, D] float32 or None.
    """

    arena: Arena
    pages: Tensor
    visible: Tensor
    weights: Tensor
    heads: Tensor
    positions: Tensor | None


@dataclass(frozen=True, slots=True)
class ChunkAttention:
    """`z` [R, H, D] float32: sum over the K chunks of weight x softmax-weighted tokens, before projection.

    When asked for: `token_weights` [R, K, C], in-chunk weights as a mean over heads, 0 where not visible;
    `token_scores` [R, K, C], in-chunk logits as a mean over heads, -inf where not visible.
    """

    z: Tensor
    token_weights: Tensor | None
    token_scores: Tensor | None


class Kernel(Protocol):
    """One implementation of the read path's three steps."""

    name: str

    def warm_up(self) -> None:
        """Do what the first batch should not have to wait for."""
        ...

    def score(self, keys: Tensor, summary: Tensor) -> Tensor:
        """Summary logits [R, M] of absorbed queries [R, D] over summary keys [M, D]."""
        ...

    def select(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k greatest of each row [R, M], k <= M: logits, indexes [R, k], descending; ties to the lower index."""
        ...

    def attend_chunks(self, batch: ChunkBatch, *, tokens: bool) -> ChunkAttention:
        """Attend in the selected chunks; with `tokens`, say how the tokens took part."""
        ...
