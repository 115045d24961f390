"""Each call of the contract once: how it is asked and how its answer is read. Both clients send these.

Does not know sockets, retries or whether anyone awaits.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Generic, TypeVar

from htm_client import calls, safetensors
from htm_client.arrays import floats
from htm_client.batches import MAX_SESSIONS, Batch, Errors
from htm_client.calls import Answer, Call, Codec, Sink, Source, attend_parts, model_path, plain, session_path
from htm_client.errors import InvalidArgument
from htm_client.models import model_file
from htm_client.options import (
    AppendConditions,
    AppendOptions,
    AttendOptions,
    BatchAppendConditions,
    BatchAppendOptions,
    BatchAttendOptions,
    BatchPayloads,
    BatchSearchOptions,
    BatchSelectOptions,
    ExplainOptions,
    ModelOptions,
    Payloads,
    RecallOptions,
    SearchAllOptions,
    SearchOptions,
    SelectOptions,
    SessionChanges,
    SessionOptions,
    check,
)
from htm_client.results import (
    Appended,
    Attended,
    BatchAppended,
    BatchAttended,
    BatchFound,
    BatchSelected,
    BatchStepped,
    BatchTruncated,
    Chunk,
    ChunkDetail,
    Explained,
    Floats,
    Found,
    Memories,
    Model,
    Recall,
    Recalled,
    Selected,
    SessionInfo,
    Stepped,
    Truncated,
)

T = TypeVar("T")

SURVEY_S = 600.0
"""How long a server may read a session before an export's first byte, or write one after an import's last."""


@dataclass(frozen=True, slots=True)
class Request(Generic[T]):
    """A call and what to make of its answer."""

    call: Call
    read: Callable[[Answer], T]


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a listing, and the cursor of the next."""

    items: Sequence[T]
    cursor: str | None


