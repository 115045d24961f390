"""The safetensors format in numpy: named tensors and, in the header, one JSON text of parameters.

Layout: 8 bytes length of the header (little-endian), a JSON header padded with spaces, the tensors' bytes.
Does not know what the tensors are for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from htm_client.json_text import dumps

MEDIA_TYPE = "application/x-safetensors"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "BOOL": np.dtype("?"),
}
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
FLOATS = frozenset((_DTYPES["F64"], _DTYPES["F32"], _DTYPES["F16"]))
"""Of the format, those that numpy has too."""

Array = npt.NDArray[Any]


def dump(tensors: Mapping[str, Array], params: Mapping[str, Any]) -> bytes:
    """Tensors and parameters as bytes. Raises KeyError for a dtype that the format here does not have."""
    return write(tensors, {"params": dumps(params)})


def write(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """Tensors and metadata as bytes. Raises KeyError as above.

    The widest numbers go first, so that each tensor starts at a multiple of its item size.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    parts: list[bytes] = []
    offset = 0
    for name, array in sorted(tensors.items(), key=lambda item: -item[1].itemsize):
        dtype = array.dtype.newbyteorder("<")
        data = array.astype(dtype, copy=False).tobytes()
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = _ENCODER.encode(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def load(data: bytes) -> tuple[dict[str, Array], dict[str, Any]]:
    """The tensors (read-only views of `data`) and the parameters. Raises ValueError for anything else."""
    try:
        return tensors_of(data), json.loads(metadata_of(data).get("params", "{}"))
    except TypeError as error:
        raise ValueError(f"the safetensors header is malformed: {error!r}") from error


def metadata_of(data: bytes) -> dict[str, str]:
    """The metadata, whatever the tensors are. Raises ValueError for anything else."""
    _, header = _header(data)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("the safetensors header is malformed: its metadata is no object")
    return metadata


def tensors_of(data: bytes) -> dict[str, Array]:
    """The tensors (read-only views of `data`). Raises ValueError for anything else, and for dtypes numpy has not."""
    origin, header = _header(data)
    try:
        return {name: _tensor(data, origin, entry) for name, entry in header.items() if name != "__metadata__"}
    except (AttributeError, KeyError, TypeError) as error:  # JSON, but not of this form
        raise ValueError(f"the safetensors header is malformed: {error!r}") from error


def _header(data: bytes) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what is said of them."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"{len(data)} bytes are no safetensors file")
    header = json.loads(data[8 : 8 + size].decode())
    if not isinstance(header, dict):
        raise ValueError("the safetensors header is malformed: it is no object")
    return 8 + size, header


def _tensor(data: bytes, origin: int, entry: Mapping[str, Any]) -> Array:
    begin, end = entry["data_offsets"]
    if (dtype := _DTYPES.get(entry["dtype"])) is None:
        raise ValueError(f"a tensor has dtype {entry['dtype']}, which is not read here")
    return np.frombuffer(data, dtype, (end - begin) // dtype.itemsize, origin + begin).reshape(entry["shape"])
