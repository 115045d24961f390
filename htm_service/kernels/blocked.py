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

    def warm_up(self) -> None:
        """Nothing: torch is ready."""

    def score(self, keys: Tensor, summary: Tensor) -> Tensor:
        """[M, D], [R, D] -> [R, M].

        One row is scored as two equal ones: the matrix-vector product of the BLAS that torch brings was seen to
        stream keys more slowly than its matrix product does.
        """
        rows = summary if len(summary) > 1 else summary.expand(2, -1)
        return (keys @ rows.T).T[: len(summary)].contiguous()

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
        """Row by row; see `ChunkAttention`. What positions contribute is computed for all rows at once."""
        num_rows, num_chunks, size = batch.visible.shape
        num_heads = batch.heads.shape[1]
        z = torch.empty_like(batch.heads)
        by_slot = batch.heads.new_empty(num_rows, num_heads, size)
        position_logits = None if batch.positions is None else batch.heads @ batch.positions.T  # [R, H, C]
        token_weights = batch.weights.new_empty(num_rows, num_chunks, size) if tokens else None
        token_scores = batch.weights.new_empty(num_rows, num_chunks, size) if tokens else None
        hidden = ~batch.visible
        has_hidden = hidden.flatten(1).any(dim=1).tolist()
        for row in range(num_rows):
            x = self._gather(batch.arena, batch.pages[row])  # [K*C, D]
            if has_hidden[row]:
                # Slots that were never written hold anything, NaN included, and 0 x NaN is NaN.
                x.masked_fill_(hidden[row].view(-1, 1), 0.0)
            logits = (batch.heads[row] @ x.T).view(num_heads, num_chunks, size)
            if position_logits is not None:
                logits += position_logits[row, :, None]
            if has_hidden[row]:
                logits.masked_fill_(hidden[row], -torch.inf)
            shares = logits.softmax(dim=-1)  # [H, K, C]
            if has_hidden[row]:
                shares.masked_fill_(hidden[row], 0.0)  # chunks without a visible token: 0 / 0
            if token_weights is not None and token_scores is not None:
                torch.mean(shares, dim=0, out=token_weights[row])
                torch.mean(logits, dim=0, out=token_scores[row])
            shares *= batch.weights[row, :, None]
            torch.mm(shares.view(num_heads, -1), x, out=z[row])
            if batch.positions is not None:
                torch.sum(shares, dim=1, out=by_slot[row])
        if batch.positions is not None:
            z += by_slot @ batch.positions
        return ChunkAttention(z, token_weights, token_scores)

    def _gather(self, arena: Arena, pages: Tensor) -> Tensor:
        """Copy pages [K] into the workspace, as float32: [K*C, D]."""
        shape = (len(pages), arena.chunk_size, arena.dim)
        num_values = shape[0] * shape[1] * shape[2]
        if self._workspace.numel() < num_values:
            self._workspace = torch.empty(num_values)
        x = self._workspace[:num_values].view(shape)
        arena.take_into(pages, x)
        return x.view(-1, arena.dim)
