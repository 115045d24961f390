"""Either client of the server, called as if it were sync."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from htm_client import AsyncHTMClient, HTMClient


class Both:
    """Calls either client as if it were sync."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.client: Any
        if kind == "sync":
            self.client = HTMClient(**options)
        else:

            async def make() -> AsyncHTMClient:
                return AsyncHTMClient(**options)

            self.client = self.loop.run_until_complete(make())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self.client, name)(*args, **kwargs)
            if inspect.isasyncgen(result):
                return self.loop.run_until_complete(collect(result))
            return self.loop.run_until_complete(result) if inspect.isawaitable(result) else result

        return call

    def end(self) -> None:
        self.close()
        self.close()
        self.loop.close()


async def collect(items: Any) -> list[Any]:
    return [item async for item in items]
