"""An app over a real engine and an in-memory store, spoken to over HTTP without a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.app import create_app
from api.settings import Settings
from htm_service.attention.convert import from_module
from htm_service.attention.model_file import model_bytes
from htm_service.attention.modules import HTMAttention

MODEL = model_bytes(*from_module(HTMAttention(3, heads=1, topk_mems=2, mem_chunk_size=2, dim_head=2)))
"""The file of a model that fits the session of the tests."""
Serve = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def talk_to(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an app whose lifespan someone else runs."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest.fixture
def serve() -> Serve:
    """`async with serve(max_body_bytes=..., clock=...) as client`: a client of a running app."""

    @asynccontextmanager
    async def start(*, clock: Callable[[], float] | None = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        own = Settings(**{"store_url": "memory://", "device": "cpu", "memory_budget_bytes": 64 << 20, **settings})
        app = create_app(own, clock=clock) if clock is not None else create_app(own)
        async with app.router.lifespan_context(app), talk_to(app) as client:
            yield client

    return start


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a running app with a session `s`: dim 3, chunk size 2, 5 tokens with payloads."""
    async with serve() as client:
        await fill(client)
        yield client


ADMIN_KEY = "the-admins-key-of-the-tests"


@pytest.fixture
async def keyed(serve: Serve) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the admin's key, of an app that asks for keys: session `s`, key `bob`, model `m`."""
    async with serve(api_key=ADMIN_KEY) as client:
        client.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        await fill(client)
        await make_key(client, "bob")
        assert (await put_model(client)).status_code == 201
        yield client


async def put_model(client: httpx.AsyncClient, name: str = "m", data: bytes = MODEL) -> httpx.Response:
    """Put a model that fits the session of the tests."""
    return await client.put(f"/v1/models/{name}", content=data, headers={"Content-Type": "application/x-safetensors"})


async def make_key(client: httpx.AsyncClient, name: str, role: str = "read", **wish: Any) -> str:
    """A key's secret."""
    made = await client.post("/v1/keys", json={"name": name, "role": role, **wish})
    assert made.status_code == 201, made.text
    return str(made.json()["key"])


async def fill(client: httpx.AsyncClient, session_id: str = "s") -> None:
    """Make the session of the tests."""
    made = await client.put(f"/v1/sessions/{session_id}", json={"dim": 3, "chunk_size": 2})
    assert made.status_code == 201, made.text
    embeddings = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0], [0, 0.6, 0.8]]
    payloads: list[Any] = [{"n": position} for position in range(4)] + [None]
    path = f"/v1/sessions/{session_id}/memories"
    added = await client.post(path, json={"embeddings": embeddings, "payloads": payloads})
    assert added.status_code == 200, added.text
