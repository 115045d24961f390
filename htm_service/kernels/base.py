"""What a kernel is: the arithmetic of the read path, for a batch of queries of many sessions.

Shapes: R query rows of a batch, Q rows of one search, D width, H heads, E width per head, C chunk size, n tokens of a
session, m chunks a search may see, K chunks per row.
Kernels are pure: they never change their arguments. They do not know sessions, requests or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from htm_service.memory.arena import Arena


class Projections(NamedTuple):
    """A model's weights as the read path takes them, float32, contiguous, scales included; see docs/attention.md."""

    summary: Tensor
    """[D, D], `summary_bias` [D]: from a query to what meets summary keys."""
    summary_bias: Tensor
    query: Tensor
    """[H E, D], `query_bias` [H E]: from a query to the heads' queries."""
    query_bias: Tensor
    key: Tensor
    """[H, E, D]: from a head's query to what meets tokens."""
    value: Tensor
    """[H, E, D]: from a head's sum of tokens to its values."""
    output: Tensor
    """[D, H E], `output_bias` [D]: from the heads' values to the answer."""
    output_bias: Tensor


@dataclass(frozen=True, slots=True)
class Search:
    """Q rows of the batch, next to each other, that look at the same m chunks of one session; m may be 0.

    `keys` [m, D] float32 summary keys; `pages` [m] int64, where the contents are, -1 where they are not here and the
    chunk is known not to be taken; both of the chunks from `first` on.
    Of the tokens those at positions `start` .. `stop`-1 are visible, and of them, with `token_mask` [n] bool, which is
    of those from `start` on, those that it marks.
    `k` at most m; `hidden` [m] or [Q, m] bool, the chunks that must not be taken, or None.
    Where rows see to different ends, `ends` [Q, 3] int64 says of each: how many of the keys it sees as they are, from
    the first on; the number among the keys of the chunk behind them that it sees in part, whose key for it is in
    `own_keys` [Q, D] float32, or -1; and where its tokens stop, at most at `stop`.
    """

    keys: Tensor
    pages: Tensor
    first: int
    start: int
    stop: int
    num_queries: int
    k: int
    token_mask: Tensor | None = None
    hidden: Tensor | None = None
    ends: Tensor | None = None
    own_keys: Tensor | None = None

    def numbers(self) -> tuple[int, ...]:
        """As loops take it: where `keys`, `pages`, `token_mask` (as if it began at position 0) and `hidden` are, 0 for
        none; the step from a row of `hidden` to the next; m; `first`, `start`, `stop`, `num_queries`, `k`; where `ends`
        and `own_keys` are.
        """
        num_keys, hidden = len(self.keys), self.hidden
        return (
            *map(_address, (self.keys, self.pages)),
            0 if self.token_mask is None else _address(self.token_mask) - self.start,
            _address(hidden),
            num_keys if hidden is not None and hidden.ndim == 2 else 0,
            *(num_keys, self.first, self.start, self.stop, self.num_queries, self.k),
            *map(_address, (self.ends, self.own_keys)),
        )


@dataclass(frozen=True, slots=True)
class View:
    """What queries look at: searches over one arena, whose rows follow each other.

    `positions` [C, D] float32 is added to the tokens of a chunk; with `tokens`, the answer says how tokens took part.
    """

    arena: Arena
    positions: Tensor | None
    searches: Sequence[Search]
    tokens: bool = False

    @property
    def width(self) -> int:
        """K, the greatest k of the searches."""
        return max(search.k for search in self.searches)


@dataclass(frozen=True, slots=True)
class Batch:
    """Folded queries and what they look at.

    `summary` [R, D] float32 meets the summary keys, `heads` [R, H, D] float32 the tokens plus positions.
    """

    view: View
    summary: Tensor
    heads: Tensor


@dataclass(frozen=True, slots=True)
class Attended:
    """What R rows took, best chunk first, ties to the lower index.

    `chunk_index` [R, K] int64, -1 where fewer could be taken; `chunk_weight` [R, K] float32, 0 there, and NaN in a
    whole row whose logits overflowed; `z` [R, H, D] float32: the sum over chunks of weight x softmax-weighted tokens, 0
    where no chunk was taken, and NaN where the logits of visible tokens overflowed. It is within the float32 numbers
    otherwise: a mean of such cannot be beyond them, so what rounding puts there is put back.
    With `View.tokens`: `token_weight` [R, K, C], in-chunk weights as a mean over heads, 0 where not visible;
    `token_score` [R, K, C], in-chunk logits as a mean over heads, -inf where not visible.
    """

    chunk_index: Tensor
    chunk_weight: Tensor
    z: Tensor
    token_weight: Tensor | None
    token_score: Tensor | None


class Kernel(Protocol):
    """One implementation of the read path."""

    name: str

    def warm_up(self) -> None:
        """Do what the first batch should not have to wait for."""
        ...

    def fold(self, projections: Projections, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [R, D] as `Batch.summary` [R, D] and `Batch.heads` [R, H, D]."""
        ...

    def select(self, batch: Batch) -> Tensor:
        """The chunks that `attend` would take: `Attended.chunk_index`. Reads keys only, no contents."""
        ...

    def attend(self, batch: Batch) -> Attended:
        """Score the keys, take the top-k chunks of each row, attend in them, sum them up."""
        ...

    def project(self, projections: Projections, z: Tensor) -> Tensor:
        """`Attended.z` [R, H, D] as answers [R, D]."""
        ...

    def answer(self, projections: Projections, queries: Tensor, view: View) -> tuple[Attended, Tensor]:
        """Queries [R, D] to answers [R, D], 0 where no chunk was taken: `fold`, `attend` and `project` at once."""
        ...


def answer_in_steps(kernel: Kernel, projections: Projections, queries: Tensor, view: View) -> tuple[Attended, Tensor]:
    """`Kernel.answer`, one method after the other."""
    attended = kernel.attend(Batch(view, *kernel.fold(projections, queries)))
    taken = (attended.chunk_index >= 0).any(dim=-1)
    return attended, torch.where(taken[:, None], kernel.project(projections, attended.z), 0.0)


def _address(tensor: Tensor | None) -> int:
    """Where a tensor's numbers are on its device, 0 for none."""
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()
