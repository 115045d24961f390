"""The binary body: golden bytes, agreement with the safetensors library, one test per rejection."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from api.wire import safetensors as wire
from api.wire.tensors import bools, floats
from htm_service.errors import BodyTooLarge, HTMError, InvalidArgument, MalformedBody

LIMIT = 1 << 20


def body(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else orjson.dumps(header)
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int = 0, stop: int = 8, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [start, stop], **changes}


GOLDEN = (
    b"\x90\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"params":"{\\"length\\":3}"},'
    b'"i":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},'
    b'"o":{"dtype":"F32","shape":[1,1],"data_offsets":[8,12]}}'
)


def test_golden_bytes() -> None:
    built = wire.build({"o": np.array([[1.5]], np.float32), "i": np.array([-1])}, {"length": 3})
    text = GOLDEN[8:]
    padded = text + b" " * (-len(text) % 8)
    data = bytes.fromhex("ffffffffffffffff0000c03f")
    assert built == struct.pack("<Q", len(padded)) + padded + data


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=4),
        hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=2, max_side=5), elements=st.just(2.5)),
        max_size=3,
    ),
    st.dictionaries(st.text(max_size=5), st.integers(-9, 9) | st.text(max_size=5) | st.none(), max_size=3),
)
def test_round_trip_and_the_library_reads_it(tensors: dict[str, Any], params: dict[str, Any]) -> None:
    built = wire.build(tensors, params)
    raw, back = wire.parse(built, LIMIT)
    assert back == params
    assert raw.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(floats(name, raw[name]), array)
    assert safetensors.numpy.load(built).keys() == tensors.keys()


def test_reads_what_the_library_writes() -> None:
    # The odd number of bytes in front leaves the floats unaligned in the body.
    arrays = {"mask": np.array([True, False, True]), "queries": np.arange(6, dtype=np.float16).reshape(2, 3)}
    raw, params = wire.parse(safetensors.numpy.save(arrays, {"params": '{"top_k": 2}'}), LIMIT)
    assert params == {"top_k": 2}
    assert bools("mask", raw["mask"]).tolist() == [True, False, True]
    queries = floats("queries", raw["queries"])
    assert queries.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert queries.flags.aligned
    assert queries.flags.writeable


def test_a_header_that_came_before() -> None:
    """What is kept of it is neither the tensors, nor what a caller did to its params, nor that it was sound."""
    header = {"x": entry(), "__metadata__": {"params": '{"episodes": [1]}'}}
    for numbers in ([1.0, 2.0], [3.0, 4.0]):
        raw, params = wire.parse(body(header, np.array(numbers, "<f4").tobytes()), LIMIT)
        assert floats("x", raw["x"]).tolist() == numbers
        assert params == {"episodes": [1]}
        params["episodes"].append(2)
        raw.clear()
    for num_bytes in (7, 9):
        for _ in range(2):
            with pytest.raises(MalformedBody, match=f"there are {num_bytes} bytes"):
                wire.parse(body(header, bytes(num_bytes)), LIMIT)


def test_payloads_are_not_kept() -> None:
    """A session's bytes are gone from the whole server when it is deleted."""
    kept = wire.known_layout.cache_info().currsize
    for text in ('{"payloads": [{"name": "Ada"}]}', '{"top_k": 3}' + " " * wire.KNOWN_BYTES):
        wire.parse(body({"x": entry(), "__metadata__": {"params": text}}, EIGHT), LIMIT)
    assert wire.known_layout.cache_info().currsize == kept


EIGHT = bytes(8)
REJECTED: dict[str, tuple[Callable[[], bytes], type[HTMError], str]] = {
    "empty": (lambda: b"", MalformedBody, "0 bytes"),
    "no header": (lambda: struct.pack("<Q", 5), MalformedBody, "says 5 bytes, but only 0"),
    "huge header": (lambda: struct.pack("<Q", 2**63) + b"{}", MalformedBody, "but only 2 follow"),
    "large header": (lambda: body(b"{}" + b" " * LIMIT), BodyTooLarge, "the limit is 1048576"),
    "not json": (lambda: body(b"{]"), MalformedBody, "not JSON"),
    "a list": (lambda: body([]), MalformedBody, "not a JSON object"),
    "truncated data": (lambda: body({"x": entry()}, bytes(7)), MalformedBody, "but there are 7 bytes"),
    "data left over": (lambda: body({"x": entry()}, bytes(9)), MalformedBody, "end at 8, but there are 9"),
    "overlap": (lambda: body({"x": entry(), "y": entry()}, EIGHT), MalformedBody, "starts at 0"),
    "hole": (lambda: body({"x": entry(4, 12)}, bytes(12)), MalformedBody, "starts at 4"),
    "backwards": (lambda: body({"x": entry(8, 0)}, EIGHT), MalformedBody, "at 8..0"),
    "negative offset": (lambda: body({"x": entry(-8, 0)}, EIGHT), MalformedBody, "at -8..0"),
    "offsets of text": (lambda: body({"x": entry(data_offsets="0,8")}, EIGHT), MalformedBody, "data_offsets"),
    "three offsets": (lambda: body({"x": entry(data_offsets=[0, 4, 8])}, EIGHT), MalformedBody, "data_offsets"),
    "no entry": (lambda: body({"x": 7}), MalformedBody, "must have dtype"),
    "extra key": (lambda: body({"x": entry(order="C")}, EIGHT), MalformedBody, "must have dtype"),
    "dtype": (lambda: body({"x": entry(dtype="F64", shape=[1])}, EIGHT), InvalidArgument, "dtype 'F64'"),
    "dtype of number": (lambda: body({"x": entry(dtype=32)}, EIGHT), InvalidArgument, "dtype 32"),
    "wrong size": (lambda: body({"x": entry(shape=[3])}, EIGHT), InvalidArgument, "takes 12 bytes"),
    "huge shape": (lambda: body({"x": entry(shape=[2**62, 4])}, EIGHT), InvalidArgument, "but 8 are there"),
    "negative shape": (lambda: body({"x": entry(shape=[-2])}, EIGHT), InvalidArgument, "non-negative"),
    "metadata list": (lambda: body({"__metadata__": []}), MalformedBody, "not a JSON object"),
    "unknown metadata": (lambda: body({"__metadata__": {"top_k": "3"}}), InvalidArgument, "unknown metadata"),
    "params number": (lambda: body({"__metadata__": {"params": 3}}), MalformedBody, "not a string"),
    "params no json": (lambda: body({"__metadata__": {"params": "{"}}), MalformedBody, "not JSON"),
    "params list": (lambda: body({"__metadata__": {"params": "[]"}}), InvalidArgument, "must be a JSON object"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case: str) -> None:
    build, error, message = REJECTED[case]
    with pytest.raises(error, match=message):
        wire.parse(build(), LIMIT)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(0, 255))
def test_damage_never_raises_anything_else(prefix: bytes, at: int, byte: int) -> None:
    good = bytearray(wire.build({"x": np.ones((2, 2), np.float32)}, {"top_k": 3}))
    good[at % len(good)] = byte
    for data in (prefix, bytes(good), bytes(good[:at])):
        with contextlib.suppress(HTMError):
            wire.parse(data, LIMIT)
