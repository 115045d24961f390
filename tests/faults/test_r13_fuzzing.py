"""R13: requests made of openapi.json, and tampered bodies of the binary format: no 500, no hang, no growth."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import hypothesis
import numpy as np
import schemathesis
from htm_client import safetensors as wire
from hypothesis import HealthCheck, Phase, Verbosity
from schemathesis.core.result import Ok

from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.faults.test_r08_growth import Usage
from tests.faults.wire import make_session
from tests.session_files import session_file

DIM = 3
TOKENS = np.eye(40, DIM, dtype=np.float32)
MAX_S = 10.0
"""Longer is a hang."""
MAX_MEMORY_MIB = 64.0


def test_r13_requests_made_of_the_schema(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    server = start_server()
    asyncio.run(make_session(server.port, "s", TOKENS))
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    varied = [operation for operation in operations if {"parameters", "requestBody"} & set(operation.definition.raw)]
    before = Usage.of(server)
    documented = {
        (operation.label, int(status)) for operation in operations for status in operation.definition.raw["responses"]
    }
    seen: set[tuple[str, int]] = set()

    def send(case: Any) -> None:
        if "session_id" in case.path_parameters and tally.requests % 4:
            case.path_parameters["session_id"] = "s"
        if case.operation.path == "/v1/events":
            case.query = {"seconds": "0.01", **case.query}  # else the stream does not end
        answer = case.call(timeout=MAX_S)
        tally.requests += 1
        seen.add((case.operation.label, answer.status_code))

    for operation in operations:
        hypothesis.given(case=operation.as_strategy())(
            hypothesis.settings(
                max_examples=-(-scale.requests // len(varied)),
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                verbosity=Verbosity.quiet,
                suppress_health_check=list(HealthCheck),
            )(lambda case: send(case))
        )()
    finish(tally, before, Usage.of(server), {status for _, status in seen})
    assert not {place for place in seen - documented if place[1] != 405}, "answers that the schema does not know"


@schemathesis.serializer(wire.MEDIA_TYPE)
def as_it_is(ctx: Any, value: Any) -> Any:
    """A binary body: what was made of a text without a form."""
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


def finish(tally: Tally, before: Usage, after: Usage, statuses: set[int]) -> None:
    tally.rounds = tally.faults = tally.requests
    tally.figures = {
        "statuses": len(statuses),
        "memory_mib": round(after.memory_mib - before.memory_mib, 1),
        "descriptors": after.descriptors - before.descriptors,
    }
    assert 500 not in statuses and {200, 422} <= statuses, statuses
    assert after.memory_mib < before.memory_mib + MAX_MEMORY_MIB
    assert after.descriptors < before.descriptors + 20


async def test_r13_bodies_of_the_binary_format(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    server = await asyncio.to_thread(start_server)
    await make_session(server.port, "s", TOKENS)
    before = Usage.of(server)
    statuses: set[int] = set()
    bodies = tampered(random.Random(13), scale.bodies)
    async with httpx.AsyncClient(base_url=server.url, timeout=MAX_S, trust_env=False) as client:

        async def send_all() -> None:
            for call, body in bodies:
                began = time.monotonic()
                method, name = ("PUT", f"s{tally.requests}") if call == "import" else ("POST", "s")
                answer = await client.request(
                    method, f"/v1/sessions/{name}/{call}", content=body, headers={"content-type": wire.MEDIA_TYPE}
                )
                assert time.monotonic() - began < MAX_S
                statuses.add(answer.status_code)
                tally.requests += 1
                tally.losses += answer.status_code >= 500

        await asyncio.gather(*(send_all() for _ in range(8)))
        assert (await client.get("/readyz")).status_code == 200
    finish(tally, before, Usage.of(server), statuses)
    assert tally.losses == 0


def tampered(draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Good bodies, changed once to three times."""
    tensors = {"queries": TOKENS[:2], "mask": np.ones(40, np.bool_), "chunk_mask": np.ones(2, np.bool_)}
    attend, append = {"return": ["output", "payloads"], "top_k": 2}, {"payloads": [{"a": 1}, None]}
    good = {
        "attend": wire.dump(tensors, attend),
        "memories": wire.dump({"embeddings": TOKENS[:2]}, append),
        "step": wire.dump({"embeddings": TOKENS[:2], **tensors}, {"attend": attend, "append": append}),
        "import": session_file(),
    }
    for _ in range(count):
        call = draw.choice(list(good))
        body = good[call]
        for _ in range(draw.randint(1, 3)):
            body = draw.choice(CHANGES)(draw, body)
        yield call, body


def flip(draw: random.Random, body: bytes) -> bytes:
    """One bit."""
    place = draw.randrange(len(body) or 1)
    return (
        body[:place] + bytes([byte ^ (1 << draw.randrange(8)) for byte in body[place : place + 1]]) + body[place + 1 :]
    )


def cut(draw: random.Random, body: bytes) -> bytes:
    """The end is missing, or there is more."""
    return (
        body[: draw.randrange(len(body) + 1)] if draw.random() < 0.7 else body + draw.randbytes(draw.randrange(1, 99))
    )


def declare(draw: random.Random, body: bytes) -> bytes:
    """Another length of the header."""
    size = draw.choice([0, 1, len(body), len(body) - 8, 2**31, 2**63, 2**64 - 1, draw.randrange(300)])
    return (size % 2**64).to_bytes(8, "little") + body[8:]


def describe(draw: random.Random, body: bytes) -> bytes:
    """Another value somewhere in the header."""
    size = int.from_bytes(body[:8], "little")
    try:
        header = json.loads(body[8 : 8 + size])
        params = json.loads(header.get("__metadata__", {}).get("params", "{}"))
    except (ValueError, AttributeError, TypeError):
        return body
    if not isinstance(header, dict) or not isinstance(params, dict):
        return body
    if draw.random() < 0.5:
        header["__metadata__"] = {"params": json.dumps(change_inside(draw, params))}
    else:
        header = change_inside(draw, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body[8 + size :]


def change_inside(draw: random.Random, value: Any) -> Any:
    """The same JSON with one value changed, left out, or one more."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        rest = {name: item for name, item in value.items() if name != key}
        chance = draw.random()
        if chance < 0.15:
            return rest
        return {**rest, draw.choice([key, key, key, "x", "queries", "embeddings"]): change_inside(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], change_inside(draw, value[place]), *value[place + 1 :]]
    return draw.choice(ODD)


ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    2**64,
    1e308,
    -0.5,
    "",
    "F64",
    "F16",
    "BF16",
    "BOOL",
    "I64",
    "é\u0000",
]
ODD += [[], {}, [[]], [0, 2**62], [-1, 4], [8, 4], [2, 3], "x" * 10_000, {"a": {"b": [1]}}, ["output", "output"]]
CHANGES: list[Callable[[random.Random, bytes], bytes]] = [
    flip,
    flip,
    cut,
    declare,
    describe,
    describe,
    describe,
    describe,
]
