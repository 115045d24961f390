"""Reading sessions and chunks back from the store, in a thread of its own, while the device goes on.

Two kinds of work: to load a cold session (its stored summary keys, then the tokens after them in pieces), and to
fetch the contents of chunks that attends wait for. Fetches go first, also between the pieces of a load: they are
small, and whoever waits for one has already been planned.
What was read is handed to the device thread, piece by piece, between its batches. Does not know attention.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from htm_service.dtypes import TORCH_DTYPES, from_bytes
from htm_service.errors import HTMError, Unhealthy
from htm_service.reads.visibility import EpisodeRun
from htm_service.sessions.session import NewTokens, Session, joined
from htm_service.threads.batcher import Batcher
from htm_service.threads.heartbeat import Heartbeat
from storage.base import Block, Store, StoreError, Summary

PIECE_BYTES = 8 << 20
"""Bytes copied to the device between two batches while a session loads."""

KEYS_AT_ONCE = 1 << 20
"""Bytes of stored summary keys that are added in one step."""

Stored = TypeVar("Stored", Block, Summary)

Contents = Mapping[Session, Mapping[int, torch.Tensor]]
"""Per session, fetched chunks by index: [C, D], on the host."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Chunks to read, and what to do with them on the device thread: their contents, and what failed."""

    chunks: Mapping[Session, Sequence[int]]
    done: Callable[[Contents, Mapping[Session, HTMError]], None]


@dataclass(frozen=True, slots=True)
class Sink:
    """Where a load's parts go, each called on the device thread; they raise HTMError."""

    add_keys: Callable[[Session, int, torch.Tensor], None]
    add: Callable[[Session, NewTokens], None]
    end: Callable[[Session, HTMError | None], None]


