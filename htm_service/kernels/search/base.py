"""What a search kernel is: of many tokens those that score best against a query, by their sketches first.

Shapes: R query rows of a batch, Q rows of one search, D width, C chunk size, W words of a sketch, m chunks that a
search may see, n tokens it wants.
A token's score is <u, x> plus what its slot adds. Where a chunk has sketches, the tokens that they estimate best are
scored, and then all whose estimate plus `SPREAD` times its error may be better than the n-th best of these; where it
has none, as the open chunk, all of its tokens are. Kernels never change their arguments. They do not
know sessions, requests or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from htm_service.memory.arena import Arena

SPREAD = 2.0
"""Standard deviations of an estimate's error that a token's score is looked for within."""


@dataclass(frozen=True, slots=True)
class TokenSearch:
    """Q rows of the batch, next to each other, that search the same m chunks of one session; m may be 0.

    `keys` [m, D] float32, `pages` [m] int64 (-1: the contents are not here), `bits` [m, W, C] int64 and `factors`
    [m, C] float32 (NaN: the chunk has no sketches), all of the chunks from `first` on; without `bits` no chunk has any.
    Of the tokens those at positions `start` .. `stop`-1 are visible, and of them, with `token_mask` [n] bool,
    which is of those from `start` on, those that it marks.
    `known` [Q, m C] float32 are scores that need not be computed, NaN for the others.
    """

    keys: Tensor
    pages: Tensor
    bits: Tensor | None
    factors: Tensor | None
    first: int
    start: int
    stop: int
    num_queries: int
    num_wanted: int
    """n: how many tokens each row is answered."""
    num_scored: int
    """How many of those with sketches are scored for each row at least, those of the best estimates."""
    token_mask: Tensor | None = None
    known: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What R rows found, best first, ties to the lower position.

    `position` [R, N] int64, -1 where fewer are visible, N the greatest n; `score` [R, N] float32, -inf there, and NaN
    in a whole row of which a score overflowed. `lacking`, for each search, [any] int64: the chunks whose contents must
    be here first, or their scores known; where there are any, what its rows found is not all.
    """

    position: Tensor
    score: Tensor
    lacking: Sequence[Tensor]


class SearchKernel(Protocol):
    """One implementation of searches over an arena."""

    prefers_tokens: bool
    """Whether it reads all tokens that are here no slower than their sketches."""

    def find(
        self, arena: Arena, searches: Sequence[TokenSearch], queries: Tensor, rotated: Tensor, slots: Tensor | None
    ) -> Found:
        """The best tokens for queries u [R, D] float32; `rotated` [R, W x 64] is P u, and `slots` [R, C] what each
        slot of a chunk adds to the scores, or None.
        """
        ...
