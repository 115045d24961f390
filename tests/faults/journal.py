"""What writers outside of the server know: which of their calls were acknowledged, and which was cut off.

Writer w appends the rows of a table of its own, in order, to session `wW-G`; when the table is used up, it deletes
the session and begins the next, of generation G + 1.
"""

from __future__ import annotations

import contextlib
import random
import time
from typing import Any

import numpy as np
from htm_client import AsyncHTMClient, ConnectionFailed, NotFound

from htm_service.attention.model import RetrievalModel
from tests.faults.report import Tally
from tests.faults.wire import Floats
from tests.reference import htm_reference, relative_error

DIM, CHUNK_SIZE, NUM_ROWS = 17, 7, 500
COUNTS = [1, 1, 3, 40]
QUERY = np.random.default_rng(0).standard_normal((1, DIM)).astype(np.float32) / np.float32(3)


class Journal:
    """One writer's. `acknowledged` is the length that was told; `pending` the tokens of an append without answer."""

    def __init__(self, writer: int, num_rows: int = NUM_ROWS) -> None:
        self.writer = writer
        self.rows: Floats = np.random.default_rng(writer).standard_normal((num_rows, DIM)).astype(np.float32)
        self.generation = 0
        self.is_created = False
        self.acknowledged = 0
        self.pending = 0
        self.num_calls = 0
        self.history: list[tuple[float, int]] = []
        """When each length was told, as of `time.monotonic`."""

    @property
    def session(self) -> str:
        return f"w{self.writer}-{self.generation}"

    async def write(self, client: AsyncHTMClient, draw: random.Random) -> None:
        """Call until the server is gone. The client must not retry, so that what is acknowledged is known exactly."""
        with contextlib.suppress(ConnectionFailed):
            while True:
                await self.call(client, draw)

    async def call(self, client: AsyncHTMClient, draw: random.Random) -> None:
        """One call, noted before it is sent and when it is answered."""
        self.num_calls += 1
        if not self.is_created:
            await client.create_session(self.session, dim=DIM, chunk_size=CHUNK_SIZE)
            self.is_created = True
        elif self.acknowledged == len(self.rows):
            with contextlib.suppress(NotFound):  # deleted by the call that the last server did not answer
                await client.delete_session(self.session)
            self.generation, self.is_created, self.acknowledged = self.generation + 1, False, 0
        else:
            self.pending = self.pending or min(draw.choice(COUNTS), len(self.rows) - self.acknowledged)
            await self.append(client, is_step=draw.random() < 0.3)

    async def append(self, client: AsyncHTMClient, *, is_step: bool = False) -> None:
        """Append what is pending, under a key that is the same when it is sent again."""
        start, stop = self.acknowledged, self.acknowledged + self.pending
        rows, options = self.rows[start:stop], self._options(start, stop)
        if is_step:
            appended = (await client.step(self.session, QUERY, rows, append=options)).appended
        else:
            appended = await client.append(self.session, rows, **options)
        assert (appended.start, appended.length) == (start, stop), f"{self.session}: {appended} is not {start}, {stop}"
        self.acknowledged, self.pending = stop, 0
        self.history.append((time.monotonic(), stop))

    def _options(self, start: int, stop: int) -> Any:
        payloads = [{"at": position} for position in range(start, stop)]
        return {"payloads": payloads, "idempotency_key": f"{self.session}/{start}"}

    async def check(self, client: AsyncHTMClient, tally: Tally) -> None:
        """Count what is lost, torn or there twice; then send again what was cut off, and ask."""
        if self.generation:
            try:
                await client.session(f"w{self.writer}-{self.generation - 1}")
                tally.losses += 1  # it came back
            except NotFound:
                pass
        if not self.is_created:
            return
        try:
            stored = await client.read(self.session)
        except NotFound:  # deleted by the call that was cut off
            tally.losses += self.acknowledged if self.acknowledged < len(self.rows) else 0
            return
        tally.losses += wrong(self.rows, stored, [self.acknowledged, self.acknowledged + self.pending])
        if self.pending:
            await self.append(client)
            stored = await client.read(self.session)
            tally.losses += wrong(self.rows, stored, [self.acknowledged])
        answer = await client.attend(self.session, QUERY)
        assert answer.output is not None
        rows = self.rows[: self.acknowledged]
        expected = htm_reference(QUERY, rows, RetrievalModel().config, chunk_size=CHUNK_SIZE).output
        tally.losses += relative_error(answer.output, expected) > 1e-5 if len(rows) else int(answer.output.any())


def wrong(rows: Floats, stored: Any, lengths: list[int]) -> int:
    """Tokens that are not as they were appended, or not there; or one, when there are more than there may be."""
    length = stored.length
    same = (stored.embeddings == rows[:length]).all(axis=1) if length <= len(rows) else np.zeros(1, np.bool_)
    paid = [payload == {"at": position} for position, payload in enumerate(stored.payloads)]
    num_wrong = int((~same).sum()) + paid.count(False) + max(0, lengths[0] - length)
    return num_wrong or int(length not in lengths)
