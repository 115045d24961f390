"""R3: one poisonous item in a batch of 16: fifteen right answers, and one error of its own."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np

from htm_service.attention.model import RetrievalModel
from tests.faults.conftest import StartServer
from tests.faults.faulty_server import POISON
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.faults.test_r02_vanishing import fault, until
from tests.faults.wire import Caller, ask, make_session, send_attend
from tests.reference import htm_reference, relative_error

DIM, SIZE, NUM_CALLERS = 11, 5, 16
TOKENS = np.random.default_rng(2).standard_normal((NUM_CALLERS, 31, DIM)).astype(np.float32)
QUERIES = np.random.default_rng(3).standard_normal((NUM_CALLERS, DIM)).astype(np.float32) / np.float32(3)
GOOD = QUERIES[0].tolist()
NAN = base64.b64encode(np.full(DIM, np.nan, np.float32).tobytes()).decode()
KINDS: dict[str, tuple[dict[str, Any], int, str]] = {
    "NaN": ({"queries": {"b64": NAN, "shape": [DIM], "dtype": "float32"}}, 422, "invalid_argument"),
    "another width": ({"queries": GOOD[1:]}, 422, "invalid_argument"),
    "top_k 0": ({"queries": GOOD, "top_k": 0}, 422, "invalid_argument"),
    "a mask of another length": ({"queries": GOOD, "mask": [True] * 7}, 422, "invalid_argument"),
    "an expired session": ({"queries": GOOD}, 410, "session_expired"),
    "a session deleted while it waits": ({"queries": GOOD}, 404, "session_not_found"),
    "the kernel fails": ({"queries": [POISON, *GOOD[1:]]}, 500, "internal_error"),
}
"""What the poisonous one sends, and the status and code it gets."""
AT_THE_DOOR = {"NaN", "another width", "top_k 0", "an expired session"}
"""Those that are refused before they are queued."""


async def test_r3_one_poisonous_item_fails_alone(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    server = await asyncio.to_thread(start_server, program="tests.faults.faulty_server")
    for place, tokens in enumerate(TOKENS):
        await make_session(server.port, f"s{place}", tokens, chunk_size=SIZE)
    for number in range(scale.poison_rounds):
        for kind in KINDS:
            await one_batch(server.port, kind, number % NUM_CALLERS, tally)
            tally.rounds += 1
    assert tally.losses == 0


async def one_batch(port: int, kind: str, place: int, tally: Tally) -> None:
    """Sixteen attends in one batch, of which the one at `place` is poisonous."""
    body, status, code = KINDS[kind]
    name = f"s{place}"
    if "session" in kind:
        name = "short-lived"
        await make_session(port, name, TOKENS[0])
        if "expired" in kind:  # from now on: on a busy machine its tokens might else come too late
            assert (await ask(port, "PATCH", f"/v1/sessions/{name}", {"ttl_s": 0.05})).status == 200
            await asyncio.sleep(0.1)
    await fault(port, "shut/device")
    await fault(port, "inside/device")
    callers = []
    for number in range(NUM_CALLERS):
        if number == place:
            content = json.dumps(body).encode()
            callers.append(await Caller.send(port, "POST", f"/v1/sessions/{name}/attend", content))
        else:
            callers.append(await send_attend(port, f"s{number}", QUERIES[number : number + 1]))
    await until(port, device=NUM_CALLERS - (kind in AT_THE_DOOR))
    if "deleted" in kind:
        deleting = asyncio.create_task(ask(port, "DELETE", f"/v1/sessions/{name}"))
        await until(port, actions=1)
    await fault(port, "open/device")
    answers = await asyncio.gather(*(caller.answer() for caller in callers))
    if "deleted" in kind:
        assert (await deleting).status == 204

    tally.faults += 1
    tally.requests += NUM_CALLERS
    error = answers.pop(place)
    assert (error.status, error.json["code"]) == (status, code), kind
    for number, answer in zip((n for n in range(NUM_CALLERS) if n != place), answers, strict=True):
        config = RetrievalModel().config
        expected = htm_reference(QUERIES[number : number + 1], TOKENS[number], config, chunk_size=SIZE).output
        is_right = answer.status == 200 and relative_error(np.array(answer.json["output"]), expected) <= 1e-5
        tally.losses += not is_right
        assert answer.headers["x-batch-size"] == ("1" if kind == "the kernel fails" else "15")
