"""One uvicorn worker in this process: its socket, its signals, the line that says it is ready.

Does not know: flags, and what the app does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import sys
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.settings import Settings

# Of the time to drain, the part in which requests may end; the rest is the engine's, which then has few.
_REQUESTS_SHARE = 0.7


class Server(uvicorn.Server):
    """uvicorn's server, which says when it is ready and for which being told to stop is not a failure."""

    def __init__(self, config: uvicorn.Config, address: str) -> None:
        super().__init__(config)
        self.address = address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then print the address on stdout: whoever started us waits for this line."""
        await super().startup(sockets)
        if self.started:
            print(f"htm-service is ready at {self.address}", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing: `serve` handles signals from before the store is opened, and does not raise them again."""
        yield


def serve(settings: Settings, app: FastAPI | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `app` is one that `create_app` made of these settings, and by default just that.

    Raises OSError when it cannot listen, and what `create_app`'s lifespan raises when it cannot start.
    """
    logging.basicConfig(
        level=settings.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of each plug-in that it loads
    with listen_socket(settings.host, settings.port) as listener:
        app = app or create_app(settings)
        config = uvicorn.Config(
            app,
            lifespan="off",  # entered below: what goes wrong in it is then an exception, not a log entry
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, math.ceil(settings.drain_seconds * _REQUESTS_SHARE)),
        )
        server = Server(config, address_of(listener))
        handlers = {name: signal.signal(name, server.handle_exit) for name in (signal.SIGTERM, signal.SIGINT)}

        async def main() -> None:
            async with app.router.lifespan_context(app):
                # What is there now stays: were the collector to look through all of torch again, once in a few
                # thousand requests, nobody would be answered for a quarter of a second.
                gc.collect()
                gc.freeze()
                await server.serve([listener])

        try:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(main())
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)


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


def address_of(listener: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
