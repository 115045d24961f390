"""Tensors on the wire: golden bytes, round trips, one test per rejection."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from starlette.requests import Request

from api.wire import safetensors
from api.wire.answers import Raw, respond_json
from api.wire.hot_bodies import attend, read_body
from api.wire.tensors import PIECE, bools, floats, to_base64, to_lists
from htm_service.errors import HTMError, InvalidArgument, MalformedBody

FLOATS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=7),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def b64(data: bytes, shape: list[Any], dtype: str = "float32") -> dict[str, Any]:
    return {"b64": base64.b64encode(data).decode(), "shape": shape, "dtype": dtype}


@settings(max_examples=60, deadline=None)
@given(FLOATS)
def test_lists_round_trip_exactly(array: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    text = to_lists(array)
    back = floats("x", orjson.loads(text))
    assert back.dtype == np.float32
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)


@settings(max_examples=60, deadline=None)
@given(FLOATS)
def test_base64_round_trips_exactly(array: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    back = floats("x", orjson.loads(orjson.dumps(to_base64(array))))
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)


def test_golden_bytes_of_each_dtype() -> None:
    # 1.5, -2.0 little-endian; bfloat16 is the upper half of float32.
    for dtype, data in {
        "float32": bytes.fromhex("0000c03f000000c0"),
        "float16": bytes.fromhex("003e00c0"),
        "bfloat16": bytes.fromhex("c03f00c0"),
    }.items():
        assert floats("x", b64(data, [2], dtype)).tolist() == [1.5, -2.0], dtype
    assert bools("m", b64(b"\x01\x00\x01", [3], "bool")).tolist() == [True, False, True]
    assert to_base64(np.array([1.5, -2.0], np.float32)) == {
        "b64": "AADAPwAAAMA=",
        "shape": [2],
        "dtype": "float32",
    }


def test_shapes_are_kept() -> None:
    assert floats("x", [1, 2.5, 3]).shape == (3,)
    assert floats("x", [[1, 2], [3, 4], [5, 6]]).shape == (3, 2)
    assert floats("x", []).shape == (0,)
    assert floats("x", b64(b"", [0, 7])).shape == (0, 7)
    assert bools("m", [[True, False]]).shape == (1, 2)


def test_what_is_no_finite_float32_is_left_to_the_engine() -> None:
    assert floats("x", [[0.0, 1e39]]).tolist() == [[0.0, np.inf]]
    assert np.isnan(floats("x", b64(np.array([np.nan], np.float16).tobytes(), [1], "float16"))).all()


def test_large_arrays_are_written_in_pieces_of_the_same_text() -> None:
    array = np.arange(3 * PIECE, dtype=np.float32).reshape(-1, 3)
    assert orjson.loads(to_lists(array)) == array.tolist()
    assert orjson.loads(to_lists(array.ravel())) == array.ravel().tolist()


REJECTED: dict[str, tuple[Any, type[HTMError], str]] = {
    "null": ([1.0, None], InvalidArgument, r"x\[1\] is None"),
    "text": (["1.0"], InvalidArgument, r"x\[0\] is '1.0'"),
    "true": ([1.0, True], InvalidArgument, r"x\[1\] is True"),
    "null in a row": ([[1.0, 2.0], [3.0, None]], InvalidArgument, r"x\[1, 1\] is None"),
    "ragged": ([[1.0, 2.0], [3.0]], InvalidArgument, r"x\[1\] has 1 numbers, x\[0\] has 2"),
    "row beside a number": ([[1.0], 2.0], InvalidArgument, r"x\[1\] is 2.0"),
    "three dimensions": ([[[1.0]]], InvalidArgument, r"x\[0, 0\] is \[1.0\]"),
    "a number": (1.0, InvalidArgument, "x is 1.0"),
    "a text": ("AAAA", InvalidArgument, "x is 'AAAA'"),
    "missing field": ({"b64": "", "shape": [0]}, InvalidArgument, "must have b64, shape and dtype"),
    "extra field": (b64(b"", [0]) | {"order": "F"}, InvalidArgument, "must have b64, shape and dtype"),
    "b64 is no text": ({"b64": 7, "shape": [1], "dtype": "float32"}, InvalidArgument, "must be strings"),
    "unknown dtype": (b64(bytes(8), [1], "float64"), InvalidArgument, "dtype 'float64'"),
    "bool as float": (b64(b"\x01", [1], "bool"), InvalidArgument, "dtype bool"),
    "wrong size": (b64(bytes(8), [3]), InvalidArgument, "takes 12 bytes, but 8 are there"),
    "negative": (b64(bytes(8), [-2]), InvalidArgument, "non-negative integers"),
    "fraction": (b64(bytes(8), [2.0]), InvalidArgument, "non-negative integers"),
    "true as size": (b64(bytes(4), [True]), InvalidArgument, "non-negative integers"),
    "shape is a number": ({"b64": "", "shape": 0, "dtype": "float32"}, InvalidArgument, "non-negative"),
    "no dimension": (b64(bytes(4), []), InvalidArgument, "0 dimensions"),
    "four dimensions": (b64(bytes(4), [1, 1, 1, 1]), InvalidArgument, "4 dimensions"),
    "huge": (b64(bytes(8), [2**40, 2**40]), InvalidArgument, "but 8 are there"),
    "empty rows, hugely many": (b64(b"", [2**62, 0]), InvalidArgument, "at most 2147483647"),
    "no row, hugely wide": (b64(b"", [0, 10**30]), InvalidArgument, "at most 2147483647"),
    "overflowing": (b64(bytes(8), [2**62, 4]), InvalidArgument, "but 8 are there"),
    "not base64": ({"b64": "!!!!", "shape": [3], "dtype": "bool"}, MalformedBody, "not base64"),
    "not ascii": ({"b64": "äöüß", "shape": [3], "dtype": "bool"}, MalformedBody, "not base64"),
    "cut base64": ({"b64": "AAAAA", "shape": [3], "dtype": "bool"}, MalformedBody, "not base64"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case: str) -> None:
    value, error, message = REJECTED[case]
    with pytest.raises(error, match=message):
        floats("x", value) if "base64" not in case and case != "not ascii" else bools("x", value)


def test_rejected_masks() -> None:
    with pytest.raises(InvalidArgument, match=r"m\[1\] is 1; expected true or false"):
        bools("m", [True, 1])
    with pytest.raises(InvalidArgument, match="dtype float32"):
        bools("m", b64(bytes(4), [1]))
    with pytest.raises(InvalidArgument, match="bytes other than 0 and 1"):
        bools("m", b64(b"\x02", [1], "bool"))


def test_a_few_long_rows_and_many_empty_ones_allocate_nothing() -> None:
    """Width of the first row times the number of rows would be 4 TB."""
    rows: list[Any] = [[0.0] * 1_000_000, *([] for _ in range(1_000_000))]
    with pytest.raises(InvalidArgument, match=r"x\[1\] has 0 numbers"):
        floats("x", rows)


def test_a_tensor_that_is_null_beside_a_binary_body_counts_as_absent() -> None:
    """It was an unknown field there; in JSON it counts as absent, and a misspelt one is told everywhere."""
    for params in ({"mask": None, "chunk_mask": None}, {"top_k": None, "queries": None}):
        body = read_body(safetensors.build({"queries": np.ones((1, 3), np.float32)}, params), "safetensors", 1 << 16)
        request, _ = attend(body, "r")
        assert request.mask is None and request.chunk_mask is None and request.queries.shape == (1, 3)
    for wrong in ({"maks": None}, {"mask": [True]}):
        body = read_body(safetensors.build({"queries": np.ones((1, 3), np.float32)}, wrong), "safetensors", 1 << 16)
        with pytest.raises(InvalidArgument, match="unknown field"):
            attend(body, "r")


async def test_an_answer_that_becomes_too_large_is_not_made_to_its_end() -> None:
    """All keys of 1,000 chunks were put into text, some times an answer's limit, before it was refused."""
    made = []

    def build(raw: Raw) -> dict[str, object]:
        for number in range(1_000):
            made.append(number)
            raw(b"x" * 100)
        return {}

    with pytest.raises(InvalidArgument, match="more than 1099 bytes, the limit of one answer is 1000"):
        await respond_json(Request({"type": "http"}), build, 1_000)
    assert len(made) == 11
