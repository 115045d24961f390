"""The REST contract without a socket: calls as values, answers as results. Shared by both clients.

Does not know httpx, retries or time.
"""

from __future__ import annotations

import base64
import json
import operator
import os
import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from htm_client import safetensors
from htm_client.arrays import bools, floats
from htm_client.errors import InvalidArgument, UnreadableAnswer, from_answer
from htm_client.json_text import dumps
from htm_client.options import AppendConditions, AppendOptions
from htm_client.results import Appended, Attended, ChunkDetail, Explained, Found, Memories, Recalled, Selected, Stepped
from htm_client.results import Chunk as ChunkResult

JSON = "application/json"
_SESSION_ID = re.compile(r"[A-Za-z0-9._~-]{1,128}")
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")
Params = dict[str, Any]
Tensors = dict[str, npt.NDArray[Any]]

UNIQUE = ("index", "key", "tokens", "visible")
"""What a select answers of the chunks taken, under `unique.`."""
TENSORS = frozenset({"output", "embeddings", "chunks.index", "chunks.logit", "chunks.weight"}).union(
    f"unique.{name}" for name in UNIQUE
)
"""Where answers hold tensors; in a step's answer under `attend.`. Elsewhere such an object is the caller's own data."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request: everything but where the server is.

    `idempotent` tells whether it may be sent again although the server may have carried it out.
    """

    method: str
    path: str
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str | int | Sequence[str]] = field(default_factory=dict)
    idempotent: bool = True
    source: Source | None = None
    """Instead of `content`, what is sent in pieces."""
    sink: Sink | None = None
    """What gets the body of a good answer, instead of whoever asks."""
    max_silence_s: float | None = None
    """How long nothing may come or go, where that is longer than the client's `timeout`."""


class Source(Protocol):
    """A body that is sent in pieces, more than once when it must be."""

    num_bytes: int

    def pieces(self) -> Generator[bytes, None, None]:
        """Its bytes, from the beginning. Raises FileFailed."""


class Sink(Protocol):
    """What takes the body of an answer as it comes."""

    def begin(self, num_bytes: int | None) -> None:
        """An answer begins, of so many bytes where it says so; what came before is of one that broke off."""

    def write(self, part: bytes) -> None:
        """A part of it. Raises FileFailed, as `begin` does."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer: its tensors by name, everything else, and its headers."""

    tensors: Tensors
    params: Params
    headers: Mapping[str, str]


def session_path(session: str, *rest: str) -> str:
    """The path of a session, or of something in it. Raises TypeError and InvalidArgument for what is no id."""
    if not isinstance(session, str):
        raise TypeError(f"a session id is a string, not {session!r:.100}")
    if not _SESSION_ID.fullmatch(session) or session in {".", ".."}:
        raise InvalidArgument(f"{session!r:.200} is no session id: those are 1 to 128 of A-Z a-z 0-9 . _ ~ -")
    return "/".join(["/v1/sessions", session, *rest])


def session_ids(sessions: Iterable[str]) -> list[str]:
    """Several sessions. Raises TypeError and InvalidArgument for what are no ids."""
    if isinstance(sessions, str):
        raise TypeError(f"sessions is a list of session ids, not {sessions!r:.100}")
    ids = list(sessions)
    for one in ids:
        session_path(one)
    return ids


def model_path(name: str) -> str:
    """The path of a model. Raises TypeError and InvalidArgument for what is no name."""
    if not isinstance(name, str):
        raise TypeError(f"a model's name is a string, not {name!r:.100}")
    if not _SESSION_ID.fullmatch(name) or name in {".", ".."}:
        raise InvalidArgument(f"{name!r:.200} is no model's name: those are 1 to 128 of A-Z a-z 0-9 . _ ~ -")
    return f"/v1/models/{name}"


def plain(method: str, path: str, body: Mapping[str, Any] | None = None, **query: Any) -> Call:
    """A call with a JSON body or none; None leaves a query parameter out."""
    content = None if body is None else dumps(body).encode()
    headers = {"Accept": JSON} if body is None else {"Accept": JSON, "Content-Type": JSON}
    return Call(method, path, content, headers, {name: value for name, value in query.items() if value is not None})


def given(**fields: Any) -> Params:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