class Requests:
    """See the head of this module."""

    def __init__(self, *, binary: bool) -> None:
        self._codec = Codec(binary=binary)

    def create_session(self, session: str | None, options: SessionOptions) -> Request[SessionInfo]:
        """PUT with an id, POST without."""
        check("create_session", options, SessionOptions)
        if session is None:  # sent twice, it would make two sessions
            return Request(replace(plain("POST", "/v1/sessions", dict(options)), idempotent=False), _session)
        return Request(plain("PUT", session_path(session), dict(options)), _session)

    def sessions(
        self, label: Mapping[str, str] | None, prefix: str | None, cursor: str | None
    ) -> Request[Page[SessionInfo]]:
        """One page of the sessions. Raises InvalidArgument for a label name that the query cannot hold."""
        call = plain("GET", "/v1/sessions", label=_labels(label), prefix=prefix, cursor=cursor)
        return Request(call, lambda answer: _page(answer, "sessions", SessionInfo.of))

    def session(self, session: str) -> Request[SessionInfo]:
        """Inspect one."""
        return Request(plain("GET", session_path(session)), _session)

    def update_session(self, session: str, changes: SessionChanges) -> Request[SessionInfo]:
        """Change one."""
        check("update_session", changes, SessionChanges)
        return Request(plain("PATCH", session_path(session), dict(changes)), _session)

    def delete_session(self, session: str) -> Request[None]:
        """Delete one."""
        return Request(plain("DELETE", session_path(session)), lambda answer: None)

    def fork(
        self, session: str, id: str | None, length: int | None, labels: Mapping[str, str] | None
    ) -> Request[SessionInfo]:
        """Begin another one with its first tokens. Sent twice, it would find its own session in the way."""
        if id is not None:
            session_path(id)  # says what is wrong with it
        body = calls.given(id=id, length=length, labels=labels)
        return Request(replace(plain("POST", session_path(session, "fork"), body), idempotent=False), _session)

    def truncate(self, session: str, length: int, if_length: int | None) -> Request[Truncated]:
        """Forget its last tokens. With a condition, that is not met by the second time it is sent."""
        call = plain("POST", session_path(session, "truncate"), calls.given(length=length, if_length=if_length))
        return Request(replace(call, idempotent=if_length is None), lambda answer: Truncated.of(answer.params))

    def delete_sessions(self, label: Mapping[str, str] | None, prefix: str | None) -> Request[int]:
        """Delete all of them. Raises InvalidArgument for a label name that the query cannot hold."""
        call = plain("DELETE", "/v1/sessions", label=_labels(label), prefix=prefix)
        return Request(call, lambda answer: int(answer.params["deleted"]))

    def append(
        self, session: str, embeddings: Any, payloads: Payloads | None, options: AppendConditions
    ) -> Request[Appended]:
        """Add tokens."""
        check("append", options, AppendConditions, "payloads")
        call = self._codec.append(session, embeddings, payloads, conditions=options)
        return Request(call, lambda answer: Appended.of(answer.params))

    def attend(self, session: str, queries: Any, options: AttendOptions) -> Request[Attended]:
        """Ask."""
        check("attend", options, AttendOptions)
        return Request(self._codec.attend(session, *attend_parts(queries, **options)), calls.attended)

    def explain(self, session: str, query: Any, options: ExplainOptions) -> Request[Explained]:
        """Ask why."""
        check("explain", options, ExplainOptions)
        explained: ExplainOptions = {"returns": [], **options}
        return Request(self._codec.explain(session, *attend_parts(query, **explained)), calls.explained)

    def select(self, session: str, queries: Any, options: SelectOptions) -> Request[Selected]:
        """Ask which chunks are taken, and what they hold."""
        check("select", options, SelectOptions)
        everything: SelectOptions = {"returns": ["chunks", "keys", "tokens"], **options}
        return Request(self._codec.select(session, *attend_parts(queries, **everything)), calls.selected)

    def search(
        self, session: str, query: Any, n: int, *, embeddings: bool, payloads: bool, options: SearchOptions
    ) -> Request[list[Found]]:
        """Find tokens."""
        array = _one_query("search", query)
        many = self.search_many(session, array, n, embeddings=embeddings, payloads=payloads, options=options)
        return Request(many.call, lambda answer: many.read(answer)[0])

    def search_many(
        self, session: str, queries: Any, n: int, *, embeddings: bool, payloads: bool, options: SearchOptions
    ) -> Request[list[list[Found]]]:
        """The same for each of several queries."""
        check("search", options, SearchOptions, "n", "embeddings", "payloads")
        parts = attend_parts(queries, n=n, returns=_included(embeddings, payloads), **options)
        return Request(self._codec.search(session, *parts), calls.found)

    def search_all(
        self,
        queries: Any,
        n: int,
        sessions: Sequence[str] | None,
        label: Mapping[str, str] | None,
        prefix: str | None,
        *,
        embeddings: bool,
        payloads: bool,
        options: SearchAllOptions,
    ) -> Request[list[list[Found]]]:
        """Find tokens of several sessions."""
        check("search_all", options, SearchAllOptions, "n", "sessions", "label", "prefix", "embeddings", "payloads")
        ids = None if sessions is None else calls.session_ids(sessions)
        named = {"sessions": ids, "label": label, "prefix": prefix}
        parts = attend_parts(queries, n=n, returns=_included(embeddings, payloads), **named, **options)
        return Request(self._codec.search_all(*parts), calls.found)

    def step(
        self, session: str, queries: Any, embeddings: Any, attend: AttendOptions, append: AppendOptions
    ) -> Request[Stepped]:
        """Ask, then add."""
        check("a step's attend", attend, AttendOptions)
        check("a step's append", append, AppendOptions)
        parts = attend_parts(queries, **attend)
        return Request(self._codec.step(session, parts, embeddings, append), calls.stepped)

    def batch_append(
        self,
        sessions: Sequence[str],
        embeddings: Any,
        payloads: BatchPayloads | None,
        errors: Errors,
        options: BatchAppendConditions,
    ) -> Request[BatchAppended]:
        """Add tokens to many sessions."""
        batch = Batch(sessions, errors)
        return Request(batch.append(self._codec, embeddings, payloads, options), batch.appended)

    def batch_attend(
        self, sessions: Sequence[str], queries: Any, errors: Errors, options: BatchAttendOptions
    ) -> Request[BatchAttended]:
        """Ask many sessions."""
        batch = Batch(sessions, errors)
        return Request(batch.attend(self._codec, queries, options), batch.attended)

    def batch_search(
        self,
        sessions: Sequence[str],
        queries: Any,
        n: int,
        *,
        embeddings: bool,
        payloads: bool,
        errors: Errors,
        options: BatchSearchOptions,
    ) -> Request[BatchFound]:
        """Search many sessions."""
        batch = Batch(sessions, errors)
        call = batch.search(self._codec, queries, options, n=n, returns=_included(embeddings, payloads))
        return Request(call, batch.found)

    def batch_step(
        self,
        sessions: Sequence[str],
        queries: Any,
        embeddings: Any,
        attend: BatchAttendOptions,
        append: BatchAppendOptions,
        errors: Errors,
    ) -> Request[BatchStepped]:
        """Ask many sessions, then add to them."""
        batch = Batch(sessions, errors)
        return Request(batch.step(self._codec, queries, embeddings, attend, append), batch.stepped)

    def batch_select(
        self, sessions: Sequence[str], queries: Any, errors: Errors, options: BatchSelectOptions
    ) -> Request[BatchSelected]:
        """Ask which chunks are taken of many sessions."""
        batch = Batch(sessions, errors)
        return Request(batch.select(self._codec, queries, options), batch.selected)

    def batch_truncate(
        self, sessions: Sequence[str], length: Any, if_length: Iterable[Any] | None, errors: Errors
    ) -> Request[BatchTruncated]:
        """Forget the last tokens of many sessions."""
        batch = Batch(sessions, errors)
        return Request(batch.truncate(self._codec, length, if_length), batch.truncated)

    def resets(self, sessions: str | Iterable[str]) -> Iterator[Request[BatchTruncated]]:
        """Forget all tokens of any number of sessions, by as few requests as that takes."""
        rest = iter([sessions] if isinstance(sessions, str) else sessions)
        while some := list(islice(rest, MAX_SESSIONS)):
            yield self.batch_truncate(some, 0, None, "raise")

    def read(
        self, session: str, start: int, stop: int | None, *, embeddings: bool, payloads: bool
    ) -> Request[Memories]:
        """Read back."""
        call = self._codec.read(session, start, stop, embeddings=embeddings, payloads=payloads)
        return Request(call, calls.memories)

    def export(self, session: str, sink: Sink) -> Request[None]:
        """A session as a file."""
        headers = {"Accept": f"{safetensors.MEDIA_TYPE}, {calls.JSON}"}
        call = Call("GET", session_path(session, "export"), None, headers, sink=sink, max_silence_s=SURVEY_S)
        return Request(call, lambda answer: None)

    def import_(self, session: str, source: Source) -> Request[SessionInfo]:
        """A session from a file. Sent twice, the second would meet the first's session."""
        headers = {"Accept": calls.JSON, "Content-Type": safetensors.MEDIA_TYPE}
        path = session_path(session, "import")
        return Request(
            Call("PUT", path, None, headers, idempotent=False, source=source, max_silence_s=SURVEY_S), _session
        )

    def chunks(self, session: str, cursor: str | None, *, keys: bool) -> Request[Page[Chunk]]:
        """One page of a session's chunks."""
        call = plain("GET", session_path(session, "chunks"), cursor=cursor, include="keys" if keys else None)
        return Request(call, lambda answer: _page(answer, "chunks", Chunk.of))

    def chunk(self, session: str, index: int, *, embeddings: bool, key: bool) -> Request[ChunkDetail]:
        """One chunk."""
        include = ",".join(name for name, wanted in (("embeddings", embeddings), ("key", key)) if wanted) or None
        return Request(
            plain("GET", session_path(session, "chunks", str(operator.index(index))), include=include),
            calls.chunk_detail,
        )

    def recalls(self, session: str, limit: int) -> Request[list[Recall]]:
        """The last recalls."""
        call = plain("GET", session_path(session, "recalls"), limit=limit)
        return Request(call, lambda answer: [Recall.of(item) for item in answer.params["recalls"]])

    def models(self) -> Request[list[Model]]:
        """The models that can be named."""
        return Request(plain("GET", "/v1/models"), lambda answer: [Model.of(item) for item in answer.params["models"]])

    def model(self, name: str) -> Request[Model]:
        """One of them."""
        return Request(plain("GET", model_path(name)), _model)

    def put_model(self, name: str, source: Any, options: ModelOptions) -> Request[Model]:
        """Weights, as a model file. With a condition it is not sent again: it would meet what it did itself."""
        check("put_model", options, ModelOptions)
        headers = {"Content-Type": safetensors.MEDIA_TYPE, "Accept": calls.JSON, **_condition(options)}
        is_idempotent = not _condition(options)
        content = model_file(source, options)
        return Request(Call("PUT", model_path(name), content, headers, idempotent=is_idempotent), _model)

    def delete_model(self, name: str, if_match: str | None) -> Request[None]:
        """Delete one."""
        call = plain("DELETE", model_path(name))
        condition = {} if if_match is None else _condition({"if_match": if_match})
        return Request(replace(call, headers={**call.headers, **condition}), lambda answer: None)

    def info(self) -> Request[dict[str, Any]]:
        """What the server is, may take and holds."""
        return Request(plain("GET", "/v1/info"), lambda answer: answer.params)

    def live(self) -> Request[None]:
        """Whether the process answers."""
        return Request(plain("GET", "/livez"), lambda answer: None)

    def ready(self) -> Request[None]:
        """Whether the server takes requests."""
        return Request(plain("GET", "/readyz"), lambda answer: None)

    def recall(self, session: str, query: Any, n: int, options: RecallOptions) -> Request[list[Recalled]]:
        """The n most similar of the tokens that one query recalls, with their payloads."""
        many = self.recall_many(session, _one_query("recall", query), n, options)
        return Request(many.call, lambda answer: many.read(answer)[0])

    def recall_many(self, session: str, queries: Any, n: int, options: RecallOptions) -> Request[list[list[Recalled]]]:
        """The same for each of several queries."""
        check("recall", options, RecallOptions, "n")
        defaults: RecallOptions = {"top_k": 16, "rank_by": "score"}
        asked: AttendOptions = {**defaults, **options, "returns": ["payloads"], "max_recalled": n}
        call = self._codec.attend(session, *attend_parts(queries, **asked))
        return Request(call, lambda answer: [list(row) for row in calls.attended(answer).recalled or []])


