"""The safetensors container as a request's or an answer's body: named tensors and `params` in its metadata.

Layout: 8 bytes little-endian N, N bytes of JSON header, the tensors' bytes without holes. Our own reader,
because a body comes from outside: each way to be wrong is refused with a sentence, and nothing is copied.
Does not know: what the tensors mean.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy.typing as npt
import orjson

from api.errors import shorten
from api.wire.tensors import RawTensor, check_size
from htm_service.errors import BodyTooLarge, InvalidArgument, MalformedBody, clipped

MEDIA_TYPE = "application/x-safetensors"
METADATA = "__metadata__"
PARAMS = "params"

KNOWN_BYTES = 512
"""Of headers up to so long the last 128 are kept as read: a client's attends differ in their tensors' bytes alone.

Not those that name payloads: no two of these are alike, and what users store is not to stay here.
"""

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
_NAMES = {"<f4": "F32", "<i8": "I64", "|b1": "BOOL"}
"""By numpy's name of a type, which holds the byte order: on a big-endian machine nothing would be found."""


class _Place(NamedTuple):
    """Where a tensor's bytes are, and what they are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def parse(body: bytes | bytearray, max_header_bytes: int) -> tuple[dict[str, RawTensor], dict[str, Any]]:
    """Tensors, as views of `body`, and params. Raises MalformedBody, InvalidArgument, BodyTooLarge."""
    header, data = _split(body, max_header_bytes)
    is_kept = len(header) <= KNOWN_BYTES and b"payloads" not in header
    places, params = (known_layout if is_kept else _layout)(header, len(data))
    tensors = {name: RawTensor(dtype, shape, data[start:stop]) for name, dtype, shape, start, stop in places}
    return tensors, _params(params)


def build(tensors: Mapping[str, npt.NDArray[Any]], params: Mapping[str, Any]) -> bytes:
    """A body of float32, int64 and bool tensors and params (JSON values, orjson fragments among them)."""
    return b"".join(frame(tensors, [orjson.dumps(params)]))


def frame(tensors: Mapping[str, npt.NDArray[Any]], params: Iterable[bytes]) -> list[bytes]:
    """The same in pieces, of params whose JSON text is in pieces."""
    # The widest numbers first, so that each tensor starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    header: dict[str, Any] = {}
    chunks, offset = [], 0
    for name, array in ordered:
        chunk = array.tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype.str],
            "shape": array.shape,
            "data_offsets": [offset, offset + len(chunk)],
        }
        offset += len(chunk)
        chunks.append(chunk)
    pieces = [b'{"%s":{"%s":"' % (METADATA.encode(), PARAMS.encode())]
    pieces += [orjson.dumps(piece.decode())[1:-1] for piece in params]  # a string's escapes do not reach over pieces
    pieces += [b'"},' if header else b'"}', orjson.dumps(header)[1:]]
    num_bytes = sum(map(len, pieces))
    padding = -num_bytes % 8
    return [struct.pack("<Q", num_bytes + padding), *pieces, b" " * padding, *chunks]


def _split(body: bytes | bytearray, max_header_bytes: int) -> tuple[bytes, memoryview]:
    """The header's text, and a view of the tensors' bytes."""
    if len(body) < 8:
        raise MalformedBody(f"the safetensors body has {len(body)} bytes, fewer than the 8 of its length")
    (size,) = struct.unpack_from("<Q", body)
    if size > len(body) - 8:
        raise MalformedBody(f"the safetensors header says {size} bytes, but only {len(body) - 8} follow")
    if size > max_header_bytes:
        raise BodyTooLarge(
            f"the safetensors header has {size} bytes, the limit is {max_header_bytes}: split the request"
        )
    view = memoryview(body)
    return bytes(view[8 : 8 + size]), view[8 + size :]


def _layout(text: bytes, num_bytes: int) -> tuple[tuple[_Place, ...], str]:
    """What a header says of so many bytes of tensors, and the text of the params."""
    try:
        header = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise MalformedBody("the safetensors header is not a JSON object")
    metadata = header.pop(METADATA, {})
    places = [_place(name, entry, num_bytes) for name, entry in header.items()]
    _check_cover(places, num_bytes)
    return tuple(places), _params_text(metadata)


@lru_cache
def known_layout(text: bytes, num_bytes: int) -> tuple[tuple[_Place, ...], str]:
    """The same, read once."""
    return _layout(text, num_bytes)


def _place(name: str, entry: Any, num_bytes: int) -> _Place:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedBody(f"tensor {shorten(name)} must have dtype, shape and data_offsets")
    offsets = entry["data_offsets"]
    if not (isinstance(offsets, list) and list(map(type, offsets)) == [int, int]):
        raise MalformedBody(f"tensor {shorten(name)} has data_offsets {shorten(offsets)}")
    start, stop = offsets
    if not 0 <= start <= stop <= num_bytes:
        raise MalformedBody(f"tensor {shorten(name)} is at {start}..{stop}, but there are {num_bytes} bytes of data")
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise InvalidArgument(f"tensor {shorten(name)} has dtype {shorten(dtype)}; known are {', '.join(_DTYPES)}")
    shape = check_size(clipped(name), _DTYPES[dtype], entry["shape"], stop - start)
    return _Place(name, _DTYPES[dtype], shape, start, stop)


def _check_cover(places: Sequence[_Place], num_bytes: int) -> None:
    """Without holes and overlaps: a byte that belongs to no tensor, or to two, is a mistake of the sender."""
    end = 0
    for start, stop, name in sorted((place.start, place.stop, place.name) for place in places):
        if start != end:
            raise MalformedBody(f"tensor {shorten(name)} starts at {start}, but the one before it ends at {end}")
        end = stop
    if end != num_bytes:
        raise MalformedBody(f"the tensors end at {end}, but there are {num_bytes} bytes of data")


def _params_text(metadata: Any) -> str:
    if not isinstance(metadata, dict):
        raise MalformedBody(f"{METADATA} is not a JSON object")
    unknown = metadata.keys() - {PARAMS, "format"}  # libraries write `format` for themselves
    if unknown:
        raise InvalidArgument(f"unknown metadata {shorten(sorted(unknown))}; fields go into {PARAMS} as one JSON text")
    text = metadata.get(PARAMS, "{}")
    if not isinstance(text, str):
        raise MalformedBody(f"{METADATA}.{PARAMS} is not a string")
    return text


def _params(text: str) -> dict[str, Any]:
    try:
        params = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise MalformedBody(f"{METADATA}.{PARAMS} is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise InvalidArgument(f"{METADATA}.{PARAMS} is {shorten(params)}; it must be a JSON object")
    return params