class Codec:
    """How tensors travel: as safetensors, or as base64 in JSON."""

    def __init__(self, *, binary: bool) -> None:
        self.binary = binary

    def append(
        self,
        session: str,
        embeddings: Any,
        payloads: Iterable[Mapping[str, Any] | None] | None,
        *,
        conditions: AppendConditions,
    ) -> Call:
        """An append; without a key of the caller's it gets one, so that it can be sent again."""
        params = append_params(payloads, conditions)
        tensors: Tensors = {"embeddings": floats(embeddings)}
        return self.post(session_path(session, "memories"), tensors, params, key_of(conditions), payloads_of(params))

    def attend(self, session: str, tensors: Tensors, params: Params) -> Call:
        """An attend, of `attend_parts`."""
        return self.post(session_path(session, "attend"), tensors, params)

    def explain(self, session: str, tensors: Tensors, params: Params) -> Call:
        """An explanation, of `attend_parts`."""
        return self.post(session_path(session, "explain"), tensors, params)

    def select(self, session: str, tensors: Tensors, params: Params) -> Call:
        """A select, of `attend_parts`."""
        return self.post(session_path(session, "select"), tensors, params)

    def search(self, session: str, tensors: Tensors, params: Params) -> Call:
        """A search, of `attend_parts`."""
        return self.post(session_path(session, "search"), tensors, params)

    def search_all(self, tensors: Tensors, params: Params) -> Call:
        """A search through several sessions, of `attend_parts`."""
        return self.post("/v1/search", tensors, params)

    def step(self, session: str, attend: tuple[Tensors, Params], embeddings: Any, options: AppendOptions) -> Call:
        """A step: an attend of `attend_parts`, then an append."""
        append = append_params(options.get("payloads"), options)
        path = session_path(session, "step")
        return self.post_step(path, attend, ({"embeddings": floats(embeddings)}, append), {}, key_of(options))

    def post_step(
        self, path: str, attend: tuple[Tensors, Params], append: tuple[Tensors, Params], params: Params, key: str
    ) -> Call:
        """An attend and an append in one body, each under its name, beside `params`."""
        payloads = payloads_of(append[1])
        if self.binary:
            body = {**params, "attend": attend[1], "append": append[1]}
            return self.post(path, attend[0] | append[0], body, key, payloads)
        parts = {
            name: fields | {tensor: _base64(array) for tensor, array in tensors.items()}
            for name, (tensors, fields) in (("attend", attend), ("append", append))
        }
        return self.post(path, {}, {**params, **parts}, key, payloads)

    def read(self, session: str, start: int, stop: int | None, *, embeddings: bool, payloads: bool) -> Call:
        """A read back."""
        include = [name for name, wanted in (("embeddings", embeddings), ("payloads", payloads)) if wanted]
        query = given(start=start, stop=stop, include=",".join(include)) | self._encoding()
        return Call("GET", session_path(session, "memories"), None, {"Accept": self._accept()}, query)

    def post(
        self,
        path: str,
        tensors: Tensors,
        params: Params,
        key: str | None = None,
        payloads: Iterable[Any] = (),
    ) -> Call:
        """A call with tensors, under an idempotency key where it appends; `payloads` are among the params."""
        try:
            if self.binary:
                content = safetensors.dump(tensors, params)
            else:
                content = dumps(params | {name: _base64(array) for name, array in tensors.items()}).encode()
        except (TypeError, InvalidArgument):
            _check_payloads(payloads)  # so that the error says which it is of
            raise
        headers = {"Content-Type": self._accept(), "Accept": self._accept()}
        if key is not None:
            headers["Idempotency-Key"] = key
        return Call("POST", path, content, headers, self._encoding())

    def _accept(self) -> str:
        return safetensors.MEDIA_TYPE if self.binary else JSON

    def _encoding(self) -> dict[str, str]:
        return {} if self.binary else {"encoding": "b64"}


def attend_parts(
    queries: Any,
    *,
    mask: Any = None,
    chunk_mask: Any = None,
    returns: Sequence[str] = ("output",),
    **fields: Any,
) -> tuple[Tensors, Params]:
    """Tensors and parameters of an attend; see docs/api.md of the server for each field."""
    if isinstance(returns, str):
        raise TypeError(f"returns is a list of names, not {returns!r:.100}")
    tensors: Tensors = {"queries": floats(queries)}
    if mask is not None:
        tensors["mask"] = bools(mask)
    if chunk_mask is not None:
        tensors["chunk_mask"] = bools(chunk_mask)
    for name in ("start", "stop"):
        if hasattr(fields.get(name), "__iter__"):
            fields[name] = _positions(fields[name])
    return tensors, {"return": list(returns)} | given(**fields)


