"""The read path in plain torch, for any device: clear first, and what the other kernels are compared with."""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn import functional

from htm_service.kernels.base import Attended, Batch, Projections, Search, View, answer_in_steps

ROWS_AT_ONCE = 16
"""Rows whose contents [rows, K, C, D] are gathered together: bounds the workspace."""
MOST = 2.0**128 - 2.0**104
"""The largest float32."""


class ReferenceKernel:
    """See the head of this module."""

    name = "reference"

    def warm_up(self) -> None:
        """Nothing: torch is ready."""

    def fold(self, projections: Projections, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrix products, and one per head."""
        summary = functional.linear(queries, projections.summary, projections.summary_bias)
        head_queries = functional.linear(queries, projections.query, projections.query_bias)
        head_queries = rearrange(head_queries, "r (h e) -> r h e", h=len(projections.key))
        return summary, einsum(head_queries, projections.key, "r h e, h e d -> r h d")

    def select(self, batch: Batch) -> Tensor:
        """Search by search; see `Kernel`."""
        chosen = batch.summary.new_full((len(batch.summary), batch.view.width), -1, dtype=torch.int64)
        first = 0
        for search in batch.view.searches:
            rows = torch.arange(search.num_queries)
            index, _ = ranked(search, batch.summary[first + rows], rows)
            chosen[first : first + search.num_queries, : search.k] = torch.where(index >= 0, index + search.first, -1)
            first += search.num_queries
        return chosen

    def attend(self, batch: Batch) -> Attended:
        """Search by search: select and attend; see `Attended`."""
        parts: list[Attended] = []
        first = 0
        for search in batch.view.searches:
            rows = torch.arange(first, first := first + search.num_queries)
            parts.extend(_attend(batch, search, part - rows[0], part) for part in rows.split(ROWS_AT_ONCE))

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        tokens = (joined("token_weight"), joined("token_score")) if batch.view.tokens else (None, None)
        return Attended(joined("chunk_index"), joined("chunk_weight"), joined("z"), *tokens)

    def project(self, projections: Projections, z: Tensor) -> Tensor:
        """One matrix product per head, and one for all."""
        values = einsum(z, projections.value, "r h d, h e d -> r h e")
        return functional.linear(values.flatten(1), projections.output, projections.output_bias)

    def answer(self, projections: Projections, queries: Tensor, view: View) -> tuple[Attended, Tensor]:
        """Step by step."""
        return answer_in_steps(self, projections, queries, view)


def mean_over_heads(logits: Tensor, dim: int) -> Tensor:
    """The mean of logits over the heads, dimension `dim`; the sum of finite ones may overflow."""
    return (logits / logits.shape[dim]).sum(dim=dim)


def _attend(batch: Batch, search: Search, queries: Tensor, rows: Tensor) -> Attended:
    """Rows of one search: their numbers in the search and in the batch."""
    view = batch.view
    index, logits = ranked(search, batch.summary[rows], queries)
    taken = index >= 0
    # A row without any chunk would be 0 / 0; one that overflowed stays NaN.
    weight = logits.softmax(dim=-1).masked_fill(logits == -torch.inf, 0.0)
    visible = _visible(search, index, queries, view.arena.chunk_size)  # [Q, k, C]
    if len(search.pages):
        pages = search.pages[index.clamp(min=0)].clamp(min=0)
        x = rearrange(view.arena.take(pages.flatten()).float(), "(q k) c d -> q k c d", k=search.k)
    else:
        x = weight.new_zeros(*visible.shape, view.arena.dim)
    # Slots that were never written hold anything, NaN included, and 0 x NaN is NaN.
    x = x.masked_fill(~visible[..., None], 0.0)
    y = x if view.positions is None else x + view.positions
    scores = einsum(batch.heads[rows], y, "q h d, q k c d -> q h k c")
    scores = scores.where(scores.isfinite(), torch.nan).masked_fill(~visible[:, None], -torch.inf)
    shares = scores.softmax(dim=-1).masked_fill(~visible[:, None], 0.0)  # chunks without a visible token: 0 / 0
    z = einsum(shares * weight[:, None, :, None], y, "q h k c, q k c d -> q h d").clamp_(-MOST, MOST)

    def widen(tensor: Tensor, fill: float) -> Tensor:
        """From the search's k chunks to the batch's K."""
        wide = tensor.new_full((tensor.shape[0], view.width, *tensor.shape[2:]), fill)
        wide[:, : search.k] = tensor
        return wide

    return Attended(
        widen(torch.where(taken, index + search.first, -1), -1),
        widen(weight, 0.0),
        z,
        widen(shares.mean(dim=1), 0.0) if view.tokens else None,
        widen(mean_over_heads(scores, dim=1), -torch.inf) if view.tokens else None,
    )


def ranked(search: Search, summary: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Indexes [Q, k] among the search's chunks, -1 for none, and logits; a stable sort keeps ties in order."""
    scores = summary @ search.keys.T  # [Q, m]
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if search.hidden is not None:
        hidden |= search.hidden if search.hidden.ndim == 1 else search.hidden[queries]
    if search.ends is not None and search.own_keys is not None:
        num_whole, own, _ = search.ends[queries].unsqueeze(-1).unbind(dim=1)  # [Q, 1] each
        of_own = (summary * search.own_keys[queries]).sum(dim=-1, keepdim=True)
        keys = torch.arange(len(search.keys), device=scores.device)
        scores = torch.where(keys == own, of_own, scores)
        hidden |= (keys >= num_whole) & (keys != own)
    overflowed = ~scores.isfinite() & ~hidden
    scores = scores.masked_fill(hidden, -torch.inf)
    logits, index = scores.sort(dim=-1, descending=True, stable=True)
    logits, index = logits[:, : search.k], index[:, : search.k]
    index = index.where(logits > -torch.inf, -1)
    return index, logits.masked_fill(overflowed.any(dim=-1, keepdim=True), torch.nan)


def _visible(search: Search, index: Tensor, queries: Tensor, chunk_size: int) -> Tensor:
    """Visible slots [Q, k, C] of chunks `index` [Q, k], taken by these rows of the search."""
    slots = torch.arange(chunk_size, device=index.device)
    positions = (search.first + index)[..., None] * chunk_size + slots
    stop = search.stop if search.ends is None else search.ends[queries, 2][:, None, None]
    visible = (positions >= search.start) & (positions < stop) & (index >= 0)[..., None]
    if search.token_mask is not None and len(search.token_mask):
        visible &= search.token_mask[(positions - search.start).clamp(0, len(search.token_mask) - 1)]
    return visible
