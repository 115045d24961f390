"""Torch with a workspace made once: a row's chunks are copied to where they stay in cache, then multiplied."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bench.candidates.workload import Workload
from htm_service.kernels import Search


def prepare(workload: Workload, num_threads: int) -> Callable[[], Tensor]:
    """Rows shared out among threads, torch itself using one in each."""
    num_sessions = len(workload.searches)
    num_parts = min(num_threads, len(workload.queries))
    if num_sessions > 1:
        edges = [num_sessions * part // num_parts for part in range(num_parts + 1)]
        shares = [(edges[part] * workload.size.num_queries, workload.searches[edges[part] : edges[part + 1]])
                  for part in range(num_parts)]  # fmt: skip
        counts = [len(searches) * workload.size.num_queries for _, searches in shares]
    else:
        edges = [workload.size.num_queries * part // num_parts for part in range(num_parts + 1)]
        shares = [(edges[part], workload.searches) for part in range(num_parts)]
        counts = [edges[part + 1] - edges[part] for part in range(num_parts)]
    output = torch.empty_like(workload.queries)
    blocks = [
        _Block(workload, searches, workload.queries[first : first + count], output[first : first + count])
        for (first, searches), count in zip(shares, counts, strict=True)
    ]
    pool = ThreadPoolExecutor(num_parts, initializer=partial(torch.set_num_threads, 1))

    def answer() -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        list(pool.map(_Block.run, blocks))
        torch.set_num_threads(before)
        return output

    return answer


class _Block:
    """R rows of one thread, and its workspace."""

    def __init__(self, workload: Workload, searches: list[Search], queries: Tensor, output: Tensor) -> None:
        size, num_rows = workload.size, len(queries)
        self.workload, self.searches, self.queries, self.output = workload, searches, queries, output
        self.summary = torch.empty(num_rows, size.dim)
        self.head_queries = torch.empty(num_rows, size.heads * size.dim_head)
        self.heads = torch.empty(num_rows, size.heads, size.dim)
        self.z = torch.empty(num_rows, size.heads, size.dim)
        self.by_slot = torch.empty(num_rows, size.heads, size.chunk_size)
        self.x = torch.empty(searches[0].k, size.chunk_size, size.dim)
        self.logits = torch.empty(size.heads, searches[0].k * size.chunk_size)
        self.scores = torch.empty(num_rows // len(searches), len(searches[0].keys))

    def run(self) -> None:
        weights, positions, contents = self.workload.projections, self.workload.positions, self.workload.arena.contents
        assert contents is not None
        num_heads, dim_head, dim = weights.key.shape
        torch.addmm(weights.summary_bias, self.queries, weights.summary.T, out=self.summary)
        torch.addmm(weights.query_bias, self.queries, weights.query.T, out=self.head_queries)
        by_head = self.head_queries.view(-1, num_heads, dim_head).transpose(0, 1)
        self.heads.copy_(torch.bmm(by_head, weights.key).transpose(0, 1))
        position_logits = (self.heads.view(-1, dim) @ positions.T).view(len(self.queries), num_heads, 1, -1)
        x, by_chunk = self.x.view(-1, dim), self.logits.view(num_heads, len(self.x), -1)
        row = 0
        for search in self.searches:
            torch.mm(self.summary[row : row + len(self.scores)], search.keys.T, out=self.scores)
            logits, index = self.scores.topk(search.k)
            weight, pages = logits.softmax(1), search.pages[index]
            for q in range(len(self.scores)):
                torch.index_select(contents, 0, pages[q], out=self.x)
                torch.mm(self.heads[row], x.T, out=self.logits)
                by_chunk.add_(position_logits[row])
                shares = functional.softmax(by_chunk, 2).mul_(weight[q, :, None])
                torch.mm(shares.view(num_heads, -1), x, out=self.z[row])
                torch.sum(shares, 1, out=self.by_slot[row])
                row += 1
        self.z.view(-1, dim).addmm_(self.by_slot.view(-1, len(positions)), positions)
        values = torch.bmm(self.z.transpose(0, 1), weights.value.transpose(1, 2)).transpose(0, 1)
        torch.addmm(weights.output_bias, values.reshape(len(values), -1), weights.output.T, out=self.output)
