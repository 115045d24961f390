"""R18: any order of forks, truncations, appends, batches, trims, restarts, deletions and damage leaves every session as
plain lists say: what is read back, what attends answer by the definition, while all of it goes on at once too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import sqlite3
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from htm_service.attention.model import RetrievalModel
from htm_service.config import EngineConfig
from htm_service.engine import Engine
from htm_service.errors import InvalidArgument, SessionConflict, SessionDamaged, SessionNotFound
from htm_service.records import (
    AppendRequest,
    AttendRequest,
    AttendResult,
    CreateRequest,
    StepRequest,
    TruncateRequest,
)
from storage.resolve import open_store
from tests.faults.scale import Scale
from tests.names import named
from tests.reference import htm_reference

T = TypeVar("T")

DIM, SIZE = 13, 5
NAMES = ("a", "b", "c", "d")
MAX_TOKENS = 23
"""Of sessions that trim."""
RETRIEVAL = RetrievalModel().config
TOKEN_BYTES = DIM * 4
BUDGET = 100 * SIZE * TOKEN_BYTES
"""Pages and keys of some sessions: others go cold, and pages are offloaded."""

names = st.sampled_from(NAMES)
parts = st.floats(0, 1)
seeds = st.integers(0, 2**20)
kinds = st.sampled_from(("append", "step", "truncate"))
changes = st.lists(st.tuples(st.sampled_from("aatf"), parts, st.integers(1, 9)), max_size=6)
"""Appends, truncations, forks."""


@dataclass(frozen=True)
class Token:
    """One that was appended, whoever has it now."""

    number: int
    vector: Any
    payload: bytes | None
    episode: int | None


@dataclass(frozen=True)
class Model:
    """One session: all its tokens by position, of which the first are trimmed."""

    tokens: tuple[Token, ...] = ()
    first: int = 0
    trims: bool = False

    def appended(self, new: list[Token]) -> Model:
        tokens, first = (*self.tokens, *new), self.first
        while self.trims and len(tokens) - first > MAX_TOKENS:
            first += SIZE
        return replace(self, tokens=tokens, first=first)

    def cut(self, length: int) -> Model:
        return replace(self, tokens=self.tokens[:length], first=min(self.first, length))

    @property
    def held(self) -> tuple[Token, ...]:
        return self.tokens[self.first :]

    def position(self, part: float) -> int:
        """A position at which it can be cut."""
        return self.first + round(part * len(self.held))


def is_answer(model: Model, request: AttendRequest, result: AttendResult, first: int) -> bool:
    """Whether this is what the definition says of these tokens; payloads before `first` may be trimmed meanwhile."""
    seen = len(model.tokens) if request.stop is None else request.stop
    if result.length != len(model.tokens) or not model.first <= seen <= len(model.tokens):
        return False
    tokens = np.array([token.vector for token in model.tokens[:seen]]).reshape(seen, DIM)
    visible = np.array([at >= model.first for at in range(seen)], dtype=bool)
    if request.episodes is not None:
        visible &= np.array([token.episode in request.episodes for token in model.tokens[:seen]], dtype=bool)
    expected = htm_reference(request.queries, tokens, RETRIEVAL, top_k=3, chunk_size=SIZE, visible=visible)
    width = result.chunk_index.shape[1]
    is_same = np.array_equal(result.chunk_index, expected.chunk_index[:, :width])
    if np.abs(expected.output).max() == 0:
        is_same &= bool(np.abs(result.output).max() == 0)
    else:
        is_same &= bool(np.abs(result.output - expected.output).max() <= 1e-5 * np.abs(expected.output).max())
    recalled = [token for row in result.recalled or [] for token in row]
    return bool(is_same) and all(
        token.payload == model.tokens[token.position].payload or (token.payload is None and token.position < first)
        for token in recalled
    )


class BranchMachine(RuleBasedStateMachine):
    """An engine on some store, and plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.sessions: dict[str, Model] = {}
        self.tainted: set[str] = set()
        """Those that had damaged tokens since the server came to know them."""
        self.damaged: set[int] = set()
        self.numbers: dict[bytes, int] = {}
        self.counter = itertools.count()
        self.states: list[Model] = []
        """Those of the session that is attended to while it changes; a state may be seen before it is acknowledged."""
        self.url = self.new_url()
        self.start()

    # --- the store ---

    is_durable = True

    def new_url(self) -> str:
        return f"sqlite:///{self.directory}/htm.sqlite3"

    def damage_block(self, choose: float) -> bytes | None:
        """Change one stored block; its data, or None where there is none."""
        with contextlib.closing(sqlite3.connect(self.directory / "htm.sqlite3")) as database, database:
            rows = database.execute("SELECT log, start, data FROM blocks ORDER BY log, start").fetchall()
            if not rows:
                return None
            log, start, data = rows[round(choose * (len(rows) - 1))]
            database.execute("UPDATE blocks SET checksum = checksum + 1 WHERE log = ? AND start = ?", [log, start])
            return bytes(data)

    # --- around the engine ---

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(work, 60))

    def start(self) -> None:
        self.store = open_store(self.url)
        self.engine = Engine(EngineConfig(device="cpu", memory_budget_bytes=BUDGET), self.store)
        self.run(self.engine.start())

    def stop(self) -> None:
        self.run(self.engine.close())
        self.store.close()

    def teardown(self) -> None:
        if not self.damaged:
            self.run(self.engine.expiry.expire())
            assert list(self.store.verify()) == []
        self.stop()
        self.loop.close()
        shutil.rmtree(self.directory)

    def is_whole(self, name: str) -> bool:
        return not any(token.number in self.damaged for token in self.sessions[name].held)

    def some(self, name: str) -> str:
        """The name, or where nothing has it, that of a session there is: few steps are to be in vain."""
        return name if name in self.sessions or not self.sessions else next(iter(self.sessions))

    def look(self) -> None:
        """Which sessions have damaged tokens now."""
        self.tainted |= {name for name in self.sessions if not self.is_whole(name)}

    def tokens(self, num: int, episode: int | None) -> list[Token]:
        new = []
        for _ in range(num):
            number = next(self.counter)
            vector = np.random.default_rng(number).standard_normal(DIM).astype(np.float32)
            self.numbers[vector.tobytes()] = number
            new.append(Token(number, vector, b'{"n":%d}' % number if number % 3 else None, episode))
        return new

    async def try_append(self, name: str, num: int, episode: int | None) -> bool:
        new = self.tokens(num, episode)
        request = AppendRequest(np.stack([one.vector for one in new]), [one.payload for one in new], episode)
        after = self.sessions[name].appended(new)
        self.states.append(after)
        try:
            appended = await self.engine.append(named(name), request)
        except SessionDamaged:
            assert name in self.tainted
            return False
        assert appended.start == len(self.sessions[name].tokens)
        self.sessions[name] = after
        assert appended.length == len(self.sessions[name].tokens)
        return True

    async def try_truncate(self, name: str, length: int) -> None:
        after = self.sessions[name].cut(length)
        self.states.append(after)
        result = await self.engine.truncate(named(name), length)
        assert (result.length, result.num_chunks) == (length, -(-length // SIZE))
        self.sessions[name] = after
        self.tainted.discard(name)
        self.look()

    async def try_batch(self, some: list[str], kind: str, num: int, part: float, seed: int) -> None:
        request = asks(seed, None, None)
        before = {name: self.sessions.get(name, Model()) for name in some}
        new = {name: self.tokens(num, None) for name in some}
        appends = [
            AppendRequest(np.stack([one.vector for one in new[name]]), [one.payload for one in new[name]])
            for name in some
        ]
        keys, lengths = [named(name) for name in some], [before[name].position(part) for name in some]
        found: Any
        if kind == "append":
            found = await self.engine.batch_append(list(zip(keys, appends, strict=True)))
        elif kind == "step":
            steps = [StepRequest(request, append) for append in appends]
            found = await self.engine.batch_step(list(zip(keys, steps, strict=True)))
        else:
            cuts = [
                TruncateRequest(length, len(before[name].tokens)) for name, length in zip(some, lengths, strict=True)
            ]
            found = await self.engine.batch_truncate(list(zip(keys, cuts, strict=True)))
        for name, outcome, length in zip(some, found, lengths, strict=True):
            if name not in self.sessions or isinstance(outcome, SessionDamaged):
                assert isinstance(outcome, SessionDamaged if name in self.tainted else SessionNotFound), outcome
                continue
            if kind == "truncate":
                assert outcome[:2] == (length, -(-length // SIZE)), outcome
                self.sessions[name] = before[name].cut(length)
                self.tainted.discard(name)
                continue
            if kind == "step" and not is_answer(before[name], request, outcome.attended, before[name].first):
                raise AssertionError(told(name, [before[name]], request, outcome.attended))
            appended = outcome.appended if kind == "step" else outcome
            assert appended.start == len(before[name].tokens), outcome
            self.sessions[name] = before[name].appended(new[name])
        self.look()

    async def try_attend(self, name: str, request: AttendRequest) -> None:
        """The answer is that of one of the states that the session had meanwhile."""
        try:
            result = await self.engine.attend(named(name), request)
        except SessionDamaged:
            assert name in self.tainted
            return
        first = max(model.first for model in self.states)
        if not any(is_answer(model, request, result, first) for model in self.states):
            raise AssertionError(told(name, self.states, request, result))

    # --- what happens ---

    @initialize(name=names, num=st.integers(10, 40))
    def begin(self, name: str, num: int) -> None:
        self.create(name, False)
        self.append(name, num, None, 2)

    @rule(name=names, trims=st.booleans())
    def create(self, name: str, trims: bool) -> None:
        if name not in self.sessions:
            more = {"max_tokens": MAX_TOKENS, "on_full": "evict_oldest"} if trims else {}
            self.run(self.engine.create(named(name), CreateRequest(dim=DIM, chunk_size=SIZE, **more)))  # type: ignore[arg-type]
            self.sessions[name] = Model(trims=trims)
            self.tainted.discard(name)

    @rule(name=names, num=st.integers(1, 17), episode=st.none() | st.integers(0, 2), times=st.integers(1, 3))
    def append(self, name: str, num: int, episode: int | None, times: int) -> None:
        name = self.some(name)
        for _ in range(times if name in self.sessions else 0):
            self.run(self.try_append(name, num, episode))

    @rule(name=names, to=names, part=parts | st.none())
    def fork(self, name: str, to: str, part: float | None) -> None:
        name = self.some(name)
        if name not in self.sessions:
            return
        model = self.sessions[name]
        length = None if part is None else model.position(part)
        if to in self.sessions:
            with contextlib.suppress(SessionConflict):
                self.run(self.engine.fork(named(name), named(to), length))
                raise AssertionError("it is there already")
            return
        info = self.run(self.engine.fork(named(name), named(to), length))
        self.sessions[to] = model if length is None else model.cut(length)
        assert (info.length, info.first_position) == (len(self.sessions[to].tokens), self.sessions[to].first)
        self.tainted.discard(to)
        self.look()

    @rule(name=names, part=parts | st.just(0.0), all_of_it=st.booleans())
    def truncate(self, name: str, part: float, all_of_it: bool) -> None:
        name = self.some(name)
        if name in self.sessions:
            self.run(self.try_truncate(name, 0 if all_of_it else self.sessions[name].position(part)))

    @rule(some=st.lists(names, min_size=1, unique=True), kind=kinds, num=st.integers(1, 9), part=parts, seed=seeds)
    def batch(self, some: list[str], kind: str, num: int, part: float, seed: int) -> None:
        """Many at once: those that are there, each as by a call of its own."""
        self.run(self.try_batch(some, kind, num, part, seed))

    @rule(name=names, part=parts, num=st.integers(1, 9), seed=seeds, goes=st.sampled_from(("none", "parent", "child")))
    def branch(self, name: str, part: float, num: int, seed: int, goes: str) -> None:
        """Parent and child are on the device and share its pages; the child is cut and grows, or one of them goes."""
        name = self.some(name)
        to = next((one for one in NAMES if one not in self.sessions), "a" if name != "a" else "b")
        if name not in self.sessions or name in self.tainted:
            return
        if to in self.sessions:
            self.delete(to)
        self.attend(name, seed, None, None)
        self.fork(name, to, None)
        self.attend(to, seed, None, None)
        if goes != "none":
            self.delete(to if goes == "child" else name)
        if to in self.sessions:
            self.truncate(to, part, False)
        for one in (to, name):
            self.append(one, num, None, 1)
        for one in (name, to):
            self.attend(one, seed, None, None)

    @rule(name=names)
    def cut_where_that_cannot_be(self, name: str) -> None:
        name = self.some(name)
        if name in self.sessions:
            model = self.sessions[name]
            for length in {len(model.tokens) + 1, max(model.first - 1, 0) or len(model.tokens) + 2}:
                for work in (
                    self.engine.truncate(named(name), length),
                    self.engine.fork(named(name), named("x"), length),
                ):
                    with contextlib.suppress(InvalidArgument):
                        self.run(work)
                        raise AssertionError("it was cut")

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.sessions:
            self.run(self.engine.delete(named(name)))
            del self.sessions[name]
            self.tainted.discard(name)

    @rule(name=names, seed=seeds, part=parts | st.none(), episode=st.none() | st.integers(0, 2))
    def attend(self, name: str, seed: int, part: float | None, episode: int | None) -> None:
        name = self.some(name)
        if name in self.sessions:
            model = self.sessions[name]
            stop = None if part is None or len(model.held) < 2 else max(model.position(part), model.first + 1)
            request = asks(seed, stop, None if episode is None else (episode,))
            self.states = [model]
            self.run(self.try_attend(name, request))

    @rule(name=names)
    def read(self, name: str) -> None:
        if name not in self.sessions:
            with contextlib.suppress(SessionNotFound):
                self.run(self.engine.inspect(named(name)))
                raise AssertionError("it is there")
            return
        model = self.sessions[name]
        try:
            found = self.run(self.engine.read(named(name), 0, None, embeddings=True, payloads=True))
        except SessionDamaged:
            assert name in self.tainted
            return
        assert (found.start, found.length) == (model.first, len(model.tokens)) and self.is_whole(name)
        assert list(found.payloads or []) == [token.payload for token in model.held]
        expected = np.array([token.vector for token in model.held], dtype=np.float32).reshape(-1, DIM)
        np.testing.assert_array_equal(found.embeddings, expected)

    @rule(name=names, steps=changes, seed=seeds)
    def all_at_once(self, name: str, steps: list[tuple[str, float, int]], seed: int) -> None:
        """Attends while the session changes: each is answered as of one of its states, payloads too."""
        name = self.some(name)
        if name not in self.sessions or name in self.tainted:
            return
        self.states = [self.sessions[name]]

        async def change() -> None:
            for kind, part, num in steps:
                model = self.sessions[name]
                if kind == "a":
                    await self.try_append(name, num, None)
                elif kind == "t":
                    await self.try_truncate(name, model.position(part))
                elif (free := next((one for one in NAMES if one not in self.sessions), None)) is not None:
                    await self.engine.fork(named(name), named(free), model.position(part))
                    self.sessions[free] = model.cut(model.position(part))
            is_over.set()

        async def ask(number: int) -> None:
            for more in itertools.count(number):
                await self.try_attend(name, asks(seed + more, None, None))
                if is_over.is_set():
                    return

        async def go_cold() -> None:
            await asyncio.sleep(0.002)
            self.offload(name)

        async def all_of_it() -> None:
            await asyncio.gather(change(), *(ask(100 * number) for number in range(3)), go_cold())

        is_over = asyncio.Event()
        self.run(all_of_it())

    @rule(name=names)
    def offload(self, name: str) -> None:
        """It goes cold."""
        for session in self.engine.directory.sessions():
            if session.id == name:
                self.engine.worker.queue.post(partial(self.engine.worker.cache.free, session.resident))

    @rule()
    def compact(self) -> None:
        self.run(self.engine.compaction.finish())

    @rule()
    def purge(self) -> None:
        self.run(self.engine.expiry.expire())
        self.run(self.engine.expiry.erase())

    @precondition(lambda self: self.is_durable and self.sessions)
    @rule()
    def restart(self) -> None:
        self.stop()
        self.tainted.clear()
        self.look()
        self.start()

    @precondition(lambda self: self.is_durable and self.sessions and len(self.damaged) < 40)
    @rule(choose=parts)
    def damage(self, choose: float) -> None:
        data = self.damage_block(choose)
        if data is not None:
            rows = (data[at : at + TOKEN_BYTES] for at in range(0, len(data), TOKEN_BYTES))
            self.damaged |= {self.numbers[row] for row in rows}
            self.look()


def told(name: str, states: list[Model], request: AttendRequest, result: AttendResult) -> str:
    """What was answered, and what should have been."""
    lines = [f"{name}: length {result.length}, stop {request.stop}, episodes {request.episodes}"]
    rows = [[(token.position, token.payload) for token in row] for row in result.recalled or []]
    lines.append(f"chunks {result.chunk_index.tolist()}, recalled {rows}")
    for model in states:
        held = [f"{token.number}{'' if token.episode is None else '/' + str(token.episode)}" for token in model.tokens]
        lines.append(f"first {model.first}, length {len(held)}: {' '.join(held)}")
    return "\n".join(lines)


def asks(seed: int, stop: int | None, episodes: tuple[int, ...] | None) -> AttendRequest:
    queries = np.random.default_rng(seed).standard_normal((2, DIM)).astype(np.float32) / np.float32(3)
    return AttendRequest(queries=queries, top_k=3, stop=stop, episodes=episodes, tokens=True, payloads=True)


class MemoryMachine(BranchMachine):
    """On the store in memory: nothing is restarted there, nor damaged."""

    is_durable = False

    def new_url(self) -> str:
        return "memory://"


def explore(machine: type[BranchMachine], examples: int, steps: int = 20) -> None:
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    run_state_machine_as_test(machine, settings=chosen)


def test_on_sqlite(scale: Scale) -> None:
    explore(BranchMachine, scale.branch_examples)


def test_in_memory(scale: Scale) -> None:
    explore(MemoryMachine, scale.branch_examples)


def test_on_postgresql(scale: Scale, new_postgresql_url: Callable[[], str]) -> None:
    import psycopg

    class Machine(BranchMachine):
        def new_url(self) -> str:
            return new_postgresql_url()

        def damage_block(self, choose: float) -> bytes | None:
            with psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True) as database:
                rows = database.execute("SELECT log, start, data FROM blocks ORDER BY log, start").fetchall()
                if not rows:
                    return None
                log, start, data = rows[round(choose * (len(rows) - 1))]
                changed = "UPDATE blocks SET checksum = checksum + 1 WHERE log = %s AND start = %s"
                database.execute(changed, [log, start])
                return bytes(data)

    explore(Machine, scale.branch_examples_on_postgresql)
