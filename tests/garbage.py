"""What refused requests leave to the garbage collector: until it came by, each of them kept its whole body."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[1]


@asynccontextmanager
async def collected() -> AsyncIterator[list[str]]:
    """Afterwards, the calls of this project's code that only the garbage collector could free."""
    found: list[str] = []
    gc.freeze()  # what there is now is not looked through
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        await asyncio.sleep(0.005)  # the thread that refused something lets go of it
        gc.collect()
        frames = [one for one in gc.garbage if isinstance(one, FrameType)]
        found += [repr(frame) for frame in frames if _is_ours(frame.f_code.co_filename)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
        gc.unfreeze()


def _is_ours(file: str) -> bool:
    return any(Path(file).is_relative_to(ROOT / name) for name in ("api", "htm_service", "storage", "tests"))
