"""R13: requests made of openapi.json, and tampered bodies of the binary format: no 500, no hang, no growth.

On a server without keys, and on one with, by callers who may not do all of it.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import hypothesis
import numpy as np
import pytest
import schemathesis
from htm_client import safetensors as wire
from hypothesis import HealthCheck, Phase, Verbosity
from schemathesis.core.result import Ok

from api.auth import ROLES
from tests.faults.conftest import StartServer
from tests.faults.report import Tally
from tests.faults.scale import Scale
from tests.faults.test_r08_growth import Usage
from tests.faults.wire import make_session
from tests.served.server import Server
from tests.session_files import session_file

DIM = 3
TOKENS = np.eye(40, DIM, dtype=np.float32)
ADMIN_KEY = "the-admins-key-of-the-fuzzers"
KEPT = ("id", "length", "first_position", "labels", "model", "ttl_s", "created_at", "updated_at", "num_appends")
"""Of a session: what only those who may write can change."""
REFUSED = {404, 405, 421}
"""What is said before anyone is asked who they are: there is no such path, or not by this method or name."""
MAX_S = 10.0
"""Longer is a hang."""
MAX_MEMORY_MIB = 64.0


def test_r13_requests_made_of_the_schema(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    server = start_server()
    asyncio.run(make_session(server.port, "s", TOKENS))
    before = Usage.of(server)
    seen = fuzz(server, tally, scale.requests)
    finish(tally, before, Usage.of(server), {status for statuses in seen.values() for status in statuses})


def test_r13_requests_by_callers_who_may_not(start_server: StartServer, tally: Tally, scale: Scale) -> None:
    """By a wrong key and by one that may only read: refused whatever the request is, and nothing changes."""
    server = start_server("--api-key", ADMIN_KEY)
    with httpx.Client(base_url=server.url, headers=as_caller(ADMIN_KEY), trust_env=False) as admin:
        assert admin.put("/v1/sessions/s", json={"dim": DIM}).status_code == 201
        assert admin.post("/v1/sessions/s/memories", json={"embeddings": TOKENS.tolist()}).status_code == 200
        made = admin.post("/v1/keys", json={"name": "reader", "role": "read"}).json()

        def state() -> list[Any]:
            """All that callers could change; reading is told apart from it by name."""
            sessions = admin.get("/v1/sessions").json()["sessions"]
            keys = admin.get("/v1/keys").json()["keys"]
            kept = [{name: session[name] for name in KEPT} for session in sessions]
            kept += [{**key, "last_used_at": None} for key in keys]
            return [*kept, admin.get("/v1/quotas/default").json(), admin.get("/v1/models").json()]

        before, usage = state(), Usage.of(server)
        by_wrong = fuzz(server, tally, scale.requests_with_keys, as_caller("htm_" + "0" * 43))
        by_reader = fuzz(server, tally, scale.requests_with_keys, as_caller(made["key"]))
        assert state() == before
    statuses = {status for seen in (by_wrong, by_reader) for found in seen.values() for status in found}
    finish(tally, usage, Usage.of(server), statuses)
    anyone = {"livez", "readyz"}
    assert {name: found for name, found in by_wrong.items() if name not in anyone and found - REFUSED > {401}} == {}
    assert all(401 in found for name, found in by_wrong.items() if name not in anyone)
    may_not = {name for name in by_reader if ROLES.get(name, "admin") != "read"}
    assert {name: by_reader[name] for name in may_not if by_reader[name] - REFUSED != {403}} == {}
    assert not {name for name, found in by_reader.items() if 401 in found}


def as_caller(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def fuzz(
    server: Server, tally: Tally, num_requests: int, headers: Mapping[str, str] | None = None
) -> dict[str, set[int]]:
    """Send about so many requests, made of the server's own openapi.json; the statuses of each operation."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    varied = [operation for operation in operations if {"parameters", "requestBody"} & set(operation.definition.raw)]
    names = {operation.label: str(operation.definition.raw["operationId"]) for operation in operations}
    seen: dict[str, set[int]] = {name: set() for name in names.values()}

    def send(case: Any) -> None:
        if "session_id" in case.path_parameters and tally.requests % 4:
            case.path_parameters["session_id"] = "s"
        if case.operation.path == "/v1/events":
            case.query = {"seconds": "0.01", **case.query}  # else the stream does not end
        answer = case.call(timeout=MAX_S, headers=dict(headers or {}))
        tally.requests += 1
        seen[names[case.operation.label]].add(answer.status_code)

    for operation in operations:
        hypothesis.given(case=operation.as_strategy())(
            hypothesis.settings(
                max_examples=-(-num_requests // len(varied)),
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                verbosity=Verbosity.quiet,
                suppress_health_check=list(HealthCheck),
            )(lambda case: send(case))
        )()
    for operation in operations:
        documented = {int(status) for status in operation.definition.raw["responses"]}
        unknown = seen[names[operation.label]] - documented - {405}
        assert not unknown, f"{operation.label} was answered {unknown}, which the schema does not know"
    return seen


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
    assert 500 not in statuses and 200 in statuses and statuses & {401, 422}, statuses
    assert after.memory_mib < before.memory_mib + MAX_MEMORY_MIB
    assert after.descriptors < before.descriptors + 20


@pytest.mark.parametrize("caller", ["anyone", "a wrong key", "a reader"])
async def test_r13_bodies_of_the_binary_format(
    caller: str, start_server: StartServer, tally: Tally, scale: Scale
) -> None:
    """On a server without keys, and by callers with a wrong key and with one that may read."""
    has_keys = caller != "anyone"
    server = await asyncio.to_thread(start_server, *(["--api-key", ADMIN_KEY] if has_keys else []))
    admin = as_caller(ADMIN_KEY) if has_keys else {}
    async with httpx.AsyncClient(base_url=server.url, headers=admin, trust_env=False) as client:
        assert (await client.put("/v1/sessions/s", json={"dim": DIM})).status_code == 201
        added = await client.post("/v1/sessions/s/memories", json={"embeddings": TOKENS.tolist()})
        assert added.status_code == 200
        key = (await client.post("/v1/keys", json={"name": "reader", "role": "read"})).json().get("key")
    headers = {"anyone": {}, "a wrong key": as_caller("htm_" + "0" * 43), "a reader": as_caller(str(key))}[caller]
    before = Usage.of(server)
    statuses: dict[str, set[int]] = {"attend": set(), "memories": set(), "step": set(), "import": set()}
    bodies = tampered(random.Random(13), scale.bodies_with_keys if has_keys else scale.bodies)
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=MAX_S, trust_env=False) as client:

        async def send_all() -> None:
            for call, body in bodies:
                began = time.monotonic()
                method, name = ("PUT", f"s{tally.requests}") if call == "import" else ("POST", "s")
                answer = await client.request(
                    method, f"/v1/sessions/{name}/{call}", content=body, headers={"content-type": wire.MEDIA_TYPE}
                )
                assert time.monotonic() - began < MAX_S
                statuses[call].add(answer.status_code)
                tally.requests += 1
                tally.losses += answer.status_code >= 500

        await asyncio.gather(*(send_all() for _ in range(8)))
        assert (await client.get("/readyz")).status_code == 200
    finish(tally, before, Usage.of(server), {200}.union(*statuses.values()))
    assert tally.losses == 0
    if caller == "a wrong key":
        assert set().union(*statuses.values()) == {401}
    elif caller == "a reader":
        assert 200 in statuses["attend"]
        assert statuses["memories"] == statuses["step"] == statuses["import"] == {403}
    else:
        assert {200, 422} <= set().union(*statuses.values()), statuses


def tampered(draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Good bodies, changed up to three times."""
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
        for _ in range(draw.randint(0, 3)):
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
