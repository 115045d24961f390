"""Session files made and read by other means than the server's own: the safetensors library and docs/api.md."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

SETTINGS: Mapping[str, Any] = {
    "dim": 3,
    "chunk_size": 2,
    "model": "retrieval",
    "dtype": "float32",
    "open_chunk": "attend",
    "labels": {"agent": "7"},
    "ttl_s": None,
    "max_tokens": None,
    "on_full": "reject",
}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def canonical(settings: Mapping[str, Any], first_position: int, length: int) -> bytes:
    """What the checksum of the parameters is of."""
    said = {"settings": dict(settings), "first_position": first_position, "length": length}
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def session_file(
    embeddings: Any = ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    payloads: Sequence[bytes] = (b'{"n":0}', b"", b'{"n":2}'),
    episodes: Sequence[int] = (-1, 4, 4),
    first_position: int = 0,
    params: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    **settings: Any,
) -> bytes:
    """A file as the library writes it; `params` and `tensors` replace what would be right."""
    own = {**SETTINGS, **settings}
    tokens = np.array(embeddings, np.float16 if own["dtype"] == "float16" else np.float32).reshape(len(embeddings), -1)
    parts = {
        "embeddings": tokens,
        "episodes": np.array(episodes, np.int64),
        "payloads": np.frombuffer(b"".join(payloads), np.uint8),
        "payload_offsets": np.cumsum([0, *map(len, payloads)], dtype=np.int64),
        **(tensors or {}),
    }
    length = first_position + len(tokens)
    checksums = {name: sha256(array.tobytes()) for name, array in parts.items()}
    said = {
        "format": "htm-session",
        "version": 1,
        "settings": own,
        "first_position": first_position,
        "length": length,
        "checksums": {**checksums, "params": sha256(canonical(own, first_position, length))},
        **(params or {}),
    }
    return safetensors.numpy.save(parts, {"params": json.dumps(said)})


def parsed(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and parameters of a file."""
    size = int.from_bytes(data[:8], "little")
    params = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["params"])
    return safetensors.numpy.load(data), params
