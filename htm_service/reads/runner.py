"""A batch of planned attends over many sessions, from queries to attended vectors.

Shapes: R rows (all queries of a group), Q queries of one attend, D width, H heads, C chunk size, M chunks,
K selected chunks.
For each group of attends that share a model and an arena: have the model answer the queries with the kernel. A select
is an attend that ends where its chunks are chosen: their keys and tokens are the answer.
Everything else about a request is decided before (`attends.py`, `worker.py`) or after (recalls).
Does not know: queues, storage, payloads, times of day.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self, TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from htm_service.attention.model import Model
from htm_service.config import MAX_SELECTED_BYTES, MAX_SELECTED_CHUNKS
from htm_service.errors import HTMError, InvalidArgument
from htm_service.kernels.base import Attended, Kernel, Search, View
from htm_service.kernels.reference import ranked
from htm_service.memory.chunks import KEY_ITEMSIZE, Chunks
from htm_service.memory.loader import Fetch
from htm_service.memory.resident import Resident
from htm_service.reads.cost import PRODUCTS_OF_A_RUN, products_per_query
from htm_service.reads.visibility import (
    Ends,
    KnownKeys,
    Visibility,
    cuts_chunks,
    ends_of,
    partial_keys,
    seen_in_part,
)
from htm_service.reads.weights import Weights
from htm_service.records import (
    RECALLED_BYTES,
    AttendRequest,
    AttendResult,
    Bools,
    Floats,
    Ints,
    Ranking,
    Recalled,
    SelectResult,
    Taken,
)

T = TypeVar("T")

TAKEN_BYTES = 12
"""Of a chunk that a query takes, in an answer: its index and its weight."""
MOST_NAMED = 8
"""Chunks that an error lists."""
COPIED_BYTES = 256 << 20
"""Summary keys that are copied at once, for those that see chunks in part."""


class Missing(NamedTuple):
    """Chunks, lowest first, whose contents an attend needs and that have no page.

    With `in_part` it needs them for their keys, and which chunks it takes is not known before.
    """

    chunks: list[int]
    in_part: bool


@dataclass(slots=True, eq=False)
class Attend:
    """One attend on its way: `request.queries` is [Q, D], checked.

    Made by the loop; the device thread's from the moment that it is submitted.
    """

    resident: Resident
    weights: Weights
    request: AttendRequest
    num_ranked: int = 0
    """Chunks that an explanation of its one query lists; 0: it is none."""
    length: int | None = None
    """How long the session was when the attend was admitted, where it must be answered as of then."""
    num_truncated: int = 0
    """How often the session was truncated before."""
    visibility: Visibility | None = None
    """What it sees, once that is planned."""
    known_keys: KnownKeys = field(default_factory=KnownKeys)
    """Of chunks that it sees in part."""
    fetch: Fetch | None = None
    missing: Missing | None = None
    """What it waits for, and why."""

    def see_as_of(self, length: int) -> None:
        """Answer as of this length, however long the session is when it comes to that."""
        if self.length is None:
            self.length = length
        if self.request.stop is None:
            self.request = replace(self.request, stop=self.length)

    def begin_anew(self, num_truncated: int) -> None:
        """Forget what is known of the tokens: the session was truncated so often since it began."""
        self.num_truncated, self.known_keys = num_truncated, KnownKeys()

    def part(self, request: AttendRequest, length: int) -> Self:
        """One with some of its queries, which sees this length."""
        return replace(self, request=request, length=length)

    def products_per_query(self, num_tokens: int) -> int:
        """Multiply-adds of one of its queries over so many tokens."""
        settings = self.resident.settings
        return products_per_query(
            self.model.config,
            dim=settings.dim,
            length=num_tokens,
            chunk_size=settings.chunk_size,
            top_k=self.top_k,
        )

    @property
    def planned_products(self) -> int:
        """What it takes to say which tokens it sees, and the keys of the chunks that it sees in part, however many
        queries it has, in multiply-adds. More than at first, perhaps, once its session's episodes are known.
        """
        mask, settings = self.request.mask, self.resident.settings
        num_runs = 0 if self.request.episodes is None else len(self.resident.episodes)
        num_cuts = num_runs + (0 if mask is None else int(np.count_nonzero(mask[1:] != mask[:-1])))
        num_in_part = min(num_cuts, self.resident.num_chunks)
        return num_runs * PRODUCTS_OF_A_RUN + num_in_part * settings.chunk_size * settings.dim

    @property
    def fetched_bytes(self) -> int:
        """What one query takes of the device at once, should none of it be there."""
        return self.top_k * self.resident.settings.chunk_size * self.resident.token_bytes

    @property
    def model(self) -> Model:
        """What computes it, once it is planned."""
        return self.weights.model

    @property
    def top_k(self) -> int:
        """How many chunks each query takes."""
        return self.weights.top_k

    @property
    def tensor_bytes(self) -> int:
        """Of its answer's tensors, at most: an output of D numbers and K chunks for each query."""
        return self.request.queries.nbytes + len(self.request.queries) * self.top_k * TAKEN_BYTES

    @property
    def listed_bytes(self) -> int:
        """Of its recalled tokens, at most and without payloads."""
        if not self.request.tokens:
            return 0
        num_listed = min(self.request.max_recalled, self.top_k * self.resident.settings.chunk_size)
        return len(self.request.queries) * num_listed * RECALLED_BYTES

    @property
    def chunks(self) -> Chunks:
        """Those of its session, which is resident."""
        return self.resident.held

    @property
    def seen(self) -> Visibility:
        """What a planned attend sees."""
        assert self.visibility is not None, "the attend is planned"
        return self.visibility


