"""The reference's arithmetic through torch.compile, for fixed shapes: selection by search, the rest by 16 rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import einsum
from torch import Tensor
from torch.nn import functional

from bench.candidates.workload import Workload
from htm_service.kernels.reference import ROWS_AT_ONCE


def prepare(workload: Workload) -> Callable[[], Tensor]:
    """The first call compiles."""
    weights, positions, contents = workload.projections, workload.positions, workload.arena.contents
    assert contents is not None
    num_heads, dim_head, _ = weights.key.shape

    def fold(queries: Tensor) -> tuple[Tensor, Tensor]:
        summary = functional.linear(queries, weights.summary, weights.summary_bias)
        head_queries = functional.linear(queries, weights.query, weights.query_bias)
        head_queries = head_queries.view(-1, num_heads, dim_head)
        return summary, einsum(head_queries, weights.key, "r h e, h e d -> r h d")

    def select(summary: Tensor, keys: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        logits, index = (summary @ keys.T).topk(workload.searches[0].k)
        return pages[index], logits.softmax(dim=-1)

    def attend(heads: Tensor, pages: Tensor, weight: Tensor) -> Tensor:
        y = contents[pages] + positions  # [R, k, C, D]
        shares = einsum(heads, y, "r h d, r k c d -> r h k c").softmax(dim=-1)
        z = einsum(shares * weight[:, None, :, None], y, "r h k c, r k c d -> r h d")
        values = einsum(z, weights.value, "r h d, h e d -> r h e")
        return functional.linear(values.flatten(1), weights.output, weights.output_bias)

    def compiled(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False)

    fold_fast, select_fast, attend_fast = compiled(fold), compiled(select), compiled(attend)
    num_queries = workload.size.num_queries

    def answer() -> Tensor:
        summary, heads = fold_fast(workload.queries)
        found = [
            select_fast(rows, search.keys, search.pages)
            for rows, search in zip(summary.split(num_queries), workload.searches, strict=True)
        ]
        pages, weight = (torch.cat(part) for part in zip(*found, strict=True))
        parts = zip(heads.split(ROWS_AT_ONCE), pages.split(ROWS_AT_ONCE), weight.split(ROWS_AT_ONCE), strict=True)
        return torch.cat([attend_fast(*part) for part in parts])

    return torch.inference_mode()(answer)
