"""Tensors on the wire: nested lists, base64 objects and raw bytes, to numpy and back.

A tensor that comes in is checked here, once: type, and shape against bytes before anything is allocated. What comes
out is a writable float32 or bool array of its own.
Does not know: requests, and what widths are right.

Raises InvalidArgument for what is well-formed and wrong, MalformedBody for what cannot be read at all.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

from api.errors import shorten
from htm_service.errors import InvalidArgument, MalformedBody
from htm_service.records import Bools, Floats

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "bool": 1}
"""The dtypes of a request's tensors and the bytes of one number."""

FLOATS = ("float32", "float16", "bfloat16")

MAX_SIZE = 2**31 - 1
"""Of one dimension. numpy refuses an empty array, too, whose other dimension is beyond what it can address."""

PIECE = 1 << 15
"""Numbers turned from or to JSON at once: about 2 ms, the longest that this holds the interpreter lock."""

Where = Callable[[int], str]
"""How a sentence names the value at an index."""


class RawTensor(NamedTuple):
    """A tensor as bytes: little-endian, C order, already known to be exactly as long as its shape says."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview


def check_size(name: str, dtype: str, shape: object, num_bytes: int) -> tuple[int, ...]:
    """The shape of a tensor of `num_bytes`, in exact integers: no dimension overflows or allocates."""
    if dtype not in ITEM_BYTES:
        raise InvalidArgument(f"{name} has dtype {shorten(dtype)}; known are {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or not {int}.issuperset(map(type, shape)) or min(shape, default=0) < 0:
        raise InvalidArgument(f"{name} has shape {shorten(shape)}; it must be a list of non-negative integers")
    if len(shape) not in (1, 2, 3):
        raise InvalidArgument(f"{name} has {len(shape)} dimensions; it must have 1, 2 or 3")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if expected != num_bytes:
        raise InvalidArgument(
            f"{name} of shape {shape} and dtype {dtype} takes {expected} bytes, but {num_bytes} are there"
        )
    if max(shape) > MAX_SIZE:
        raise InvalidArgument(f"{name} has shape {shape}; a dimension is at most {MAX_SIZE}")
    return tuple(shape)


def floats(name: str, value: Any) -> Floats:
    """A tensor as float32; `value` is a list (of lists), a base64 object or a RawTensor.

    What is too large for float32 becomes infinite, and is the engine's to refuse, like NaN.
    """
    if isinstance(value, list):
        array = _from_rows(name, value, np.float32, {int, float}, "numbers")
    else:
        raw = value if isinstance(value, RawTensor) else from_base64(name, value)
        if raw.dtype not in FLOATS:
            raise InvalidArgument(f"{name} has dtype {raw.dtype}; it must be one of {', '.join(FLOATS)}")
        array = _widen(raw)
    return array


def bools(name: str, value: Any) -> Bools:
    """A mask; `value` is a list (of lists), a base64 object or a RawTensor."""
    if isinstance(value, list):
        return _from_rows(name, value, np.bool_, {bool}, "true or false")
    raw = value if isinstance(value, RawTensor) else from_base64(name, value)
    if raw.dtype != "bool":
        raise InvalidArgument(f"{name} has dtype {raw.dtype}; it must be bool")
    numbers = np.frombuffer(raw.data, np.uint8)
    if (numbers > 1).any():
        raise InvalidArgument(f"{name} holds bytes other than 0 and 1")
    return numbers.astype(np.bool_).reshape(raw.shape)


def from_base64(name: str, value: Any) -> RawTensor:
    """The tensor of an object {"b64", "shape", "dtype"}."""
    if not isinstance(value, dict):
        raise InvalidArgument(f"{name} is {shorten(value)}; it must be a list or an object with b64, shape, dtype")
    if value.keys() != {"b64", "shape", "dtype"}:
        raise InvalidArgument(f"{name} has the fields {shorten(sorted(value))}; it must have b64, shape and dtype")
    text, dtype = value["b64"], value["dtype"]
    if not isinstance(text, str) or not isinstance(dtype, str):
        raise InvalidArgument(f"{name}: b64 and dtype must be strings")
    num_bytes = len(text) // 4 * 3 - (len(text) - len(text.rstrip("=")))
    shape = check_size(name, dtype, value["shape"], num_bytes)
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedBody(f"{name} is not base64: {error}") from error
    if len(data) != num_bytes:
        raise MalformedBody(f"{name} is not base64: padding in the wrong place")
    return RawTensor(dtype, shape, data)


def to_base64(array: npt.NDArray[Any]) -> dict[str, Any]:
    """The base64 object of an answer's tensor."""
    data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return {"b64": base64.b64encode(data).decode(), "shape": list(array.shape), "dtype": array.dtype.name}