class Share(NamedTuple):
    """What a select has of one answer: it is for `num_items`, all as wide as the widest, whose chunks have so many
    tokens (0: as many as its own).
    """

    num_items: int = 1
    chunk_size: int = 0


ALL_OF_IT = Share()


@dataclass(slots=True, eq=False)
class Select(Attend):
    """One select on its way. What it takes is answered with `keys` or `tokens`, or only named."""

    keys: bool = True
    tokens: bool = True
    share: Share = ALL_OF_IT

    def part(self, request: AttendRequest, length: int) -> Self:
        """A part only says what it takes; that is brought afterwards, each chunk once for all parts."""
        return replace(self, request=request, length=length, keys=False, tokens=False)

    def excess(self, num_chunks: int) -> InvalidArgument | None:
        """What is wrong where so many chunks are more than one answer may hold."""
        num_items = self.share.num_items
        dim, size = self.resident.settings.dim, max(self.share.chunk_size, self.resident.settings.chunk_size)
        num_bytes = num_items * num_chunks * 4 * dim * (self.keys + self.tokens * size)
        if not num_bytes or (num_items * num_chunks <= MAX_SELECTED_CHUNKS and num_bytes <= MAX_SELECTED_BYTES):
            return None
        each = "" if num_items == 1 else f", for each of {num_items} sessions,"
        return InvalidArgument(
            f"the queries take {num_chunks} chunks, which{each} have {num_bytes} bytes in the answer; the limits of "
            f"one select are {MAX_SELECTED_CHUNKS // num_items} and {MAX_SELECTED_BYTES}: ask fewer queries at once, "
            "or a smaller top_k"
        )


