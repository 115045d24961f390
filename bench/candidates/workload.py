"""What the candidates compute: queries on sessions in an arena, with random weights, in three sizes.

Sessions are whole chunks and nothing is masked, so that no candidate needs code for more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from htm_service.attention.positions import position_table
from htm_service.kernels import Batch, Kernel, Projections, Search, View
from htm_service.kernels.reference import ReferenceKernel
from htm_service.memory.arena import Arena, Budget
from htm_service.memory.chunks import Memory


@dataclass(frozen=True)
class Size:
    """Sessions of n tokens each, `num_queries` queries on each; D, H, E, C, k as everywhere."""

    name: str
    num_sessions: int
    length: int
    num_queries: int
    dim: int = 512
    heads: int = 8
    dim_head: int = 64
    chunk_size: int = 32
    top_k: int = 8


@dataclass(frozen=True)
class Workload:
    """Fold, attend and project these: `queries` [R, D], the rows of the searches following each other."""

    size: Size
    projections: Projections
    positions: Tensor
    """[C, D]."""
    queries: Tensor
    arena: Arena
    searches: list[Search]

    def view(self) -> View:
        """What a kernel answers the queries from."""
        return View(self.arena, self.positions, self.searches)

    def batch(self, summary: Tensor, heads: Tensor) -> Batch:
        """The folded queries [R, D] and [R, H, D] as a kernel takes them."""
        return self.view().batch(summary, heads)

    def answer(self, kernel: Kernel) -> Tensor:
        """The answers [R, D]."""
        return kernel.answer(self.projections, self.queries, self.view())[1]

    def chosen_pages(self) -> list[Tensor]:
        """The pages that each search takes chunks from, once each."""
        kernel = ReferenceKernel()
        chosen = kernel.select(self.batch(*kernel.fold(self.projections, self.queries)))
        rows = chosen.split(self.size.num_queries)
        return [search.pages[index.unique()] for search, index in zip(self.searches, rows, strict=True)]

    def with_dtype(self, dtype: torch.dtype) -> Workload:
        """The same with contents of `dtype`: of the chosen chunks only, the others would not be read."""
        pages = torch.cat(self.chosen_pages())
        budget = Budget((len(pages) + 1) * 2 * self.arena.page_bytes)
        arena = Arena(self.size.dim, self.size.chunk_size, dtype, torch.device("cpu"), budget)
        new = arena.allocate(len(pages))
        arena.put(new, self.arena.take(pages).to(dtype))
        new_page = torch.full((self.arena.max_pages,), -1)
        new_page[pages] = torch.tensor(new)
        searches = [replace(search, pages=new_page[search.pages]) for search in self.searches]
        return replace(self, arena=arena, searches=searches)


def make_workload(size: Size) -> Workload:
    """Seeded. Takes n x D x 4 bytes per session."""
    random = torch.Generator().manual_seed(1)
    dim, inner = size.dim, size.heads * size.dim_head
    assert size.length % size.chunk_size == 0

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).div(dim**0.5)

    projections = Projections(
        summary=weights(dim, dim) * 4,
        summary_bias=weights(dim),
        query=weights(inner, dim) * size.dim_head**-0.5,
        query_bias=weights(inner),
        key=weights(size.heads, size.dim_head, dim),
        value=weights(size.heads, size.dim_head, dim),
        output=weights(dim, inner),
        output_bias=weights(dim),
    )
    num_chunks = size.length // size.chunk_size
    budget = Budget(2 * size.num_sessions * (num_chunks + 1) * (size.chunk_size + 1) * dim * 4)
    arena = Arena(dim, size.chunk_size, torch.float32, torch.device("cpu"), budget)
    searches = []
    for _ in range(size.num_sessions):
        memory = Memory(arena, budget)
        memory.append(torch.randn(size.length, dim, generator=random))
        k = min(size.top_k, num_chunks)
        searches.append(Search(memory.keys, memory.page_table, 0, 0, size.length, size.num_queries, k))
    queries = torch.randn(size.num_sessions * size.num_queries, dim, generator=random)
    return Workload(size, projections, position_table(size.chunk_size, dim), queries, arena, searches)
