"""R4: one of the engine's threads dies or is stuck: who waits is told at once, and the process ends."""

from __future__ import annotations

import asyncio
import time

import numpy as np

from api.serving import EXIT_UNHEALTHY, LAST_WORDS_S
from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.faults.wire import ask, make_session, send_append, send_attend
from tests.served.server import Server

DIM, NUM_CALLERS, STUCK_S, WITHIN_S = 7, 6, 1.0, 1.0
TOKENS = np.random.default_rng(4).standard_normal((40, DIM)).astype(np.float32)
HELD = ["shut/device", "inside/device"]
"""The device thread is held with nothing in its hands: who comes later waits behind what it does next."""
FAULTS = {
    "device dies": (HELD, ["die/device", "open/device"]),
    "store is stuck": (["shut/store"], []),
    "store dies": (HELD, ["die/store"]),
    "loader dies": (HELD, ["die/loader"]),
    "device is stuck": (HELD, []),
}
"""What is done before the callers come, and after."""


async def test_r4_a_thread_that_dies_or_is_stuck_ends_the_process(
    start_server: StartServer, tally: Tally, scale: Scale
) -> None:
    """`/readyz` says why within 1 s, and the process ends with its code; five servers at once."""
    chosen = list(FAULTS)[: scale.thread_faults]
    options = ("--stuck-seconds", str(STUCK_S))
    program = "tests.faults.faulty_server"
    servers = await asyncio.gather(*(asyncio.to_thread(start_server, *options, program=program) for _ in chosen))
    told = await asyncio.gather(*(end(*pair, tally) for pair in zip(servers, chosen, strict=True)))
    tally.rounds = tally.faults = len(chosen)
    tally.figures["slowest_answer_s"] = round(max(told), 2)
    assert tally.losses == 0


async def end(server: Server, fault: str, tally: Tally) -> float:
    """Let one thread of one server fail; seconds until everybody had been told."""
    port, (before, after) = server.port, FAULTS[fault]
    await make_session(port, "s", TOKENS)
    for call in before:
        assert (await ask(port, "POST", f"/faults/{call}")).status == 200
    callers = [await send_attend(port, "s", TOKENS[:1]) for _ in range(NUM_CALLERS)]
    callers += [await send_append(port, "s", TOKENS[:1]) for _ in range(NUM_CALLERS)]
    assert (await ask(port, "GET", "/readyz")).status == 200
    began = time.monotonic()
    for call in after:
        assert (await ask(port, "POST", f"/faults/{call}")).status == 200
    answers = await asyncio.gather(*(caller.answer() for caller in callers))
    told_s = time.monotonic() - began
    ready = await ask(port, "GET", "/readyz")
    late = await (await send_attend(port, "s", TOKENS[:1])).answer()
    code = await asyncio.to_thread(server.wait)

    tally.requests += len(answers) + 2
    tally.losses += sum(answer.status not in (200, 503) for answer in answers)
    thread, is_stuck = fault.split()[0], "stuck" in fault
    assert {answer.status for answer in answers} >= {503}, fault
    assert told_s < WITHIN_S + (STUCK_S if is_stuck else 0)
    assert (ready.status, ready.json["code"], late.status) == (503, "unhealthy", 503)
    assert f"the {thread} thread {'is stuck' if is_stuck else 'died'}" in ready.json["detail"]
    assert code == EXIT_UNHEALTHY
    assert time.monotonic() - began < told_s + LAST_WORDS_S + WITHIN_S
    return told_s