class Loader:
    """See the head of this module. `worker` is the device thread; `on_death` is told why this one ended."""

    def __init__(self, store: Store, sink: Sink, worker: Batcher[Any, Any], on_death: Callable[[str], None]) -> None:
        self.heartbeat = Heartbeat()
        self._store = store
        self._sink = sink
        self._worker = worker
        self._on_death = on_death
        self._changed = threading.Condition()
        self._loads: deque[Session] = deque()
        self._fetches: deque[Fetch] = deque()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="htm-loader", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def load(self, session: Session) -> None:
        """Begin to load a session; its `end` is called when it is complete or has failed."""
        with self._changed:
            self._loads.append(session)
            self._changed.notify()

    def fetch(self, fetch: Fetch) -> None:
        """Begin to fetch chunks."""
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
                    session = None if self._fetches else self._loads.popleft()
                if session is None:
                    self._run_fetches()
                else:
                    self._load(session)
                self.heartbeat.rest()
        except BaseException as error:
            logging.getLogger(__name__).critical("the loader thread died", exc_info=error)
            self._on_death(f"the loader thread died: {error!r}")

    def _run_fetches(self) -> None:
        while self._fetches and not self._is_closed:
            self.heartbeat.beat()
            self._fetch(self._fetches.popleft())

    def _load(self, session: Session) -> None:
        error: HTMError | None = None
        try:
            self.heartbeat.beat()
            wait: Callable[[], None] | None = None
            for part in self._parts(session):
                self.heartbeat.beat()
                if wait is not None:
                    wait()
                    self._run_fetches()
                wait = self._hand_over(part)  # while the next one is read
            if wait is not None:
                wait()
        except HTMError as reason:
            error = reason
        except StoreError as reason:
            error = session.unreadable(reason)
        except Exception as reason:
            logging.getLogger(__name__).exception("session %s could not be loaded", session.id)
            error = Unhealthy(f"session {session.id!r} could not be loaded: {reason!r}")
        try:
            # Waited for: the attends that wanted the session may want chunks, before another load evicts it.
            self._hand_over(lambda: self._sink.end(session, error))()
        except HTMError:
            logging.getLogger(__name__).warning("session %s was loaded too late", session.id)

    def _parts(self, session: Session) -> Iterable[Callable[[], None]]:
        """What the device thread is to do, one after the other: keys, then the tokens that they do not cover."""
        num_chunks, dim = session.first_chunk, session.settings.dim
        has_keys = False
        for summaries in _lots(self._store.read_summaries(session.sid), KEYS_AT_ONCE):
            first_chunk = summaries[0].first
            if first_chunk > num_chunks and not session.settings.evicts:
                break  # the ones before are lost; all keys are computed again
            keys = from_bytes([summary.data for summary in summaries], "float32", dim)
            num_chunks, has_keys = first_chunk + len(keys), True
            yield partial(self._sink.add_keys, session, first_chunk, keys)
        first = num_chunks * session.settings.chunk_size
        if has_keys:  # read while the last keys are added
            runs = [EpisodeRun(start, episode) for start, episode in self._store.read_episodes(session.sid, first)]
            yield partial(session.episodes.extend, runs)
        for lot in _lots(self._store.read_blocks(session.sid, first), PIECE_BYTES):
            yield partial(self._add_all, session, _merged(lot, session, first))

    def _add_all(self, session: Session, tokens: Sequence[NewTokens]) -> None:
        for new in tokens:
            self._sink.add(session, new)

    def _fetch(self, fetch: Fetch) -> None:
        """All chunks in one read; when that fails, session by session, so that each has its own error."""
        contents: dict[Session, dict[int, torch.Tensor]] = {}
        errors: dict[Session, HTMError] = {}
        try:
            contents = self._read(fetch.chunks)
        except StoreError:
            for session, chunks in fetch.chunks.items():
                try:
                    contents.update(self._read({session: chunks}))
                except StoreError as reason:
                    errors[session] = session.unreadable(reason)
        self._worker.post(lambda: fetch.done(contents, errors))

    def _read(self, wanted: Mapping[Session, Sequence[int]]) -> dict[Session, dict[int, torch.Tensor]]:
        runs = [(session, *run) for session, chunks in wanted.items() for run in _runs(chunks)]
        ranges, buffers = [], []
        for session, first, last in runs:
            settings = session.settings
            ranges.append((session.sid, first * settings.chunk_size, last * settings.chunk_size))
            shape = (last - first, settings.chunk_size, settings.dim)
            buffers.append(torch.empty(shape, dtype=TORCH_DTYPES[settings.dtype]))
        num_read = [0] * len(runs)
        for place, block in self._store.read_ranges(ranges):
            num_read[place] += _cut(block, runs[place][0], ranges[place][1], buffers[place].flatten(0, 1))
        contents: dict[Session, dict[int, torch.Tensor]] = {session: {} for session in wanted}
        for (session, first, last), (_, start, stop), buffer, num in zip(runs, ranges, buffers, num_read, strict=True):
            if num != stop - start:
                held = self._first_position(session) // session.settings.chunk_size
                if held > first:  # some were evicted meanwhile: without them
                    rest = [chunk for chunk in wanted[session] if chunk >= held]
                    return self._read({**wanted, session: rest})
                raise StoreError(f"{num} of its tokens {start} to {stop} are there")
            contents[session].update(zip(range(first, last), buffer, strict=True))
        return contents

    def _first_position(self, session: Session) -> int:
        """Where the session begins in the store, which may be ahead of the device."""
        row = self._store.get_session(session.id) if session.settings.evicts else None
        return 0 if row is None or row.sid != session.sid else row.first_position

    def _hand_over(self, action: Callable[[], object]) -> Callable[[], None]:
        """Have the device thread do something; the answer waits for that, and raises what went wrong."""
        done = threading.Event()
        errors: list[HTMError] = []

        def act() -> None:
            try:
                action()
            except HTMError as error:
                errors.append(error)
            finally:
                done.set()

        def wait() -> None:
            while not done.wait(0.5):
                if not self._worker.is_running:
                    raise Unhealthy("the device thread has stopped")
            if errors:
                raise errors[0]

        self._worker.post(act)
        return wait


def _lots(stored: Iterable[Stored], num_bytes: int) -> Iterator[list[Stored]]:
    """What the store yields, in lots of at least so many bytes; the last may have fewer."""
    lot: list[Stored] = []
    missing = num_bytes
    for item in stored:
        lot.append(item)
        missing -= len(item.data)
        if missing <= 0:
            yield lot
            lot, missing = [], num_bytes
    if lot:
        yield lot


def _runs(chunks: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Neighbouring chunks as ranges first .. last-1."""
    for _, run in itertools.groupby(enumerate(sorted(chunks)), key=lambda entry: entry[1] - entry[0]):
        members = [chunk for _, chunk in run]
        yield members[0], members[-1] + 1


def _cut(block: Block, session: Session, start: int, into: torch.Tensor) -> int:
    """Copy what a block has of the tokens from `start` on into a buffer [T, D]; how many these are."""
    low, high = max(start, block.start), min(start + len(into), block.start + block.num_tokens)
    tokens = from_bytes([block.data], session.settings.dtype, session.settings.dim)
    into[low - start : high - start] = tokens[low - block.start : high - block.start]
    return high - low


def _merged(lot: list[Block], session: Session, first: int) -> list[NewTokens]:
    """A session appended token by token loads in few steps; from `first` on, which only the first block overlaps."""
    merged = joined(lot, session.settings)
    skip = max(0, first - merged[0].start)
    merged[0] = NewTokens(merged[0].start + skip, merged[0].tokens[skip:], merged[0].episode)
    return merged
