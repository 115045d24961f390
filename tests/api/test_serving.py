"""When the server stops: after a notice, at once, or because its engine can do nothing more."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from uvicorn.server import ServerState

from api import protocol, serving
from api.serving import EXIT_UNHEALTHY, STOP_MARGIN_S, Server, last_resort
from storage.databases.sqlite import READERS_MS
from storage.sql.store import CLOSE_SECONDS


async def nothing(*_: Any) -> None:
    """An app that is never called."""


class Timer:
    """Counts its starts."""

    num_starts = 0

    def start(self) -> None:
        self.num_starts += 1


def make_server(notice_s: float, reason: str | None = None) -> tuple[Server, Any]:
    engine = SimpleNamespace(is_draining=False, unhealthy_reason=lambda: reason)
    server = Server(uvicorn.Config(nothing, lifespan="off", log_config=None), "http://here", notice_s, Timer())  # type: ignore[arg-type]
    server.engine = engine  # type: ignore[assignment]
    return server, engine


async def test_sigterm_refuses_first_and_stops_after_the_notice() -> None:
    server, engine = make_server(0.05)
    assert not await server.on_tick(1)
    server.handle_exit(signal.SIGTERM, None)
    assert engine.is_draining and not server.should_exit
    assert not await server.on_tick(1)
    await asyncio.sleep(0.06)
    assert await server.on_tick(1)


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
async def test_sigint_and_a_second_sigterm_stop_at_once(signals: list[signal.Signals]) -> None:
    server, _ = make_server(60.0)
    for name in signals:
        server.handle_exit(name, None)
    assert await server.on_tick(1)
    assert server.last_resort.num_starts == 1  # type: ignore[attr-defined]


def test_a_stop_that_does_not_end_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    timer = last_resort(0.01)
    timer.start()
    timer.join()
    assert codes == [EXIT_UNHEALTHY]
    assert "did not end within 0.0 s: the process ends with code 70" in caplog.text


def test_a_log_that_hangs_does_not_keep_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer once waited for the log, as a stop does whose stderr is a full pipe that nobody reads."""
    codes: list[int] = []
    is_read = threading.Event()
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr("logging.shutdown", lambda: None)

    class Full(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            is_read.wait()

    log, handler = logging.getLogger(serving.__name__), Full()
    log.addHandler(handler)
    try:
        timer = last_resort(0.01)
        timer.start()
        timer.join(10)
        assert codes == [EXIT_UNHEALTHY]
    finally:
        is_read.set()
        for thread in threading.enumerate():
            if thread.name == "htm-last-words":  # what it says belongs to no other test
                thread.join(10)
        log.removeHandler(handler)


def test_giving_free_space_back_does_not_make_a_stop_look_as_if_it_hung() -> None:
    """It took up to 2 s after all that `drain_seconds` covers, and the process ended with code 70."""
    assert CLOSE_SECONDS + READERS_MS / 1e3 < STOP_MARGIN_S


def test_a_server_that_has_not_started_stops_at_once() -> None:
    server, _ = make_server(60.0)
    server.engine = None
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit


async def test_an_engine_that_can_do_nothing_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(serving, "LAST_WORDS_S", 0.05)
    server, _ = make_server(1.0, "the device thread died: no such device")
    monkeypatch.setattr("logging.shutdown", lambda: None)
    assert not await server.on_tick(1)
    assert codes == [] and "the device thread died: no such device: the process ends with code 70" in caplog.text
    await asyncio.sleep(0.06)
    await server.on_tick(1)
    assert codes == [EXIT_UNHEALTHY]
    assert len(caplog.records) == 1


async def test_who_waits_for_the_server_is_not_ended_for_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server had stopped reading a body, because what it did with it took longer than a client may be silent."""
    monkeypatch.setattr(protocol, "MAX_SILENCE_S", 0.1)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(app, lifespan="off", http=protocol.BoundedProtocol, log_config=None)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: protocol.BoundedProtocol(config, state, {}), "127.0.0.1", 0)

    async def look() -> None:
        while True:
            await asyncio.sleep(0.02)
            for connection in list(state.connections):
                assert isinstance(connection, protocol.BoundedProtocol)
                connection.end_if_stuck()

    looking = asyncio.create_task(look())
    try:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.put(url, content=bytes(1 << 20))).status_code == 204
    finally:
        looking.cancel()
        server.close()
