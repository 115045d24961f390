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
from htm_client import AsyncHTMClient, Recalled, SessionConflict

from examples.demo.corpus import Passage
from examples.demo.embedder import Floats

CHUNK_SIZE = 32
LABELS = {"corpus": "python-library"}
TOP_K = 16
PASSAGES_PER_APPEND = 16
PASSAGES_PER_READ = 1000
LIBRARY = "library"


@dataclass(slots=True)
class Agent:
    """One session and what is streamed into it; `acknowledged` counts the passages the server said it has."""

    session: str
    passages: Sequence[Passage]
    embeddings: Floats
    """[n, D], a row per passage."""
    acknowledged: int = 0
    num_appends: int = 0

    async def stream(self, client: AsyncHTMClient, gate: asyncio.Event, on_progress: Callable[[int], None]) -> None:
        """Create the session and append everything that it does not hold yet; no new append while `gate` is shut.

        Raises OSError when the session is there and is not this agent's.
        """
        try:
            info = await client.create_session(
                self.session, dim=self.embeddings.shape[1], chunk_size=CHUNK_SIZE, labels=LABELS
            )
        except SessionConflict as error:
            raise OSError(f"the data directory holds another session {self.session!r}: {error.detail}") from error
        if info.length > len(self.passages):
            raise OSError(
                f"the data directory holds another session {self.session!r}, of {info.length} tokens; "
                f"there are {len(self.passages)} passages"
            )
        if info.length and await self.find_loss(client, info.length, 0) is not None:
            raise OSError(f"the data directory holds another session {self.session!r}, of other passages")
        self.acknowledged = info.length
        on_progress(info.length)
        while self.acknowledged < len(self.passages):
            await gate.wait()
            part = slice(self.acknowledged, self.acknowledged + PASSAGES_PER_APPEND)
            payloads = [payload_of(passage) for passage in self.passages[part]]
            appended = await client.append(
                self.session, self.embeddings[part], payloads=payloads, if_length=self.acknowledged
            )
            on_progress(appended.length - self.acknowledged)
            self.acknowledged = appended.length
            self.num_appends += 1

    async def find_loss(self, client: AsyncHTMClient, acknowledged: int, in_flight: int) -> str | None:
        """What is wrong when the first `acknowledged` tokens should be there as they were sent; None when nothing is.

        `in_flight` more may be there, or none of them: an append is all or nothing.
        """
        info = await client.session(self.session)
        if info.length not in {acknowledged, acknowledged + in_flight}:
            return f"{self.session}: {acknowledged} tokens were acknowledged, {info.length} are there"
        for start in range(0, info.length, PASSAGES_PER_READ):
            part = slice(start, min(start + PASSAGES_PER_READ, info.length))
            memories = await client.read(self.session, part.start, part.stop)
            if memories.embeddings is None or not np.array_equal(memories.embeddings, self.embeddings[part]):
                return f"{self.session}: the embeddings from {start} on are not those that were sent"
            if memories.payloads != [payload_of(passage) for passage in self.passages[part]]:
                return f"{self.session}: the payloads from {start} on are not those that were sent"
        return None

    @property
    def next_part(self) -> int:
        """How many tokens its next append carries, which may be in flight."""
        return min(PASSAGES_PER_APPEND, len(self.passages) - self.acknowledged)


@dataclass(slots=True)
class Answers:
    """What came back for the questions, in their order, and how long each took."""

    recalled: list[Sequence[Recalled]] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)

    @property
    def positions(self) -> list[list[int]]:
        """Of the recalled tokens, best first."""
        return [[token.position for token in row] for row in self.recalled]


async def ask(
    client: AsyncHTMClient, asked: Sequence[tuple[str, str, Floats]], on_progress: Callable[[int], None]
) -> Answers:
    """Ask each (session, question, its embedding [D]) after the other, as one agent does."""
    answers = Answers()
    for session, text, query in asked:
        began = time.perf_counter()
        attended = await client.attend(
            session, query, top_k=TOP_K, rank_by="score", returns=["payloads"], max_recalled=10, note=text
        )
        answers.latencies_ms.append((time.perf_counter() - began) * 1e3)
        answers.recalled.append((attended.recalled or [[]])[0])
        answers.batch_sizes.append(attended.batch_size)
        on_progress(1)
    return answers


async def search(
    client: AsyncHTMClient, asked: Sequence[tuple[str, str, Floats]], on_progress: Callable[[int], None]
) -> list[list[int]]:
    """What a search finds for the same: the positions of ten tokens each, best first."""
    rows = []
    for session, _, query in asked:
        rows.append([token.position for token in await client.search(session, query, n=10)])
        on_progress(1)
    return rows


def payload_of(passage: Passage) -> dict[str, Any]:
    """What is stored with a passage."""
    return {"module": passage.module, "name": passage.name, "line": passage.line, "text": passage.text}


def make_agents(passages: Sequence[Passage], embeddings: Floats, num_shares: int) -> list[Agent]:
    """One agent for the whole corpus and `num_shares` for a share of its modules each, about equally large."""
    packages: dict[str, list[int]] = {}
    for place, passage in enumerate(passages):
        packages.setdefault(passage.package, []).append(place)
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for places in sorted(packages.values(), key=len, reverse=True):
        min(shares, key=len).extend(places)
    agents = [Agent(LIBRARY, passages, embeddings)]
    for number, share in enumerate(shares, start=1):
        share.sort()
        agents.append(Agent(f"agent-{number:02}", [passages[i] for i in share], embeddings[share]))
    return agents
