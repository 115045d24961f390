"""Lock-step calls: many sessions in one request; how they are asked, and how their answers are read.

Does not know sockets or retries.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

from htm_client import calls
from htm_client.arrays import floats
from htm_client.calls import Answer, Call, Codec, Params, Tensors, given
from htm_client.errors import BatchFailed, InvalidArgument, ItemError, from_answer
from htm_client.options import (
    BatchAppendConditions,
    BatchAppendOptions,
    BatchAttendOptions,
    BatchSearchOptions,
    BatchSelectOptions,
    check,
)
from htm_client.results import BatchAppended, BatchAttended, BatchFound, BatchSelected, BatchStepped, BatchTruncated

MAX_SESSIONS = 4_096
"""Of one request."""

Errors = Literal["raise", "return"]
T = TypeVar("T", BatchAppended, BatchAttended, BatchFound, BatchSelected, BatchStepped, BatchTruncated)


@dataclass(frozen=True, slots=True)
class Batch:
    """The sessions of a request, and whether items that failed are raised or returned."""

    sessions: Sequence[str]
    errors: Errors

    def __post_init__(self) -> None:
        if self.errors not in ("raise", "return"):
            raise InvalidArgument(f"errors is {self.errors!r:.100}, it must be 'raise' or 'return'")
        calls.session_ids(self.sessions)

    def append(
        self, codec: Codec, embeddings: Any, payloads: Iterable[Any] | None, conditions: BatchAppendConditions
    ) -> Call:
        """Appends."""
        check("batch_append", conditions, BatchAppendConditions, "payloads", "errors")
        params = _append_params(payloads, conditions)
        key = calls.key_of(conditions)
        sent = {"sessions": list(self.sessions), **params}
        return codec.post("/v1/batch/append", {"embeddings": floats(embeddings)}, sent, key, _flat(params))

    def attend(self, codec: Codec, queries: Any, options: BatchAttendOptions) -> Call:
        """Attends."""
        check("batch_attend", options, BatchAttendOptions, "errors")
        tensors, params = _attend_parts(queries, options)
        return codec.post("/v1/batch/attend", tensors, {"sessions": list(self.sessions), **params})

    def search(self, codec: Codec, queries: Any, options: BatchSearchOptions, **params: Any) -> Call:
        """Searches; `params` are n and what is returned."""
        check("batch_search", options, BatchSearchOptions, "n", "embeddings", "payloads", "errors")
        model = options.get("model")
        tensors, sent = calls.attend_parts(queries, **options, **params)
        if model is not None and not isinstance(model, str):
            sent = sent | {"model": list(model)}
        return codec.post("/v1/batch/search", tensors, {"sessions": list(self.sessions), **sent})

    def step(
        self, codec: Codec, queries: Any, embeddings: Any, attend: BatchAttendOptions, append: BatchAppendOptions
    ) -> Call:
        """Steps."""
        check("a batch_step's attend", attend, BatchAttendOptions)
        check("a batch_step's append", append, BatchAppendOptions)
        appended = {"embeddings": floats(embeddings)}, _append_params(append.get("payloads"), append)
        key = calls.key_of(append)
        sent = {"sessions": list(self.sessions)}
        return codec.post_step("/v1/batch/step", _attend_parts(queries, attend), appended, sent, key)

    def select(self, codec: Codec, queries: Any, options: BatchSelectOptions) -> Call:
        """Selects."""
        check("batch_select", options, BatchSelectOptions, "errors")
        everything: BatchSelectOptions = {"returns": ["chunks", "keys", "tokens"], **options}
        tensors, params = calls.attend_parts(queries, **everything)
        return codec.post("/v1/batch/select", tensors, {"sessions": list(self.sessions), **params})

    def truncate(self, codec: Codec, length: Any, if_length: Iterable[Any] | None) -> Call:
        """Truncations; with a condition they are not sent again: they would meet what they did themselves."""
        params = given(length=_one_or_each(length), if_length=_integers(if_length))
        call = codec.post("/v1/batch/truncate", {}, {"sessions": list(self.sessions), **params})
        return replace(call, idempotent=if_length is None)

    def appended(self, answer: Answer) -> BatchAppended:
        """The result of appends."""
        return self._checked(answer, _appended(answer.params))

    def attended(self, answer: Answer) -> BatchAttended:
        """The result of attends."""
        return self._checked(answer, _attended(answer, ""))

    def found(self, answer: Answer) -> BatchFound:
        """The result of searches."""
        return self._checked(answer, _found(answer))

    def stepped(self, answer: Answer) -> BatchStepped:
        """The result of steps."""
        attended, appended = _attended(answer, "attend."), _appended(answer.params["append"])
        return self._checked(answer, BatchStepped(attended, appended))

    def selected(self, answer: Answer) -> BatchSelected:
        """The result of selects."""
        sizes = answer.params.get("chunk_size")
        result = BatchSelected(
            chunk_index=answer.tensors.get("chunks.index"),
            chunk_logit=answer.tensors.get("chunks.logit"),
            unique_index=answer.tensors.get("unique.index"),
            unique_key=answer.tensors.get("unique.key"),
            unique_tokens=answer.tensors.get("unique.tokens"),
            unique_visible=answer.tensors.get("unique.visible"),
            chunk_size=None if sizes is None else np.array(sizes, np.int64),
            length=np.array(answer.params["length"], np.int64),
        )
        return self._checked(answer, result)

    def truncated(self, answer: Answer) -> BatchTruncated:
        """The result of truncations."""
        length, num_chunks = (np.array(answer.params[name], np.int64) for name in ("length", "num_chunks"))
        return self._checked(answer, BatchTruncated(length=length, num_chunks=num_chunks))

    def _checked(self, answer: Answer, result: T) -> T:
        """The result with what became of each item. Raises BatchFailed where some failed, unless they are wanted."""
        errors = [self._error(item, answer) for item in answer.params["errors"]]
        status = np.array(answer.params["status"], np.int64)
        result = replace(result, status=status, errors=errors)
        if errors and self.errors == "raise":
            raise BatchFailed(errors, len(status), result)
        return result

    def _error(self, said: dict[str, Any], answer: Answer) -> ItemError:
        problem = {name: value for name, value in said.items() if name != "item"}
        error = from_answer(said["status"], problem, answer.headers.get("x-request-id", ""))
        return ItemError(said["item"], self.sessions[said["item"]], error)


def _attend_parts(queries: Any, options: BatchAttendOptions) -> tuple[Tensors, Params]:
    model = options.get("model")
    tensors, params = calls.attend_parts(queries, **options)
    return (tensors, params) if model is None or isinstance(model, str) else (tensors, params | {"model": list(model)})


def _append_params(payloads: Iterable[Any] | None, conditions: BatchAppendConditions) -> Params:
    return given(
        payloads=None if payloads is None else [None if one is None else calls.listed(one) for one in payloads],
        num_tokens=_integers(conditions.get("num_tokens")),
        if_length=_integers(conditions.get("if_length")),
        episode=_one_or_each(conditions.get("episode")),
    )


def _integers(values: Iterable[Any] | None) -> list[int | None] | None:
    """Whole numbers, of arrays and tensors too. Raises TypeError for others."""
    return None if values is None else [None if value is None else operator.index(value) for value in values]


def _one_or_each(value: Any) -> Any:
    """One whole number for all, or a list with one for each session; None as it is. Raises TypeError for others."""
    if value is None or hasattr(value, "__iter__"):
        return _integers(value)
    return operator.index(value)


def _flat(params: Params) -> list[Any]:
    return [payload for one in params.get("payloads", ()) for payload in one or ()]


def _appended(params: Params) -> BatchAppended:
    start, length, num_chunks = (np.array(params[name], np.int64) for name in ("start", "length", "num_chunks"))
    return BatchAppended(start=start, length=length, num_chunks=num_chunks)


def _attended(answer: Answer, prefix: str) -> BatchAttended:
    params = answer.params[prefix.rstrip(".")] if prefix else answer.params
    rows = params.get("recalled")
    return BatchAttended(
        output=answer.tensors.get(f"{prefix}output"),
        chunk_index=answer.tensors.get(f"{prefix}chunks.index"),
        chunk_weight=answer.tensors.get(f"{prefix}chunks.weight"),
        recalled=None if rows is None else [calls.recalled(of_session) for of_session in rows],
        length=np.array(params["length"], np.int64),
        model_hash=params.get("model_hash", [""] * len(params["length"])),
        **calls.measured(answer),
    )


def _found(answer: Answer) -> BatchFound:
    vectors, params = answer.tensors.get("embeddings"), answer.params
    rows = params.get("found")
    if rows is None:
        numbers = zip(answer.tensors["position"], answer.tensors["score"], strict=True)
        texts = params.get("payloads") or [None] * len(params["status"])
        rows = [
            calls.found_items(position, score, of, size or 1)
            for (position, score), of, size in zip(numbers, texts, params["chunk_size"], strict=True)
        ]
    return BatchFound(
        found=[calls.found_rows(of, None if vectors is None else vectors[at]) for at, of in enumerate(rows)],
        length=np.array(params["length"], np.int64),
        **calls.measured(answer),
    )
