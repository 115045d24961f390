"""What openapi.json says of the hot calls. Does not know: how they are carried out."""

from __future__ import annotations

from typing import Any

from api.openapi import BODY_CODES, IDEMPOTENCY_KEY, SESSION_CODES, WRITE_CODES, HotCall
from api.schemas import bodies

_ATTEND_BODY = {"queries": [[0.6, 0.8]], "top_k": 8, "return": ["output", "chunks", "payloads"]}
_APPEND_BODY = {"embeddings": [[1.0, 0.0]], "payloads": [{"text": "the key is under the mat"}]}
_APPENDED = {"start": 40, "length": 41, "num_chunks": 2}
_ATTENDED = {
    "output": [[0.62, 0.78]],
    "chunks": {"index": [[1, 0]], "weight": [[0.75, 0.25]]},
    "recalled": [
        [{"position": 39, "weight": 0.5, "score": 19.2, "chunk": 1, "payload": {"text": "the door is locked"}}]
    ],
    "length": 40,
}
_MODEL_HASH = "4e2718460261b5363c6a20fefd8139b085ef9264af400e952147f2288220c0a5"
_EXPLAINED = {
    "model": "retrieval",
    "model_hash": _MODEL_HASH,
    "top_k": 2,
    "num_taken": 2,
    "num_visible": 9,
    "chunks": {"index": [1, 0, 7], "logit": [19.0, 17.9, 4.2], "weight": [0.75, 0.25, 0.0]},
    "recalled": _ATTENDED["recalled"],
    "length": 280,
}
_SELECTED = {
    "chunks": {"index": [[1, 0]], "logit": [[0.98, 0.91]]},
    "unique": {
        "index": [0, 1],
        "key": [[0.7, 0.7], [0.6, 0.8]],
        "tokens": [[[1.0, 0.0], [0.4, 1.4]], [[0.6, 0.8], [0.0, 0.0]]],
        "visible": [[True, True], [True, False]],
    },
    "length": 3,
}
_FOUND = {"position": 39, "score": 0.96, "chunk": 1, "payload": {"text": "the door is locked"}}
_READ = {
    "start": 0,
    "stop": 1,
    "length": 41,
    "embeddings": [[1.0, 0.0]],
    "payloads": [{"text": "the key is under the mat"}],
}

_BATCH_ERROR = {"item": 1, "status": 404, "code": "session_not_found", "detail": "there is no session 'agent-8'"}
_BATCH = {"status": [200, 404], "errors": [_BATCH_ERROR]}
_BATCH_APPEND_BODY = {"embeddings": [[1.0, 0.0], [0.0, 1.0]], "num_tokens": [1, 1], "episode": [3, 4]}
_BATCH_APPENDED = {"start": [40, 0], "length": [41, 0], "num_chunks": [2, 0]}
_BATCH_ATTEND_BODY = {"queries": [[0.6, 0.8], [0.8, 0.6]], "top_k": 8, "return": ["output", "chunks"]}
_BATCH_ATTENDED = {
    "output": [[[0.62, 0.78]], [[0.0, 0.0]]],
    "chunks": {"index": [[[1, 0]], [[0, 0]]], "weight": [[[0.75, 0.25]], [[0.0, 0.0]]]},
    "length": [40, 0],
    "model_hash": [_MODEL_HASH, ""],
}
_BATCH_SELECTED = {
    "chunks": {"index": [[[1, 0]], [[0, 0]]], "logit": [[[0.98, 0.91]], [[0.0, 0.0]]]},
    "unique": {"index": [[0, 1], [-1, -1]], "key": [[[0.7, 0.7], [0.6, 0.8]], [[0.0, 0.0], [0.0, 0.0]]]},
    "length": [40, 0],
}
_SESSIONS = {"sessions": ["agent-7", "agent-8"]}
_BATCH_CODES = (*BODY_CODES, "invalid_argument", "overloaded", "unhealthy", "draining", "internal_error")

_ATTEND_CODES = (
    *BODY_CODES,
    *SESSION_CODES,
    "model_not_found",
    "length_conflict",
    "deadline_exceeded",
    "out_of_memory",
)
_APPEND_CODES = (*BODY_CODES, *SESSION_CODES, *WRITE_CODES, "quota_exceeded", "length_conflict", "idempotency_mismatch")


