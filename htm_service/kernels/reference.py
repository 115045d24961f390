"""The read path in plain torch, for any device: clear first, and what the other kernels are compared with."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor

from htm_service.kernels.base import ChunkAttention, ChunkBatch

ROWS_AT_ONCE = 16
"""Rows whose contents [rows, K, C, D] are gathered together: bounds the workspace."""


class ReferenceKernel:
    """See the head of this module."""

    name = "reference"

    def warm_up(self) -> None:
        """Nothing: torch is ready."""

    def score(self, keys: Tensor, summary: Tensor) -> Tensor:
        """[M, D], [R, D] -> [R, M]."""
        return summary @ keys.T

    def select(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[R, M] -> [R, k], [R, k]; a stable sort keeps ties in order, where topk promises none."""
        ordered, indexes = logits.sort(dim=-1, descending=True, stable=True)
        return ordered[:, :k], indexes[:, :k]

    def attend_chunks(self, batch: ChunkBatch, *, tokens: bool) -> ChunkAttention:
        """Rows in blocks; see `ChunkAttention`."""
        parts = [self._attend(batch, rows) for rows in torch.arange(len(batch.heads)).split(ROWS_AT_ONCE)]
        z, weights, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        return ChunkAttention(z, weights if tokens else None, scores if tokens else None)

    def _attend(self, batch: ChunkBatch, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads, visible, weights = batch.heads[rows], batch.visible[rows], batch.weights[rows]
        num_rows, num_chunks = weights.shape
        x = batch.arena.take(batch.pages[rows].flatten()).float()
        x = rearrange(x, "(r k) c d -> r k c d", r=num_rows, k=num_chunks)
        # Slots that were never written hold anything, NaN included, and 0 x NaN is NaN.
        x = x.masked_fill(~visible[..., None], 0.0)
        y = x if batch.positions is None else x + batch.positions
        scores = einsum(heads, y, "r h d, r k c d -> r h k c")
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
        shares = scores.softmax(dim=-1).masked_fill(~visible[:, None], 0.0)  # chunks without a visible token: 0 / 0
        z = einsum(shares * weights[:, None, :, None], y, "r h k c, r k c d -> r h d")
        return z, shares.mean(dim=1), scores.mean(dim=1)