class Runner:
    """Runs batches of attends with one kernel, on one thread."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def run(self, attends: Sequence[Attend]) -> list[AttendResult | SelectResult | Exception]:
        """One result per attend, in order; a attend that fails by itself gets its own error.

        Every chunk that an attend takes or sees in part must have its page; see `missing`.
        """
        return self._by_group(attends, self._run_group)

    def missing(self, attends: Sequence[Attend]) -> list[Missing]:
        """Per attend, what must be fetched before `run`."""
        return self._by_group(attends, self._missing_of_group)

    def _by_group(self, attends: Sequence[Attend], run: Callable[[list[list[Attend]]], list[T]]) -> list[T]:
        """Run groups of attends that share a model and an arena, those that see the same together; results in order."""
        groups: dict[tuple[int, int], dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        for place, attend in enumerate(attends):
            groups[id(attend.model), id(attend.chunks.arena)][_what_is_seen(attend, place)].append(place)
        results: dict[int, T] = {}
        with torch.inference_mode():
            for alike in groups.values():
                for some in _portions(alike.values(), lambda places: _copied_bytes(attends[places[0]])):
                    group = [[attends[place] for place in places] for places in some]
                    results.update(zip(itertools.chain.from_iterable(some), run(group), strict=True))
        return [results[place] for place in range(len(attends))]

    def _missing_of_group(self, alike: list[list[Attend]]) -> list[Missing]:
        in_part = [_missing_in_part(together[0]) for together in alike]
        ready = [together for together, missing in zip(alike, in_part, strict=True) if not missing]
        chosen: list[Missing] = []
        if ready:
            attends = [attend for together in ready for attend in together]
            for attend, rows in zip(attends, self._choose(ready, attends), strict=True):
                chosen.append(Missing(_missing_contents(attend, np.unique(rows[rows >= 0])), in_part=False))
        found = iter(chosen)
        return [
            Missing(missing, in_part=True) if missing else next(found)
            for together, missing in zip(alike, in_part, strict=True)
            for _ in together
        ]

    def _choose(self, alike: list[list[Attend]], attends: list[Attend]) -> list[Ints]:
        """The chunks [Q, K] that each of the `attends` of `alike` takes, -1 for none."""
        index = attends[0].model.select(stack_queries(attends), _view(alike, attends), self.kernel).cpu().numpy()
        return np.split(index, np.cumsum([len(attend.request.queries) for attend in attends])[:-1])

    def _run_group(self, alike: list[list[Attend]]) -> list[AttendResult | SelectResult | Exception]:
        attends = [attend for together in alike for attend in together]
        if isinstance(attends[0], Select):
            return list(map(_take, attends, self._choose(alike, attends)))
        attended, output = attends[0].model.answer(stack_queries(attends), _view(alike, attends), self.kernel)
        results: list[AttendResult | SelectResult | Exception] = list(_split(attends, output, attended))
        for place, (attend, result) in enumerate(zip(attends, results, strict=True)):
            if attend.num_ranked and isinstance(result, AttendResult):
                results[place] = result._replace(ranking=_explain(attend, result, self.kernel))
        return results


def _view(alike: list[list[Attend]], attends: list[Attend]) -> View:
    """What a group looks at: the attends of `alike` in one row."""
    model, arena = attends[0].model, attends[0].chunks.arena
    return View(
        arena,
        model.positions(arena.chunk_size),
        [_search(together) for together in alike],
        tokens=any(attend.request.tokens for attend in attends),
    )


def _what_is_seen(attend: Attend, place: int) -> tuple[int, ...]:
    """Equal for attends that can share a search; masks are not compared: such an attend stays alone, as an
    explanation does.
    """
    visibility = attend.seen
    is_masked = visibility.token_mask is not None or visibility.chunk_mask is not None
    if is_masked or visibility.stops is not None or attend.num_ranked:
        return (place,)
    return id(attend.chunks), visibility.start, visibility.stop, attend.top_k


def _portions(items: Iterable[T], num_bytes_of: Callable[[T], int]) -> Iterator[list[T]]:
    """The items in lists of up to COPIED_BYTES each, or of one item."""
    portion: list[T] = []
    left = COPIED_BYTES
    for item in items:
        num_bytes = num_bytes_of(item)
        if portion and num_bytes > left:
            yield portion
            portion, left = [], COPIED_BYTES
        portion.append(item)
        left -= num_bytes
    if portion:
        yield portion


def _copied_bytes(attend: Attend) -> int:
    """Bytes of the keys that a search of its own needs."""
    first, last = attend.seen.chunk_range(attend.chunks.chunk_size)
    return (last - first) * attend.chunks.arena.dim * KEY_ITEMSIZE if cuts_chunks(attend.chunks, attend.seen) else 0


def _missing_in_part(attend: Attend) -> list[int]:
    """The chunks that an attend sees in part, whose keys are not known and whose contents are not here."""
    size, (first, last) = attend.chunks.chunk_size, attend.seen.chunk_range(attend.chunks.chunk_size)
    if first >= last:
        return []
    seen_to: list[Tensor] = []
    if (in_part := seen_in_part(attend.chunks, attend.seen, first, last)) is not None:
        seen_to.append(in_part.parts.seen_to)
    if (ends := _ends(attend)) is not None:
        seen_to.append(ends.parts().seen_to)
    if not seen_to:
        return []
    lacking = attend.known_keys.lacking(torch.cat(seen_to).cpu().numpy())
    return attend.chunks.missing(np.unique((lacking - 1) // size).tolist())


def _missing_contents(attend: Attend, chunks: Ints) -> list[int]:
    """Of the chunks that an attend takes, those whose contents it needs and that are not here."""
    if isinstance(attend, Select) and (not attend.tokens or attend.excess(len(chunks)) is not None):
        return []
    return attend.chunks.missing(chunks.tolist())


def _search(together: list[Attend]) -> Search:
    """What attends that see the same look through: the keys of the chunks they see, those seen in part recomputed."""
    attend, num_queries = together[0], sum(len(attend.request.queries) for attend in together)
    held, visibility = attend.chunks, attend.seen
    first, last = visibility.chunk_range(held.chunk_size)
    keys, pages = held.tables(first, last)
    hidden: Tensor | None = None
    in_part = seen_in_part(held, visibility, first, last) if first < last else None
    allowed = visibility.allowed(first, last, num_queries)
    if allowed is not None:
        hidden = ~torch.tensor(allowed, device=keys.device)
    if in_part is not None:
        keys = keys.clone()
        keys[in_part.parts.chunks - first] = partial_keys(held, in_part.parts, attend.known_keys)
        if len(in_part.hidden):
            hidden = keys.new_zeros(len(keys), dtype=torch.bool) if hidden is None else hidden
            hidden[..., in_part.hidden - first] = True
    token_mask = None if visibility.token_mask is None else torch.from_numpy(visibility.token_mask).to(keys.device)
    k = min(attend.top_k, last - first)
    search = Search(keys, pages, first, visibility.start, visibility.stop, num_queries, k, token_mask, hidden)
    ends = _ends(attend) if first < last else None
    return search if ends is None else _with_ends(search, attend, ends)


def _ends(attend: Attend) -> Ends | None:
    held = attend.chunks
    return ends_of(attend.seen, held.chunk_size, held.length, held.keys.device)


def _with_ends(search: Search, attend: Attend, ends: Ends) -> Search:
    """The search, whose rows each see to an end of their own."""
    chunk = ends.chunk - search.first
    num_whole = torch.where(ends.chunk < 0, 0, chunk + ends.in_whole.long())
    own = torch.where(ends.in_part, chunk, -1)
    own_keys = search.keys.new_zeros(search.num_queries, search.keys.shape[1])
    own_keys[ends.in_part] = partial_keys(attend.chunks, ends.parts(), attend.known_keys)
    return replace(search, ends=torch.stack((num_whole, own, ends.stop), dim=1), own_keys=own_keys)


def stack_queries(attends: Sequence[Attend]) -> Tensor:
    """All queries [R, D] float32 on the device."""
    return torch.from_numpy(np.concatenate([attend.request.queries for attend in attends])).to(
        attends[0].chunks.arena.device
    )


def _split(attends: list[Attend], output: Tensor, attended: Attended) -> list[AttendResult | Exception]:
    """Cut the group's tensors into one result per attend, on the host."""
    outputs, indexes, weights, token_weights, token_scores = (
        None if tensor is None else tensor.cpu().numpy()
        for tensor in (
            *(output, attended.chunk_index, attended.chunk_weight),
            *(attended.token_weight, attended.token_score),
        )
    )
    assert outputs is not None and indexes is not None and weights is not None
    is_finite = np.isfinite(outputs).all(axis=1) & np.isfinite(weights).all(axis=1)
    results: list[AttendResult | Exception] = []
    stop = 0
    for attend in attends:
        rows = slice(stop, stop := stop + len(attend.request.queries))
        if not (finite := is_finite[rows]).all():
            results.append(_overflow(attend, ~finite, indexes[rows], weights[rows]))
            continue
        first, last = attend.seen.chunk_range(attend.chunks.chunk_size)
        width = min(attend.top_k, last - first)  # of its own search; the batch's may be greater
        recalled: list[list[Recalled]] | None = None
        if attend.request.tokens and token_weights is not None and token_scores is not None:
            recalled = [
                _rank(attend, *row)
                for row in zip(indexes[rows], weights[rows], token_weights[rows], token_scores[rows], strict=True)
            ]
        index_of, weight_of = indexes[rows, :width].copy(), weights[rows, :width].copy()
        results.append(AttendResult(outputs[rows], index_of, weight_of, recalled, attend.chunks.length))
    return results


