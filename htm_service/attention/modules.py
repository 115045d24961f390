"""Hierarchical Transformer Memory attention as trainable modules; the readable reference of its definition.

HTM (also called HCAM): Lampinen, Chan, Banino, Hill, *Towards mental time travel: a hierarchical memory for
reinforcement learning agents*, 2021, arXiv 2105.14039.

`HTMAttention` and `HTMBlock` take the arguments and the state dicts of htm-pytorch 0.0.4. What differs, on
purpose, is in docs/attention.md: chunks are anchored at the front, and a query that sees nothing gets zero.

Shapes
    B  batch
    Q  queries
    N  tokens (memories)
    D  width of a query and a token
    C  chunk size
    M  chunks, ceil(N / C)
    K  selected chunks, min(topk_mems, M)
    H  heads
    E  width per head

Does not know: sessions, the serving path (`model.py` computes the same in folded form).
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional

from htm_service.attention.positions import inverse_frequencies, position_table
from htm_service.memory.summary import SCALE, mean_of


class ChunkPositions(nn.Module):
    """The sinusoid of each slot of a chunk, added to its tokens.

    `inv_freqs` is in the state dict because htm-pytorch's has it. The table does not come from it: in half
    precision its rounding would grow with the position.
    """

    inv_freqs: Tensor
    table: Tensor

    def __init__(self, dim: int, chunk_size: int) -> None:
        super().__init__()
        self.register_buffer("inv_freqs", inverse_frequencies(dim).float())  # [ceil(D / 2)]
        self.register_buffer("table", position_table(chunk_size, dim), persistent=False)  # [C, D]

    def forward(self, chunks: Tensor) -> Tensor:
        """Return `chunks` [..., C, D] plus the table."""
        return chunks + self.table.to(chunks.dtype)


class InChunkAttention(nn.Module):
    """Multi-head attention of each query to the tokens of each chunk selected for it: a softmax per chunk."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, queries: Tensor, chunks: Tensor, visible: Tensor) -> Tensor:
        """Attend `queries` [B, Q, D] to `chunks` [B, Q, K, C, D], `visible` [B, Q, K, C]: [B, Q, K, D].

        A chunk without a visible token gets a finite, meaningless result; the caller gives it weight 0.
        """
        q = rearrange(self.to_q(queries), "b q (h e) -> b q h e", h=self.heads)
        k, v = rearrange(self.to_kv(chunks), "b q k c (two h e) -> two b q k h c e", two=2, h=self.heads)

        logits = _at_least_float32(einsum(q, k, "b q h e, b q k h c e -> b q k h c")) * self.scale
        hidden = rearrange(~visible, "b q k c -> b q k 1 c")
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        weights = logits.softmax(dim=-1).to(v.dtype)  # [B, Q, K, H, C]

        heads = einsum(weights, v, "b q k h c, b q k h c e -> b q k h e")
        out: Tensor = self.to_out(rearrange(heads, "b q k h e -> b q k (h e)"))
        return out  # [B, Q, K, D]


