"""The projected cache of keys and values: a page holds W_k (x + p) and W_v (x + p) of its tokens, for one model.

H times fewer multiply-adds in the chunks, and 2 H E numbers read per token instead of D. Rows of a page [2 C, H E]:
the keys of its C tokens, then their values. Only the chosen chunks are projected here, the others would not be read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.candidates.workload import Workload
from bench.machine import best_of
from htm_service.kernels import loops
from htm_service.kernels.compiled import CompiledKernel, _row_parts, _table
from htm_service.kernels.loops import Array, compile_loop

_linear, _tokens, _softmax, choose = loops._linear, loops._tokens, loops._softmax, loops.choose


def project_tokens(workload: Workload, tokens: Tensor) -> Tensor:
    """Tokens [T, D], the first in slot 0, as keys and values [T, 2 H E]."""
    slots = torch.arange(len(tokens)) % workload.size.chunk_size
    weight = torch.cat((workload.projections.key, workload.projections.value)).flatten(0, 1)
    return (tokens + workload.positions[slots]) @ weight.T


def us_per_token(workload: Workload, num_tokens: int) -> float:
    """What an append of so many tokens would take longer: microseconds per token, the best of many."""
    tokens = torch.randn(num_tokens, workload.size.dim)
    weight = torch.cat((workload.projections.key, workload.projections.value)).flatten(0, 1)
    return best_of(20_000 // num_tokens + 10, lambda: tokens @ weight.T) / num_tokens * 1e6


def prepare(workload: Workload, num_threads: int, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Folded and scored as in the compiled kernel, then the loop below."""
    kernel, size, weights = CompiledKernel(num_threads), workload.size, workload.projections
    chosen = torch.cat(workload.chosen_pages())
    projected = project_tokens(workload, workload.arena.take(chosen).flatten(0, 1)).to(dtype)  # [P C, 2 H E]
    shape = (len(chosen), size.chunk_size, 2, size.heads * size.dim_head)
    pages = projected.view(shape).transpose(1, 2).flatten(1, 2).contiguous()  # [P, 2 C, H E]
    no_pages = np.empty((0, *pages.shape[1:]))
    wide, narrow, encoding = pages, no_pages.astype(np.uint16), loops.FLOAT32
    if dtype == torch.bfloat16:
        wide, narrow, encoding = torch.empty(no_pages.shape), pages.view(torch.uint16).numpy(), loops.BFLOAT16
    contents = (wide.numpy(), narrow, encoding)
    place = torch.full((workload.arena.max_pages,), -1)
    place[chosen] = torch.arange(len(chosen))
    table = _table(workload.searches)
    page_tables = [place[search.pages].numpy() for search in workload.searches]
    session_of = np.repeat(np.arange(len(page_tables)), size.num_queries)
    queries, rest = workload.queries.numpy(), [tensor.numpy() for tensor in weights]

    def answer() -> Tensor:
        summary = np.empty_like(queries)
        head_queries = np.empty((len(queries), size.heads * size.dim_head), np.float32)
        output = np.empty_like(queries)
        parts = _row_parts(len(queries), kernel._num_parts(len(queries)))
        kernel._together([partial(fold, queries[part], *rest[:4], summary[part], head_queries[part]) for part in parts])
        batch = workload.batch(torch.from_numpy(summary), torch.empty(len(queries), 0))
        index, logit = kernel._score(batch, table)
        chunks = np.full((len(queries), batch.width), -1)
        weight = np.zeros(chunks.shape, np.float32)
        choose(table, index, logit, chunks, weight)
        taken = np.stack([page_tables[at][row] for at, row in zip(session_of, chunks, strict=True)])
        kernel._together(
            [
                partial(
                    attend,
                    *contents,
                    taken[part],
                    weight[part],
                    head_queries[part],
                    size.heads,
                    *rest[6:],
                    output[part],
                )
                for part in parts
            ]
        )
        return torch.from_numpy(output)

    return answer


@compile_loop
def fold(
    queries: Array, summary_weight: Array, summary_bias: Array, query_weight: Array, query_bias: Array,
    summary: Array, head_queries: Array,
) -> None:  # fmt: skip
    """Queries [R, D] to what meets summary keys [R, D], and to the heads' queries [R, H E]: keys are not folded in."""
    _linear(queries, summary_weight, summary_bias, summary)
    _linear(queries, query_weight, query_bias, head_queries)


@compile_loop
def attend(
    wide: Array, narrow: Array, encoding: int, pages: Array, weight: Array, head_queries: Array, num_heads: int,
    output_weight: Array, output_bias: Array, output: Array,
) -> None:  # fmt: skip
    """Answers [R, D] of pages [R, K] with weights [R, K]."""
    size, inner = max(wide.shape[1], narrow.shape[1]) // 2, head_queries.shape[1]
    width = inner // num_heads
    workspace = np.empty((2 * size, inner), np.float32)
    share = np.empty((num_heads, size), np.float32)
    values = np.zeros(head_queries.shape, np.float32)
    for row in range(len(pages)):
        for place in range(pages.shape[1]):
            tokens = _tokens(wide, narrow, encoding, pages[row, place], 0, 2 * size, workspace)
            for c in range(size):
                for h in range(num_heads):
                    total = np.float32(0)
                    query, key = head_queries[row, h * width : (h + 1) * width], tokens[c, h * width : (h + 1) * width]
                    for e in range(width):
                        total += query[e] * key[e]
                    share[h, c] = total
            for h in range(num_heads):
                _softmax(share[h])
                share[h] *= weight[row, place]
            for c in range(size):
                for h in range(num_heads):
                    p, value = share[h, c], tokens[size + c, h * width : (h + 1) * width]
                    to = values[row, h * width : (h + 1) * width]
                    for e in range(width):
                        to[e] += p * value[e]
    _linear(values, output_weight, output_bias, output)
