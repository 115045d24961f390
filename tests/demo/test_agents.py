"""How passages are shared out, and that an agent sees when something it sent is not there."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from htm_client import AsyncHTMClient, Memories

from examples.demo.agents import LIBRARY, Agent, make_agents, payload_of
from examples.demo.corpus import Passage
from examples.demo.embedder import Floats


def test_each_package_is_in_one_share_and_shares_are_even(passages: Sequence[Passage], embeddings: Floats) -> None:
    library, *shares = make_agents(passages, embeddings, 16)
    assert library.session == LIBRARY
    assert len(library.passages) == len(passages)
    assert len({agent.session for agent in shares}) == 16
    assert sum(len(agent.passages) for agent in shares) == len(passages)
    packages = [package for agent in shares for package in {passage.package for passage in agent.passages}]
    assert len(packages) == len(set(packages))
    sizes = [len(agent.passages) for agent in shares]
    assert min(sizes) > len(passages) / 32 and max(sizes) < len(passages) / 8
    rows = {passage.text: row for passage, row in zip(passages, embeddings, strict=True)}
    last = shares[-1]
    assert all(np.array_equal(rows[p.text], row) for p, row in zip(last.passages, last.embeddings, strict=True))


@dataclass
class Held:
    """A client of a server that holds this."""

    embeddings: Floats
    payloads: list[dict[str, Any]]

    async def create_session(self, session: str, **settings: Any) -> SimpleNamespace:
        return await self.session(session)

    async def session(self, session: str) -> SimpleNamespace:
        return SimpleNamespace(length=len(self.payloads))

    async def read(self, session: str, start: int, stop: int) -> Memories:
        return Memories(start, stop, len(self.payloads), self.embeddings[start:stop], self.payloads[start:stop])


@pytest.mark.parametrize(
    ("length", "spoil", "loss"),
    [
        (32, None, None),
        (43, None, None),
        (31, None, "s: 32 tokens were acknowledged, 31 are there"),
        (33, None, "s: 32 tokens were acknowledged, 33 are there"),
        (32, "embeddings", "s: the embeddings from 0 on are not those that were sent"),
        (32, "payloads", "s: the payloads from 0 on are not those that were sent"),
    ],
)
async def test_loss_is_found(length: int, spoil: str | None, loss: str | None) -> None:
    passages = [Passage("m", "", place, f"text {place}") for place in range(43)]
    sent = np.random.default_rng(0).standard_normal((43, 7)).astype(np.float32)
    agent = Agent("s", passages, sent, acknowledged=32)
    held = Held(sent[:length].copy(), [payload_of(passage) for passage in passages[:length]])
    if spoil == "embeddings":
        held.embeddings[31, 6] = np.nextafter(held.embeddings[31, 6], np.float32(9))
    if spoil == "payloads":
        held.payloads[31] = {**held.payloads[31], "line": 0}
    assert agent.next_part == 11
    assert await agent.find_loss(cast(AsyncHTMClient, held), 32, agent.next_part) == loss


async def test_a_session_of_other_passages_is_refused_and_not_reported_as_lost() -> None:
    passages = [Passage("m", "", place, f"text {place}") for place in range(43)]
    sent = np.random.default_rng(0).standard_normal((43, 7)).astype(np.float32)
    agent = Agent("s", passages, sent)
    others = cast(AsyncHTMClient, Held(sent[:5], [{"text": "of another corpus"}] * 5))
    with pytest.raises(OSError, match="another session 's', of other passages"):
        await agent.stream(others, asyncio.Event(), lambda _: None)
    assert agent.acknowledged == 0