def _take(select: Attend, index: Ints) -> SelectResult | Exception:
    """What a select takes: the chunks [Q, K] that were chosen for it."""
    assert isinstance(select, Select)
    search = _search([select])
    index = index[:, : search.k]  # of its own search; the batch's may be wider
    chunks, places = np.unique(index, return_inverse=True)  # -1, for none, comes first
    num_none = int(index.size > 0 and chunks[0] < 0)
    chunks = chunks[num_none:]
    keys = _on_host(search.keys, chunks - search.first)
    logit = _dots(select.request.queries, keys, places.reshape(index.shape) - num_none)
    num_visible = np.full(len(index), len(search.keys))
    if search.hidden is not None:
        num_visible = num_visible - search.hidden.sum(dim=-1).cpu().numpy()
    is_whole = (index >= 0).sum(axis=1) == np.minimum(num_visible, search.k)
    if not (finite := np.isfinite(logit).all(axis=1) & is_whole).all():  # a query whose logits overflow takes no chunk
        return _overflow(select, ~finite, index, np.full(index.shape, np.nan, np.float32))
    if (excess := select.excess(len(chunks))) is not None:
        return excess
    taken = _bring(select, chunks, keys) if select.keys or select.tokens else None
    return SelectResult(index, logit, taken, select.chunks.length)