def calls() -> list[HotCall]:
    """The hot calls."""
    session = "/v1/sessions/{session_id}"
    return [
        HotCall(
            path=f"{session}/memories",
            method="post",
            operation_id="append",
            summary="Append tokens",
            body=bodies.AppendBody,
            body_example=_APPEND_BODY,
            answer=bodies.AppendAnswer,
            example=_APPENDED,
            tensors="Binary: tensor `embeddings`; the answer has none.",
            parameters=(IDEMPOTENCY_KEY,),
            codes=_APPEND_CODES,
        ),
        HotCall(
            path=f"{session}/memories",
            method="get",
            operation_id="read_memories",
            summary="Read tokens back",
            answer=bodies.MemoriesAnswer,
            example=_READ,
            tensors="Binary (by `Accept`): tensor `embeddings`.",
            parameters=(
                _query(
                    "start", "First position; where the tokens begin if left out, or if they begin later.", "integer"
                ),
                _query("stop", "End of the positions; the length if left out.", "integer"),
                _query("include", "`embeddings`, `payloads`, or both with a comma; both if left out.", "string"),
            ),
            codes=SESSION_CODES,
        ),
        HotCall(
            path=f"{session}/attend",
            method="post",
            operation_id="attend",
            summary="Attend to the memory",
            body=bodies.AttendBody,
            body_example=_ATTEND_BODY,
            answer=bodies.AttendAnswer,
            example=_ATTENDED,
            tensors="Binary: tensors `queries`, `mask`, `chunk_mask`; `output`, `chunks.index`, `chunks.weight`.",
            codes=_ATTEND_CODES,
        ),
        HotCall(
            path=f"{session}/explain",
            method="post",
            operation_id="explain",
            summary="Rank the chunks for one query",
            body=bodies.ExplainBody,
            body_example={"queries": [0.6, 0.8], "limit": 3, "return": ["payloads"]},
            answer=bodies.ExplainAnswer,
            example=_EXPLAINED,
            tensors="Which chunks one query takes and which nearly, as an attend would now; it is no recall. "
            "Binary: tensors `queries`, `mask`, `chunk_mask`; `chunks.index`, `chunks.logit`, `chunks.weight`, "
            "`output`.",
            codes=_ATTEND_CODES,
        ),
        HotCall(
            path=f"{session}/select",
            method="post",
            operation_id="select",
            summary="Which chunks a query in key space takes",
            body=bodies.SelectBody,
            body_example={"queries": [[0.6, 0.8]], "top_k": 2},
            answer=bodies.SelectAnswer,
            example=_SELECTED,
            tensors="For whoever computes attention with weights of their own; it is no recall. "
            "Binary: tensors `queries`, `mask`, `chunk_mask`; `chunks.index`, `chunks.logit`, `unique.index`, "
            "`unique.key`, `unique.tokens`, `unique.visible`.",
            codes=_ATTEND_CODES,
        ),
        HotCall(
            path=f"{session}/search",
            method="post",
            operation_id="search",
            summary="Find the tokens that score best",
            body=bodies.SearchBody,
            body_example={"queries": [0.6, 0.8], "n": 1},
            answer=bodies.SearchAnswer,
            example={"found": [[_FOUND]], "length": 40, "chunk_size": 32},
            tensors="It is no recall. Binary: tensors `queries`, `mask`; `position` [Q, n], -1 where fewer are found, "
            "`score` [Q, n], `embeddings`; payloads in `params`, a list for each query.",
            codes=_ATTEND_CODES,
        ),
        HotCall(
            path="/v1/search",
            method="post",
            operation_id="search_all",
            summary="Find the tokens of several sessions that score best",
            body=bodies.SearchAllBody,
            body_example={"queries": [0.6, 0.8], "label": {"user": "ana"}, "n": 1},
            answer=bodies.SearchAllAnswer,
            example={"found": [[{"session": "monday", **_FOUND}]], "num_sessions": 2},
            tensors="Binary: tensors `queries`; `embeddings`. What was found is in `params` as in JSON.",
            codes=_ATTEND_CODES,
        ),
        HotCall(
            path=f"{session}/step",
            method="post",
            operation_id="step",
            summary="Attend, then append",
            body=bodies.StepBody,
            body_example={"attend": _ATTEND_BODY, "append": _APPEND_BODY},
            answer=bodies.StepAnswer,
            example={"attend": _ATTENDED, "append": _APPENDED},
            tensors="Binary: tensors `queries`, `mask`, `chunk_mask`, `embeddings`; `attend.output`, "
            "`attend.chunks.index`, `attend.chunks.weight`.",
            parameters=(IDEMPOTENCY_KEY,),
            codes=tuple(dict.fromkeys((*_ATTEND_CODES, *_APPEND_CODES))),
        ),
        HotCall(
            path="/v1/batch/append",
            method="post",
            operation_id="batch_append",
            summary="Append to many sessions",
            body=bodies.BatchAppendBody,
            body_example={**_SESSIONS, **_BATCH_APPEND_BODY},
            answer=bodies.BatchAppendAnswer,
            example={**_BATCH, **_BATCH_APPENDED},
            tensors="One group of writes; an item that fails changes nothing, and nothing of the others. "
            "Binary: tensor `embeddings`; the answer has none.",
            parameters=(IDEMPOTENCY_KEY,),
            codes=_BATCH_CODES,
        ),
        HotCall(
            path="/v1/batch/attend",
            method="post",
            operation_id="batch_attend",
            summary="Attend to many sessions",
            body=bodies.BatchAttendBody,
            body_example={**_SESSIONS, **_BATCH_ATTEND_BODY},
            answer=bodies.BatchAttendAnswer,
            example={**_BATCH, **_BATCH_ATTENDED},
            tensors="One entry of the device's queue. "
            "Binary: tensors `queries`, `mask`, `chunk_mask`; `output`, `chunks.index`, `chunks.weight`.",
            codes=_BATCH_CODES,
        ),
        HotCall(
            path="/v1/batch/search",
            method="post",
            operation_id="batch_search",
            summary="Search many sessions",
            body=bodies.BatchSearchBody,
            body_example={**_SESSIONS, "queries": [[0.6, 0.8], [0.8, 0.6]], "n": 1},
            answer=bodies.BatchSearchAnswer,
            example={**_BATCH, "found": [[[_FOUND]], [[]]], "length": [40, 0], "chunk_size": [32, 0]},
            tensors="One entry of the device's queue. Binary: tensors `queries`, `mask`; `position` [S, Q, n], -1 "
            "where nothing is found, `score`, `embeddings`; payloads in `params`.",
            codes=_BATCH_CODES,
        ),
        HotCall(
            path="/v1/batch/step",
            method="post",
            operation_id="batch_step",
            summary="Attend to many sessions, then append to them",
            body=bodies.BatchStepBody,
            body_example={**_SESSIONS, "attend": _BATCH_ATTEND_BODY, "append": _BATCH_APPEND_BODY},
            answer=bodies.BatchStepAnswer,
            example={**_BATCH, "attend": _BATCH_ATTENDED, "append": _BATCH_APPENDED},
            tensors="Each item is a step: it attends to its session as it is, and appends unless that failed. "
            "Binary: tensors `queries`, `mask`, `chunk_mask`, `embeddings`; `attend.output`, `attend.chunks.index`, "
            "`attend.chunks.weight`.",
            parameters=(IDEMPOTENCY_KEY,),
            codes=_BATCH_CODES,
        ),
        HotCall(
            path="/v1/batch/select",
            method="post",
            operation_id="batch_select",
            summary="Which chunks queries in key space take of many sessions, and what they hold",
            body=bodies.BatchSelectBody,
            body_example={**_SESSIONS, "queries": [[0.6, 0.8], [0.8, 0.6]], "top_k": 2, "return": ["chunks", "keys"]},
            answer=bodies.BatchSelectAnswer,
            example={**_BATCH, **_BATCH_SELECTED},
            tensors="One entry of the device's queue; it is no recall. Binary: tensors `queries`, `mask`, "
            "`chunk_mask`; `chunks.index`, `chunks.logit`, `unique.index`, `unique.key`, `unique.tokens`, "
            "`unique.visible`.",
            codes=_BATCH_CODES,
        ),
        HotCall(
            path="/v1/batch/truncate",
            method="post",
            operation_id="batch_truncate",
            summary="Forget what came after a length in many sessions",
            body=bodies.BatchTruncateBody,
            body_example={**_SESSIONS, "length": 0},
            answer=bodies.BatchTruncateAnswer,
            example={**_BATCH, "length": [0, 0], "num_chunks": [0, 0]},
            tensors="One group of writes; an item that fails changes nothing, and nothing of the others. There are no "
            "tensors.",
            codes=_BATCH_CODES,
        ),
    ]


def _query(name: str, description: str, kind: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "description": description, "schema": {"type": kind}}
