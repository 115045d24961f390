"""Client of htm-service, a memory server for agents: sync and async, binary by default, safe retries.

Knows the REST contract. Does not know the server's code, except to run it in process for `:memory:`.
"""

from htm_client.aio import AsyncHTMClient
from htm_client.client import HTMClient
from htm_client.errors import (
    BatchFailed,
    ConnectionFailed,
    FileFailed,
    Forbidden,
    HTMClientError,
    InvalidArgument,
    InvalidRequest,
    ItemError,
    LengthConflict,
    NotFound,
    RequestRefused,
    ServerUnavailable,
    SessionConflict,
    Unauthenticated,
    UnreadableAnswer,
)
from htm_client.results import (
    Appended,
    Attended,
    BatchAppended,
    BatchAttended,
    BatchStepped,
    Chunk,
    ChunkDetail,
    Explained,
    Memories,
    Recall,
    Recalled,
    Selected,
    SessionInfo,
    Stepped,
)

__all__ = [
    "Appended",
    "AsyncHTMClient",
    "Attended",
    "BatchAppended",
    "BatchAttended",
    "BatchFailed",
    "BatchStepped",
    "Chunk",
    "ChunkDetail",
    "ConnectionFailed",
    "Explained",
    "FileFailed",
    "Forbidden",
    "HTMClient",
    "HTMClientError",
    "InvalidArgument",
    "InvalidRequest",
    "ItemError",
    "LengthConflict",
    "Memories",
    "NotFound",
    "Recall",
    "Recalled",
    "RequestRefused",
    "Selected",
    "ServerUnavailable",
    "SessionConflict",
    "SessionInfo",
    "Stepped",
    "Unauthenticated",
    "UnreadableAnswer",
]
