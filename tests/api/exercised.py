"""One good request per operation, and the ways to make it fail: what the tests of statuses walk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from api import errors
from htm_service.errors import HTMError
from htm_service.metrics import Metrics
from htm_service.writes.keys import Keys
from storage.in_memory import MemoryStore
from tests.api.conftest import MODEL
from tests.session_files import session_file


@dataclass(frozen=True, slots=True)
class Call:
    """A good request of an admin, on a server with what conftest.keyed puts there, and its status."""

    method: str
    path: str
    status: int = 200
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content: bytes | None = None

    async def send(self, client: httpx.AsyncClient, **changes: Any) -> httpx.Response:
        """Send it, with httpx arguments changed."""
        arguments: dict[str, Any] = {"headers": dict(self.headers)}
        if self.json is not None and "content" not in changes:
            arguments["json"] = self.json
        if self.content is not None:
            arguments["content"] = self.content
        headers = {**arguments["headers"], **changes.pop("headers", {})}
        return await client.request(
            self.method, changes.pop("path", self.path), **{**arguments, **changes, "headers": headers}
        )


ATTEND = {"queries": [[1, 0, 0]], "return": ["output", "chunks", "payloads"]}
APPEND = {"embeddings": [[1, 0, 0]], "payloads": [{"text": "hello"}]}
BATCH_ATTEND = {"queries": [[1, 0, 0], [0, 1, 0]], "return": ["output", "chunks", "payloads"]}
BATCH_SEARCH = {"queries": [[1, 0, 0], [0, 1, 0]], "return": ["payloads", "embeddings"]}
BATCH_APPEND = {"embeddings": [[1, 0, 0], [0, 1, 0]], "payloads": [[{"text": "hello"}], None]}

FILE = {"content-type": "application/x-safetensors"}

CALLS: Mapping[str, Call] = {
    "livez": Call("GET", "/livez"),
    "readyz": Call("GET", "/readyz"),
    "info": Call("GET", "/v1/info"),
    "metrics": Call("GET", "/metrics"),
    "list_models": Call("GET", "/v1/models"),
    "inspect_model": Call("GET", "/v1/models/retrieval"),
    "put_model": Call("PUT", "/v1/models/m", content=MODEL, headers={"content-type": "application/x-safetensors"}),
    "delete_model": Call("DELETE", "/v1/models/m", 204),
    "create_session": Call("POST", "/v1/sessions", 201, {"dim": 3}),
    "list_sessions": Call("GET", "/v1/sessions?limit=10"),
    "delete_sessions": Call("DELETE", "/v1/sessions?prefix=nobody"),
    "put_session": Call("PUT", "/v1/sessions/s", 200, {"dim": 3, "chunk_size": 2}),
    "inspect_session": Call("GET", "/v1/sessions/s"),
    "update_session": Call("PATCH", "/v1/sessions/s", 200, {"labels": {"agent": "7"}}),
    "delete_session": Call("DELETE", "/v1/sessions/s", 204),
    "fork": Call("POST", "/v1/sessions/s/fork", 201, {"length": 1, "labels": {"agent": "8"}}),
    "truncate": Call("POST", "/v1/sessions/s/truncate", 200, {"length": 1}),
    "append": Call("POST", "/v1/sessions/s/memories", 200, APPEND),
    "read_memories": Call("GET", "/v1/sessions/s/memories"),
    "attend": Call("POST", "/v1/sessions/s/attend", 200, ATTEND),
    "explain": Call("POST", "/v1/sessions/s/explain", 200, {"queries": [1, 0, 0], "return": ["output", "payloads"]}),
    "select": Call("POST", "/v1/sessions/s/select", 200, {"queries": [1, 0, 0]}),
    "search": Call("POST", "/v1/sessions/s/search", 200, {"queries": [1, 0, 0], "return": ["payloads", "embeddings"]}),
    "search_all": Call("POST", "/v1/search", 200, {"queries": [1, 0, 0], "sessions": ["s"], "n": 3}),
    "step": Call("POST", "/v1/sessions/s/step", 200, {"attend": ATTEND, "append": APPEND}),
    "export_session": Call("GET", "/v1/sessions/s/export"),
    "import_session": Call("PUT", "/v1/sessions/imported/import", 201, None, FILE, session_file()),
    "list_chunks": Call("GET", "/v1/sessions/s/chunks?include=keys"),
    "inspect_chunk": Call("GET", "/v1/sessions/s/chunks/1?include=embeddings,key"),
    "session_heat": Call("GET", "/v1/sessions/s/heat"),
    "list_recalls": Call("GET", "/v1/sessions/s/recalls?include=query"),
    "events": Call("GET", "/v1/events?seconds=0.01"),
    "list_keys": Call("GET", "/v1/keys"),
    "create_key": Call("POST", "/v1/keys", 201, {"name": "new", "role": "read"}),
    "get_quota": Call("GET", "/v1/quotas/default"),
    "put_quota": Call("PUT", "/v1/quotas/default", 200, {"max_sessions": 1000}),
    "revoke_key": Call("DELETE", "/v1/keys/bob", 204),
    "batch_append": Call("POST", "/v1/batch/append", 200, {"sessions": ["s", "no"], **BATCH_APPEND}),
    "batch_attend": Call("POST", "/v1/batch/attend", 200, {"sessions": ["s", "no"], **BATCH_ATTEND}),
    "batch_search": Call("POST", "/v1/batch/search", 200, {"sessions": ["s", "no"], **BATCH_SEARCH}),
    "batch_select": Call("POST", "/v1/batch/select", 200, {"sessions": ["s", "no"], "queries": [[1, 0, 0]] * 2}),
    "batch_truncate": Call("POST", "/v1/batch/truncate", 200, {"sessions": ["s", "no"], "length": [1, 0]}),
    "batch_step": Call(
        "POST", "/v1/batch/step", 200, {"sessions": ["s", "no"], "attend": BATCH_ATTEND, "append": BATCH_APPEND}
    ),
}
"""By operationId. `delete_session` comes last where all are sent to one server."""

WITH_BODY = [name for name, call in CALLS.items() if call.json is not None]
"""Of those with JSON bodies."""
ON_SESSION = [name for name, call in CALLS.items() if "/v1/sessions/s" in call.path]


class FailingEngine:
    """An engine of which every call raises `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.metrics: Any = Metrics()
        self.keys = Keys(MemoryStore(), self.create_key, lambda: 0.0)
        self.keys.find = self._find  # type: ignore[method-assign]
        self.is_draining = getattr(error, "code", "") == "draining"

    def __getattr__(self, name: str) -> Any:
        async def call(*_: object, **__: object) -> None:
            raise self.error

        return call

    def listen(self, namespace: str, session_id: str | None) -> None:
        raise self.error

    def _find(self, digest: bytes) -> None:
        raise self.error

    def unhealthy_reason(self) -> str | None:
        return "the device thread has died" if getattr(self.error, "code", "") == "unhealthy" else None


def domain_error(code: str) -> Exception:
    """The exception of the domain that has this code; a plain one for internal_error."""
    if code == "internal_error":
        return RuntimeError("a secret of the server's")
    kinds = [HTMError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    kind = next(kind for kind in kinds if vars(kind).get("code") == code)
    return kind(errors.PROBLEMS[code].example)
