"""R2: clients go away while they are queued, on the device, being written or answered: all others are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from htm_service.attention.model import RetrievalModel
from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.faults.wire import Answer, Caller, ask, make_session, send_append, send_attend
from tests.reference import htm_reference, relative_error

DIM, SIZE, NUM_CALLERS = 11, 5, 16
TOKENS = np.random.default_rng(2).standard_normal((6, 43, DIM)).astype(np.float32)
QUERY = np.random.default_rng(3).standard_normal((1, DIM)).astype(np.float32) / np.float32(3)
NAMES = [f"s{number}" for number in range(len(TOKENS))]
Stage = Callable[[int], Awaitable[tuple[list[Answer], int]]]


async def test_r2_clients_that_vanish_take_nobody_along(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    server = await asyncio.to_thread(start_server, program="tests.faults.faulty_server")
    port = server.port
    for name, tokens in zip(NAMES, TOKENS, strict=True):
        await make_session(port, name, tokens, chunk_size=SIZE)
    await make_session(port, "large", np.tile(TOKENS[0], (200, 1)))
    stages: list[Stage] = [while_queued, while_batched, while_written, while_sending, while_answered]
    num_skipped = 0
    for stage in stages * scale.vanishing_rounds:
        answers, skipped = await stage(port)
        num_skipped += skipped
        totals = (await ask(port, "GET", "/v1/info")).json["totals"]
        assert totals["skipped"] == num_skipped, f"after round {tally.rounds}, {stage.__name__}"
        tally.rounds += 1
        tally.faults += NUM_CALLERS // 2
        tally.requests += NUM_CALLERS
        tally.losses += sum(not is_right(answer, place) for place, answer in enumerate(answers))
        assert len(answers) == NUM_CALLERS // 2
    tally.figures["skipped"] = num_skipped
    assert tally.losses == 0 < num_skipped
    for place, name in enumerate(NAMES):  # what was appended meanwhile is the sessions' own
        stored = (await ask(port, "GET", f"/v1/sessions/{name}/memories?include=embeddings")).json["embeddings"]
        assert (np.array(stored[43:], np.float32) == TOKENS[place][0]).all()


def is_right(answer: Answer, place: int) -> bool:
    """Whether an answer to caller number `place` is the one it should get."""
    if answer.status != 200:
        return False
    if "start" in answer.json:  # an append's, or tokens read back
        return True
    tokens = TOKENS[place % len(TOKENS)]
    grown = np.concatenate([tokens, np.repeat(tokens[:1], answer.json["length"] - len(tokens), axis=0)])
    expected = htm_reference(QUERY, grown, RetrievalModel().config, chunk_size=SIZE).output
    return bool(relative_error(np.array(answer.json["output"]), expected) <= 1e-5)


async def begin(port: int, send: Callable[[int, str], Awaitable[Caller]]) -> tuple[list[Caller], list[Caller]]:
    """Callers that stay, in turn on all sessions, and as many that will go."""
    staying = [await send(port, NAMES[place % len(NAMES)]) for place in range(NUM_CALLERS // 2)]
    return staying, [await send(port, NAMES[place % len(NAMES)]) for place in range(NUM_CALLERS // 2)]


async def attend(port: int, name: str) -> Caller:
    return await send_attend(port, name, QUERY)


async def append(port: int, name: str) -> Caller:
    return await send_append(port, name, TOKENS[NAMES.index(name)][:1])


async def fault(port: int, call: str) -> None:
    assert (await ask(port, "POST", f"/faults/{call}")).status == 200


async def until(port: int, **wanted: int) -> None:
    """Wait until the queues are as wanted."""
    for _ in range(1_000):
        queue = (await ask(port, "GET", "/faults/queue")).json
        if {name: queue[name] for name in wanted} == wanted:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the queues are {queue}, not {wanted}")


async def while_queued(port: int) -> tuple[list[Answer], int]:
    """The device is busy; half of those who wait go away, and their work is not begun."""
    await fault(port, "shut/device")
    await fault(port, "inside/device")
    staying, going = await begin(port, attend)
    await until(port, device=NUM_CALLERS)
    for caller in going:
        caller.vanish()
    await until(port, gone=len(going))
    await fault(port, "open/device")
    return await asyncio.gather(*(caller.answer() for caller in staying)), len(going)


async def while_batched(port: int) -> tuple[list[Answer], int]:
    """They go away when their batch is on the device: it is computed for nobody."""
    await fault(port, "shut/device")
    await fault(port, "inside/device")
    staying, going = await begin(port, attend)
    await until(port, device=NUM_CALLERS)
    await fault(port, "shut/batch")
    await fault(port, "open/device")
    await fault(port, "inside/batch")
    for caller in going:
        caller.vanish()
    await until(port, gone=len(going))
    await fault(port, "open/batch")
    return await asyncio.gather(*(caller.answer() for caller in staying)), 0


async def while_written(port: int) -> tuple[list[Answer], int]:
    """A first append is being written; half of those behind it go away, and theirs are not written."""
    await fault(port, "shut/store")
    first = await append(port, NAMES[0])
    await fault(port, "inside/store")
    staying, going = await begin(port, append)
    first.vanish()
    await until(port, store=NUM_CALLERS)
    for caller in going:
        caller.vanish()
    await until(port, gone=len(going) + 1)
    await fault(port, "open/store")
    return await asyncio.gather(*(caller.answer() for caller in staying)), len(going)


async def while_sending(port: int) -> tuple[list[Answer], int]:
    """Half of them go away in the middle of their own bodies."""
    body = b'{"queries": [' + b",".join([b"0.1"] * DIM) + b"]}"
    paths = [f"/v1/sessions/{NAMES[place % len(NAMES)]}/attend" for place in range(NUM_CALLERS // 2)]
    going = [await Caller.send(port, "POST", path, body, part=0.5) for path in paths]
    staying, others = await begin(port, attend)
    for caller in going:
        caller.vanish()
    answers = await asyncio.gather(*(caller.answer() for caller in [*staying, *others]))
    assert all(answer.status == 200 for answer in answers)
    return answers[: len(staying)], 0


async def while_answered(port: int) -> tuple[list[Answer], int]:
    """Half of them go away with the first bytes of a megabyte read."""
    path = "/v1/sessions/large/memories?include=embeddings"
    going = [await Caller.send(port, "GET", path) for _ in range(NUM_CALLERS // 2)]
    staying = [await Caller.send(port, "GET", path) for _ in range(NUM_CALLERS // 2)]
    for caller in going:
        await caller.reader.read(100)
        caller.vanish()
    return await asyncio.gather(*(caller.answer() for caller in staying)), 0
