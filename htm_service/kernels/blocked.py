"""The read path on a CPU: one row at a time, its chunks copied once into a workspace that stays in cache.

A batch's contents gathered at once ([R, K, C, D]) would leave the cache before they are used twice. Here the
K pages of one row, half a megabyte at D 512, are copied once and read twice from the second-level cache.
Does not know sessions, requests or models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from htm_service.arena import Arena
from htm_service.kernels.base import ChunkAttention, ChunkBatch


class BlockedKernel:
    """See the head of this module."""

    name = "blocked"

    def __init__(self) -> None:
        self._workspace = torch.empty(0)

    def score(self, keys: Tensor, summary: Tensor) -> Tensor:
        """[M, D], [R, D] -> [R, M]."""
        return summary @ keys.T

    def select(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[R, M] -> [R, k], [R, k]; `topk`, and a stable sort only where it met a tie."""
        values, indexes = logits.topk(k, dim=-1)
        among = (values[:, 1:] == values[:, :-1]).any(dim=-1)
        across = (logits >= values[:, -1:]).sum(dim=-1) > k
        tied = (among | across).nonzero().squeeze(1)
        if len(tied):
            ordered, order = logits[tied].sort(dim=-1, descending=True, stable=True)
            values[tied], indexes[tied] = ordered[:, :k], order[:, :k]
        return values, indexes

    def attend_chunks(self, batch: ChunkBatch, *, tokens: bool) -> ChunkAttention:
        """Row by row; see `ChunkAttention`."""
        num_rows, num_chunks, size = batch.visible.shape
        z = torch.empty_like(batch.heads)
        shares = batch.weights.new_empty(num_rows, num_chunks, size) if tokens else None
        scores = batch.weights.new_empty(num_rows, num_chunks, size) if tokens else None
        hidden = ~batch.visible
        is_full = (~hidden.flatten(1).any(dim=1)).tolist()
        pages = batch.pages.tolist()
        for row in range(num_rows):
            x = self._gather(batch.arena, pages[row])  # [K*C, D]
            if not is_full[row]:
                # Slots that were never written hold anything, NaN included, and 0 x NaN is NaN.
                x.masked_fill_(hidden[row].view(-1, 1), 0.0)
            logits = batch.heads[row] @ x.T  # [H, K*C]
            logits = logits.view(-1, num_chunks, size)
            if batch.positions is not None:
                logits = logits + (batch.heads[row] @ batch.positions.T)[:, None]
            if not is_full[row]:
                logits = logits.masked_fill(hidden[row], -torch.inf)
            share = logits.softmax(dim=-1)  # [H, K, C]
            if not is_full[row]:
                share = share.masked_fill(hidden[row], 0.0)  # chunks without a visible token: 0 / 0
            if shares is not None and scores is not None:
                torch.mean(share, dim=0, out=shares[row])
                torch.mean(logits, dim=0, out=scores[row])
            share = share * batch.weights[row, :, None]
            torch.mm(share.view(-1, num_chunks * size), x, out=z[row])
            if batch.positions is not None:
                z[row].addmm_(share.sum(dim=1), batch.positions)
        return ChunkAttention(z, shares, scores)

    def _gather(self, arena: Arena, pages: list[int]) -> Tensor:
        """Copy pages into the workspace, as float32: [K*C, D]."""
        num_tokens = len(pages) * arena.chunk_size
        if self._workspace.numel() < num_tokens * arena.dim:
            self._workspace = torch.empty(num_tokens * arena.dim)
        x = self._workspace[: num_tokens * arena.dim].view(len(pages), arena.chunk_size, arena.dim)
        for place, page in enumerate(pages):
            x[place] = arena.page(page)
        return x.view(num_tokens, arena.dim)
