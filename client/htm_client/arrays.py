"""Anything array-like (lists, numpy, torch on any device, lists of these) as the numpy arrays that travel.

What numpy would convert and lose something of (imaginary parts, masks, dates, text, None) is refused. Knows tensors by
their methods, and imports no torch.
"""

from __future__ import annotations

from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from htm_client.errors import InvalidArgument

_NUMBERS = frozenset({float, int, bool})


def floats(value: Any) -> npt.NDArray[np.float32]:
    """As float32. Raises TypeError for what is no real number, InvalidArgument for rows of different shapes."""
    if type(value) is np.ndarray and value.dtype.kind == "f":  # as in most calls: nothing can be lost
        return np.ascontiguousarray(value, dtype=np.float32)
    array = _array(value)
    if not np.can_cast(array.dtype, np.float32, "same_kind") and not _is_of_numbers(array):
        raise TypeError(f"these are no real numbers, but {array.dtype}: {value!r:.200}")
    try:
        return np.ascontiguousarray(array, dtype=np.float32)
    except OverflowError as error:
        raise InvalidArgument(f"{error}: {value!r:.200}") from error


def bools(value: Any) -> npt.NDArray[np.bool_]:
    """As bool: what is not 0 is true. Raises as `floats` does."""
    array = _array(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"this is no mask, but {array.dtype}: {value!r:.200}")
    return np.ascontiguousarray(array, dtype=np.bool_)


def _array(value: Any) -> npt.NDArray[Any]:
    if np.ma.is_masked(value):
        raise TypeError(f"a masked array's mask would be lost: {value!r:.200}")
    if hasattr(value, "detach"):
        return _of_tensor(value)
    if isinstance(value, list | tuple) and not _NUMBERS.issuperset(map(type, value)):
        rows = [_array(item) for item in value]
        if len(shapes := {row.shape for row in rows}) > 1:
            raise InvalidArgument(
                f"rows of different shapes: {', '.join(str(list(shape)) for shape in sorted(shapes))}"
            )
        return np.stack(rows)
    return np.asarray(value)


def _of_tensor(tensor: Any) -> npt.NDArray[Any]:
    if tensor.is_complex():
        raise TypeError(f"these are no real numbers, but {tensor.dtype}: {tensor!r:.200}")
    real = tensor.float() if tensor.is_floating_point() else tensor  # numpy has no bfloat16
    array: npt.NDArray[Any] = real.numpy(force=True)
    return array


def _is_of_numbers(array: npt.NDArray[Any]) -> bool:
    """Whether these objects are numbers that numpy has no dtype for, such as fractions and large integers."""
    return array.dtype.kind == "O" and all(isinstance(item, Real | Decimal) for item in array.flat)
