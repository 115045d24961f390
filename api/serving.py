"""One uvicorn worker in this process: its socket, its signals, the line that says it is ready.

Does not know: flags, and what the app does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from fastapi import FastAPI

from api import logs
from api.app import create_app
from api.protocol import BoundedProtocol, raise_file_limit
from api.settings import Settings, of_services

if TYPE_CHECKING:  # torch takes seconds to import, and a port that is taken is told without it
    from htm_service.engine import Engine

# Of the time to drain: in which new requests are refused, so that whoever asks /readyz sends no more of them; in
# which requests that have begun may end. The rest is the engine's, which then has few.
_NOTICE_SHARE = 0.1
_REQUESTS_SHARE = 0.6

ORDERLY = frozenset({signal.SIGTERM, signal.SIGHUP})
"""Signals that ask for a stop with notice: the second is what the end of a terminal sends."""

EXIT_UNHEALTHY = 70
"""Exit code when a thread of the engine died or is stuck, or a stop did not end (EX_SOFTWARE of sysexits.h)."""

STOP_MARGIN_S = 1.5
"""How long a stop may take beyond the time to drain: with the default of that, less than Docker's 10 s in all."""

MAX_SAYING_S = 0.3
"""How long the end of a process waits for its log: that nobody reads it may be what the stop hangs in."""

LOOK_AT_CONNECTIONS_EVERY = 50
"""Ticks of the server, of which there are ten a second."""

LAST_WORDS_S = 2.0
"""How long a server that can do no more work says why, before it ends."""


class Server(uvicorn.Server):
    """uvicorn's server, which says when it is ready, and when it is about to stop.

    `last_resort` is started with the first signal: what ends the process, should the stop not do so.
    """

    def __init__(self, config: uvicorn.Config, address: str, notice_s: float, last_resort: threading.Timer) -> None:
        super().__init__(config)
        self.address = address
        self.notice_s = notice_s
        self.last_resort = last_resort
        self._is_told_to_stop = False
        self.engine: Engine | None = None
        self._stop_at = math.inf
        self._end_at = math.inf

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first SIGTERM or SIGHUP makes the engine refuse what is new, and stops the server after the notice."""
        if not self._is_told_to_stop:
            self._is_told_to_stop = True
            self.last_resort.start()
        if sig in ORDERLY and self.engine is not None and not self.engine.is_draining:
            self.engine.is_draining = True
            self._stop_at = time.monotonic() + self.notice_s
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; asked ten times a second. Ends the process itself when the engine can do no work.

        Not in order: a thread that is stuck would never be done. It is as if the process were killed, which what
        was acknowledged survives.
        """
        now = time.monotonic()
        if self.engine is not None and self._end_at == math.inf and (reason := self.engine.unhealthy_reason()):
            logging.getLogger(__name__).critical("%s: the process ends with code %d", reason, EXIT_UNHEALTHY)
            self._end_at = now + LAST_WORDS_S
        if now >= self._end_at:
            _end_process()
        if counter % LOOK_AT_CONNECTIONS_EVERY == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, BoundedProtocol):
                    connection.end_if_stuck()
        return await super().on_tick(counter) or now >= self._stop_at

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then print the address on stdout: whoever started us waits for this line."""
        await super().startup(sockets)
        if self.started:
            print(f"htm-service is ready at {self.address}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: `serve` handles signals from before the store is opened, and does not raise them again."""
        yield


def _end_process() -> None:
    logging.shutdown()
    os._exit(EXIT_UNHEALTHY)


def last_resort(max_stop_s: float) -> threading.Timer:
    """A timer, to be started, that ends the process after so many seconds, whatever its threads hang in.

    What was acknowledged is on disk by then, as it is when the process is killed.
    """

    def say() -> None:
        logging.getLogger(__name__).critical(
            "the stop did not end within %.1f s: the process ends with code %d", max_stop_s, EXIT_UNHEALTHY
        )
        logging.shutdown()

    def give_up() -> None:
        saying = threading.Thread(target=say, name="htm-last-words", daemon=True)
        saying.start()
        saying.join(MAX_SAYING_S)
        os._exit(EXIT_UNHEALTHY)

    timer = threading.Timer(max_stop_s, give_up)
    timer.daemon = True
    return timer


def serve(settings: Settings, app: FastAPI | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `app` is one that `create_app` made of these settings, and by default just that.

    Raises OSError when it cannot listen, and what `create_app`'s lifespan raises when it cannot start.
    """
    logs.configure(settings.log_level, settings.log_format)
    if others := of_services():
        logging.getLogger(__name__).info("%s are Kubernetes' and no settings", ", ".join(others))
    BoundedProtocol.max_connections = raise_file_limit()
    with listen_socket(settings.host, settings.port) as listener:
        check_tls(settings)
        app = app or create_app(settings.model_copy(update={"kernel_cache": settings.directory_of_kernels}))
        config = uvicorn.Config(
            app,
            lifespan="off",  # entered below: what goes wrong in it is then an exception, not a log entry
            http=BoundedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_seconds,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            proxy_headers=False,  # nobody here asks where a request comes from
            timeout_graceful_shutdown=max(1, math.ceil(settings.drain_seconds * _REQUESTS_SHARE)),
        )
        timer = last_resort(settings.drain_seconds + STOP_MARGIN_S)
        server = Server(
            config,
            address_of(listener, is_tls=settings.tls_cert is not None),
            settings.drain_seconds * _NOTICE_SHARE,
            timer,
        )
        # Who started us with SIGHUP ignored, as nohup does, wants us to outlive the terminal.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        handlers = {name: signal.signal(name, server.handle_exit) for name in {*ORDERLY, signal.SIGINT} - ignored}

        async def main() -> None:
            async with app.router.lifespan_context(app):
                # What is there now stays: were the collector to look through all of torch again, once in a few
                # thousand requests, nobody would be answered for a quarter of a second.
                gc.collect()
                gc.freeze()
                server.engine = app.state.engine
                await server.serve([listener])

        try:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(main())
        finally:
            timer.cancel()
            for name, handler in handlers.items():
                signal.signal(name, handler)


def check_tls(settings: Settings) -> None:
    """Raise OSError where certificate and key cannot be used, before the store is opened."""
    if settings.tls_cert is None or settings.tls_key is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(settings.tls_cert, settings.tls_key)
    except OSError as error:
        why = error.strerror or error
        raise OSError(
            f"the certificate {settings.tls_cert} with the key {settings.tls_key} cannot be used: {why}"
        ) from error


def listen_socket(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: until the server is ready, connecting is refused.

    Raises OSError with the address in its message.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    return listener


def address_of(listener: socket.socket, *, is_tls: bool = False) -> str:
    """The URL of a bound socket."""
    scheme = "https" if is_tls else "http"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
