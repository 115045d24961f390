"""The device's half of searches: a batch of them over many sessions, from queries to positions and scores.

What a search has to score and is not here is scored as it is fetched, so that nothing must stay until the rest has
come. Shapes: R rows of a group, Q queries of one search, n tokens it wants, C chunk size, D width, m chunks.
Does not know queues, storage or payloads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from htm_service.errors import InvalidArgument
from htm_service.kernels.base import Kernel
from htm_service.kernels.resolve import search_kernel
from htm_service.kernels.search.base import Found, TokenSearch
from htm_service.memory.chunks import Chunks
from htm_service.memory.sketches.code import LEAST_DIM
from htm_service.reads.cost import PRODUCTS_OF_ANY_QUERY
from htm_service.reads.runner import Attend, Missing, stack_queries
from htm_service.records import SearchResult

FEW_SCORED = 1024
"""Tokens scored for a query, up to which all share a group."""
PRODUCTS_PER_SKETCHED = 8
"""A sketch costs as much as one in so many of its token's multiply-adds."""


@dataclass(slots=True, eq=False)
class Find(Attend):
    """One search on its way; of an attend's fields `top_k` has no meaning."""

    num_wanted: int = 0
    num_scored: int = 0
    exact: bool = False
    embeddings: bool = False
    known_scores: Sequence[tuple[Tensor, Tensor]] = ()
    """Chunks [p], and the scores [p, Q, C] of their tokens, whose contents were here and need not be any more."""
    known_tokens: dict[int, Tensor] = field(default_factory=dict)
    """By position, [D], on the host: of what was found, where `embeddings` are asked for."""
    wanted: Collection[int] = ()
    """Positions that are to be among these."""

    def begin_anew(self, num_truncated: int) -> None:
        """See `Attend.begin_anew`."""
        self.num_truncated = num_truncated
        self.known_scores, self.known_tokens, self.wanted = (), {}, ()

    def products_per_query(self, num_tokens: int) -> int:
        """Those of the keys, of the tokens scored, and of the sketches, or of all tokens."""
        dim, size = self.resident.settings.dim, self.resident.settings.chunk_size
        per_token = dim if self.exact or dim < LEAST_DIM else dim // PRODUCTS_PER_SKETCHED
        return PRODUCTS_OF_ANY_QUERY + dim * (num_tokens // size + self.num_scored) + num_tokens * per_token

    @property
    def fetched_bytes(self) -> int:
        """What a search lacks comes by and by."""
        return 1


class Finder:
    """Runs batches of searches with one kernel, on one thread."""

    def __init__(self, kernel: Kernel) -> None:
        self.use(kernel)

    def use(self, kernel: Kernel) -> None:
        """Compute with another kernel from now on."""
        self._kernel = kernel
        self._search = search_kernel(kernel)

    def run(self, finds: Sequence[Find]) -> list[SearchResult | Exception]:
        """One result per search, in order. All that it scores must be here or known; see `missing`."""
        results: dict[Find, SearchResult | Exception] = {}
        for group in _groups(finds):
            for find, found, _ in self._find(group):
                results[find] = _result(find, found)
        return [results[find] for find in finds]

    def missing(self, finds: Sequence[Find]) -> list[Missing]:
        """Per search, what must be fetched before `run`, or before this can say what else."""
        missing: dict[Find, Missing] = {}
        for group in _groups(finds):
            for find, found, lacking in self._find(group):
                chunks, at_once = find.chunks, max(1, find.chunks.arena.max_pages // 2)
                if not lacking and find.embeddings:  # those of what it found
                    position = found.position[found.position >= 0].tolist()
                    find.wanted = {at for at in position if at not in find.known_tokens}
                    lacking = chunks.missing(sorted({at // chunks.chunk_size for at in find.wanted}))
                missing[find] = Missing(lacking, in_part=len(lacking) > at_once)
        return [missing[find] for find in finds]

    def know(self, find: Find, contents: Mapping[int, Tensor]) -> None:
        """Keep of chunks, by their contents [C, D] on the host, the scores of all tokens, and those tokens wanted."""
        size = find.chunks.chunk_size
        find.known_tokens |= {
            at: contents[at // size][at % size].float() for at in find.wanted if at // size in contents
        }
        tokens = torch.stack(list(contents.values())).to(find.chunks.arena.device).float()
        with torch.inference_mode():
            queries, _, slots = self._asked([find])
            scores = torch.einsum("q d, m c d -> m q c", queries, tokens)
            if slots is not None:
                scores += slots
        chunks = torch.tensor(list(contents), device=scores.device)
        find.known_scores = (*find.known_scores, (chunks, scores))

    def _find(self, group: list[list[Find]]) -> list[tuple[Find, Found, list[int]]]:
        """What each search of a group finds, and the chunks that those which look at the same lack together."""
        finds = [find for together in group for find in together]
        with torch.inference_mode():
            searches = [self._look(together) for together in group]
            found = self._search.find(finds[0].chunks.arena, searches, *self._asked(finds))
        position, score = found.position.cpu(), found.score.cpu()
        answers, first = [], 0
        for together, lacking in zip(group, found.lacking, strict=True):
            for find in together:
                rows = slice(first, first := first + len(find.request.queries))
                own = Found(position[rows, : find.num_wanted], score[rows, : find.num_wanted], [])
                answers.append((find, own, lacking.tolist()))
        return answers

    def _asked(self, finds: list[Find]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries u [R, D], P u, and what slots add to the scores [R, C]."""
        model, arena = finds[0].model, finds[0].chunks.arena
        queries = model.scoring(stack_queries(finds), self._kernel)
        rotated = arena.rotation.rotate(queries)
        positions = model.positions(arena.chunk_size)
        return queries, rotated, None if positions is None else queries @ positions.T

    def _look(self, together: list[Find]) -> TokenSearch:
        """What searches that see the same look through."""
        find, num_queries = together[0], sum(len(find.request.queries) for find in together)
        chunks, seen = find.chunks, find.seen
        first, last = seen.chunk_range(chunks.chunk_size)
        keys, pages = chunks.tables(first, last)
        bits: Tensor | None = None
        factors: Tensor | None = None
        if chunks.sketches is not None and not (find.exact or self._is_scanned(chunks)) and first < last:
            bits, factors = chunks.sketches.tables(first, last)
        return TokenSearch(
            *(keys, pages, bits, factors, first, seen.start, seen.stop, num_queries, find.num_wanted, find.num_scored),
            token_mask=None if seen.token_mask is None else torch.from_numpy(seen.token_mask).to(keys.device),
            known=_known(find, first, last),
        )

    def _is_scanned(self, chunks: Chunks) -> bool:
        """Whether reading all tokens is no slower."""
        return chunks.arena.dim < LEAST_DIM or (self._search.prefers_tokens and not chunks.num_missing)


def _groups(finds: Sequence[Find]) -> list[list[list[Find]]]:
    """Searches that share a model and an arena, those that look at the same tokens in the same way together.

    A kernel has lists for all rows as long as the longest, so searches for much have groups of their own.
    """
    groups: dict[tuple[int, ...], dict[tuple[object, ...], list[Find]]] = defaultdict(lambda: defaultdict(list))
    for find in finds:
        seen = find.seen
        alike: tuple[object, ...] = (id(find),)
        if seen.token_mask is None and not find.known_scores:
            alike = id(find.chunks), seen.start, seen.stop, find.num_wanted, find.num_scored, find.exact
        much = (find.num_scored // FEW_SCORED).bit_length()
        groups[id(find.model), id(find.chunks.arena), much][alike].append(find)
    return [list(alike.values()) for alike in groups.values()]


def _known(find: Find, first: int, last: int) -> Tensor | None:
    """The scores that are known of the tokens of chunks first .. last-1: [Q, m C], NaN for the others."""
    if not find.known_scores:
        return None
    size = find.chunks.chunk_size
    known = torch.full((len(find.request.queries), last - first, size), torch.nan, device=find.chunks.keys.device)
    for chunks, scores in find.known_scores:
        is_seen = (chunks >= first) & (chunks < last)
        known[:, chunks[is_seen] - first] = rearrange(scores[is_seen], "p q c -> q p c")
    return known.flatten(1)


def _result(find: Find, found: Found) -> SearchResult | Exception:
    """What a search answers, on the host."""
    position, score = found.position.numpy(), found.score.numpy()
    if np.isnan(score[:, 0]).any():  # then it is so in the whole row
        largest = float(np.abs(find.request.queries[np.isnan(score).any(axis=1)]).max())
        return InvalidArgument(
            f"scores overflow float32: a query of up to {largest:g} meets tokens that are too large; scale the "
            "embeddings, or hide such tokens (start, stop, mask)"
        )
    if (is_none := position < 0).any():
        score = np.where(is_none, np.float32(0), score)
    return SearchResult(
        position,
        score,
        find.chunks.length,
        find.chunks.chunk_size,
        embeddings=_embeddings(find, found.position) if find.embeddings else None,
    )


def _embeddings(find: Find, position: Tensor) -> np.ndarray:
    """The tokens [Q, n, D] at these positions, which are known or whose pages are here; 0 for none."""
    chunks = find.chunks
    vectors = torch.zeros(*position.shape, chunks.arena.dim)
    is_known = torch.from_numpy(np.isin(position.numpy(), list(find.known_tokens)))
    for row in is_known.nonzero().tolist():
        vectors[tuple(row)] = find.known_tokens[int(position[tuple(row)])]
    is_found = (position >= 0) & ~is_known
    at = position[is_found].to(chunks.keys.device)
    held, slots = at // chunks.chunk_size, at % chunks.chunk_size
    needed, places = held.unique(return_inverse=True)
    vectors[is_found] = chunks.contents(needed)[places, slots].float().cpu()
    return vectors.numpy()