def to_lists(array: npt.NDArray[Any]) -> bytes:
    """JSON text of an array of one dimension or more; in pieces, so that other threads get their turn."""
    array = np.ascontiguousarray(array)
    if array.size <= PIECE:
        return orjson.dumps(array, option=orjson.OPT_SERIALIZE_NUMPY)
    rows = max(1, PIECE // math.prod(array.shape[1:]))
    pieces = (array[at : at + rows] for at in range(0, len(array), rows))
    texts = (orjson.dumps(piece, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1] for piece in pieces)
    return b"".join([b"[", b",".join(texts), b"]"])


def _widen(raw: RawTensor) -> Floats:
    if raw.dtype == "bfloat16":  # the upper half of a float32
        upper = np.frombuffer(raw.data, "<u2").astype(np.uint32)
        array = (upper << 16).view(np.float32)
    elif raw.dtype == "float16":
        array = np.frombuffer(raw.data, "<f2").astype(np.float32)
    else:
        return np.ndarray(raw.shape, "<f4", bytearray(raw.data))  # a copy, because torch takes no read-only memory
    return array.reshape(raw.shape)


def _from_rows(name: str, value: list[Any], dtype: type[Any], types: set[type], words: str) -> npt.NDArray[Any]:
    """An array of a list, or of a list of lists of one length."""
    if not value or not isinstance(value[0], list):
        flat = np.empty(len(value), dtype)
        _fill(flat, value, types, words, lambda at: f"{name}[{at}]")
        return flat
    _check_types(value, {list}, "lists, all of one length", lambda at: f"{name}[{at}]")
    width = len(value[0])
    # Before allocating: a few long rows and many empty ones would ask for far more than the body has.
    for at, row in _ragged(value, width):
        raise InvalidArgument(f"{name}[{at}] has {len(row)} {words}, {name}[0] has {width}")
    array = np.empty((len(value), width), dtype)
    for at, row in enumerate(value):
        _fill(array[at], row, types, words, lambda column, at=at: f"{name}[{at}, {column}]")  # type: ignore[misc]
    return array


def _fill(into: npt.NDArray[Any], values: list[Any], types: set[type], words: str, where: Where) -> None:
    """Copy a list into a row, in pieces: each holds the interpreter lock for about 2 ms."""
    with np.errstate(over="ignore"):  # too large for float32 becomes infinite
        for start in range(0, len(values), PIECE):
            piece = values[start : start + PIECE]
            _check_types(piece, types, words, lambda at, start=start: where(start + at))  # type: ignore[misc]
            into[start : start + PIECE] = piece


def _ragged(rows: list[list[Any]], width: int) -> Iterator[tuple[int, list[Any]]]:
    return ((at, row) for at, row in enumerate(rows) if len(row) != width)


def _check_types(values: list[Any], types: set[type], words: str, where: Where) -> None:
    if types.issuperset(map(type, values)):
        return
    at = next(index for index, value in enumerate(values) if type(value) not in types)
    raise InvalidArgument(f"{where(at)} is {shorten(values[at])}; expected {words}")
