"""A session whose every token is of another episode than the one before: it holds up nobody else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from htm_service.engine import Engine
from htm_service.memory import loader
from htm_service.memory.cache import Cache
from htm_service.memory.resident import NewTokens, Resident
from htm_service.records import AttendRequest, AttendResult
from tests.engine.conftest import MakeEngine
from tests.engine.test_transfers import stream
from tests.names import named
from tests.session_files import session_file

NUM = 1_000


async def fill(engine: Engine) -> None:
    """The session `s`, not on the device yet."""
    tokens = np.ones((NUM, 3), np.float32)
    file = session_file(tokens, [b""] * NUM, (np.arange(NUM) % 2).tolist())
    assert (await engine.import_session(named("s"), stream(file))).length == NUM


async def test_it_is_loaded_in_portions(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A portion was 8 MB of tokens, whatever their number: 300,000 runs held up the device for 10 s."""
    engine = await make_engine()
    await fill(engine)
    added: list[int] = []
    post, add = engine.worker.queue.post, Cache.add

    def counting_post(act: Callable[[], None]) -> None:
        def counted() -> None:
            added.append(0)
            act()

        post(counted)

    def counting_add(self: Cache, resident: Resident, new: NewTokens) -> None:
        added[-1] += 1
        add(self, resident, new)

    monkeypatch.setattr(engine.worker.queue, "post", counting_post)
    monkeypatch.setattr(Cache, "add", counting_add)
    found = await engine.attend(named("s"), AttendRequest(queries=np.ones((1, 3), np.float32), episodes=[1]))
    np.testing.assert_allclose(found.output, np.ones((1, 3)), atol=1e-6)
    assert sum(added) == NUM and max(added) == loader.ADDED_AT_ONCE


async def test_asking_for_some_episodes_costs_what_it_takes(make_engine: MakeEngine) -> None:
    """Saying which tokens are of an episode cost nothing: 100 such attends to 300,000 runs in one request of 1.3 kB
    held up all others for 27 s.
    """
    engine = await make_engine(max_batch_products=8 << 20)  # a thousand runs cost 4 of them, a query 1
    await fill(engine)
    for episodes, num_together in ((None, 6), ([1], 1)):
        request = AttendRequest(queries=np.ones((1, 3), np.float32), episodes=episodes)
        await engine.attend(named("s"), request)
        outcomes = await engine.batch_attend([(named("s"), request)] * 6)
        sizes = [outcome.timing.batch_size for outcome in outcomes if isinstance(outcome, AttendResult)]
        assert len(sizes) == 6 and max(sizes) == num_together
