"""Reading sessions and chunks back from the store, in a thread of its own, while the device goes on.

Three kinds of work: to load a cold session (its stored summary keys, then the tokens after them in pieces), to read
the stored sketches of a session that is searched, and to fetch the contents of chunks that attends wait for. Fetches
go first, also between the pieces of the others: they are small, and whoever waits for one has already been planned.
What a load reads is put into the cache piece by piece, by the device thread between its batches. Who waited goes back
into the device's queue, with what was fetched in hand. Does not know attention, nor what waits.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch

from htm_service.dtypes import TORCH_DTYPES, from_bytes
from htm_service.errors import HTMError, Unhealthy
from htm_service.memory.cache import Cache
from htm_service.memory.resident import EpisodeRun, NewTokens, Resident, joined
from htm_service.memory.sketches.code import FORMAT
from htm_service.memory.sketches.table import SketchTable
from htm_service.store_errors import unreadable
from htm_service.threads.batcher import Batcher, Ticket
from storage.base import Block, Store, StoreError, Summary

PIECE_BYTES = 8 << 20
"""Bytes copied to the device between two batches while a session loads."""

ADDED_AT_ONCE = 256
"""Runs of tokens of one episode that are put into chunks between two batches: about 10 ms."""

KEYS_AT_ONCE = 1 << 20
"""Bytes of stored summary keys that are added in one step."""

Stored = TypeVar("Stored", Block, Summary)

Contents = Mapping[Resident, Mapping[int, torch.Tensor]]
"""Per session, fetched chunks by index: [C, D], on the host."""


@dataclass(slots=True, eq=False)
class Fetch:
    """Chunks to read, and the tickets that wait for them; then what was read, and what could not be."""

    chunks: dict[Resident, list[int]]
    tickets: list[Ticket[Any, Any]]
    contents: Contents = field(default_factory=dict)
    errors: dict[Resident, HTMError] = field(default_factory=dict)
    num_seen: dict[Resident, int] = field(default_factory=dict)
    """As of how many truncations of each."""

    def add(self, resident: Resident, chunks: Sequence[int], ticket: Ticket[Any, Any]) -> None:
        """Fetch these chunks too, for this ticket."""
        wanted = self.chunks.setdefault(resident, [])
        self.num_seen[resident] = resident.num_seen
        wanted.extend(sorted(set(chunks).difference(wanted)))
        self.tickets.append(ticket)


class Loader:
    """See the head of this module. `queue` is the device thread's."""

    def __init__(self, store: Store, cache: Cache, queue: Batcher[Any, Any]) -> None:
        self.busy_since: float | None = None
        self.unhealthy_reason: str | None = None
        self._store = store
        self._cache = cache
        self._queue = queue
        self._changed = threading.Condition()
        self._loads: deque[Callable[[], None]] = deque()
        self._fetches: deque[Fetch] = deque()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="htm-loader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def load(self, resident: Resident) -> None:
        """Begin to load a session; what is parked there goes back into the queue when it is complete, or is told."""
        self._begin(partial(self._load, resident))

    def load_sketches(self, resident: Resident, into: SketchTable) -> None:
        """Begin to read the stored sketches of a resident session; what is parked there goes back when they are here
        (the device thread).
        """
        self._begin(partial(self._load_sketches, resident, into, resident.num_seen))

    def _begin(self, load: Callable[[], None]) -> None:
        with self._changed:
            self._loads.append(load)
            self._changed.notify()

    def fetch(self, fetch: Fetch) -> None:
        """Begin to fetch chunks; the tickets go back into the queue when they are there."""
        with self._changed:
            self._fetches.append(fetch)
            self._changed.notify()

    def close(self, timeout_s: float) -> None:
        """Begin nothing more, and wait for what is being read. What was not begun is forgotten. Safe to call twice."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread.ident is None:  # never started
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logging.getLogger(__name__).error("the loader thread did not stop within %.0f s", timeout_s)

    # --- the thread ---

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed or self._fetches or self._loads)
                    if self._is_closed:
                        return
                    load = self._run_fetches if self._fetches else self._loads.popleft()
                load()
                self.busy_since = None
        except BaseException as error:
            logging.getLogger(__name__).critical("the loader thread died", exc_info=error)
            self.unhealthy_reason = f"the loader thread died: {error!r}"

    def _run_fetches(self) -> None:
        while self._fetches and not self._is_closed:
            self.busy_since = time.monotonic()
            self._fetch(self._fetches.popleft())

    def _load(self, resident: Resident) -> None:
        error: HTMError | None = None
        try:
            self._hand_all_over(self._pieces(resident))
        except HTMError as reason:
            error = reason
        except StoreError as reason:
            error = unreadable(resident.id, reason)
        except Exception as reason:
            logging.getLogger(__name__).exception("session %s could not be loaded", resident.key)
            error = Unhealthy(f"session {resident.id!r} could not be loaded: {reason!r}")
        try:
            # Waited for: the attends that wanted the session may want chunks, before another load offloads it.
            self._hand_over(partial(self._end_load, resident, error))()
        except HTMError:
            logging.getLogger(__name__).warning("session %s was loaded too late", resident.key)

    def _end_load(self, resident: Resident, error: HTMError | None) -> None:
        """Put who waited for the session back into the queue, or tell them what went wrong (the device thread)."""
        if (error := self._cache.end_load(resident, error)) is None:
            self._wake(resident)
            return
        parked, resident.parked = resident.parked, []
        self._queue.finish((ticket, error) for ticket in parked)

    def _load_sketches(self, resident: Resident, into: SketchTable, num_seen: int) -> None:
        try:
            stored = _gathered(self._store.read_sketches(resident.sid, FORMAT), KEYS_AT_ONCE)
            self._hand_all_over(partial(self._cache.add_sketches, resident, into, some) for some in stored)
        except Exception as reason:  # whoever needs them makes them again
            logging.getLogger(__name__).warning("stored sketches of session %s are not used: %r", resident.key, reason)
        try:
            self._hand_over(partial(self._end_sketches, resident, into, num_seen))()
        except HTMError:
            logging.getLogger(__name__).warning("sketches of session %s were read too late", resident.key)

    def _end_sketches(self, resident: Resident, table: SketchTable, num_seen: int) -> None:
        self._cache.end_sketches(resident, table, num_seen)
        self._wake(resident)

    def _wake(self, resident: Resident) -> None:
        """Put what is parked at a session back into the queue (the device thread)."""
        parked, resident.parked = resident.parked, []
        if parked:
            self._queue.requeue(parked)

    def _pieces(self, resident: Resident) -> Iterable[Callable[[], None]]:
        """What the device thread is to do, one after the other: keys, then the tokens that they do not cover."""
        num_chunks, dim = resident.first_chunk, resident.settings.dim
        has_keys = False
        for summaries in _gathered(self._store.read_summaries(resident.sid), KEYS_AT_ONCE):
            first_chunk = summaries[0].first
            if first_chunk > num_chunks and not resident.settings.trims:
                break  # the ones before are lost; all keys are computed again
            keys = from_bytes([summary.data for summary in summaries], "float32", dim)
            if not torch.isfinite(keys).all():
                break  # kept by a version whose sums of large tokens overflowed: computed again
            num_chunks, has_keys = first_chunk + len(keys), True
            yield partial(self._cache.add_keys, resident, first_chunk, keys)
        first = num_chunks * resident.settings.chunk_size
        if has_keys:  # read while the last keys are added
            runs = [EpisodeRun(start, episode) for start, episode in self._store.read_episodes(resident.sid, first)]
            yield partial(resident.episodes.extend, runs)
        for blocks in _gathered(self._store.read_blocks(resident.sid, first), PIECE_BYTES):
            merged = _merged(blocks, resident, first)
            for place in range(0, len(merged), ADDED_AT_ONCE):
                yield partial(self._add_all, resident, merged[place : place + ADDED_AT_ONCE])

    def _add_all(self, resident: Resident, tokens: Sequence[NewTokens]) -> None:
        for new in tokens:
            self._cache.add(resident, new)

    def _fetch(self, fetch: Fetch) -> None:
        """All chunks in one read; when that fails, session by session, so that each has its own error."""
        try:
            fetch.contents = self._read(fetch.chunks)
        except StoreError:
            contents: dict[Resident, Mapping[int, torch.Tensor]] = {}
            for resident, chunks in fetch.chunks.items():
                try:
                    contents.update(self._read({resident: chunks}))
                except StoreError as reason:
                    fetch.errors[resident] = unreadable(resident.id, reason)
            fetch.contents = contents
        self._queue.requeue(fetch.tickets)

    def _read(self, wanted: Mapping[Resident, Sequence[int]]) -> dict[Resident, dict[int, torch.Tensor]]:
        runs = [(resident, *run) for resident, chunks in wanted.items() for run in _runs(chunks)]
        ranges, buffers = [], []
        for resident, first, last in runs:
            settings = resident.settings
            ranges.append((resident.sid, first * settings.chunk_size, last * settings.chunk_size))
            shape = (last - first, settings.chunk_size, settings.dim)
            buffers.append(torch.empty(shape, dtype=TORCH_DTYPES[settings.dtype]))
        num_read = [0] * len(runs)
        for place, block in self._store.read_ranges(ranges):
            num_read[place] += _cut(block, runs[place][0], ranges[place][1], buffers[place].flatten(0, 1))
        contents: dict[Resident, dict[int, torch.Tensor]] = {resident: {} for resident in wanted}
        for (resident, first, last), (_, start, stop), buffer, num in zip(runs, ranges, buffers, num_read, strict=True):
            if num != stop - start:
                held = self._first_position(resident) // resident.settings.chunk_size
                if held > first:  # some were trimmed meanwhile: without them
                    rest = [chunk for chunk in wanted[resident] if chunk >= held]
                    return self._read({**wanted, resident: rest})
                raise StoreError(f"{num} of its tokens {start} to {stop} are there")
            contents[resident].update(zip(range(first, last), buffer, strict=True))
        return contents

    def _first_position(self, resident: Resident) -> int:
        """Where the session begins in the store, which may be ahead of the device."""
        row = self._store.get_session(resident.key) if resident.settings.trims else None
        return 0 if row is None or row.sid != resident.sid else row.first_position

    def _hand_all_over(self, pieces: Iterable[Callable[[], object]]) -> None:
        """Have the device thread do one after the other, each while the next one is read."""
        self.busy_since = time.monotonic()
        wait: Callable[[], None] | None = None
        for piece in pieces:
            self.busy_since = time.monotonic()
            if wait is not None:
                wait()
                self._run_fetches()
            wait = self._hand_over(piece)
        if wait is not None:
            wait()

    def _hand_over(self, action: Callable[[], object]) -> Callable[[], None]:
        """Have the device thread do something; the answer waits for that, and raises what went wrong."""
        done = threading.Event()
        errors: list[HTMError] = []

        def act() -> None:
            try:
                action()
            except HTMError as error:
                errors.append(error)
            except Exception as error:  # this load's trouble, not the device thread's
                logging.getLogger(__name__).exception("a piece of a load could not be put on the device")
                errors.append(Unhealthy(f"what was read could not be put on the device: {error!r}"))
            finally:
                done.set()

        def wait() -> None:
            while not done.wait(0.5):
                if not self._queue.is_running:
                    raise Unhealthy("the device thread has stopped")
            if errors:
                raise errors[0]

        self._queue.post(act)
        return wait


def _gathered(stored: Iterable[Stored], num_bytes: int) -> Iterator[list[Stored]]:
    """What the store yields, in lists of at least so many bytes; the last may have fewer."""
    gathered: list[Stored] = []
    missing = num_bytes
    for item in stored:
        gathered.append(item)
        missing -= len(item.data)
        if missing <= 0:
            yield gathered
            gathered, missing = [], num_bytes
    if gathered:
        yield gathered


def _runs(chunks: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Neighbouring chunks as ranges first .. last-1."""
    for _, run in itertools.groupby(enumerate(sorted(chunks)), key=lambda entry: entry[1] - entry[0]):
        members = [chunk for _, chunk in run]
        yield members[0], members[-1] + 1


def _cut(block: Block, resident: Resident, start: int, into: torch.Tensor) -> int:
    """Copy what a block has of the tokens from `start` on into a buffer [T, D]; how many these are."""
    low, high = max(start, block.start), min(start + len(into), block.start + block.num_tokens)
    tokens = from_bytes([block.data], resident.settings.dtype, resident.settings.dim)
    into[low - start : high - start] = tokens[low - block.start : high - block.start]
    return high - low


def _merged(blocks: list[Block], resident: Resident, first: int) -> list[NewTokens]:
    """A session appended token by token loads in few steps; from `first` on, which only the first block overlaps."""
    merged = joined(blocks, resident.settings)
    merged[0] = merged[0].after(max(first, merged[0].start))
    return merged