def _positions(values: Iterable[Any]) -> list[Any]:
    """Whole numbers, of arrays and tensors too, in lists of lists where there are some. Raises TypeError for others."""
    return [
        value if value is None else _positions(value) if hasattr(value, "__iter__") else operator.index(value)
        for value in (values.tolist() if hasattr(values, "tolist") else values)
    ]


def append_params(payloads: Iterable[Mapping[str, Any] | None] | None, conditions: AppendConditions) -> Params:
    """Parameters of an append."""
    fields = {name: conditions.get(name) for name in ("episode", "if_length")}
    return given(payloads=None if payloads is None else listed(payloads), **fields)


def payloads_of(params: Params) -> Iterable[Any]:
    """The payloads among the parameters of an append."""
    found: Iterable[Any] = params.get("payloads", ())
    return found


def listed(payloads: Iterable[Mapping[str, Any] | None]) -> list[Mapping[str, Any] | None]:
    """Raises TypeError, and InvalidArgument, with the number of what is no payload."""
    if isinstance(payloads, Mapping | str | bytes):
        raise TypeError(f"payloads is a list of one object, or None, per token, not a {type(payloads).__name__}")
    listed = list(payloads)
    for number, payload in enumerate(listed):
        if payload is not None and not isinstance(payload, Mapping):
            raise TypeError(f"payloads[{number}] must be an object or None, not {payload!r:.100}")
    return listed


def _check_payloads(payloads: Iterable[Mapping[str, Any] | None]) -> None:
    for number, payload in enumerate(payloads):
        try:
            dumps(payload)
        except TypeError as error:
            raise TypeError(f"payloads[{number}]: {error}") from error
        except InvalidArgument as error:
            raise InvalidArgument(f"payloads[{number}]: {error}") from error


def parse(status: int, headers: Mapping[str, str], content: bytes) -> Answer:
    """An answer of the server. Raises the error that it says, or UnreadableAnswer."""
    if status >= 400:
        try:
            problem = json.loads(content)
        except ValueError:
            problem = None
        if not isinstance(problem, dict):  # not from the server, but from something in between
            problem = {"detail": content[:200].decode(errors="replace")}
        raise from_answer(status, problem, headers.get("x-request-id", ""))
    try:
        if status >= 300:
            raise ValueError(f"it redirects to {headers.get('location', '')!r:.200}")
        if headers.get("content-encoding", "identity") != "identity":
            raise ValueError(f"it is compressed ({headers['content-encoding']!r:.50}), which was not asked for")
        if content and headers.get("content-type", "").startswith(safetensors.MEDIA_TYPE):  # a sink leaves none
            tensors, params = safetensors.load(content)
            return Answer(tensors, params, headers)
        params = json.loads(content) if content else {}
        return Answer(_take_tensors(params), params, headers)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnreadableAnswer(f"the answer ({status}) is not one of htm-service: {error}") from error


def attended(answer: Answer, prefix: str = "") -> Attended:
    """The result of an attend; `prefix` names its part of a step."""
    params = answer.params[prefix.rstrip(".")] if prefix else answer.params
    rows = params.get("recalled")
    return Attended(
        output=answer.tensors.get(f"{prefix}output"),
        chunk_index=answer.tensors.get(f"{prefix}chunks.index"),
        chunk_weight=answer.tensors.get(f"{prefix}chunks.weight"),
        recalled=None if rows is None else recalled(rows),
        length=params["length"],
        model_hash=answer.headers.get("x-model-hash", ""),
        **measured(answer),
    )


def recalled(rows: Iterable[Iterable[Mapping[str, Any]]]) -> list[list[Recalled]]:
    """Recalled tokens, a list for each query."""
    return [[Recalled.of(token) for token in row] for row in rows]


def measured(answer: Answer) -> dict[str, Any]:
    """What an attend's headers say of it."""
    return {
        "timing_ms": _timing(answer.headers.get("server-timing", "")),
        "batch_size": int(answer.headers.get("x-batch-size", 0)),
        "request_id": answer.headers.get("x-request-id", ""),
    }


def explained(answer: Answer) -> Explained:
    """The result of an explanation."""
    params, tensors = answer.params, answer.tensors
    rows = params.get("recalled")
    return Explained(
        chunk_index=tensors["chunks.index"],
        chunk_logit=tensors["chunks.logit"],
        chunk_weight=tensors["chunks.weight"],
        output=tensors.get("output"),
        recalled=None if rows is None else [Recalled.of(token) for token in rows[0]],
        **{name: params[name] for name in ("num_taken", "num_visible", "model", "model_hash", "top_k", "length")},
    )


