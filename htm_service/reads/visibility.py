"""Which tokens and chunks one attend may see, and the summary keys of the chunks it sees only in part.

Shapes: D width, C chunk size, n the tokens up to `stop`, m the chunks that touch the visible range, Q queries.
Implements "Visibility of a token" of docs/attention.md. Does not know batches, models or kernels.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from htm_service.errors import InvalidArgument
from htm_service.memory.chunks import Chunks
from htm_service.memory.resident import EpisodeRun
from htm_service.memory.summary import mean_of, sum_slots
from htm_service.records import AttendRequest, Bools, Ints, OpenChunk

CHUNKS_AT_ONCE = 256
"""Chunks whose contents are copied together to recompute their keys: bounds the workspace."""


class Trimmed(InvalidArgument):
    """Of what an attend was to see, as of then, all was trimmed."""


class Truncated(InvalidArgument):
    """The tokens that an attend was to see, as of then, are not those that are there now."""


@dataclass(frozen=True, slots=True)
class Visibility:
    """Tokens `start` .. `stop`-1 are visible, less those that `token_mask` [n] bool (host) hides, which is of those
    from `start` on: a session that forgets may begin anywhere.
    """

    start: int
    stop: int
    token_mask: Bools | None
    chunk_mask: Bools | None
    """[M] or [Q, M] bool (host), M the chunks of the n tokens that the request speaks of."""
    stops: Ints | None = None
    """[Q] (host), where the range stops for each query; `stop` is then the end of the last chunk that one may see."""

    def chunk_range(self, chunk_size: int) -> tuple[int, int]:
        """The chunks first .. last-1 that touch the visible range."""
        if self.start >= self.stop:
            return 0, 0
        return self.start // chunk_size, -(-self.stop // chunk_size)

    def slots(self, chunks: Tensor, chunk_size: int) -> Tensor:
        """Visible slots of chunks [...] (int64 indexes): [..., C] bool."""
        positions = chunks[..., None] * chunk_size + torch.arange(chunk_size, device=chunks.device)
        visible = (positions >= self.start) & (positions < self.stop)
        if self.token_mask is not None:
            mask = torch.from_numpy(self.token_mask).to(chunks.device)
            visible &= mask[(positions - self.start).clamp(0, len(mask) - 1)]
        return visible

    def parts(self, chunks: Tensor, chunk_size: int, slots: Tensor) -> Parts:
        """What is seen of chunks [p], which of their `slots` [p, C] is known."""
        return Parts(chunks, slots, ((chunks + 1) * chunk_size).clamp(max=self.stop))

    def allowed(self, first: int, last: int, num_queries: int) -> Bools | None:
        """`chunk_mask` for chunks first .. last-1 as [Q, m], or None when it hides nothing."""
        if self.chunk_mask is None:
            return None
        return np.broadcast_to(np.atleast_2d(self.chunk_mask)[:, first:last], (num_queries, last - first))


def plan_visibility(
    request: AttendRequest,
    *,
    length: int,
    first_position: int = 0,
    chunk_size: int,
    num_queries: int,
    open_chunk: OpenChunk,
    episodes: Sequence[EpisodeRun],
) -> Visibility:
    """What `request` sees of a session's tokens `first_position` .. `length`-1. Raises InvalidArgument, Trimmed."""
    stop = length if request.stop is None else request.stop
    lowest = stop if request.stops is None else min(request.stops)
    if stop > length:
        raise InvalidArgument(f"stop is {stop}, the session's length is {length}")
    if lowest < first_position:
        raise Trimmed(f"stop is {lowest}, the session's tokens before {first_position} were trimmed")
    if request.start > lowest:
        raise InvalidArgument(f"start is {request.start}, it must be at most {lowest}, where the visible range stops")
    num_chunks = -(-stop // chunk_size)
    mask, chunk_mask = request.mask, request.chunk_mask
    if mask is not None and mask.shape != (stop,):
        raise InvalidArgument(f"mask has shape {list(mask.shape)}, it must be [{stop}], one value per token")
    if chunk_mask is not None and chunk_mask.shape not in {(num_chunks,), (num_queries, num_chunks)}:
        raise InvalidArgument(
            f"chunk_mask has shape {list(chunk_mask.shape)}, it must be [{num_chunks}] or [{num_queries}, {num_chunks}]"
        )
    begin = max(request.start, first_position)
    mask = None if mask is None else mask[begin:]
    if request.episodes is not None:
        of_episodes = _episode_mask(episodes, frozenset(request.episodes), begin, stop)
        mask = of_episodes if mask is None else mask & of_episodes
    stops = None if request.stops is None else np.array(request.stops, np.int64)
    if open_chunk == "exclude":
        stop = stop // chunk_size * chunk_size
        stops = None if stops is None else stops // chunk_size * chunk_size
        mask = None if mask is None else mask[: max(0, stop - begin)]
    if stops is not None:
        stop = -(-stop // chunk_size) * chunk_size  # whatever is cut, is cut for each query
        mask = None if mask is None else np.pad(mask, (0, max(0, stop - begin - len(mask))))
    return Visibility(begin, stop, mask if stop > begin else None, chunk_mask, stops)


class Parts(NamedTuple):
    """Chunks [p] int64 that are seen in part: which of their `slots` [p, C] bool, and the position `seen_to` [p] int64
    that these are before, which tells one part from another. On the chunks' device.
    """

    chunks: Tensor
    slots: Tensor
    seen_to: Tensor


class KnownKeys:
    """Summary keys [D] of parts, whose contents were here and need not be any more; on the host. What one request
    sees of a chunk up to some position is always the same: its attends can share what they know.
    """

    def __init__(self) -> None:
        self._known: list[tuple[Ints, Tensor]] = []

    def add(self, parts: Parts, contents: Tensor) -> None:
        """Know the keys of more parts, by their chunks' contents [p, C, D]."""
        order = parts.seen_to.argsort()
        keys = torch.empty(len(order), contents.shape[-1])
        for some in torch.arange(len(order)).split(CHUNKS_AT_ONCE):
            keys[some] = keys_of(contents[order[some]], parts.slots[order[some]])
        self._known.append((parts.seen_to[order].numpy(), keys))

    def lacking(self, seen_to: Ints) -> Ints:
        """Those of the parts that are not known, each once."""
        lacking = np.unique(seen_to)
        for known, _ in self._known:
            lacking = lacking[~_find(known, lacking)[1]]
        return lacking

    def fill(self, seen_to: Tensor, keys: Tensor) -> Tensor:
        """Put the keys that are known in their rows of `keys` [p, D]; the rows of the others."""
        wanted = seen_to.cpu().numpy()
        is_left = np.ones(len(wanted), np.bool_)
        for known, own in self._known:
            places, is_known = _find(known, wanted)
            rows = np.flatnonzero(is_known)
            keys[torch.from_numpy(rows).to(keys.device)] = own[torch.from_numpy(places[rows])].to(keys.device)
            is_left[rows] = False
        return torch.from_numpy(np.flatnonzero(is_left)).to(keys.device)


def _find(known: Ints, wanted: Ints) -> tuple[Ints, Bools]:
    """Where the numbers are in a sorted list that is not empty, and whether they are."""
    places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return places, known[places] == wanted


@dataclass(frozen=True, slots=True)
class SeenInPart:
    """Of the chunks of a range, the `parts`; `hidden` [h] int64, those that are not seen at all."""

    parts: Parts
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the range stops for each query: `chunk` [Q] int64 that holds the last token before its stop, -1 for none;
    of it the query sees `slots` [Q, C] bool: all, some (`in_part` [Q] bool) or none (`in_whole` is false then, too).
    """

    chunk: Tensor
    stop: Tensor
    slots: Tensor
    in_whole: Tensor
    in_part: Tensor

    def parts(self) -> Parts:
        """One for each query that sees its last chunk in part."""
        return Parts(self.chunk[self.in_part], self.slots[self.in_part], self.stop[self.in_part])


def ends_of(visibility: Visibility, size: int, length: int, device: torch.device) -> Ends | None:
    """Where the range stops for each query, in a session of this length; None where that is the same for all."""
    if visibility.stops is None:
        return None
    stop = torch.from_numpy(visibility.stops).to(device)
    chunk = torch.where(stop > visibility.start, (stop - 1) // size, -1)
    positions = chunk[:, None] * size + torch.arange(size, device=device)
    slots = visibility.slots(chunk, size) & (positions < stop[:, None]) & (chunk >= 0)[:, None]
    seen = slots.sum(dim=1)
    in_whole = (seen > 0) & (seen == (length - chunk * size).clamp(max=size))
    return Ends(chunk, stop, slots, in_whole, (seen > 0) & ~in_whole)


def seen_in_part(held: Chunks, visibility: Visibility, first: int, last: int) -> SeenInPart | None:
    """Of the chunks first .. last-1: those seen in part or not at all.

    None when every chunk is seen as far as it is filled, which is the common case.
    """
    size = held.chunk_size
    if visibility.token_mask is None:
        edges = {chunk for chunk in (first, last - 1) if _is_cut(held, visibility, chunk)}
        if not edges:
            return None
        suspects = torch.tensor(sorted(edges), dtype=torch.int64, device=held.keys.device)
    else:
        suspects = torch.arange(first, last, device=held.keys.device)
    slots = visibility.slots(suspects, size)  # [s, C]
    seen = slots.sum(dim=1)
    stored = (held.length - suspects * size).clamp(max=size)
    in_part = (seen > 0) & (seen < stored)
    return SeenInPart(visibility.parts(suspects[in_part], size, slots[in_part]), suspects[seen == 0])


def cuts_chunks(held: Chunks, visibility: Visibility) -> bool:
    """Whether some chunk may be seen in part, or not at all."""
    if visibility.token_mask is not None:
        return True
    first, last = visibility.chunk_range(held.chunk_size)
    return first < last and any(_is_cut(held, visibility, chunk) for chunk in (first, last - 1))


def keys_of(contents: Tensor, slots: Tensor) -> Tensor:
    """Summary keys [p, D] float32 of chunks [p, C, D] over some of their slots [p, C] bool."""
    return mean_of(sum_slots(contents, slots), slots.sum(dim=1, keepdim=True))


def partial_keys(held: Chunks, parts: Parts, known: KnownKeys) -> Tensor:
    """The keys [p, D] of parts: those that are known, and the others from their contents."""
    keys = torch.empty(len(parts.chunks), held.keys.shape[1], device=held.keys.device)
    for some in known.fill(parts.seen_to, keys).split(CHUNKS_AT_ONCE):
        keys[some] = keys_of(held.contents(parts.chunks[some]), parts.slots[some])
    return keys


def _is_cut(held: Chunks, visibility: Visibility, chunk: int) -> bool:
    """Whether the range's start or stop lies inside what is held of this chunk."""
    begin = chunk * held.chunk_size
    end = min(begin + held.chunk_size, held.length)
    return visibility.start > begin or visibility.stop < end


def _episode_mask(runs: Sequence[EpisodeRun], wanted: Set[int], begin: int, stop: int) -> Bools:
    """Which of the tokens `begin` .. `stop`-1 were appended under these episodes."""
    starts = np.fromiter((run.start for run in runs), np.int64, len(runs))
    is_wanted = np.fromiter((run.episode in wanted for run in runs), np.bool_, len(runs))
    return np.repeat(is_wanted, np.diff(starts.clip(begin, stop), append=stop))
