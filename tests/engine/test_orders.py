"""Single calls and batches that change and ask the same sessions, all at once: everything is as the store's order of
writes says, forks and truncations too.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pytest

from htm_service.attention.model import RetrievalModel
from htm_service.engine import Engine
from htm_service.errors import HTMError
from htm_service.memory.resident import Resident
from htm_service.records import (
    AppendRequest,
    AppendResult,
    AttendRequest,
    AttendResult,
    SelectResult,
    StepRequest,
    StepResult,
    TruncateRequest,
)
from storage.base import Append, Appended, Fork, SessionRow, Truncate
from storage.resolve import open_store
from tests.engine.conftest import MakeEngine
from tests.engine.inside import on_device_thread, session_of
from tests.engine.test_attend import DIM, SIZE, fill, vectors
from tests.names import named
from tests.reference import htm_reference, relative_error

RETRIEVAL = RetrievalModel().config
TOP_K = 3
Tokens = np.ndarray[Any, np.dtype[np.float32]]
Outcome = object


class History:
    """All that the tokens of each session ever were, in the order in which a store wrote."""

    def __init__(self, store: Any) -> None:
        self.of_sid: dict[int, list[Tokens]] = {}
        self._write = store.write
        store.write = self.write

    def states(self, sid: int) -> list[Tokens]:
        return self.of_sid.setdefault(sid, [np.zeros((0, DIM), np.float32)])

    def write(self, writes: Sequence[Any], now: float) -> Any:
        outcomes = self._write(writes, now=now)
        for write, outcome in zip(writes, outcomes, strict=True):
            if isinstance(outcome, Appended) and isinstance(write, Append):
                states = self.states(write.sid)
                assert outcome.start == len(states[-1])
                new = np.frombuffer(write.data, np.float32).reshape(-1, DIM)
                states.append(np.concatenate([states[-1], new]))
            elif isinstance(outcome, SessionRow) and isinstance(write, Truncate):
                self.states(write.sid).append(self.states(write.sid)[-1][: write.length])
            elif isinstance(outcome, SessionRow) and isinstance(write, Fork):
                self.of_sid[outcome.sid] = [self.states(write.sid)[-1]]
        return outcomes


class Calls:
    """Makes calls and compares what they answer."""

    def __init__(self, engine: Engine, history: History, names: list[str], seed: int) -> None:
        self.engine, self.history, self.names = engine, history, names
        self.chance = random.Random(seed)
        self.number = 0
        self.num_seen = dict.fromkeys(("AttendResult", "SelectResult", "TruncateResult", "refused"), 0)

    async def call(self) -> None:
        self.number += 1
        some = self.chance.sample(self.names, self.chance.randint(1, min(5, len(self.names))))
        token = vectors(1_000 + self.number, 1, DIM)
        append = AppendRequest(vectors(self.number, self.chance.choice([1, 1, 7]), DIM))
        ask = AttendRequest(queries=token, top_k=TOP_K)
        length = self.chance.choice([0, 3, 10, 11, 25])
        keys, first = [named(name) for name in some], named(some[0])
        states = [self.history.states(session_of(self.engine, name).sid) for name in some]
        least = [self.acknowledged(name) for name in some]
        fork = f"fork-{self.number}"
        makes: list[Callable[[], Awaitable[object]]] = [
            lambda: self.engine.append(first, append),
            lambda: self.engine.attend(first, ask),
            lambda: self.engine.truncate(first, length),
            lambda: self.engine.fork(first, named(fork)),
            lambda: self.engine.batch_append([(key, append) for key in keys]),
            lambda: self.engine.batch_attend([(key, ask) for key in keys]),
            lambda: self.engine.batch_select([(key, ask) for key in keys]),
            lambda: self.engine.batch_step([(key, StepRequest(ask, append)) for key in keys]),
            lambda: self.engine.batch_truncate([(key, TruncateRequest(length)) for key in keys]),
        ]
        try:
            found: Any = await self.chance.choice(makes)()
        except HTMError as error:
            found = error
        if getattr(found, "id", None) == fork:
            self.names.append(fork)
            return
        outcomes = found if isinstance(found, list) else [found]
        for outcome, of_session, at_least in zip(outcomes, states, least, strict=False):
            self.check(outcome, token, of_session[at_least:], length)

    def acknowledged(self, name: str) -> int:
        """A state that readers do not see before: the first of the length that they see now."""
        session = session_of(self.engine, name)
        states, length = self.history.states(session.sid), session.length
        return next((at for at, state in enumerate(states) if len(state) == length), 0)

    def check(self, outcome: Outcome, query: Tokens, states: list[Tokens], length: int) -> None:
        """The outcome is that of some state, of those from the beginning of the call to its end."""
        kind = "refused" if isinstance(outcome, HTMError) else type(outcome).__name__
        self.num_seen[kind] = self.num_seen.get(kind, 0) + 1
        if isinstance(outcome, HTMError):
            assert outcome.code == "invalid_argument" and any(len(state) < length for state in states), outcome
        elif isinstance(outcome, StepResult):
            self.check(outcome.attended, query, states, length)
            self.check(outcome.appended, query, states, length)
        elif isinstance(outcome, AppendResult):
            assert any(len(state) == outcome.length for state in states)
        elif isinstance(outcome, AttendResult):
            assert any(is_answer(outcome, query, state) for state in states if len(state) == outcome.length)
        elif isinstance(outcome, SelectResult):
            assert any(is_selected(outcome, query, state) for state in states if len(state) == outcome.length)


def is_answer(result: AttendResult, query: Tokens, tokens: Tokens) -> bool:
    """Whether this is what the definition says of these tokens."""
    expected = htm_reference(query, tokens, RETRIEVAL, top_k=TOP_K, chunk_size=SIZE)
    if not len(tokens):
        return not result.output.any()
    return relative_error(result.output, expected.output) <= 1e-4  # what other tokens answer is far off


def is_selected(result: SelectResult, query: Tokens, tokens: Tokens) -> bool:
    """Whether these are the chunks of these tokens whose keys have the greatest products with the query."""
    assert result.taken is not None and result.taken.tokens is not None
    chunks = [tokens[at : at + SIZE] for at in range(0, len(tokens), SIZE)]
    logits = np.array([float(query[0] @ chunk.mean(axis=0)) for chunk in chunks])
    best = np.argsort(-logits, kind="stable")[:TOP_K]
    same = len(result.taken.index) == len(best) and all(
        np.array_equal(held[: len(chunks[at])], chunks[at])
        for at, held in zip(result.taken.index, result.taken.tokens, strict=True)
        if at < len(chunks)
    )
    return same and np.array_equal(result.chunk_index[0][: len(best)], best)


@pytest.mark.parametrize("kind", ["memory", "sqlite", "postgresql"])
@pytest.mark.parametrize("seed", range(2))
async def test_it_is_some_order_of_single_calls(
    make_engine: MakeEngine, request: pytest.FixtureRequest, kind: str, seed: int
) -> None:
    store = open_store("memory://" if kind == "memory" else request.getfixturevalue(f"{kind}_url"))
    history = History(store)
    engine = await make_engine(store, max_batch_products=6 << 20)
    names = [f"s{number}" for number in range(6)]
    for number, name in enumerate(names):
        await fill(engine, name, vectors(number, 17, DIM))
    calls = Calls(engine, history, names, seed)

    def offload(resident: Resident) -> None:
        if resident.state == "resident":
            engine.worker.cache.offload(resident)

    async def worker() -> None:
        for _ in range(20):
            await calls.call()
            if calls.chance.random() < 0.2:
                resident = session_of(engine, calls.chance.choice(names)).resident
                await on_device_thread(engine, lambda one=resident: offload(one))  # type: ignore[misc]

    await asyncio.wait_for(asyncio.gather(*(worker() for _ in range(8))), 120)
    assert min(calls.num_seen.values()) > 0 and len(names) > 8, (calls.num_seen, names)
    for name in names:
        stored = await engine.read(named(name), 0, None, embeddings=True, payloads=False)
        states = history.states(session_of(engine, name).sid)
        assert stored.embeddings is not None
        np.testing.assert_array_equal(stored.embeddings, states[-1])
        result = await engine.attend(named(name), AttendRequest(queries=vectors(5, 1, DIM), top_k=TOP_K))
        assert is_answer(result, vectors(5, 1, DIM), states[-1])