def _labels(label: Mapping[str, str] | None) -> list[str] | None:
    for key in label or {}:
        if ":" in key:  # `key:value` ends the name at the first colon, and would find other sessions
            raise InvalidArgument(f"sessions cannot be found by the label {key!r}: its name has a colon")
    return [f"{key}:{value}" for key, value in (label or {}).items()] or None


def _condition(options: ModelOptions) -> dict[str, str]:
    """The headers of a condition. Raises InvalidArgument for a hash that is none."""
    headers = {"If-None-Match": "*"} if options.get("if_new") else {}
    if (hash_ := options.get("if_match")) is not None:
        if not hash_.isalnum():
            raise InvalidArgument(f"if_match is {hash_!r:.100}, it must be the hash of a model")
        headers["If-Match"] = f'"{hash_}"'
    return headers


def _model(answer: Answer) -> Model:
    return Model.of(answer.params)


def _session(answer: Answer) -> SessionInfo:
    return SessionInfo.of(answer.params)


def _page(answer: Answer, name: str, of: Callable[[Mapping[str, Any]], T]) -> Page[T]:
    return Page([of(item) for item in answer.params[name]], answer.params["cursor"])


def _one_query(call: str, query: Any) -> Floats:
    array = floats(query)
    if array.ndim != 1:
        raise InvalidArgument(f"{call} takes one query [D], not shape {list(array.shape)}; {call}_many takes [Q, D]")
    return array


def _included(embeddings: bool, payloads: bool) -> list[str]:
    """What a search answers of each token."""
    return [name for name, wanted in (("payloads", payloads), ("embeddings", embeddings)) if wanted]