def selected(answer: Answer) -> Selected:
    """The result of a select."""
    tensors = answer.tensors
    return Selected(
        chunk_index=tensors.get("chunks.index"),
        chunk_logit=tensors.get("chunks.logit"),
        **{f"unique_{name}": tensors.get(f"unique.{name}") for name in UNIQUE},
        length=answer.params["length"],
    )


def found(answer: Answer) -> list[list[Found]]:
    """What a search found, of each query; in binary its numbers are tensors."""
    vectors = answer.tensors.get("embeddings")
    if "found" in answer.params:
        return found_rows(answer.params["found"], vectors)
    position, score = answer.tensors["position"], answer.tensors["score"]
    texts, size = answer.params.get("payloads"), answer.params["chunk_size"]
    return found_rows(found_items(position, score, texts, size), vectors)


def found_rows(rows: Sequence[Sequence[Params]], vectors: Any) -> list[list[Found]]:
    """What was found, as JSON says it, with the embeddings [Q, n, D] if there are any."""
    return [
        [Found.of(item if vectors is None else {**item, "embedding": vectors[q, i]}) for i, item in enumerate(row)]
        for q, row in enumerate(rows)
    ]


def found_items(position: Any, score: Any, texts: Any, chunk_size: int) -> list[list[Params]]:
    """Tensors [Q, n] as JSON would say it."""
    return [
        [
            {"position": at, "score": of, "chunk": at // chunk_size, "payload": None if texts is None else texts[q][i]}
            for i, (at, of) in enumerate(zip(positions, scores, strict=True))
            if at >= 0
        ]
        for q, (positions, scores) in enumerate(zip(position.tolist(), score.tolist(), strict=True))
    ]


def stepped(answer: Answer) -> Stepped:
    """The result of a step."""
    return Stepped(attended(answer, "attend."), Appended.of(answer.params["append"]))


def memories(answer: Answer) -> Memories:
    """The result of a read back."""
    params = answer.params
    return Memories(
        params["start"], params["stop"], params["length"], answer.tensors.get("embeddings"), params.get("payloads")
    )


def chunk_detail(answer: Answer) -> ChunkDetail:
    """The result of looking at one chunk."""
    embeddings = answer.params.get("embeddings")
    found = answer.tensors.get("embeddings")
    if embeddings is not None:
        found = floats(embeddings)
    return ChunkDetail(ChunkResult.of(answer.params["chunk"]), answer.params["payloads"], found)


def key_of(conditions: Mapping[str, Any]) -> str:
    """What makes it safe to send an append again."""
    key = conditions.get("idempotency_key")
    if key is None:
        return os.urandom(16).hex()
    if not isinstance(key, str):
        raise TypeError(f"an idempotency_key is a string, not {key!r:.100}")
    # What stands at either end would be gone on the way (RFC 9110, 5.5).
    if not _IDEMPOTENCY_KEY.fullmatch(key) or key != key.strip():
        raise InvalidArgument(
            f"idempotency_key {key!r:.100} must be 1 to 255 printable ASCII characters, without spaces at the ends; "
            f"it has {len(key)}"
        )
    return key


def _base64(array: npt.NDArray[Any]) -> Params:
    text = base64.b64encode(array.tobytes()).decode()
    return {"b64": text, "shape": list(array.shape), "dtype": array.dtype.name}


def _take_tensors(params: Params, prefix: str = "") -> Tensors:
    """Take the base64 tensors out of a JSON answer, by their dotted names."""
    tensors: Tensors = {}
    for name, value in list(params.items()):
        if not isinstance(value, dict):
            continue
        place = prefix + name
        if place.removeprefix("attend.") in TENSORS and "b64" in value:
            dtype = np.dtype(value["dtype"]).newbyteorder("<")
            tensors[place] = np.frombuffer(base64.b64decode(value["b64"]), dtype).reshape(value["shape"])
            del params[name]
        elif name in {"chunks", "attend", "unique"}:
            tensors |= _take_tensors(value, f"{place}.")
    return tensors


def _timing(header: str) -> dict[str, float]:
    """`queue;dur=0.1, compute;dur=2` as {"queue": 0.1, "compute": 2.0}."""
    parts = (part.strip().split(";dur=") for part in header.split(",") if ";dur=" in part)
    return {name: float(value) for name, value in parts}