class HTMAttention(nn.Module):
    """Attention to the `topk_mems` chunks of the memories whose summaries match the query best.

    Args:
        dim: width D of queries and memories, odd ones too.
        heads: heads H of the attention within a chunk.
        topk_mems: chunks each query selects; where fewer are visible it takes those.
        mem_chunk_size: tokens C per chunk.
        dim_head: width E per head.
        add_pos_enc: whether the slot's sinusoid is added to a token within its chunk.
        eps: added to the count of visible tokens in the mean of a masked chunk. 0 is the exact mean;
            1e-5 reproduces htm-pytorch.
        summary_scale: factor of the summary logits, D^-1/2 when None.

    No gradient reaches the memories: they are detached for the summaries and for the contents, as in
    htm-pytorch and in the paper. Raises ValueError for an argument out of range.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        topk_mems: int = 2,
        mem_chunk_size: int = 32,
        dim_head: int = 64,
        add_pos_enc: bool = True,
        eps: float = 0.0,
        *,
        summary_scale: float | None = None,
    ) -> None:
        super().__init__()
        for name, number in (
            ("dim", dim),
            ("heads", heads),
            ("topk_mems", topk_mems),
            ("mem_chunk_size", mem_chunk_size),
            ("dim_head", dim_head),
        ):
            if number < 1:
                raise ValueError(f"{name} is {number}; it must be at least 1")
        if eps < 0:
            raise ValueError(f"eps is {eps}; it must be at least 0")
        self.dim = dim
        self.topk_mems = topk_mems
        self.mem_chunk_size = mem_chunk_size
        self.eps = eps
        self.scale = dim**-0.5 if summary_scale is None else summary_scale
        self.to_summary_queries = nn.Linear(dim, dim)
        self.to_summary_keys = nn.Linear(dim, dim)
        self.attn = InChunkAttention(dim, heads, dim_head)
        self.pos_emb = ChunkPositions(dim, mem_chunk_size) if add_pos_enc else None

    def forward(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend `queries` [B, Q, D] to `memories` [B, N, D], N may be 0; returns [B, Q, D].

        `mask` [B, N] bool: which tokens are visible. `chunk_attn_mask` [B, Q, M] bool: which chunks each
        query may select. A query that sees no chunk gets the zero vector. Raises ValueError for a shape or a
        dtype that does not fit.
        """
        self._check(queries, memories, mask, chunk_attn_mask)
        chunks, visible = self._split(memories.detach(), mask)  # [B, M, C, D], [B, M, C]

        logits = self._summary_logits(queries, chunks, visible, masked=mask is not None)  # [B, Q, M]
        selectable = rearrange(visible.any(dim=-1), "b m -> b 1 m")
        if chunk_attn_mask is not None:
            selectable = selectable & chunk_attn_mask
        index, weights = select_chunks(logits, selectable, self.topk_mems)  # [B, Q, K] each

        batch = torch.arange(len(chunks), device=chunks.device)[:, None, None]
        selected, selected_visible = chunks[batch, index], visible[batch, index]  # [B, Q, K, C, (D)]
        if self.pos_emb is not None:
            selected = self.pos_emb(selected)
        within = self.attn(queries, selected, selected_visible)  # [B, Q, K, D]
        output: Tensor = einsum(weights.to(within.dtype), within, "b q k, b q k d -> b q d")
        return output

    def _split(self, memories: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Chunks [B, M, C, D], hidden and missing tokens zero, and which tokens are visible [B, M, C]."""
        if mask is None:
            mask = memories.new_ones(memories.shape[:2], dtype=torch.bool)  # [B, N]
        # Hidden tokens become zero, so that not even a NaN of theirs can reach the output.
        memories = memories.masked_fill(~mask[..., None], 0.0)
        num_missing = -memories.shape[1] % self.mem_chunk_size
        memories = functional.pad(memories, (0, 0, 0, num_missing))
        mask = functional.pad(mask, (0, num_missing), value=False)
        chunks = rearrange(memories, "b (m c) d -> b m c d", c=self.mem_chunk_size)
        return chunks, rearrange(mask, "b (m c) -> b m c", c=self.mem_chunk_size)

    def _summary_logits(self, queries: Tensor, chunks: Tensor, visible: Tensor, *, masked: bool) -> Tensor:
        """Match of each query with each chunk's mean of visible tokens, [B, Q, M] in float32 or wider."""
        total = reduce(_at_least_float32(chunks) * SCALE, "b m c d -> b m d", "sum")
        # htm-pytorch adds eps only where it has a mask; a chunk without a visible token is never selected.
        count = visible.sum(dim=-1).clamp(min=1)[..., None] + (self.eps if masked else 0.0)  # [B, M, 1]
        summary_keys = self.to_summary_keys(mean_of(total, count).to(chunks.dtype))  # [B, M, D]
        summary_queries = self.to_summary_queries(queries)  # [B, Q, D]
        logits = einsum(_at_least_float32(summary_queries), _at_least_float32(summary_keys), "b q d, b m d -> b q m")
        return logits * self.scale

    def _check(self, queries: Tensor, memories: Tensor, mask: Tensor | None, chunk_attn_mask: Tensor | None) -> None:
        for name, tensor in (("queries", queries), ("memories", memories)):
            if tensor.ndim != 3 or tensor.shape[2] != self.dim:
                raise ValueError(f"{name} has shape {list(tensor.shape)}; it must be [B, *, {self.dim}]")
            expected = self.to_summary_queries.weight.dtype
            if torch.is_autocast_enabled(tensor.device.type):
                if not tensor.is_floating_point():
                    raise ValueError(f"{name} has dtype {tensor.dtype}; it must be a floating point one")
            elif tensor.dtype != expected:
                raise ValueError(f"{name} has dtype {tensor.dtype}; the weights have {expected}")
        batch, num_queries = queries.shape[:2]
        if len(memories) != batch:
            raise ValueError(f"memories has batch {len(memories)}, queries {batch}; they must be equal")
        num_tokens = memories.shape[1]
        num_chunks = -(-num_tokens // self.mem_chunk_size)
        for name, given, shape in (
            ("mask", mask, [batch, num_tokens]),
            ("chunk_attn_mask", chunk_attn_mask, [batch, num_queries, num_chunks]),
        ):
            if given is None:
                continue
            if given.dtype != torch.bool:
                raise ValueError(f"{name} has dtype {given.dtype}; it must be torch.bool")
            if list(given.shape) != shape:
                raise ValueError(f"{name} has shape {list(given.shape)}; it must be {shape}")


class HTMBlock(nn.Module):
    """Layer norm of the queries, `HTMAttention`, and the normed queries added to its output.

    The residual is the normed query, not the raw one: that is what htm-pytorch trains. Keyword arguments
    are those of `HTMAttention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        topk_mems: int = 2,
        mem_chunk_size: int = 32,
        dim_head: int = 64,
        add_pos_enc: bool = True,
        eps: float = 0.0,
        *,
        summary_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attn = HTMAttention(
            dim,
            heads,
            topk_mems,
            mem_chunk_size,
            dim_head,
            add_pos_enc,
            eps,
            summary_scale=summary_scale,
        )

    def forward(
        self,
        queries: Tensor,
        memories: Tensor,
        mask: Tensor | None = None,
        chunk_attn_mask: Tensor | None = None,
    ) -> Tensor:
        """As `HTMAttention.forward`; a query that sees no chunk gets itself back, normed."""
        queries = self.norm(queries)
        output: Tensor = self.attn(queries, memories, mask=mask, chunk_attn_mask=chunk_attn_mask)
        return output + queries


def select_chunks(logits: Tensor, selectable: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best chunks of each query and their softmax: index [B, Q, K] and weights [B, Q, K].

    `logits` [B, Q, M], `selectable` broadcast to it; K = min(top_k, M). Among equal logits the lower index
    wins. Where fewer than K are selectable the rest have weight 0; where none is, all have.
    """
    selectable = selectable.expand_as(logits)
    ranked = logits.masked_fill(~selectable, -torch.inf)
    # A stable sort, because topk promises no order among equals.
    index = ranked.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top_k]  # [B, Q, K]
    chosen = selectable.gather(-1, index)
    # The lowest finite number, not -inf: a row of -inf would make softmax and its gradient NaN.
    best = logits.gather(-1, index).masked_fill(~chosen, torch.finfo(logits.dtype).min)
    return index, best.softmax(dim=-1) * chosen


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
