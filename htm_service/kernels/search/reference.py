"""Searches in plain torch, for any device: clear first, and what the compiled kernel is compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from htm_service.kernels.search.base import SPREAD, Found, TokenSearch
from htm_service.memory.arena import Arena
from htm_service.memory.sketches.code import ERROR, WORD_BITS

CHUNKS_AT_ONCE = 256
"""Chunks whose contents or bits are unpacked together: bounds the workspace."""


class ReferenceSearch:
    """See the head of this module."""

    prefers_tokens = True

    def find(
        self, arena: Arena, searches: Sequence[TokenSearch], queries: Tensor, rotated: Tensor, slots: Tensor | None
    ) -> Found:
        """Search by search; see `SearchKernel`."""
        width = max(search.num_wanted for search in searches)
        positions, scores, lacking, first = [], [], [], 0
        for search in searches:
            rows = slice(first, first := first + search.num_queries)
            of_slots = queries.new_zeros(search.num_queries, arena.chunk_size) if slots is None else slots[rows]
            position, score, lacks = _find(arena, search, queries[rows], rotated[rows], of_slots)
            positions.append(functional.pad(position, (0, width - position.shape[1]), value=-1))
            scores.append(functional.pad(score, (0, width - score.shape[1]), value=-torch.inf))
            lacking.append(lacks)
        position, score = torch.cat(positions), torch.cat(scores)
        return Found(position, score.masked_fill(score.isnan().any(dim=1, keepdim=True), torch.nan), lacking)


def _find(
    arena: Arena,
    search: TokenSearch,
    queries: Tensor,  # [Q, D]
    rotated: Tensor,  # [Q, W x 64]
    slots: Tensor,  # [Q, C]
) -> tuple[Tensor, Tensor, Tensor]:
    """One search: positions and scores [Q, n or all], and the chunks that it lacks."""
    visible = _visible(search, arena.chunk_size)  # [m, C]
    sketched = visible & _sketched(search)[:, None]  # [m, C]
    scored = (visible & ~sketched).expand(len(queries), *visible.shape).clone()  # [Q, m, C]
    scores = _known(search, queries, arena.chunk_size)  # [Q, m, C], NaN where it is not known
    estimates = slots[:, None].expand(scores.shape)
    if sketched.any():
        estimates = estimates + _estimates(search, queries, rotated)
        estimates = estimates.where(estimates.isfinite(), torch.inf)  # what says nothing is looked at
        _, best = _best(estimates, sketched.expand(scores.shape), search.num_scored)
        scored.flatten(1).scatter_(1, best, value=True)
        scored &= visible
    _score(arena, search, queries, slots, scored, scores)
    if sketched.any() and not _lacking(search, scored, scores).any():
        found, _ = _best(scores, scored, search.num_wanted)
        threshold = found[:, -1] if found.shape[1] == search.num_wanted else found.new_full((len(found),), -torch.inf)
        error = SPREAD * ERROR * queries.norm(dim=1)[:, None, None] * _factors(search)
        scored |= sketched & (estimates + error > threshold[:, None, None])
        _score(arena, search, queries, slots, scored, scores)
    found, best = _best(scores, scored, search.num_wanted)
    lacking = _lacking(search, scored, scores)
    overflowed = (scored & ~scores.isfinite())[:, ~lacking].flatten(1).any(dim=1, keepdim=True)
    is_there = (found > -torch.inf) & ~overflowed
    position = torch.where(is_there, best + search.first * arena.chunk_size, -1)
    return position, found.masked_fill(overflowed, torch.nan), torch.nonzero(lacking)[:, 0] + search.first


def _best(numbers: Tensor, among: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The greatest of numbers [Q, m, C], `among` some of them, and where they are: [Q, num or all], best first."""
    row = numbers.masked_fill(~among | numbers.isnan(), -torch.inf).flatten(1)
    sorted_, index = row.sort(dim=1, descending=True, stable=True)
    return sorted_[:, :num], index[:, :num]


def _score(arena: Arena, search: TokenSearch, queries: Tensor, slots: Tensor, wanted: Tensor, scores: Tensor) -> None:
    """Fill in the `wanted` [Q, m, C] of the scores [Q, m, C] that are not known, where the contents are here."""
    missing = (wanted & scores.isnan()).any(dim=2).any(dim=0) & (search.pages >= 0)
    for some in torch.nonzero(missing)[:, 0].split(CHUNKS_AT_ONCE):
        tokens = arena.take(search.pages[some]).float()
        fresh = torch.einsum("q d, m c d -> q m c", queries, tokens) + slots[:, None]
        scores[:, some] = torch.where(wanted[:, some] & scores[:, some].isnan(), fresh, scores[:, some])


def _lacking(search: TokenSearch, scored: Tensor, scores: Tensor) -> Tensor:
    """The chunks [m] whose contents are not here, and of which a score is wanted and not known."""
    return (scored & scores.isnan()).any(dim=2).any(dim=0) & (search.pages < 0)


def _sketched(search: TokenSearch) -> Tensor:
    """Which chunks [m] have sketches."""
    return ~_factors(search)[:, 0].isnan()


def _factors(search: TokenSearch) -> Tensor:
    """Those of the sketches [m, C], or [m, 1] without any."""
    return search.keys.new_full((len(search.pages), 1), torch.nan) if search.factors is None else search.factors


def _visible(search: TokenSearch, chunk_size: int) -> Tensor:
    """Visible slots [m, C]."""
    num_slots = len(search.pages) * chunk_size
    positions = torch.arange(num_slots, device=search.pages.device) + search.first * chunk_size
    visible = (positions >= search.start) & (positions < search.stop)
    if search.token_mask is not None and len(search.token_mask):
        visible &= search.token_mask[(positions - search.start).clamp(0, len(search.token_mask) - 1)]
    return visible.view(-1, chunk_size)


def _known(search: TokenSearch, queries: Tensor, chunk_size: int) -> Tensor:
    """Scores [Q, m, C], a copy, NaN where they are to be computed."""
    if search.known is None:
        return queries.new_full((len(queries), len(search.pages), chunk_size), torch.nan)
    return rearrange(search.known, "q (m c) -> q m c", c=chunk_size).clone()


def _estimates(search: TokenSearch, queries: Tensor, rotated: Tensor) -> Tensor:
    """What sketches say of the tokens' scores, without their slots': [Q, m, C], NaN without sketches."""
    assert search.bits is not None and search.factors is not None
    places = torch.arange(WORD_BITS, device=queries.device)
    parts = []
    for bits, factors, keys in zip(
        *(tensor.split(CHUNKS_AT_ONCE) for tensor in (search.bits, search.factors, search.keys)), strict=True
    ):
        signs = rearrange((bits[..., None] >> places) & 1, "m w c b -> m c (w b)") * 2.0 - 1.0
        around = torch.einsum("q e, m c e -> q m c", rotated, signs) * factors
        parts.append((queries @ keys.T)[..., None] + around)
    return torch.cat(parts, dim=1)
