"""A client that goes away while its request waits: the work is not begun, and nobody is answered."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request

from api import disconnect
from api.app import create_app
from api.settings import Settings
from tests.api.conftest import fill, talk_to

BODY = b'{"queries": [1, 0, 0]}'


def scope_of(app: FastAPI, path: str) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
    return {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("t", 80), "client": ("t", 1),
        "root_path": "", "asgi": {"version": "3.0"}, "state": {},
    }  # fmt: skip


@pytest.mark.parametrize("goes", [True, False])
async def test_a_client_that_goes_away(monkeypatch: pytest.MonkeyPatch, goes: bool) -> None:
    monkeypatch.setattr(disconnect, "LOOK_EVERY_S", 0.01)
    app = create_app(Settings(store_url="memory://", device="cpu", memory_budget_bytes=64 << 20))
    is_watched, is_gone, release = asyncio.Event(), asyncio.Event(), threading.Event()
    sent: list[Any] = []
    messages: list[Any] = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        is_watched.set()
        await is_gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    def hold() -> None:
        release.wait(20)

    async with app.router.lifespan_context(app), talk_to(app) as client:
        await fill(client)
        batcher = app.state.engine.worker.queue
        batcher.post(hold)
        calling = asyncio.create_task(app(scope_of(app, "/v1/sessions/s/attend"), receive, send))
        await asyncio.wait_for(is_watched.wait(), 10)
        if goes:
            is_gone.set()
            await calling
        release.set()
        await calling
        answer = await client.post("/v1/sessions/s/attend", content=BODY, headers={"content-type": "application/json"})
        assert answer.status_code == 200
        assert batcher.num_skipped == goes
    assert [message.get("status") for message in sent] == ([] if goes else [200, None])


async def test_a_request_that_is_cancelled_by_others_is_cancelled() -> None:
    """uvicorn cancels what is not done when it stops."""
    app = create_app(Settings(store_url="memory://", device="cpu", memory_budget_bytes=64 << 20))
    release = threading.Event()
    messages: list[Any] = [{"type": "http.request", "body": BODY, "more_body": False}]

    async def receive() -> Any:
        return messages.pop()

    async def send(message: Any) -> None:
        raise AssertionError("nobody is answered")

    def hold() -> None:
        release.wait(20)

    async with app.router.lifespan_context(app), talk_to(app) as client:
        await fill(client)
        batcher = app.state.engine.worker.queue
        batcher.post(hold)
        calling = asyncio.create_task(app(scope_of(app, "/v1/sessions/s/attend"), receive, send))
        for _ in range(100):
            if batcher.num_waiting:
                break
            await asyncio.sleep(0)
        calling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await calling
        release.set()


async def test_one_look_is_not_enough_and_each_request_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one timer ends when nobody waits, and begins anew with the next request."""
    monkeypatch.setattr(disconnect, "LOOK_EVERY_S", 0.02)
    over, num_asked = disconnect.Watch(), 0

    async def receive() -> Any:
        nonlocal num_asked
        num_asked += 1
        return {"type": "http.disconnect"}

    request = Request({"type": "http"}, receive)
    for _ in range(2):
        assert await over.unless_gone(request, asyncio.sleep(0, "done")) == "done"
        await asyncio.sleep(0.1)
    assert num_asked == 0
    for number in (1, 2):
        with pytest.raises(ClientDisconnect):
            await asyncio.wait_for(over.unless_gone(request, asyncio.sleep(20)), 10)
        await asyncio.sleep(0.1)
        assert num_asked == number
