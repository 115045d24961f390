"""Which files and shapes a small attend and a small append pass, from the bytes to the answer: `python -m tests.paths`.

A file counts when one of its functions runs, a shape when one of our classes is made anew. Not a test; for whoever
changes a path and wants to see whether it became shorter.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import safetensors.numpy

ROOT = Path(__file__).parents[1]
PACKAGES = ("api", "htm_service", "storage")
BESIDE = ("compaction.py", "expiry.py")
"""What runs by its own clock."""


class Recorder:
    """What runs in all threads while it is on."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.shapes: set[str] = set()
        self.is_on = False

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """A profile function."""
        if not self.is_on or event != "call":
            return
        code = frame.f_code
        path = Path(code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES and path.name not in BESIDE:
            self.files.add(path.relative_to(ROOT).as_posix())
        made: Any = None
        if code.co_name == "__init__":
            made = type(next(iter(frame.f_locals.values()), None))
        elif code.co_name in ("__new__", "<lambda>") and "_cls" in frame.f_locals:
            made = frame.f_locals["_cls"]
        if isinstance(made, type) and made.__module__.split(".")[0] in PACKAGES:
            self.shapes.add(f"{made.__module__}.{made.__qualname__}")


def body(tensors: dict[str, Any], params: str) -> bytes:
    """A binary body."""
    return safetensors.numpy.save(tensors, {"params": params})


async def call(app: Any, method: str, path: str, content: bytes, content_type: str) -> int:
    """One request on the app itself; its status."""
    status: list[int] = []
    messages = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not messages:
            await asyncio.Event().wait()  # the client stays
        return messages.pop()

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "app": app,
        "headers": [(b"content-type", content_type.encode()), (b"content-length", str(len(content)).encode())],
        "http_version": "1.1", "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        "root_path": "", "asgi": {"version": "3.0"}, "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    return status[0]


async def main(recorder: Recorder) -> None:
    """Print both paths."""
    from api.app import create_app
    from api.settings import Settings

    binary = "application/x-safetensors"
    tokens = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    calls = {
        "attend": ("attend", body({"queries": tokens[:1]}, '{"top_k": 2}')),
        "append": ("memories", body({"embeddings": tokens[:1]}, "{}")),
    }
    app = create_app(Settings(store_url="memory://", device="cpu", memory_budget_bytes=64 << 20))
    async with app.router.lifespan_context(app):
        assert await call(app, "PUT", "/v1/sessions/s", b'{"dim": 16}', "application/json") == 201
        assert await call(app, "POST", "/v1/sessions/s/memories", body({"embeddings": tokens}, "{}"), binary) == 200
        for name, (where, content) in calls.items():
            for is_on in (False, True):
                recorder.files.clear()
                recorder.shapes.clear()
                recorder.is_on = is_on
                assert await call(app, "POST", f"/v1/sessions/s/{where}", content, binary) == 200
                await asyncio.sleep(0.05)
                recorder.is_on = False
            print(f"{name}: {len(recorder.files)} files, {len(recorder.shapes)} shapes")
            for kind, found in (("files", recorder.files), ("shapes", recorder.shapes)):
                print(f"  {kind}: {', '.join(sorted(found))}")


if __name__ == "__main__":
    recorder = Recorder()
    threading.setprofile(recorder)
    sys.setprofile(recorder)
    asyncio.run(main(recorder))
