"""The demo's agents: each streams passages into a session over HTTP, and asks questions of it.

Knows htm-client only. Does not know the server's process or what is printed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from htm_client import AsyncHTMClient, Recalled

from api.demo.corpus import Passage
from api.demo.embedder import Floats

CHUNK_SIZE = 32
TOP_K = 16
PASSAGES_PER_APPEND = 16
LIBRARY = "library"


@dataclass(slots=True)
class Agent:
    """One session and what is streamed into it; `acknowledged` counts the passages the server said it has."""

    session: str
    passages: Sequence[Passage]
    embeddings: Floats
    acknowledged: int = 0
    num_appends: int = 0

    async def stream(self, client: AsyncHTMClient, on_progress: Callable[[int], None]) -> None:
        """Create the session and append everything that it does not hold yet."""
        info = await client.create_session(self.session, dim=self.embeddings.shape[1], chunk_size=CHUNK_SIZE)
        self.acknowledged = info.length
        on_progress(info.length)
        while self.acknowledged < len(self.passages):
            part = slice(self.acknowledged, self.acknowledged + PASSAGES_PER_APPEND)
            payloads = [payload_of(passage) for passage in self.passages[part]]
            appended = await client.append(
                self.session, self.embeddings[part], payloads=payloads, if_length=self.acknowledged
            )
            on_progress(appended.length - self.acknowledged)
            self.acknowledged = appended.length
            self.num_appends += 1

    async def check(self, client: AsyncHTMClient) -> str | None:
        """Read everything back and compare it with what was sent; what is wrong, or None."""
        info = await client.session(self.session)
        if info.length != self.acknowledged:
            return f"{self.session}: {self.acknowledged} tokens were acknowledged, {info.length} are there"
        for start in range(0, info.length, 1000):
            memories = await client.read(self.session, start, min(start + 1000, info.length))
            assert memories.embeddings is not None and memories.payloads is not None
            if not np.array_equal(memories.embeddings, self.embeddings[start : memories.stop]):
                return f"{self.session}: the embeddings from {start} on are not those that were sent"
            if memories.payloads != [payload_of(passage) for passage in self.passages[start : memories.stop]]:
                return f"{self.session}: the payloads from {start} on are not those that were sent"
        return None


@dataclass(slots=True)
class Answers:
    """What came back for the questions, in their order, and how long each took."""

    recalled: list[Sequence[Recalled]] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    seconds: float = 0.0


async def ask_all(client: AsyncHTMClient, asked: Sequence[tuple[str, Floats]]) -> Answers:
    """Ask all (session, query [D]) at the same time."""
    answers = Answers()

    async def ask(session: str, query: Floats) -> tuple[Sequence[Recalled], float, int]:
        began = time.perf_counter()
        attended = await client.attend(
            session, query, top_k=TOP_K, rank_by="score", returns=["payloads"], max_recalled=10
        )
        assert attended.recalled is not None
        return attended.recalled[0], (time.perf_counter() - began) * 1e3, attended.batch_size

    began = time.perf_counter()
    for recalled, latency_ms, batch_size in await asyncio.gather(*(ask(*item) for item in asked)):
        answers.recalled.append(recalled)
        answers.latencies_ms.append(latency_ms)
        answers.batch_sizes.append(batch_size)
    answers.seconds = time.perf_counter() - began
    return answers


def payload_of(passage: Passage) -> dict[str, Any]:
    """What is stored with a passage."""
    return {"module": passage.module, "name": passage.name, "line": passage.line, "text": passage.text}


def make_agents(passages: Sequence[Passage], embeddings: Floats, num_shares: int) -> list[Agent]:
    """One agent for the whole corpus and `num_shares` for a share of its modules each, about equally large."""
    packages: dict[str, list[int]] = {}
    for place, passage in enumerate(passages):
        packages.setdefault(passage.module.split(".")[0], []).append(place)
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for places in sorted(packages.values(), key=len, reverse=True):
        min(shares, key=len).extend(places)
    agents = [Agent(LIBRARY, passages, embeddings)]
    for number, share in enumerate(shares, start=1):
        share.sort()
        agents.append(Agent(f"agent-{number:02}", [passages[i] for i in share], embeddings[share]))
    return agents