def _bring(select: Select, chunks: Ints, keys: Floats) -> Taken:
    """What a select asks for of the `chunks` [U] that it takes, whose keys [U, D] are known."""
    tokens: Floats | None = None
    visible: Bools | None = None
    if select.tokens:
        visible = select.seen.slots(torch.from_numpy(chunks), select.chunks.chunk_size).numpy()
        tokens = select.chunks.contents_on_host(chunks)
        tokens[~visible] = 0.0
    return Taken(chunks, keys if select.keys else None, tokens, visible)


def _on_host(keys: Tensor, rows: Ints) -> Floats:
    """Some rows of keys. On a CPU not by torch: its threads would have to be woken for a copy of microseconds."""
    found = (
        keys.numpy()[rows] if keys.device.type == "cpu" else keys[torch.from_numpy(rows).to(keys.device)].cpu().numpy()
    )
    return np.asarray(found, np.float32)


def _dots(queries: Floats, keys: Floats, places: Ints) -> Floats:
    """Inner products [Q, K] of queries [Q, D] with the keys [U, D] at `places` [Q, K], 0 where that is -1."""
    products = np.zeros(places.shape, np.float32)
    for query, place, of_query in zip(queries, places, products, strict=True):
        of_query[place >= 0] = np.einsum("kd,d->k", keys[place[place >= 0]], query)
    return products


def _explain(attend: Attend, result: AttendResult, kernel: Kernel) -> Ranking:
    """All chunks that one query sees, by their keys alone: those it took, as the kernel took them, then the others."""
    search = _search([attend])
    summary, _ = attend.model.fold(stack_queries([attend]), kernel)
    order, logits = ranked(replace(search, k=len(search.keys)), summary, torch.zeros(1, dtype=torch.int64))
    index, logit = order[0].cpu().numpy(), logits[0].cpu().numpy()
    index, logit = index[index >= 0] + search.first, logit[index >= 0]
    taken, weight = result.chunk_index[0], result.chunk_weight[0]
    taken, weight = taken[taken >= 0], weight[taken >= 0]
    is_other = ~np.isin(index, taken)
    by_index = np.argsort(index)
    logit_of_taken = logit[by_index[np.searchsorted(index, taken, sorter=by_index)]]
    some = slice(attend.num_ranked)
    return Ranking(
        index=np.concatenate([taken, index[is_other]])[some],
        logit=np.concatenate([logit_of_taken, logit[is_other]])[some],
        weight=np.pad(weight, (0, int(is_other.sum())))[some],
        num_taken=len(taken),
        num_visible=len(index),
    )


def _rank(attend: Attend, index: Ints, weight: Floats, shares: Floats, scores: Floats) -> list[Recalled]:
    """The recalled tokens of one query in the order asked for, best first, ties to the lower position."""
    size = attend.chunks.chunk_size
    positions = rearrange(index[:, None] * size + np.arange(size), "k c -> (k c)")
    token_weights = (weight[:, None] * shares).ravel()
    token_scores = scores.ravel()
    seen = np.flatnonzero((token_scores > -np.inf) & (index >= 0).repeat(size))
    by = token_weights if attend.request.rank_by == "weight" else token_scores
    best = seen[np.lexsort((positions[seen], -by[seen]))][: attend.request.max_recalled]
    return [
        Recalled(int(positions[i]), float(token_weights[i]), float(token_scores[i]), int(positions[i]) // size)
        for i in best
    ]


def _overflow(attend: Attend, rows: Bools, indexes: Ints, weights: Floats) -> HTMError:
    """Why some `rows` [Q] of an attend are not finite numbers, of those that took the chunks [Q, K]."""
    largest = float(np.abs(attend.request.queries[rows]).max())
    if np.isnan(weights[rows]).any():
        search = _search([attend])
        sizes = search.keys.abs().amax(dim=1)
        if search.hidden is not None:
            sizes[torch.atleast_2d(search.hidden).all(dim=0)] = 0.0
        met = f"the summary key of chunk {search.first + int(sizes.argmax())}, of up to {float(sizes.max()):g}"
    else:
        met = f"tokens of the chunks {np.unique(indexes[rows])[:MOST_NAMED].tolist()}"
    return InvalidArgument(
        f"the attention overflows float32: a query of up to {largest:g} meets {met}; scale the embeddings, "
        "or hide such tokens (start, stop, mask, chunk_mask)"
    )
